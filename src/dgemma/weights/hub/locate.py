"""From the name a user gives to a checkpoint on disk: a folder of safetensors, or a GGUF file.

Works on names and paths; reads no tensor, and leaves the hub to `repository`. A name is, in this order: a model that
ships with the package, an existing folder or file, a repository on the Hugging Face hub.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dgemma.errors import CheckpointError
from dgemma.gguf.container import PART, is_gguf
from dgemma.weights.files import GGUFFiles, bundled_models, bundled_path, gguf_models, hub_name, is_checkpoint

if TYPE_CHECKING:
    from dgemma.weights.hub.transfer import Downloads


def locate(name: str | Path, downloads: Downloads | None = None) -> Path:
    """The checkpoint that ``name`` means: a folder with config.json and safetensors, or a GGUF file.

    Of a GGUF file that was split it is the first part, and all the others are there. A `Path` is always a path; a
    string may also be a bundled name or one on the hub: ``org/name``, or ``org/name:Q4_K_M`` for one of its GGUF
    files. What is complete in the hub's local cache is used without asking the hub; else it is downloaded,
    which ``downloads`` makes a listener of (None: lines on stderr).
    Raises CheckpointError when there is nothing under that name, or more than one model, and when the hub refuses.
    """
    if isinstance(name, str) and name in bundled_models():
        return bundled_path(name)
    if not str(name).strip():  # as a path it would be the present folder
        raise CheckpointError("the model's name is empty")
    try:
        path = Path(name).expanduser()
        is_folder, is_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # too long for a path, ~somebody who does not exist
        raise CheckpointError(f"{str(name)[:80]}: cannot be a model's name or path ({error.args[-1]})") from error
    if is_folder:
        return _in_folder(path)
    if is_file:
        if is_gguf(path):
            return _first_part(path)
        raise CheckpointError(f"{path}: this is a file, but not a GGUF file; for safetensors give the folder that "
                              "holds config.json and the weights")
    on_hub = hub_name(name) if isinstance(name, str) else None
    if on_hub and (on_hub[1] or path.suffix.lower() != ".gguf"):
        return _on_hub(*on_hub, downloads)
    if path.suffix.lower() == ".gguf":
        raise CheckpointError(f"{path}: no such file")
    if isinstance(name, Path) or path.is_absolute() or len(path.parts) > 1 or str(name)[0] in ".~":
        raise CheckpointError(f"{name}: no such file or folder")
    raise CheckpointError(f"{name}: no such file or folder, and no bundled model of that name ({_bundled_list()}); a "
                          "repository on the hub is written org/name, or org/name:Q4_K_M for a GGUF file in it")


def _in_folder(folder: Path) -> Path:
    """The folder itself, unless the model in it is a GGUF file."""
    try:
        names = [path.name for path in folder.iterdir() if path.is_file()]
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error.strerror})") from error
    if is_checkpoint(names):
        return folder
    models = gguf_models(names)
    if not models:  # what is missing is for those to say who know what they look for
        return folder
    if len(models) > 1:
        listed = "".join(f"\n  {folder / model.files[0]}" for model in models)
        raise CheckpointError(f"{folder}: {len(models)} GGUF models here; name one of them:{listed}")
    return _complete(models[0], folder)


def _first_part(path: Path) -> Path:
    """Of a GGUF file, or any part of one, the first part; the others must be there, too."""
    split = PART.fullmatch(path.name)
    if split is None:
        return path
    files = sorted(other.name for other in path.parent.iterdir() if (part := PART.fullmatch(other.name))
                   and (part["stem"], part["count"]) == (split["stem"], split["count"]))
    model = GGUFFiles(split["stem"], tuple(files), int(split["count"]))
    return _complete(model, path.parent)


def _complete(model: GGUFFiles, folder: Path) -> Path:
    if model.complete:
        return folder / model.files[0]
    raise CheckpointError(f"{folder / model.files[0]}: this GGUF file was split into {model.parts} parts, and "
                          f"{len(model.missing)} of them {'is' if len(model.missing) == 1 else 'are'} not beside it: "
                          f"{', '.join(model.missing[:5])}{' …' if len(model.missing) > 5 else ''}")


def _on_hub(repo: str, tag: str | None, downloads: Downloads | None) -> Path:
    from dgemma.weights.hub.repository import NotThereError, locate_on_hub
    from dgemma.weights.hub.transfer import ProgressLines

    try:
        return locate_on_hub(repo, tag, downloads or ProgressLines)
    except NotThereError as error:
        cache = "not complete in the local cache, " if error.offline else ""
        raise CheckpointError(f"{repo}: no such folder, no bundled model of that name ({_bundled_list()}), {cache}and "
                              f"{error.reason}") from error


def _bundled_list() -> str:
    names = bundled_models()
    return f"bundled: {', '.join(names)}" if names else "this installation has none"
