"""ggml's block formats: how weights lie packed in bytes, and what numbers they stand for.

A row of K weights is K / `BlockType.block` blocks of `BlockType.nbytes` bytes, whatever the tensor's other axes.
`dequantize` is the plain-torch reference that every kernel is held to; layouts after ggml's ``ggml-common.h``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockType:
    """One way to pack weights; ``code`` is ggml's number for it, ``block`` weights take ``nbytes`` bytes."""

    name: str
    code: int
    block: int
    nbytes: int

    def row_bytes(self, width: int) -> int:
        """The bytes of a row of ``width`` weights; raises ValueError when it is no whole number of blocks."""
        if width % self.block:
            raise ValueError(f"a row of {width} weights is no whole number of {self.name} blocks of {self.block}")
        return width // self.block * self.nbytes

    def row_width(self, nbytes: int) -> int:
        """The weights in a row of ``nbytes`` bytes."""
        return nbytes // self.nbytes * self.block


BLOCK_TYPES: dict[str, BlockType] = {t.name: t for t in (
    BlockType("F32", 0, 1, 4),
    BlockType("F16", 1, 1, 2),
    BlockType("Q4_0", 2, 32, 18),
    BlockType("Q4_1", 3, 32, 20),
    BlockType("Q5_0", 6, 32, 22),
    BlockType("Q5_1", 7, 32, 24),
    BlockType("Q8_0", 8, 32, 34),
    BlockType("Q2_K", 10, 256, 84),
    BlockType("Q3_K", 11, 256, 110),
    BlockType("Q4_K", 12, 256, 144),
    BlockType("Q5_K", 13, 256, 176),
    BlockType("Q6_K", 14, 256, 210),
    BlockType("IQ4_NL", 20, 32, 18),
    BlockType("IQ4_XS", 23, 256, 136),
    BlockType("BF16", 30, 1, 2),
)}
BY_CODE: dict[int, BlockType] = {t.code: t for t in BLOCK_TYPES.values()}

_CHUNK = 1 << 18  # weights expanded at a time: temporaries of a few megabytes, whatever the tensor's size

