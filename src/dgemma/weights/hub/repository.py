"""Models of the Hugging Face hub: which files one is made of, and fetching them into the local cache.

Works on repositories, by way of the hub's own library; reads no tensor. A model is named ``org/name`` (safetensors), or
``org/name:tag`` for a GGUF file in a repository, where the tag is a quantisation such as Q4_K_M or a file's name.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from dgemma.errors import CheckpointError, DgemmaError
from dgemma.files import free_space
from dgemma.formats import size_text
from dgemma.weights.files import (
    SINGLE_FILE,
    GGUFFiles,
    checkpoint_files,
    choose_gguf,
    gguf_models,
    is_checkpoint,
    tag_of,
    tower_files,
)
from dgemma.weights.hub.cache import (
    alone,
    cache_folder,
    cached_path,
    note_finished,
    note_wanted,
    partial_of,
    repo_folder,
)
from dgemma.weights.hub.transfer import (
    Downloads,
    Listener,
    TransferError,
    download,
    first_line,
    is_network_trouble,
    size_of,
    verify,
)

_GIT_NAME = re.compile(r"[0-9a-f]{40}")
_PLAIN = re.compile(r"[A-Za-z0-9][\w.-]*")  # what may become a file's name in the cache
_MAKE_SPACE = "`dgemma models` shows what is here, `dgemma models remove NAME` removes it"


class NotThereError(CheckpointError):
    """The hub has no such repository, or (``offline``) cannot be asked; ``reason`` says which."""

    def __init__(self, repo: str, reason: str, offline: bool):
        super().__init__(f"{repo}: {'not complete in the local cache, and ' if offline else ''}{reason}")
        self.reason, self.offline = reason, offline


@dataclass(frozen=True)
class HubFile:
    """A file of a repository; ``blob`` is its name in the cache, ``sha256`` known for large files only."""

    name: str
    size: int
    blob: str
    sha256: str | None = None

    @property
    def checksum(self) -> str | None:
        """What its contents are checked by: the SHA-256 of a large file, of others what git calls them."""
        return self.sha256 or (self.blob if _GIT_NAME.fullmatch(self.blob) else None)


@dataclass(frozen=True)
class Pull:
    """The files that a pull is about, all of one commit. ``model`` is what to write after -m, if they make one."""

    repo: str
    commit: str
    files: tuple[HubFile, ...]
    model: str | None

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def to_fetch(self) -> int:
        """Bytes that are not on this machine yet."""
        return sum(file.size - _here(self, file) for file in self.files)


def locate_on_hub(repo: str, tag: str | None, downloads: Downloads) -> Path:
    """The local snapshot or GGUF file of a model; fetched if it is not complete in the cache.

    ``downloads`` makes who is told of the download. Raises CheckpointError.
    """
    found = cached_path(repo, tag)
    if found is not None:
        return found
    try:
        pull = plan_pull(repo, tag)
    except NotThereError:
        # A loose tag (Q4_K) may mean another file of the repository than the one that is here: the hub goes first.
        found = cached_path(repo, tag, loose=True)
        if found is not None:
            return found
        raise
    with downloads() as listener:
        return fetch(pull, listener)


def plan_pull(repo: str, tag: str | None = None, include: Sequence[str] = ()) -> Pull:
    """Ask the hub for a repository's files and choose those that the model is made of, or those ``include`` matches.

    With a GGUF file comes the vision tower beside it, the first of `tower_files`.

    Raises CheckpointError (NotThereError where there is nobody to ask or nothing of that name).
    """
    commit, files = listing(repo)
    names = list(files)
    model: str | None = repo
    if include:
        chosen = [name for name in names if any(_matches(name, pattern) for pattern in include)]
        if not chosen:
            raise CheckpointError(f"{repo}: no file matches {' or '.join(include)}; there are {_listed(names)}")
        whole = [gguf for gguf in gguf_models(chosen) if gguf.complete]
        if not is_checkpoint(chosen) or not {*checkpoint_files(names)} <= {*chosen}:
            model = f"{repo}:{tag_of(whole[0], gguf_models(names))}" if whole else None
    elif tag is None and is_checkpoint(names):
        chosen = checkpoint_files(names)
    else:
        models = gguf_models(names)
        if not models and tag is not None and is_checkpoint(names):
            raise CheckpointError(f"{repo}: there are no GGUF files in this repository, only safetensors: leave away "
                                  f"the {tag!r}")
        if not models:
            raise CheckpointError(f"{repo}: neither a checkpoint in safetensors form (config.json, {SINGLE_FILE}) nor "
                                  f"GGUF files in this hub repository; there are {_listed(names)}")
        gguf = choose_gguf(models, tag, repo, "in this hub repository")
        if not gguf.complete:
            raise CheckpointError(f"{repo}: {gguf.stem} was split into {gguf.parts} parts, and this hub repository "
                                  f"lacks {_listed(gguf.missing)}")
        return _of_gguf(repo, commit, files, gguf)
    return _pull(repo, commit, files, chosen, model)


def plan_all(repo: str) -> tuple[Pull, ...]:
    """Every model that a repository has, as `plan_pull` would fetch it: its checkpoint first, then its GGUF files.

    Raises CheckpointError as `plan_pull` does; no model is no error.
    """
    commit, files = listing(repo)
    names = list(files)
    whole = [_pull(repo, commit, files, checkpoint_files(names), repo)] if is_checkpoint(names) else []
    return (*whole, *(_of_gguf(repo, commit, files, gguf) for gguf in gguf_models(names) if gguf.complete))


def _of_gguf(repo: str, commit: str, files: Mapping[str, HubFile], gguf: GGUFFiles) -> Pull:
    """A GGUF file, with the vision tower beside it."""
    names = list(files)
    return _pull(repo, commit, files, [*gguf.files, *tower_files(names, gguf.files[0])[:1]],
                 f"{repo}:{tag_of(gguf, gguf_models(names))}")


def _pull(repo: str, commit: str, files: Mapping[str, HubFile], chosen: Sequence[str], model: str | None) -> Pull:
    # Small files first: they tell what the large ones are for.
    order = sorted((files[name] for name in chosen), key=lambda file: (file.sha256 is not None, file.name))
    return Pull(repo, commit, tuple(order), model)


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(PurePosixPath(name).name, pattern)


def _listed(names: Sequence[str], most: int = 8) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "no files") + rest


def listing(repo: str) -> tuple[str, dict[str, HubFile]]:
    """The present commit of a repository, and its files by name."""
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(repo, files_metadata=True)
    except Exception as error:
        raise explanation(repo, error) from error
    files = {}
    for sibling in info.siblings or ():
        sha256 = sibling.lfs.sha256 if sibling.lfs else None
        blob = sha256 or sibling.blob_id
        if any(part in ("", ".", "..") or "\\" in part for part in sibling.rfilename.split("/")):
            continue  # no such file is ever fetched: its name leads out of the cache
        if sibling.size is None or not (_PLAIN.fullmatch(blob or "") and _PLAIN.fullmatch(info.sha or "")):
            raise CheckpointError(f"{repo}: {_endpoint()} does not tell sizes and checksums; if HF_ENDPOINT is set, it "
                                  "must be that of a Hugging Face hub")
        files[sibling.rfilename] = HubFile(sibling.rfilename, sibling.size, blob or "", sha256)
    return info.sha or "", files


def explanation(repo: str, error: Exception) -> CheckpointError:
    """What to tell the user when the hub's library, the network or the disk did not do what it should."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    if isinstance(error, OfflineModeIsEnabled):
        return NotThereError(repo, "the Hugging Face hub must not be asked (HF_HUB_OFFLINE is set)", offline=True)
    if isinstance(error, GatedRepoError):
        return CheckpointError(f"{repo}: this repository is gated: accept its terms on {_endpoint()}/{repo}, then log "
                               "in with `hf auth login` (or set HF_TOKEN)")
    if isinstance(error, RepositoryNotFoundError):
        return NotThereError(repo, "the Hugging Face hub has no such repository (a private one needs `hf auth login`)",
                             offline=False)
    if is_network_trouble(error) and not isinstance(error, HfHubHTTPError):
        return NotThereError(repo, f"the Hugging Face hub cannot be reached from here (offline?): {first_line(error)}",
                             offline=True)
    if isinstance(error, HfHubHTTPError):
        return CheckpointError(f"{repo}: the Hugging Face hub answered with an error: {first_line(error)}")
    return CheckpointError(f"{repo}: downloading from the Hugging Face hub failed: {type(error).__name__}: "
                           f"{first_line(error)}")


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def fetch(pull: Pull, listener: Listener) -> Path:
    """Bring all files of a pull into the cache, checked, and say where the model is.

    That is the snapshot's folder, or the GGUF file (its first part) where there is no folder to load. What an earlier
    try has fetched is not fetched again. Nothing has its final name before its size and, where the hub knows one, its
    checksum are right. Raises CheckpointError, also when there is too little space, before anything is fetched.
    """
    folder = repo_folder(pull.repo)
    snapshot = folder / "snapshots" / pull.commit
    with explained(pull.repo, lambda: pull.to_fetch):
        missing = [file for file in pull.files if not _is_linked(snapshot, file)]
        check_room(pull.repo, pull.to_fetch, folder)
        snapshot.mkdir(parents=True, exist_ok=True)
        (folder / "blobs").mkdir(exist_ok=True)
        if missing:
            note_wanted(folder, {file.name: (file.blob, file.size) for file in missing})
        for file in missing:
            with alone(folder, file.blob,
                       lambda name=file.name: listener.note(f"another process is fetching {name}; waiting for it")):
                if not _is_linked(snapshot, file):
                    _fetch_blob(pull, file, folder, listener)
                    _link(folder / "blobs" / file.blob, snapshot / file.name)
        reference = folder / "refs" / "main"
        if not reference.is_file() or reference.read_text() != pull.commit:
            reference.parent.mkdir(exist_ok=True)
            reference.write_text(pull.commit)
        note_finished(folder, [file.name for file in pull.files])
    names = [file.name for file in pull.files]
    models = [gguf for gguf in gguf_models(names) if gguf.complete]
    return snapshot / models[0].files[0] if models and not is_checkpoint(names) else snapshot


