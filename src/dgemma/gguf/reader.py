"""The GGUF container: what a file says about itself and where its tensors lie. Versions 2 and 3, little-endian.

Works on bytes; knows nothing of models. A file may be one of several parts (``name-00001-of-00003.gguf``), which are
read as one. Everything that a file claims (lengths, counts, offsets) is checked against its size before it is believed.

The format: magic, version, counts; metadata (key, type, value); tensor table (name, dimensions from the innermost
outwards, block type, offset); padding; the tensors' data, each at a multiple of ``general.alignment``.
"""

from __future__ import annotations

import math
import mmap
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dgemma.errors import CheckpointError
from dgemma.fields import is_whole, shown
from dgemma.gguf.blocks import BY_CODE, BlockType
from dgemma.gguf.container import ALIGNMENT, ARRAY, MAGIC, NUMBERS, PART, STRING, part_names

_HEADER_LIMIT = 128 << 20  # a 262144-token vocabulary with its merges takes 15 MB
_NESTING = 4
_WINDOW = 1 << 16  # where strings are many, the bytes looked at in one go
_SLOWLY = 64  # and how many are read one by one where that does not work
_ZEROS = b"\0" * 7
_MOST_DIMENSIONS = 8
_AGAIN = "copy or download it again"

_ONE_NUMBER = {code: struct.Struct(f"<{letter}") for code, letter in NUMBERS.items()}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")

# The types that dgemma does not compute with, by name, for errors.
_OTHER_TYPES = {
    9: "Q8_1", 15: "Q8_K", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 41: "Q1_0",
}


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies. ``shape`` is in torch's order: the last axis is the one that is packed in blocks.

    ``type`` is None for a block type that dgemma does not know, and ``nbytes`` 0 then; ``offset`` counts from the
    start of ``file``.
    """

    name: str
    type: BlockType | None
    type_name: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUFFile:
    """A GGUF model: metadata of its first part, tensors of all parts.

    ``damaged`` says which parts are missing or cut short; ``complete`` is False when some part's tensor table could
    not be read, so that nobody knows what it should hold.
    """

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]
    files: tuple[Path, ...]
    damaged: tuple[str, ...] = ()
    complete: bool = True


def read_gguf(path: str | Path) -> GGUFFile:
    """Read the header of a GGUF file, and of the other parts of the model if it is one of several.

    Any part may be given. Data that is cut short and parts that are missing stand in ``damaged``. Raises
    CheckpointError when there is nothing to go on: no GGUF, a version that cannot be read, a broken header, no part 1.
    """
    path = Path(path)
    first = _read_part(path)
    count = first.metadata.get("split.count", 1)
    if not is_whole(count) or not 0 <= count <= 99_999:
        raise CheckpointError(f"{path}: corrupt header: split.count is {shown(count)}")
    if count <= 1:
        return first
    paths = _part_paths(path, first.metadata.get("split.no"), count)
    if path != paths[0]:
        if not paths[0].is_file():
            raise CheckpointError(f"{path}: this is one of {count} parts, and the first one, which says what the model "
                                  f"is, is missing: {paths[0].name} should be beside it")
        first = _read_part(paths[0])
    return _join(first, paths)


def _part_paths(path: Path, number: Any, count: int) -> list[Path]:
    if not is_whole(number) or not 0 <= number < count:
        raise CheckpointError(f"{path}: corrupt header: split.no is {shown(number)} and split.count {count}")
    name = PART.fullmatch(path.name)
    if name is None or int(name["count"]) != count:
        raise CheckpointError(f"{path}: this is part {number + 1} of {count}; the others are found by their names, so "
                              f"it must be called …-{number + 1:05}-of-{count:05}.gguf")
    return [path.with_name(part) for part in part_names(name["stem"], count)]


def _join(first: GGUFFile, paths: list[Path]) -> GGUFFile:
    """All parts as one; ``first`` is the first of them, read."""
    tensors: dict[str, GGUFTensor] = {}
    damaged: list[str] = []
    complete = True
    for number, path in enumerate(paths):
        if not path.is_file():
            damaged.append(f"{path.name}: part {number + 1} of {len(paths)} is missing")
            complete = False
            continue
        try:
            part = first if number == 0 else _read_part(path)
        except CheckpointError as error:
            damaged.append(str(error))
            complete = False
            continue
        says = part.metadata.get("split.no"), part.metadata.get("split.count")
        if says != (number, len(paths)):
            what = "no part of a split model" if says == (None, None) else "a part of another one"
            damaged.append(f"{path.name}: this should be part {number + 1} of {len(paths)}, but it says that it is "
                           f"{what} (split.no {shown(says[0])}, split.count {shown(says[1])})")
            complete = False
            continue
        damaged.extend(part.damaged)
        damaged.extend(f"{path.name}: {name} stands in {tensors[name].file.name} too" for name in part.tensors
                       if name in tensors)
        tensors.update(part.tensors)
    total = first.metadata.get("split.tensors.count")
    if complete and is_whole(total) and total != len(tensors):
        damaged.append(f"{paths[0].name}: the parts hold {len(tensors)} tensors together, split.tensors.count says "
                       f"{total}")
    return GGUFFile(paths[0], first.version, first.metadata, tensors, tuple(paths), tuple(damaged), complete)


def read_tensor(tensor: GGUFTensor) -> Tensor | None:
    """A small tensor's bytes, uint8 [nbytes], read from the file; None when the file ends before them."""
    try:
        with tensor.file.open("rb") as file:
            file.seek(tensor.offset)
            data = bytearray(file.read(tensor.nbytes))
    except (OSError, OverflowError, ValueError) as error:  # the last two for numbers beyond any file
        raise CheckpointError(f"{tensor.file}: cannot be read ({error})") from error
    return torch.frombuffer(data, dtype=torch.uint8) if data and len(data) == tensor.nbytes else None


