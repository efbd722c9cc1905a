"""Finding the tensors of a checkpoint that hold infinite numbers or no numbers (NaN), without loading any.

Works on the files' bytes, a piece at a time, whatever the tensors' size; knows nothing of networks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dgemma.files import read_pieces
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
                 progress: Callable[[int, int], None] | None = None, piece: int = _PIECE) -> Finiteness:
    """Read every tensor's data, at most ``piece`` bytes at a time. ``progress(done, total)`` counts bytes.

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
            kind, block = tensor.type_name, tensor.type
            dtype = _FLOATS.get(kind) if block else None
        else:
            kind, block, dtype = tensor.dtype, None, _FLOATS.get(tensor.dtype)
        if dtype is not None:
            size, unit, count_in = dtype.itemsize, "numbers", partial(_odd_numbers, dtype)
        elif block is not None and not missing_grid(kind):
            size, unit, count_in = block.nbytes, "blocks", partial(_odd_blocks, block)
        else:
            if kind not in _WHOLE:
                unread[kind] = None
            done += tensor.nbytes
            progress(done, total)
            continue
        found = 0
        for data in read_pieces(tensor.file, tensor.offset, tensor.nbytes, max(piece // size, 1) * size, tensor.name):
            found += count_in(torch.frombuffer(data, dtype=torch.uint8))
            done += len(data)
            progress(done, total)
        if found:
            broken.append(f"{tensor.name} in {tensor.file.name}: {found:,} of {tensor.nbytes // size:,} {unit}")
    progress(total, total)
    return Finiteness(tuple(broken), tuple(unread))


def _odd_numbers(dtype: torch.dtype, data: Tensor) -> int:
    """How many of the numbers in uint8 [n] are not finite."""
    numbers = data.view(dtype)
    finite = (numbers.float() if dtype.itemsize == 1 else numbers).isfinite()
    return 0 if finite.all() else int((~finite).sum())


def _odd_blocks(kind: BlockType, data: Tensor) -> int:
    """How many of the blocks in uint8 [n] hold what is not finite."""
    blocks, scales = data.view(-1, kind.nbytes), _SCALES.get(kind.name)
    if scales is None:
        bad = ~dequantize(blocks, kind).isfinite().all(-1)
    else:  # the high byte of a float16 has its exponent in five bits: all set where it is not finite
        bad = torch.stack([(blocks[:, at + 1] & 0x7C) == 0x7C for at in scales]).any(0)
    return int(bad.sum())
