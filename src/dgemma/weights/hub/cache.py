"""The models on this machine: those that ship with the package and those in the hub's local cache.

Works on the cache's folders, in the layout that the hub's library documents and other programs share: ``blobs`` hold
the files' contents, ``snapshots/<commit>`` their names as links to blobs, ``refs/main`` the commit last fetched.
Reads no tensor and asks nobody.
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from dgemma.config import ARCHITECTURE, MODEL_TYPE
from dgemma.errors import CheckpointError
from dgemma.fields import read_json
from dgemma.files import atomic_write, json_bytes
from dgemma.gguf.keys import ARCHITECTURE_KEY
from dgemma.weights.files import (
    bundled_models,
    bundled_path,
    checkpoint_files,
    choose_gguf,
    find_tagged,
    gguf_models,
    hub_name,
    is_checkpoint,
    tag_of,
    weight_files,
)
from dgemma.weights.hub.transfer import size_of

SAFETENSORS, GGUF = "safetensors", "GGUF"
_UNFINISHED = ".dgemma-pull.json"  # beside the blobs: what unfinished pulls want, which no snapshot tells
_HEAD = 4096  # bytes at a GGUF file's beginning: writers put the architecture first

Wanted = Mapping[str, tuple[str, int]]  # name -> blob, size


@dataclass(frozen=True)
class LocalModel:
    """A model on this machine. ``name`` is what to write after -m; ``size`` counts the bytes that are here.

    ``full_size`` is the size when complete, None where nobody knows; ``files`` are its names in the snapshots.
    """

    name: str
    kind: str
    quantisation: str | None
    size: int
    full_size: int | None
    complete: bool
    path: Path
    files: tuple[str, ...] = ()
    bundled: bool = False


def cache_folder() -> Path:
    """Where the hub's library keeps its cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


def repo_folder(repo: str) -> Path:
    return cache_folder() / f"models--{repo.replace('/', '--')}"


def partial_of(folder: Path, blob: str) -> Path:
    """The file that a blob of a repository's folder is while it is being fetched."""
    return folder / "blobs" / f"{blob}.incomplete"


def cached_path(repo: str, tag: str | None, loose: bool = False) -> Path | None:
    """Where a model of the hub lies complete in the cache: its snapshot, or its GGUF file; None if it does not.

    Raises CheckpointError when several models there answer to the name.
    """
    for snapshot in _snapshots(repo_folder(repo)):
        names = _files(snapshot)
        if tag is None and is_checkpoint(names):
            if _has_weights(snapshot):
                return snapshot
            continue
        models = [model for model in gguf_models(names) if model.complete]
        if tag is not None:
            models = find_tagged(models, tag, loose)
        if models:
            return snapshot / choose_gguf(models, None, repo, "in the local cache").files[0]
    return None


@contextmanager
def alone(folder: Path, what: str, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """While this lasts nobody else does ``what`` with a repository's folder; ``waiting`` is called if somebody does.

    For a blob's name it is the lock that the hub's library holds while it fetches the blob.
    """
    from huggingface_hub.utils import WeakFileLock

    path = cache_folder() / ".locks" / folder.name / f"{what}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(WeakFileLock(path, timeout=0.5))
        except TimeoutError:
            waiting()
            stack.enter_context(WeakFileLock(path))
        yield


def note_wanted(folder: Path, wanted: Wanted) -> None:
    """Write down what is about to be fetched into a repository's folder."""
    with alone(folder, "dgemma-pull"):
        _write_wanted(folder, {**_wanted(folder), **wanted})


def note_finished(folder: Path, names: Iterable[str]) -> None:
    """These files have arrived, or are not wanted any more."""
    if not (folder / _UNFINISHED).is_file():
        return
    gone = set(names)
    with alone(folder, "dgemma-pull"):
        _write_wanted(folder, {name: entry for name, entry in _wanted(folder).items() if name not in gone})


def local_models() -> list[LocalModel]:
    """All DiffusionGemma models on this machine, the bundled ones first; partly fetched ones among them."""
    found = []
    for name in bundled_models():
        path = bundled_path(name)
        size = sum(size_of(file) for file in path.iterdir())
        found.append(LocalModel(name, SAFETENSORS, None, size, size, True, path, bundled=True))
    folders = [path for path in cache_folder().glob("models--*--*") if path.is_dir()]
    for folder in sorted(folders, key=lambda path: path.name.lower()):
        found += _models_in(folder)
    return found


def find_local(name: str) -> LocalModel:
    """The model of that name on this machine, complete or not; raises CheckpointError when there is none."""
    models = local_models()
    for model in models:
        if model.name.lower() == name.lower():
            return model
    repo, tag = hub_name(name) or (name, None)
    here = [model for model in models if model.name.split(":")[0].lower() == repo.lower()]
    matching = here if tag is None else [model for model in here if find_tagged(gguf_models(model.files), tag)]
    if len(matching) == 1:
        return matching[0]
    if here:
        raise CheckpointError(f"{name}: on this machine there {'is' if len(here) == 1 else 'are'} "
                              f"{', '.join(model.name for model in here)}; name one of them")
    raise CheckpointError(f"{name}: no model of that name on this machine; `dgemma models` lists those that are here")


def remove_model(model: LocalModel) -> int:
    """Delete a model of the cache, whole or partly fetched, in all its revisions; the bytes that are free now.

    Its own files go and nothing else: not what other models of the repository are made of (`files_beside` tells what is
    left), nor contents that another file or revision shares. The repository's folder goes with its last file. Not by
    way of the hub library. Its ``delete_revisions`` deletes with the last revision what others are fetching, and takes
    a commit's name for unique, which it is not among copies of a repository; its ``delete_files`` deletes what a link
    out of the cache leads to, and both leave alone every repository with a link whose contents are missing.
    Raises CheckpointError for a bundled model, and when something cannot be deleted.
    """
    if model.bundled:
        raise CheckpointError(f"{model.name}: this model ships with the package and cannot be removed")
    folder = _folder_of(model)
    before = _disk_use(folder)
    try:
        _remove_files(folder, model.name)
        _remove_empty(folder)
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder}: cannot be removed ({error.strerror or error})") from error
    return before - _disk_use(folder)