# The sixteen values of IQ4_NL and IQ4_XS.
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def dequantize(data: Tensor, type: BlockType, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers that packed rows stand for: uint8 [..., row bytes] -> ``dtype`` [..., K], a tensor of its own.

    Computed in float32 as ggml does, bit for bit, and then rounded to ``dtype``. ``data`` may lie at any address and
    in any strides. Raises ValueError when its rows are no whole number of blocks.
    """
    if data.dtype != torch.uint8:
        raise ValueError(f"packed weights are uint8, not {str(data.dtype).removeprefix('torch.')}")
    if data.shape[-1] % type.nbytes:
        raise ValueError(f"a row of {data.shape[-1]} bytes is no whole number of {type.name} blocks of {type.nbytes}")
    out = torch.empty(*data.shape[:-1], type.row_width(data.shape[-1]), dtype=dtype, device=data.device)
    blocks, numbers = data.reshape(-1, type.nbytes), out.view(-1, type.block)
    step = max(1, _CHUNK // type.block)
    for start in range(0, len(blocks), step):
        numbers[start : start + step] = _DECODERS[type.name](blocks[start : start + step])
    return out


def spread(packed: Tensor, bits: int, group: int) -> Tensor:
    """Take bytes apart: uint8 [n, m] -> uint8 [n, m / group · 8 / bits · group].

    ggml keeps 8 / bits runs of ``group`` numbers in ``group`` bytes: the bytes' lowest bits are the first run.
    """
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device).view(-1, 1)
    return ((packed.reshape(len(packed), -1, 1, group) >> shifts) & ((1 << bits) - 1)).flatten(1)


def gather(numbers: Tensor, bits: int, group: int) -> Tensor:
    """The inverse of `spread`: uint8 [n, m] of ``bits`` each -> uint8 [n, m · bits / 8]."""
    runs = numbers.reshape(len(numbers), -1, 8 // bits, group)
    packed = runs[:, :, 0].clone()
    for index in range(1, 8 // bits):
        packed |= runs[:, :, index] << (index * bits)
    return packed.flatten(1)


def spread_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The eight 6-bit scales and minima in the 12 bytes of a Q4_K or Q5_K block: uint8 [n, 12] -> two [n, 8]."""
    low, middle, high = packed[:, :4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat([low & 63, (high & 15) | ((low >> 2) & 48)], dim=1)
    minima = torch.cat([middle & 63, (high >> 4) | ((middle >> 2) & 48)], dim=1)
    return scales, minima


def gather_scales(scales: Tensor, minima: Tensor) -> Tensor:
    """The inverse of `spread_scales`: two uint8 [n, 8] below 64 -> [n, 12]."""
    low = scales[:, :4] | ((scales[:, 4:] >> 4) << 6)
    middle = minima[:, :4] | ((minima[:, 4:] >> 4) << 6)
    high = (scales[:, 4:] & 15) | ((minima[:, 4:] & 15) << 4)
    return torch.cat([low, middle, high], dim=1)


def _float(blocks: Tensor, kind: torch.dtype, at: int = 0) -> Tensor:
    """The number of ``kind`` at byte ``at`` of every block, float32 [n, 1]."""
    # A clone: a slice of a mapped file may start at an odd address, where no float can be viewed.
    field = blocks[:, at : at + kind.itemsize].clone(memory_format=torch.contiguous_format)
    return field.view(kind).float()


def _half(blocks: Tensor, at: int = 0) -> Tensor:
    return _float(blocks, torch.float16, at)


def _f32(blocks: Tensor) -> Tensor:
    return _float(blocks, torch.float32)


def _bf16(blocks: Tensor) -> Tensor:
    return _float(blocks, torch.bfloat16)


def _q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks) * (spread(blocks[:, 2:], 4, 16).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks) * spread(blocks[:, 4:], 4, 16).float() + _half(blocks, 2)


def _five_bits(low: Tensor, high: Tensor) -> Tensor:
    """Four low bits [n, 16 bytes] and one high bit [n, 4 bytes] of 32 numbers -> float32 [n, 32]."""
    return (spread(low, 4, 16) | (spread(high, 1, 1) << 4)).float()


def _q5_0(blocks: Tensor) -> Tensor:
    return _half(blocks) * (_five_bits(blocks[:, 6:], blocks[:, 2:6]) - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    return _half(blocks) * _five_bits(blocks[:, 8:], blocks[:, 4:8]) + _half(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return _half(blocks) * _signed(blocks[:, 2:])


def _signed(packed: Tensor) -> Tensor:
    return packed.clone(memory_format=torch.contiguous_format).view(torch.int8).float()


def _scaled(scales: Tensor, numbers: Tensor, minima: Tensor | None = None) -> Tensor:
    """scales [n, g] times numbers [n, g · width], less minima [n, g]."""
    out = scales.unsqueeze(2) * numbers.view(*scales.shape, -1)
    return (out if minima is None else out.sub_(minima.unsqueeze(2))).flatten(1)


def _q2_k(blocks: Tensor) -> Tensor:
    scales = _half(blocks, 80) * (blocks[:, :16] & 15).float()
    minima = _half(blocks, 82) * (blocks[:, :16] >> 4).float()
    return _scaled(scales, spread(blocks[:, 16:80], 2, 32).float(), minima)


def _q3_k(blocks: Tensor) -> Tensor:
    scales = spread(blocks[:, 96:104], 4, 8) | (spread(blocks[:, 104:108], 2, 4) << 4)
    numbers = spread(blocks[:, 32:96], 2, 32) | (spread(blocks[:, :32], 1, 32) << 2)
    return _scaled(_half(blocks, 108) * (scales.float() - 32), numbers.float() - 4)


def _q4_k(blocks: Tensor) -> Tensor:
    scales, minima = spread_scales(blocks[:, 4:16])
    numbers = spread(blocks[:, 16:], 4, 32).float()
    return _scaled(_half(blocks) * scales.float(), numbers, _half(blocks, 2) * minima.float())


def _q5_k(blocks: Tensor) -> Tensor:
    scales, minima = spread_scales(blocks[:, 4:16])
    numbers = (spread(blocks[:, 48:], 4, 32) | (spread(blocks[:, 16:48], 1, 32) << 4)).float()
    return _scaled(_half(blocks) * scales.float(), numbers, _half(blocks, 2) * minima.float())


def _q6_k(blocks: Tensor) -> Tensor:
    numbers = spread(blocks[:, :128], 4, 64) | (spread(blocks[:, 128:192], 2, 32) << 4)
    return _scaled(_half(blocks, 208) * _signed(blocks[:, 192:208]), numbers.float() - 32)


def _iq4(packed: Tensor) -> Tensor:
    values = torch.tensor(IQ4_VALUES, dtype=torch.float32, device=packed.device)
    return values[spread(packed, 4, 16).int()]


def _iq4_nl(blocks: Tensor) -> Tensor:
    return _half(blocks) * _iq4(blocks[:, 2:])


def _iq4_xs(blocks: Tensor) -> Tensor:
    scales = spread(blocks[:, 4:8], 4, 1) | (spread(blocks[:, 2:4], 2, 1) << 4)
    return _scaled(_half(blocks) * (scales.float() - 32), _iq4(blocks[:, 8:]))


_DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "F32": _f32, "F16": _half, "BF16": _bf16, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1,
    "Q8_0": _q8_0, "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k, "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}  # uint8 [n, nbytes] -> float32 [n, block]
