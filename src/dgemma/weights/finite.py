"""Finding the tensors of a checkpoint that hold infinite numbers or no numbers (NaN), without loading any.

Works on the files' bytes, a piece at a time, whatever the tensors' size; knows nothing of networks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dgemma.errors import CheckpointError
from dgemma.files import fill
from dgemma.gguf.blocks import BlockType, dequantize
from dgemma.gguf.codebooks import missing_grid
from dgemma.gguf.reader import GGUFTensor
from dgemma.weights.load import DTYPES, StoredTensor

_PIECE = 16 << 20  # bytes read at a time
_FLOATS = {**DTYPES, "F64": torch.float64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
_WHOLE = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")  # these hold nothing else
# Where a block's float16 scales and minima are: its numbers are finite if and only if these are. A type that is not
# here is dequantised.
_SCALES: dict[str, tuple[int, ...]] = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,),
}


@dataclass(frozen=True)
class Finiteness:
    """What a check found: a line for every tensor that is not finite, and the types of those that were not read."""

    broken: tuple[str, ...]
    unread: tuple[str, ...] = ()


def check_finite(tensors: Iterable[StoredTensor | GGUFTensor],
                 progress: Callable[[int, int], None] | None = None) -> Finiteness:
    """Read every tensor's data. ``progress(done, total)`` counts bytes.

    Raises CheckpointError when a file cannot be read, or ends before a tensor does.
    """
    tensors = sorted(tensors, key=lambda tensor: (str(tensor.file), tensor.offset))
    progress = progress or (lambda done, total: None)
    total, done = sum(tensor.nbytes for tensor in tensors), 0
    broken: list[str] = []
    unread: dict[str, None] = {}
    progress(0, total)
    for tensor in tensors:
        if isinstance(tensor, GGUFTensor):
            kind, count_in = tensor.type_name, _counter_of_blocks(tensor.type)
            unit = "numbers" if tensor.type is None or tensor.type.block == 1 else "blocks"
            size = 1 if tensor.type is None else tensor.type.nbytes
        else:
            kind, unit = tensor.dtype, "numbers"
            dtype = _FLOATS.get(kind)
            size = dtype.itemsize if dtype else 1
            count_in = None if dtype is None else _counter_of_numbers(dtype)
        if count_in is None and kind not in _WHOLE:
            unread[kind] = None
        if count_in is not None:
            found = 0
            for data in _pieces(tensor.file, tensor.offset, tensor.nbytes, size, tensor.name):
                found += count_in(data)
                done += len(data)
                progress(done, total)
            if found:
                broken.append(f"{tensor.name} in {tensor.file.name}: {found:,} of {tensor.nbytes // size:,} {unit}")
        else:
            done += tensor.nbytes
            progress(done, total)
    progress(total, total)
    return Finiteness(tuple(broken), tuple(unread))


def _counter_of_numbers(dtype: torch.dtype) -> Callable[[Tensor], int]:
    """uint8 [n] -> how many of the numbers in it are not finite."""
    def count(data: Tensor) -> int:
        numbers = data.view(dtype)
        finite = (numbers.float() if dtype.itemsize == 1 else numbers).isfinite()
        return 0 if finite.all() else int((~finite).sum())

    return count


def _counter_of_blocks(kind: BlockType | None) -> Callable[[Tensor], int] | None:
    """uint8 [n] -> how many of the blocks in it hold what is not finite; None for a type that cannot be read here."""
    if kind is None or missing_grid(kind.name):
        return None
    if kind.name in _FLOATS:
        return _counter_of_numbers(_FLOATS[kind.name])
    scales = _SCALES.get(kind.name)

    def count(data: Tensor) -> int:
        blocks = data.view(-1, kind.nbytes)
        if scales is None:
            bad = ~dequantize(blocks, kind).isfinite().all(-1)
        else:  # the high byte of a float16 has its exponent in five bits: all set where it is not finite
            bad = torch.stack([(blocks[:, at + 1] & 0x7C) == 0x7C for at in scales]).any(0)
        return int(bad.sum())

    return count


def _pieces(path: Path, start: int, nbytes: int, unit: int, name: str) -> Iterator[Tensor]:
    """A tensor's bytes, uint8, in pieces of whole units.

    Plain reads into one buffer: pages of a mapped file would count as memory.
    """
    buffer = bytearray(min(nbytes, max(_PIECE // unit, 1) * unit))
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            left = nbytes
            while left:
                view = memoryview(buffer)[: min(len(buffer), left)]
                fill(view, file, name)
                left -= len(view)
                yield torch.frombuffer(buffer, dtype=torch.uint8, count=len(view))
    except EOFError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