def files_beside(model: LocalModel) -> dict[str, int]:
    """What else is in the repository's folder of a model and belongs to no model: name -> bytes.

    A vision tower, files of another architecture, the card.
    """
    folder = _folder_of(model)
    found: dict[str, int] = {}
    for snapshot in _snapshots(folder):
        known = {name for files in _files_by_model(folder, snapshot).values() for name in files}
        found |= {name: size_of(snapshot / name) for name in _files(snapshot) if name not in known}
    return dict(sorted(found.items()))


def _models_in(folder: Path) -> list[LocalModel]:
    """The models in a repository's folder of the cache; where several snapshots have one, the one in use."""
    found: dict[str, LocalModel] = {}
    for snapshot in _snapshots(folder):
        for name, files in _files_by_model(folder, snapshot).items():
            if name not in found and (":" in name or is_checkpoint(files)):
                found[name] = _local(name, snapshot, files)
    return [found[name] for name in sorted(found, key=str.lower)]


def _files_by_model(folder: Path, snapshot: Path) -> dict[str, list[str]]:
    """The files of each model in a snapshot. Of a checkpoint also those that are there without its weights."""
    repo = folder.name.removeprefix("models--").replace("--", "/", 1)
    known = sorted({*_files(snapshot), *_wanted_in(snapshot)})
    models = [model for model in gguf_models(known) if _is_our_gguf(snapshot / model.files[0])]
    found = {f"{repo}:{tag_of(model, models)}": list(model.files) for model in models}
    checkpoint = checkpoint_files(known)
    if _is_ours(snapshot / "config.json") and ((snapshot / "config.json").is_file() or is_checkpoint(checkpoint)):
        found[repo] = checkpoint
    return found


def _wanted_in(snapshot: Path) -> Wanted:
    """What unfinished pulls want for a snapshot: for the one in use only."""
    folder = snapshot.parent.parent
    return _wanted(folder) if snapshot in _snapshots(folder)[:1] else {}


def _folder_of(model: LocalModel) -> Path:
    return repo_folder(model.name.split(":")[0])


def _local(name: str, snapshot: Path, files: list[str]) -> LocalModel:
    """The model made of these files."""
    folder, wanted = snapshot.parent.parent, _wanted_in(snapshot)
    gguf = None if is_checkpoint(files) else gguf_models(files)[0]
    complete = whole = gguf is None or gguf.complete  # whole: no other files belong to it
    size = full = 0
    for file in files:
        here = size_of(snapshot / file)
        size, full = size + here, full + here
        if not (snapshot / file).is_file():
            complete = False
            blob, expected = wanted[file]
            here = max(size_of(folder / "blobs" / blob), size_of(partial_of(folder, blob)))
            size, full = size + min(here, expected), full + expected
    if gguf is None and complete and not _has_weights(snapshot):  # another program was interrupted
        complete = whole = False
    return LocalModel(name, GGUF if gguf else SAFETENSORS, gguf and gguf.tag, size, full if whole else None, complete,
                      snapshot / files[0] if gguf else snapshot, tuple(files))


