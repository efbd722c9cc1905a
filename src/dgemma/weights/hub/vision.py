"""The vision tower of a repository of which nobody wants the rest: ranges of the shards that hold it.

What arrives is kept in the repository's folder of the local cache, beside what the hub's library has there:
``vision/<commit>`` with config.json and a model.safetensors of the tower's tensors, which loads like any checkpoint.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dgemma.errors import CheckpointError
from dgemma.files import atomic_write, json_bytes, read_pieces
from dgemma.weights.files import INDEX_FILE, SINGLE_FILE, weight_files
from dgemma.weights.hub.cache import alone, cached_path, repo_folder
from dgemma.weights.hub.repository import HubFile, check_room, explained, file_url, listing
from dgemma.weights.hub.transfer import Downloads, Listener, download, size_of, verify
from dgemma.weights.load import StoredTensor, read_header
from dgemma.weights.names import is_vision, vision_name

_GAP = 1 << 20  # bytes between two tensors that are fetched along rather than asked around
_PIECE = 16 << 20  # bytes copied at a time


@dataclass(frozen=True)
class _Run:
    """Tensors of a shard that are fetched as one range, in the order in which they lie there."""

    shard: HubFile
    tensors: tuple[StoredTensor, ...]
    target: Path

    @property
    def first(self) -> int:
        return self.tensors[0].offset

    @property
    def size(self) -> int:
        return self.tensors[-1].offset + self.tensors[-1].nbytes - self.first


def locate_tower(repo: str, downloads: Downloads) -> Path:
    """A folder with a repository's config.json and the tensors of its vision tower, perhaps with all others, too.

    That is the whole checkpoint if it is complete in the local cache; else the tower's tensors, which are fetched
    unless they are there. ``downloads`` makes who is told of it. Raises CheckpointError (NotThereError where there is
    nobody to ask or nothing of that name).
    """
    whole = cached_path(repo, None)
    if whole is not None and whole.is_dir():
        return whole
    kept = [folder for folder in (repo_folder(repo) / "vision").glob("*") if _is_complete(folder)]
    if kept:
        return max(kept, key=lambda folder: folder.stat().st_mtime)
    commit, files = listing(repo)
    folder = repo_folder(repo) / "vision" / commit
    runs: list[_Run] = []
    with explained(repo, lambda: sum(run.size - size_of(run.target) for run in runs)), downloads() as listener:
        (repo_folder(repo) / "snapshots").mkdir(parents=True, exist_ok=True)  # a cache without it is called corrupt
        folder.mkdir(parents=True, exist_ok=True)
        with alone(repo_folder(repo), "dgemma-vision",
                   lambda: listener.note("another process is fetching this vision tower; waiting for it")):
            if not _is_complete(folder):
                runs += _plan(repo, commit, files, folder, listener)
                _fetch(repo, commit, runs, listener)
                _join(runs, folder / SINGLE_FILE)
                for path in folder.iterdir():
                    if path.name not in ("config.json", SINGLE_FILE):
                        path.unlink()
    return folder


def _is_complete(folder: Path) -> bool:
    return (folder / "config.json").is_file() and (folder / SINGLE_FILE).is_file()


def _plan(repo: str, commit: str, files: Mapping[str, HubFile], folder: Path, listener: Listener) -> list[_Run]:
    """What is to be fetched, by the config, the index and the headers of shards, which are fetched first."""
    for name in ("config.json", INDEX_FILE):
        if name in files and size_of(folder / name) != files[name].size:
            download(file_url(repo, name, commit), folder / name, files[name].size, listener)
            if (checksum := files[name].checksum) is not None:
                verify(folder / name, checksum, listener)
    if "config.json" not in files:
        raise CheckpointError(f"{repo}: no config.json in this hub repository, so there is no vision tower for "
                              "dgemma; it is taken from checkpoints in safetensors form")
    listed = weight_files(folder) if INDEX_FILE in files else {}
    names = [path.relative_to(folder).as_posix() for path, tensors in listed.items() if any(map(is_vision, tensors))]
    runs: list[_Run] = []
    for name in [name for name in names if name in files] or [name for name in (SINGLE_FILE,) if name in files]:
        header = folder / f"{name.replace('/', '--')}.header"
        url, shard = file_url(repo, name, commit), files[name]
        if size_of(header) < 8:
            download(url, header, min(8, shard.size), listener, whole=shard.size)
        length = int.from_bytes(header.read_bytes()[:8], "little")
        if 8 + length <= min(shard.size, 1 << 27):  # if not, reading it says what is wrong
            download(url, header, 8 + length, listener, whole=shard.size)
        tensors = [tensor for tensor in read_header(header, shard.size)[0].values() if vision_name(tensor.name)]
        runs += _runs(shard, sorted(tensors, key=lambda tensor: tensor.offset), header.with_suffix(""))
    if not runs:
        raise CheckpointError(f"{repo}: there is no vision tower in the safetensors of this hub repository")
    return runs


def _runs(shard: HubFile, tensors: Sequence[StoredTensor], stem: Path) -> list[_Run]:
    """Tensors in the order in which they lie in a shard, those together that are close to each other."""
    groups: list[list[StoredTensor]] = []
    end = 0
    for tensor in tensors:
        if not groups or tensor.offset > end + _GAP:
            groups.append([])
        groups[-1].append(tensor)
        end = tensor.offset + tensor.nbytes
    return [_Run(shard, tuple(group), stem.with_name(f"{stem.name}.{group[0].offset}")) for group in groups]


def _fetch(repo: str, commit: str, runs: Sequence[_Run], listener: Listener) -> None:
    """Bring every range into its own file; what an earlier try has fetched is not fetched again."""
    here, total = sum(size_of(run.target) for run in runs), sum(run.size for run in runs)
    check_room(repo, 2 * total - here, repo_folder(repo))
    listener.begin(f"downloading the vision tower of {repo}", min(here, total), total)
    for run in runs:
        others = sum(min(size_of(other.target), other.size) for other in runs if other is not run)
        download(file_url(repo, run.shard.name, commit), run.target, run.size, _Within(listener, others),
                 first=run.first, whole=run.shard.size)


class _Within(Listener):
    """Tells of a part of something of which so many other bytes are done."""

    def __init__(self, listener: Listener, others: int):
        self._listener, self._others = listener, others

    def advance(self, done: int) -> None:
        self._listener.advance(self._others + done)

    def note(self, text: str) -> None:
        self._listener.note(text)


def _join(runs: Sequence[_Run], path: Path) -> None:
    """Write the tensors of all runs as one safetensors file."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for run in runs:
        for tensor in run.tensors:
            header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape),
                                   "data_offsets": [end, end + tensor.nbytes]}
            end += tensor.nbytes
    lead = json_bytes(header)
    lead += b" " * (-len(lead) % 8)  # data begins at a multiple of 8
    with atomic_write(path) as beside, beside.open("wb") as file:
        file.write(struct.pack("<Q", len(lead)) + lead)
        for run in runs:
            for tensor in run.tensors:
                for piece in read_pieces(run.target, tensor.offset - run.first, tensor.nbytes, _PIECE, tensor.name):
                    file.write(piece)
