"""From the name a user gives to a checkpoint folder on disk, and from that folder to its weight files.

Works on names, paths and the hub; reads no tensor. A name is, in this order: a model that ships with the package,
an existing folder, a repository on the Hugging Face hub.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from dgemma.config import read_json
from dgemma.errors import CheckpointError

_BUNDLED = Path(__file__).resolve().parents[1] / "models"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# What running a checkpoint takes: no PyTorch pickles, no pictures of the model card.
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def bundled_models() -> list[str]:
    """The names of the models that ship with the package, sorted."""
    return sorted(path.parent.name for path in _BUNDLED.glob("*/config.json"))


def locate(name: str | Path) -> Path:
    """The checkpoint folder that ``name`` means; a hub id that is not on this machine yet is downloaded.

    A `Path` is always a path; a string may also be a bundled name or a hub id ``org/name``. A hub repository that
    is complete in the local cache is used without asking the hub for a newer revision.
    Raises CheckpointError when there is nothing under that name, for GGUF files, and when the hub refuses.
    """
    if isinstance(name, str) and name in bundled_models():
        return _BUNDLED / name
    if not str(name).strip():  # as a path it would be the present folder
        raise CheckpointError("the model's name is empty")
    try:
        path = Path(name).expanduser()
        is_folder = path.is_dir()
    except (OSError, RuntimeError) as error:  # a name too long for a path, ~somebody who does not exist
        raise CheckpointError(f"{str(name)[:80]}: cannot be a model's name or folder ({error.args[-1]})") from error
    if is_folder:
        if not (path / "config.json").is_file():
            refuse_gguf(next(iter(sorted(path.glob("*.gguf"))), path))
        return path
    if path.is_file():
        refuse_gguf(path)
        raise CheckpointError(f"{path}: this is a file; give the folder that holds config.json and the weights")
    if path.suffix.lower() == ".gguf":
        raise CheckpointError(f"{path}: no such file")
    if isinstance(name, str) and _HUB_ID.fullmatch(name):
        return _from_hub(name)
    raise CheckpointError(f"{name}: no such folder, and no bundled model of that name ({_bundled_list()}); a "
                          "repository on the hub is written org/name")


def weight_files(folder: Path) -> dict[Path, tuple[str, ...]]:
    """The safetensors files of a checkpoint folder, each with the tensors that the index says are in it.

    A single ``model.safetensors`` has no index, so its tuple is empty. The files need not exist.
    Raises CheckpointError when the folder does not exist, is a file, or names no safetensors.
    """
    refuse_gguf(folder)
    if not folder.exists():
        raise CheckpointError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: this is a file; give the folder that holds config.json and the weights")
    if (folder / SINGLE_FILE).is_file():
        return {folder / SINGLE_FILE: ()}
    index = folder / INDEX_FILE
    if not index.is_file():
        others = sorted(path.name for pattern in ("*.safetensors", "*.bin", "*.gguf") for path in folder.glob(pattern))
        found = f"; found {', '.join(others[:5])}" if others else ""
        raise CheckpointError(f"{folder}: no weights here: neither {SINGLE_FILE} nor {INDEX_FILE}{found}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{index}: 'weight_map' must say for every tensor which file holds it")
    shards: dict[Path, list[str]] = {}
    for tensor, file in weight_map.items():
        shards.setdefault(folder / file, []).append(tensor)
    return {path: tuple(shards[path]) for path in sorted(shards)}


def refuse_gguf(path: Path) -> None:
    """Raise CheckpointError if ``path`` is a GGUF file, by its name or by its first bytes."""
    if not path.is_file():
        return
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if magic == b"GGUF" or path.suffix.lower() == ".gguf":
        raise CheckpointError(f"{path}: GGUF is not supported yet by this version; use the checkpoint in safetensors "
                              "form (a folder with config.json and model.safetensors)")


def _bundled_list() -> str:
    names = bundled_models()
    return f"bundled: {', '.join(names)}" if names else "this installation has none"


def _from_hub(repo: str) -> Path:
    """The local snapshot of a hub repository, downloaded if need be."""
    lost = f"{repo}: no such folder, no bundled model of that name ({_bundled_list()}), and"
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            LocalEntryNotFoundError,
            OfflineModeIsEnabled,
            RepositoryNotFoundError,
        )
    except ImportError as error:
        raise CheckpointError(f"{lost} fetching it from the Hugging Face hub needs an extra: "
                              "pip install dgemma[hub]") from error
    try:
        with suppress(LocalEntryNotFoundError):  # the usual first time
            cached = Path(snapshot_download(repo, allow_patterns=_HUB_FILES, local_files_only=True))
            if _is_complete(cached):
                return cached
        folder = Path(snapshot_download(repo, allow_patterns=_HUB_FILES))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:  # in some versions it is an HTTP error, too
        raise CheckpointError(f"{lost} the Hugging Face hub cannot be reached from here (offline?) and the repository "
                              "is not complete in the local cache") from error
    except GatedRepoError as error:
        raise CheckpointError(f"{repo}: this repository is gated: accept its terms on https://huggingface.co/{repo}, "
                              "then log in with `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(f"{lost} the Hugging Face hub has no such repository (a private one needs `hf auth "
                              "login`)") from error
    except HfHubHTTPError as error:
        raise CheckpointError(f"{repo}: the Hugging Face hub answered with an error: {_first_line(error)}") from error
    except Exception as error:  # a full disk, a broken connection, a bad proxy: the library raises many kinds
        raise CheckpointError(f"{repo}: downloading from the Hugging Face hub failed: {type(error).__name__}: "
                              f"{_first_line(error)}") from error
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{repo}: this hub repository has no config.json, so it is not a checkpoint in "
                              "safetensors form (GGUF repositories are not supported yet by this version)")
    return folder


def _is_complete(folder: Path) -> bool:
    """Whether a cached snapshot holds a configuration and every weight file."""
    if not (folder / "config.json").is_file():
        return False
    try:
        return all(path.is_file() for path in weight_files(folder))
    except CheckpointError:
        return False


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