def _snapshots(folder: Path) -> list[Path]:
    """A repository's snapshots in the cache: the one in use first, then from the newest to the oldest."""
    try:
        found = [path for path in (folder / "snapshots").iterdir() if path.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder}: cannot be read ({error.strerror or error})") from error
    current = ""
    with suppress(OSError, UnicodeError):
        current = (folder / "refs" / "main").read_text().strip()
    return sorted(found, key=lambda path: (path.name != current, -path.stat().st_mtime))


def _files(snapshot: Path) -> list[str]:
    """The names of a snapshot's files, with ``/``, those whose contents are there."""
    return sorted(path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file())


def _has_weights(folder: Path) -> bool:
    try:
        return all(path.is_file() for path in weight_files(folder))
    except CheckpointError:
        return False


def _is_ours(config: Path) -> bool:
    """Whether a config.json is that of a DiffusionGemma; one that is still to come was asked for, so it is."""
    if not config.is_file():
        return True
    try:
        return read_json(config).get("model_type") == MODEL_TYPE
    except CheckpointError:
        return False


def _is_our_gguf(file: Path) -> bool:
    """Whether a GGUF file holds a DiffusionGemma, as far as its first bytes tell; in doubt it does."""
    try:
        with file.open("rb") as opened:
            head = opened.read(_HEAD)
    except OSError:
        return True
    _, key, rest = head.partition(ARCHITECTURE_KEY.encode())
    if not key or len(rest) < 12:
        return True
    _, length = struct.unpack_from("<IQ", rest)  # the value's type, then a string's length
    return rest[12 : 12 + length] == ARCHITECTURE.encode()


def _remove_files(folder: Path, model: str) -> None:
    """Take a model's files out of all snapshots, and delete the contents that no other name stands for."""
    wanted = _wanted(folder)
    snapshots = {snapshot: _files_by_model(folder, snapshot) for snapshot in _snapshots(folder)}
    names = {file for models in snapshots.values() for file in models.get(model, ())}
    blobs = {blob for name, (blob, _) in wanted.items() if name in names}
    kept = {blob for name, (blob, _) in wanted.items() if name not in names}
    for snapshot, models in snapshots.items():
        # In another revision the same file may have another name (where there are two of one quantisation).
        own = {file for files in models.values() if names & {*files} for file in files}
        for path in [path for path in snapshot.rglob("*") if path.is_symlink() or path.is_file()]:
            remove = path.relative_to(snapshot).as_posix() in own
            if (blob := _blob_of(path, folder)) is not None:
                (blobs if remove else kept).add(blob)
            if remove:
                path.unlink()
    for blob in blobs - kept:
        (folder / "blobs" / blob).unlink(missing_ok=True)
        partial_of(folder, blob).unlink(missing_ok=True)
    note_finished(folder, names)


def _blob_of(path: Path, folder: Path) -> str | None:
    """The blob that a snapshot's file is a link to; None for one that holds its contents itself, or links elsewhere."""
    if not path.is_symlink():
        return None
    target = path.parent / path.readlink()
    return target.name if target.parent.resolve() == (folder / "blobs").resolve() else None


def _remove_empty(folder: Path) -> None:
    """Delete the snapshots of a repository's folder in which nothing is left, and the folder after the last of them."""
    for snapshot in _snapshots(folder):
        for inner in sorted((path for path in snapshot.rglob("*") if path.is_dir()), reverse=True):
            with suppress(OSError):  # not empty
                inner.rmdir()
        if any(snapshot.iterdir()) or _wanted(folder):  # what is wanted belongs to a snapshot, even to an empty one
            continue
        snapshot.rmdir()
        for reference in [path for path in (folder / "refs").rglob("*") if path.is_file()]:
            if reference.read_text(encoding="utf-8", errors="replace").strip() == snapshot.name:
                reference.unlink()
    if not _snapshots(folder) and not any((folder / "blobs").glob("*.incomplete")):  # those somebody may be fetching
        shutil.rmtree(folder)
        shutil.rmtree(cache_folder() / ".locks" / folder.name, ignore_errors=True)


def _wanted(folder: Path) -> dict[str, tuple[str, int]]:
    path = folder / _UNFINISHED
    if not path.is_file():
        return {}
    try:
        return {str(name): (str(blob), int(size)) for name, (blob, size) in read_json(path).items()}
    except (CheckpointError, TypeError, ValueError):  # not what we have written: nothing is known
        return {}


def _write_wanted(folder: Path, files: Wanted) -> None:
    path = folder / _UNFINISHED
    if not files:
        path.unlink(missing_ok=True)
        return
    with atomic_write(path) as beside:
        beside.write_bytes(json_bytes({name: list(entry) for name, entry in files.items()}))


def _disk_use(folder: Path) -> int:
    """The bytes of all files in a repository's folder, each counted once; not which commit it is at."""
    return sum(path.stat().st_size for path in folder.rglob("*")
               if path.is_file() and not path.is_symlink() and folder / "refs" not in path.parents)