def map_tensors(gguf: GGUFFile) -> dict[str, Tensor]:
    """Every tensor's bytes, uint8 [nbytes], as views of the mapped files: nothing is read until it is used.

    Privately mapped: writing to a view leaves the file alone. The mapping lives as long as a view of it.
    Raises CheckpointError when a file cannot be mapped; call it for files that are not ``damaged`` only.
    """
    maps = {path: _map(path) for path in {tensor.file for tensor in gguf.tensors.values()}}
    return {name: maps[tensor.file][tensor.offset : tensor.offset + tensor.nbytes]
            for name, tensor in gguf.tensors.items()}


def _map(path: Path) -> Tensor:
    try:
        with path.open("rb") as file:
            if sys.platform == "win32":
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            else:
                # Writable in private, so that torch takes it without a warning and a stray write does no harm.
                # Without a reservation of memory, which Linux would refuse for a file larger than RAM.
                no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
                mapping = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE | no_reserve,
                                    prot=mmap.PROT_READ | mmap.PROT_WRITE)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be mapped into memory ({getattr(error, 'strerror', None) or error})"
                              ) from error
    return torch.frombuffer(mapping, dtype=torch.uint8)


def _read_part(path: Path) -> GGUFFile:
    """One file by itself."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            _check_magic(path, file.read(24), size)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                return _parse(_Reader(path, mapped, size))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error


def _check_magic(path: Path, lead: bytes, size: int) -> None:
    """Raise CheckpointError unless the first bytes are those of a GGUF file that we read."""
    if lead[:4] != MAGIC:
        if lead.startswith(b"version https://"):
            raise CheckpointError(f"{path}: a Git LFS pointer, not the model itself; fetch it with `git lfs pull`")
        if lead.lstrip()[:5].lower() in (b"<!doc", b"<html"):
            raise CheckpointError(f"{path}: not a GGUF file but a web page; download the file itself")
        if not lead.strip(b"\0"):
            what = f"{size:,} zero bytes or more" if lead else "empty"
            raise CheckpointError(f"{path}: not a GGUF file: {what}; {_AGAIN}")
        raise CheckpointError(f"{path}: not a GGUF file: it begins with {lead[:4]!r} instead of {MAGIC!r}")
    if len(lead) < 24:
        raise CheckpointError(f"{path}: truncated: {size:,} bytes, a GGUF header alone takes more; {_AGAIN}")
    (version,) = _U32.unpack_from(lead, 4)
    if version & 0xFFFF == 0 and version:
        raise CheckpointError(f"{path}: a big-endian GGUF file, which dgemma does not read; use the little-endian one")
    if version == 1:
        raise CheckpointError(f"{path}: GGUF version 1, which no current program writes; dgemma reads versions 2 and "
                              "3: get a newer conversion of the model")
    if version not in (2, 3):
        raise CheckpointError(f"{path}: GGUF version {version} is not supported (2 and 3 are); a newer dgemma may "
                              "read it")


def _parse(reader: _Reader) -> GGUFFile:
    path = reader.path
    reader.skip(4)
    version, tensor_count, key_count = reader.u32(), reader.u64(), reader.u64()
    metadata: dict[str, Any] = {}
    reader.check_count(key_count, 13, "metadata keys")
    for _ in range(key_count):
        reader.where = "metadata"
        key = reader.name()
        reader.where = f"metadata key {key}"
        if key in metadata:
            raise reader.corrupt("it is there twice")
        metadata[key] = reader.value(reader.u32())
    reader.where = "tensor table"
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not is_whole(alignment) or not 1 <= alignment <= 1 << 20:
        raise reader.corrupt(f"general.alignment is {shown(alignment)}")
    reader.check_count(tensor_count, 24, "tensors")
    entries = []
    for _ in range(tensor_count):
        reader.where = "tensor table"
        name = reader.name()
        reader.where = f"tensor {name}"
        dimensions = reader.u32()
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise reader.corrupt(f"{dimensions} dimensions")
        shape = tuple(reader.u64() for _ in range(dimensions))[::-1]
        entries.append((name, shape, reader.u32(), reader.u64()))
    start = -(-reader.at // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, code, offset in entries:
        reader.where = f"tensor {name}"
        kind = BY_CODE.get(code)
        if name in tensors:
            raise reader.corrupt("it is there twice")
        if offset % alignment:
            raise reader.corrupt(f"its data begins at {offset}, which is no multiple of {alignment}")
        nbytes = 0
        if kind is not None:
            if shape[-1] % kind.block:
                raise reader.corrupt(f"rows of {shape[-1]} numbers are no whole number of {kind.name} blocks of "
                                     f"{kind.block}")
            nbytes = math.prod(shape[:-1]) * kind.row_bytes(shape[-1])
        type_name = kind.name if kind else _OTHER_TYPES.get(code, f"type {code}")
        tensors[name] = GGUFTensor(name, kind, type_name, shape, path, start + offset, nbytes)
    _check_apart(reader, tensors)
    end = max((tensor.offset + tensor.nbytes for tensor in tensors.values()), default=0)
    damaged = (f"{path}: truncated: {reader.size:,} bytes, its header says {end:,}; {_AGAIN}",) \
        if end > reader.size else ()
    return GGUFFile(path, version, metadata, tensors, (path,), damaged)


def _check_apart(reader: _Reader, tensors: dict[str, GGUFTensor]) -> None:
    """Raise CheckpointError when two tensors claim the same bytes."""
    end, before = 0, ""
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.nbytes and tensor.offset < end:
            reader.where = f"tensor {tensor.name}"
            raise reader.corrupt(f"its data lies over that of {before}")
        if tensor.nbytes:
            end, before = tensor.offset + tensor.nbytes, tensor.name


class _Reader:
    """A place in a file's header. Every read is checked; ``where`` says in errors what was being read."""

    def __init__(self, path: Path, data: mmap.mmap, size: int):
        self.path, self.data, self.size = path, data, size
        self.end = min(size, _HEADER_LIMIT)
        self.at = 0
        self.where = "header"

    def corrupt(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: corrupt header: {self.where}: {what}; {_AGAIN}")

    def _past_the_end(self) -> CheckpointError:
        if self.end < self.size:
            return self.corrupt(f"it would reach past {self.end >> 20} MB, more than any header takes")
        return CheckpointError(f"{self.path}: truncated or corrupt: the file ends ({self.size:,} bytes) within its "
                               f"header, at {self.where}; {_AGAIN}")

    def skip(self, nbytes: int) -> int:
        """Step over so many bytes and return where they begin."""
        start = self.at
        if nbytes > self.end - start:
            raise self._past_the_end()
        self.at = start + nbytes
        return start

    def check_count(self, count: int, smallest: int, of: str) -> None:
        """Raise CheckpointError if ``count`` things of ``smallest`` bytes at least cannot be there."""
        if count * smallest > self.end - self.at:
            self.where = f"{count:,} {of}"
            raise self._past_the_end()

    def u32(self) -> int:
        return _U32.unpack_from(self.data, self.skip(4))[0]

    def u64(self) -> int:
        return _U64.unpack_from(self.data, self.skip(8))[0]

    def name(self) -> str:
        start = self.skip(self.u64())
        try:
            return self.data[start : self.at].decode()
        except UnicodeDecodeError as error:
            raise self.corrupt("a name that is not UTF-8 text") from error

    def value(self, code: int, depth: int = 0) -> Any:
        """One metadata value of a type; arrays become lists."""
        if code == STRING:
            start = self.skip(self.u64())
            return self.data[start : self.at].decode(errors="replace")
        if code in _ONE_NUMBER:
            kind = _ONE_NUMBER[code]
            return kind.unpack_from(self.data, self.skip(kind.size))[0]
        if code != ARRAY:
            raise self.corrupt(f"type {code} is no metadata type")
        inner, count = self.u32(), self.u64()
        if inner == STRING:
            self.check_count(count, 8, "strings")
            return self._strings(count)
        if inner in NUMBERS:
            kind = np.dtype(f"<{NUMBERS[inner]}")
            self.check_count(count, kind.itemsize, "numbers")
            start = self.skip(count * kind.itemsize)
            return np.frombuffer(self.data[start : self.at], kind).tolist()
        if inner != ARRAY or depth == _NESTING:
            raise self.corrupt(f"an array of type {inner}" + (" nested too deep" if inner == ARRAY else ""))
        self.check_count(count, 12, "arrays")
        return [self.value(ARRAY, depth + 1) for _ in range(count)]

    def _strings(self, count: int) -> list[str]:
        """So many strings, each a length in 8 bytes and its text: a vocabulary has hundreds of thousands of them."""
        strings: list[str] = []
        while len(strings) < count:
            window = self.data[self.at : min(self.at + _WINDOW, self.end)]
            found, nbytes = _short_strings(window, count - len(strings))
            strings += found
            self.at += nbytes
            for _ in range(min(_SLOWLY, count - len(strings)) if len(found) < _SLOWLY else 0):
                start = self.skip(self.u64())
                strings.append(self.data[start : self.at].decode(errors="replace"))
        return strings


def _short_strings(window: bytes, most: int) -> tuple[list[str], int]:
    """The strings that ``window`` begins with, as far as there is a quick way to them, and the bytes they take.

    The length of a short text is one byte and seven zeros. So the window is cut at every seven zeros: a piece is then a
    text and the first byte of the next length, and as long as the length before says. The first piece for which that is
    not so (after an empty text, a long one, one with zeros in it) ends the quick way.
    """
    pieces = window.split(_ZEROS, most + 1)
    if len(pieces) < 3 or len(pieces[0]) != 1:
        return [], 0
    sizes = np.fromiter(map(len, pieces), np.int64, len(pieces))
    length_at = np.cumsum(sizes[:-1] + len(_ZEROS)) - len(_ZEROS) - 1
    lengths = np.frombuffer(window, np.uint8)[length_at[:-1]].astype(np.int64)
    right = (sizes[1:-1] == lengths + 1) & (lengths < 0x80)
    count = len(right) if right.all() else int(right.argmin())
    nbytes = int(length_at[count])
    try:  # lengths below 128 are ASCII, so texts and lengths can be decoded together
        texts = (window[:nbytes] + b".").decode().split(_ZEROS.decode())[1:]
    except UnicodeDecodeError:
        return [], 0
    return [text[:-1] for text in texts], nbytes