@contextmanager
def explained(repo: str, to_fetch: Callable[[], int]) -> Iterator[None]:
    """Errors of the disk, the network and the hub as CheckpointErrors; ``to_fetch`` counts bytes still to come."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
            raise CheckpointError(
                f"{repo}: the disk is full: {size_text(to_fetch())} are still to come into {cache_folder()}; "
                f"make space there ({_MAKE_SPACE}), then the same command goes on where it stopped"
            ) from error
        from huggingface_hub.errors import HfHubHTTPError

        if isinstance(error, HfHubHTTPError) or is_network_trouble(error):
            raise explanation(repo, error) from error
        where = f"{error.filename}: " if error.filename else ""
        raise CheckpointError(f"{where}{repo} cannot be stored in the local cache "
                              f"({error.strerror or first_line(error)})") from error
    except DgemmaError:
        raise
    except Exception as error:
        raise explanation(repo, error) from error


def file_url(repo: str, name: str, commit: str) -> str:
    """Where a file of a repository is fetched from."""
    from huggingface_hub import hf_hub_url

    return hf_hub_url(repo, name, revision=commit, endpoint=_endpoint())


def _fetch_blob(pull: Pull, file: HubFile, folder: Path, listener: Listener) -> None:
    """Bring one file's contents into ``blobs``, unless they are there."""
    blob, partial = folder / "blobs" / file.blob, partial_of(folder, file.blob)
    if blob.is_file() and size_of(blob) == file.size:
        return
    base = PurePosixPath(file.name).name
    url = file_url(pull.repo, file.name, pull.commit)
    listener.begin(f"downloading {base}", min(size_of(partial), file.size), file.size)
    try:
        download(url, partial, file.size, listener)
    except TransferError as error:
        raise CheckpointError(f"{pull.repo}: the download broke off after {size_text(size_of(partial))} of "
                              f"{size_text(file.size)} of {file.name} ({error}); the same command goes on from "
                              "there") from error
    if file.checksum is not None:
        listener.begin(f"checking {base}", 0, file.size)
        try:
            verify(partial, file.checksum, listener)
        except TransferError as error:
            partial.unlink()
            raise CheckpointError(f"{pull.repo}: {file.name} arrived damaged ({error}); it was deleted, so that the "
                                  "same command fetches it again") from error
    partial.replace(blob)


def check_room(repo: str, needed: int, folder: Path) -> None:
    """Raises CheckpointError when the cache's disk has not so many bytes free for a repository's ``folder``."""
    free = free_space(folder)
    if needed > free:
        raise CheckpointError(f"{repo}: not enough space on the disk of {cache_folder()}: {size_text(needed)} are "
                              f"needed, {size_text(free)} are free; {_MAKE_SPACE}, or set HF_HOME to a folder "
                              "on another disk")


def _here(pull: Pull, file: HubFile) -> int:
    """How many bytes of a file are on this machine."""
    folder = repo_folder(pull.repo)
    if _is_linked(folder / "snapshots" / pull.commit, file) or size_of(folder / "blobs" / file.blob) == file.size:
        return file.size
    return min(size_of(partial_of(folder, file.blob)), file.size)


def _is_linked(snapshot: Path, file: HubFile) -> bool:
    path = snapshot / file.name
    return path.is_file() and path.stat().st_size == file.size


def _link(blob: Path, path: Path) -> None:
    """Give a blob its name in the snapshot; where there are no symbolic links the file itself goes there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    try:
        path.symlink_to(os.path.relpath(blob, path.parent))
    except OSError:
        blob.replace(path)
