"""ggml's block formats: how weights lie packed in bytes, and what numbers they stand for.

A row of K weights is K / `BlockType.block` blocks of `BlockType.nbytes` bytes, whatever the tensor's other axes.
`dequantize` is the plain-torch reference that every kernel is held to; layouts after ggml's ``ggml-common.h``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dgemma.gguf.codebooks import DECODERS, half, number_at


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

    def tensor_bytes(self, shape: Sequence[int]) -> int:
        """The bytes of a tensor of this shape; raises ValueError as `row_bytes` does."""
        return math.prod(shape[:-1]) * self.row_bytes(shape[-1])

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
    BlockType("IQ2_XXS", 16, 256, 66),
    BlockType("IQ2_XS", 17, 256, 74),
    BlockType("IQ3_XXS", 18, 256, 98),
    BlockType("IQ1_S", 19, 256, 50),
    BlockType("IQ4_NL", 20, 32, 18),
    BlockType("IQ3_S", 21, 256, 110),
    BlockType("IQ2_S", 22, 256, 82),
    BlockType("IQ4_XS", 23, 256, 136),
    BlockType("IQ1_M", 29, 256, 56),
    BlockType("BF16", 30, 1, 2),
    BlockType("TQ1_0", 34, 256, 54),
    BlockType("TQ2_0", 35, 256, 66),
    BlockType("MXFP4", 39, 32, 17),
    BlockType("NVFP4", 40, 64, 36),
)}
BY_CODE: dict[int, BlockType] = {t.code: t for t in BLOCK_TYPES.values()}

_CHUNK = 1 << 18  # weights expanded at a time: temporaries of a few megabytes, whatever the tensor's size

# The sixteen values of IQ4_NL and IQ4_XS.
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# Twice the sixteen values of a 4-bit float (one sign bit, two of exponent, one of mantissa): MXFP4's and NVFP4's.
FP4_VALUES = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def dequantize(data: Tensor, type: BlockType, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers that packed rows stand for: uint8 [..., row bytes] -> ``dtype`` [..., K], a tensor of its own.

    Computed in float32 as ggml does, bit for bit, and then rounded to ``dtype``. ``data`` may lie at any address and
    in any strides. Raises ValueError when its rows are no whole number of blocks, DgemmaError when the type has a
    codebook and that is not here (see `codebooks`).
    """
    if data.dtype != torch.uint8:
        raise ValueError(f"packed weights are uint8, not {str(data.dtype).removeprefix('torch.')}")
    if data.shape[-1] % type.nbytes:
        raise ValueError(f"a row of {data.shape[-1]} bytes is no whole number of {type.name} blocks of {type.nbytes}")
    out = torch.empty(*data.shape[:-1], type.row_width(data.shape[-1]), dtype=dtype, device=data.device)
    blocks, numbers = data.reshape(-1, type.nbytes), out.view(-1, type.block)
    step = max(1, _CHUNK // type.block)
    decode = _DECODERS[type.name]
    for start in range(0, len(blocks), step):
        numbers[start : start + step] = decode(blocks[start : start + step])
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


def _f32(blocks: Tensor) -> Tensor:
    return number_at(blocks, torch.float32)


def _bf16(blocks: Tensor) -> Tensor:
    return number_at(blocks, torch.bfloat16)


def _q4_0(blocks: Tensor) -> Tensor:
    return half(blocks) * (spread(blocks[:, 2:], 4, 16).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return half(blocks) * spread(blocks[:, 4:], 4, 16).float() + half(blocks, 2)


def _five_bits(low: Tensor, high: Tensor) -> Tensor:
    """Four low bits [n, 16 bytes] and one high bit [n, 4 bytes] of 32 numbers -> float32 [n, 32]."""
    return (spread(low, 4, 16) | (spread(high, 1, 1) << 4)).float()


def _q5_0(blocks: Tensor) -> Tensor:
    return half(blocks) * (_five_bits(blocks[:, 6:], blocks[:, 2:6]) - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    return half(blocks) * _five_bits(blocks[:, 8:], blocks[:, 4:8]) + half(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return half(blocks) * _signed(blocks[:, 2:])


def _signed(packed: Tensor) -> Tensor:
    return packed.clone(memory_format=torch.contiguous_format).view(torch.int8).float()


def _scaled(scales: Tensor, numbers: Tensor, minima: Tensor | None = None) -> Tensor:
    """scales [n, g] times numbers [n, g · width], less minima [n, g]."""
    out = scales.unsqueeze(2) * numbers.view(*scales.shape, -1)
    return (out if minima is None else out.sub_(minima.unsqueeze(2))).flatten(1)


def _q2_k(blocks: Tensor) -> Tensor:
    scales = half(blocks, 80) * (blocks[:, :16] & 15).float()
    minima = half(blocks, 82) * (blocks[:, :16] >> 4).float()
    return _scaled(scales, spread(blocks[:, 16:80], 2, 32).float(), minima)


def _q3_k(blocks: Tensor) -> Tensor:
    scales = spread(blocks[:, 96:104], 4, 8) | (spread(blocks[:, 104:108], 2, 4) << 4)
    numbers = spread(blocks[:, 32:96], 2, 32) | (spread(blocks[:, :32], 1, 32) << 2)
    return _scaled(half(blocks, 108) * (scales.float() - 32), numbers.float() - 4)


def _q4_k(blocks: Tensor) -> Tensor:
    scales, minima = spread_scales(blocks[:, 4:16])
    numbers = spread(blocks[:, 16:], 4, 32).float()
    return _scaled(half(blocks) * scales.float(), numbers, half(blocks, 2) * minima.float())


def _q5_k(blocks: Tensor) -> Tensor:
    scales, minima = spread_scales(blocks[:, 4:16])
    numbers = (spread(blocks[:, 48:], 4, 32) | (spread(blocks[:, 16:48], 1, 32) << 4)).float()
    return _scaled(half(blocks) * scales.float(), numbers, half(blocks, 2) * minima.float())


def _q6_k(blocks: Tensor) -> Tensor:
    numbers = spread(blocks[:, :128], 4, 64) | (spread(blocks[:, 128:192], 2, 32) << 4)
    return _scaled(half(blocks, 208) * _signed(blocks[:, 192:208]), numbers.float() - 32)


def _table(packed: Tensor, values: tuple[int, ...], group: int) -> Tensor:
    """Nibbles as `spread` takes them apart -> the values that they number, float32."""
    return torch.tensor(values, dtype=torch.float32, device=packed.device)[spread(packed, 4, group).int()]


def _iq4_nl(blocks: Tensor) -> Tensor:
    return half(blocks) * _table(blocks[:, 2:], IQ4_VALUES, 16)


def _iq4_xs(blocks: Tensor) -> Tensor:
    scales = spread(blocks[:, 4:8], 4, 1) | (spread(blocks[:, 2:4], 2, 1) << 4)
    return _scaled(half(blocks) * (scales.float() - 32), _table(blocks[:, 8:], IQ4_VALUES, 16))


def _ternary(packed: Tensor, digits: int) -> Tensor:
    """``digits`` numbers of -1, 0, 1 in each byte, which is a fraction of 256 with as many base-3 places: uint8 [n, m]
    -> float32 [n, digits · m], the first digit of all bytes first."""
    powers = torch.tensor([1, 3, 9, 27, 81][:digits], dtype=torch.uint8, device=packed.device).view(-1, 1)
    rest = (packed.unsqueeze(1) * powers).short()  # modulo 256: what is left behind the digits before
    return ((rest * 3) >> 8).flatten(1).float() - 1


def _tq1_0(blocks: Tensor) -> Tensor:
    parts = (_ternary(blocks[:, :32], 5), _ternary(blocks[:, 32:48], 5), _ternary(blocks[:, 48:52], 4))
    return half(blocks, 52) * torch.cat(parts, dim=1)


def _tq2_0(blocks: Tensor) -> Tensor:
    return half(blocks, 64) * (spread(blocks[:, :64], 2, 32).float() - 1)


def _mxfp4(blocks: Tensor) -> Tensor:
    power = blocks[:, :1].int() - 1  # of half the scale, for the values are doubled; the two smallest are subnormal
    bits = torch.where(power < 1, 0x0020_0000 << (power + 1).clamp(max=1), power << 23)
    return bits.view(torch.float32) * _table(blocks[:, 1:], FP4_VALUES, 16)


def _nvfp4(blocks: Tensor) -> Tensor:
    scales = blocks[:, :4].int()  # unsigned floats of four bits of exponent and three of mantissa
    exponent, mantissa = (scales >> 3) & 15, (scales & 7).float()
    powers = torch.ldexp(torch.ones_like(mantissa), exponent - 7)
    halves = torch.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * powers) * 0.5
    return _scaled(torch.where(scales == 0x7F, 0.0, halves), _table(blocks[:, 4:], FP4_VALUES, 8))


_DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "F32": _f32, "F16": half, "BF16": _bf16, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1,
    "Q8_0": _q8_0, "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k, "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs, "TQ1_0": _tq1_0, "TQ2_0": _tq2_0, "MXFP4": _mxfp4, "NVFP4": _nvfp4, **DECODERS,
}  # uint8 [n, nbytes] -> float32 [n, block]
