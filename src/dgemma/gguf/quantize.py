"""Packing weights into ggml's block formats: the inverse of `blocks.dequantize`, in plain torch.

Q8_0, Q4_0, Q4_1, Q5_0, Q5_1 and BF16 round as ggml's reference does, bit for bit. The K-quants' blocks leave a choice
of scales and minima; here they are searched for the least squared error. The same numbers always give the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dgemma.gguf.blocks import BlockType, gather, gather_scales

# Weights packed at a time: few enough to stay in a core's cache, and fewer than torch splits over its threads (32768).
# Operations this small gain nothing from threads, torch's or Python's: those would wait for each other all the time.
_CHUNK = 30 * 1024

# A block's range is divided by its number of steps plus each of these; Lloyd's iteration starts from the best.
_AFFINE_TRIALS = (-2.5, -2.1, -1.7, -1.3, -0.9, -0.5, -0.1, 0.3)
_SYMMETRIC_TRIALS = (-2.0, -1.5, -1.0, -0.5, 0.0, 0.5)

_ROUNDER = 1.5 * 2.0**23  # floats of this size are whole numbers

Encoder = Callable[[Tensor], Tensor]  # float32 [n, block] -> uint8 [n, nbytes]


def can_quantize(type: BlockType) -> bool:
    """Whether `quantize` packs this type (every type can be read)."""
    return type.name in _ENCODERS


def quantize(x: Tensor, type: BlockType) -> Tensor:
    """Pack rows of finite numbers: any float [..., K] -> uint8 [..., row bytes].

    Raises ValueError when K is no whole number of blocks, and for a type that is only read.
    """
    if not can_quantize(type):
        raise ValueError(f"{type.name} can be read but not written; {', '.join(_ENCODERS)} can be written")
    out = torch.empty(*x.shape[:-1], type.row_bytes(x.shape[-1]), dtype=torch.uint8)
    numbers, blocks = x.detach().reshape(-1, type.block), out.view(-1, type.nbytes)
    step = max(1, _CHUNK // type.block)
    for start in range(0, len(blocks), step):
        piece = numbers[start : start + step].float()
        # Whole vectors only: what is left over from one would be rounded a little differently.
        whole = F.pad(piece, (0, 0, 0, -len(piece) % 8))
        blocks[start : start + step] = _ENCODERS[type.name](whole)[: len(piece)]
    return out


def _bytes(x: Tensor) -> Tensor:
    """The bytes of one number per block: [n, 1] -> uint8 [n, its size]."""
    return x.contiguous().view(torch.uint8)


def _half(x: Tensor) -> Tensor:
    return _bytes(x.half())


def _inverse(x: Tensor) -> Tensor:
    """1 / x, and 0 where that is not finite."""
    return (1 / x).nan_to_num_(0.0, 0.0, 0.0)


def _round_(x: Tensor) -> Tensor:
    """Round |x| < 2^22 to whole numbers in place, halves to even.

    torch's own round, floor and trunc split even a small tensor over torch's threads.
    """
    return x.add_(_ROUNDER).sub_(_ROUNDER)


def _q8_0(x: Tensor) -> Tensor:
    scale = x.abs().amax(1, keepdim=True) / 127
    size = (x * _inverse(scale)).abs()
    whole = size.to(torch.uint8).float()
    rounded = whole + (size - whole >= 0.5)  # halves go away from zero
    return torch.cat([_half(scale), _bytes(rounded.copysign(x).to(torch.int8))], dim=1)


def _symmetric(x: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """The scale that takes the largest number of each block to -half, and the levels 0 … 2·half - 1."""
    scale = x.gather(1, x.abs().argmax(1, keepdim=True)) / -half
    levels = (x * _inverse(scale) + (half + 0.5)).clamp(0, 2 * half - 1)  # which uint8 cuts to whole numbers
    return scale, levels.to(torch.uint8)


def _affine(x: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scale and minimum that spread the levels 0 … top over each block's range, and the levels."""
    low = x.amin(1, keepdim=True)
    scale = (x.amax(1, keepdim=True) - low) / top
    levels = ((x - low) * _inverse(scale) + 0.5).clamp(0, top)
    return scale, low, levels.to(torch.uint8)


def _q4_0(x: Tensor) -> Tensor:
    scale, levels = _symmetric(x, 8)
    return torch.cat([_half(scale), gather(levels, 4, 16)], dim=1)


def _q4_1(x: Tensor) -> Tensor:
    scale, low, levels = _affine(x, 15)
    return torch.cat([_half(scale), _half(low), gather(levels, 4, 16)], dim=1)


def _q5_0(x: Tensor) -> Tensor:
    scale, levels = _symmetric(x, 16)
    return torch.cat([_half(scale), gather(levels >> 4, 1, 1), gather(levels & 15, 4, 16)], dim=1)


def _q5_1(x: Tensor) -> Tensor:
    scale, low, levels = _affine(x, 31)
    return torch.cat([_half(scale), _half(low), gather(levels >> 4, 1, 1), gather(levels & 15, 4, 16)], dim=1)


def _q4_k(x: Tensor) -> Tensor:
    head, levels = _affine_k(x, 15)
    return torch.cat([head, gather(levels, 4, 32)], dim=1)


def _q5_k(x: Tensor) -> Tensor:
    head, levels = _affine_k(x, 31)
    return torch.cat([head, gather(levels >> 4, 1, 32), gather(levels & 15, 4, 32)], dim=1)


def _affine_k(x: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """x [n, 256] -> the 16 bytes of scales and minima [n, 16] and the levels 0 … top [n, 256], both uint8."""
    part = x.view(-1, 8, 32).permute(2, 1, 0).contiguous()  # [32, 8, n]: everything below works on whole vectors
    scale, minimum = _search_affine(part, top)
    scale_unit, scales = _six_bits(scale)
    minimum_unit, minima = _six_bits(minimum)
    scale = scale_unit * scales
    inverse = _inverse(scale)
    levels = _round_(torch.addcmul(minimum_unit * minima * inverse, part, inverse)).clamp_(0, top)
    # The scales were rounded, so the best minima are others now.
    minimum = torch.addcmul(-part, levels, scale).mean(0)
    minima = _round_((minimum * _inverse(minimum_unit)).clamp_(0, 63))
    levels = _round_(torch.addcmul(minimum_unit * minima * inverse, part, inverse, out=levels)).clamp_(0, top)
    head = [_half(scale_unit.view(-1, 1)), _half(minimum_unit.view(-1, 1)),
            gather_scales(scales.t().to(torch.uint8), minima.t().to(torch.uint8))]
    return torch.cat(head, dim=1), levels.to(torch.uint8).permute(2, 1, 0).reshape(len(x), 256)


def _six_bits(factors: Tensor) -> tuple[Tensor, Tensor]:
    """Factors [8, n] ≥ 0 as a unit [n] that half precision holds, times whole numbers 0 … 63 [8, n]."""
    unit = (factors.amax(0) / 63).clamp_(max=65504).half().float()
    return unit, _round_((factors * _inverse(unit)).clamp_(0, 63))


def _search_affine(x: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Scales and minima ≥ 0 [...] for which ``scale · level - minimum``, levels 0 … top, is nearest to x [w, ...]."""
    width, total = x.shape[0], x.sum(0)
    low = x.amin(0).clamp_(max=0)
    reach = x.amax(0) - low
    levels, product = torch.empty_like(x), torch.empty_like(x)

    def fit(inverses: Tensor, minimum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Round with each of the inverse scales [t, ...], then draw the line of least squares through the result."""
        sum_1, sum_2, sum_x = torch.empty(3, *inverses.shape)
        for i, inverse in enumerate(inverses):
            _round_(torch.addcmul(minimum * inverse, x, inverse, out=levels)).clamp_(0, top)
            torch.sum(levels, 0, out=sum_1[i])
            torch.sum(torch.mul(levels, levels, out=product), 0, out=sum_2[i])
            torch.sum(torch.mul(levels, x, out=product), 0, out=sum_x[i])
        spread = width * sum_2 - sum_1 * sum_1
        scale = (width * sum_x - total * sum_1) / spread
        offset = (sum_1 * sum_x - total * sum_2) / spread
        scale = torch.where(offset < 0, sum_x / sum_2, scale)  # the format has no offset that way
        offset = offset.clamp_(min=0)
        error = scale * (scale * sum_2 - 2 * (sum_x + offset * sum_1)) + offset * (width * offset + 2 * total)
        return scale, offset, torch.where(spread > 0, error, torch.inf)

    trials = torch.tensor([top + trial for trial in _AFFINE_TRIALS]).view(-1, *[1] * low.ndim)
    scale, minimum, error = _best(*fit(_inverse(reach) * trials, -low))
    refined = fit(_inverse(scale)[None], minimum)
    scale, minimum, error = _best(*(torch.cat([old[None], new]) for old, new in
                                    zip((scale, minimum, error), refined, strict=True)))
    flat = error.isinf()  # all numbers of the part are one, or all but: no line goes through one level
    return torch.where(flat, reach / top, scale), torch.where(flat, -low, minimum)


def _best(*fits: Tensor) -> list[Tensor]:
    """Of every row of trials [t, ...] that with the least value in the last of ``fits``, the first one of equals."""
    best = [values[0].clone() for values in fits]
    for trial in range(1, len(fits[-1])):  # faster than argmin and gather
        better = fits[-1][trial] < best[-1]
        for kept, values in zip(best, fits, strict=True):
            torch.where(better, values[trial], kept, out=kept)
    return best


def _q6_k(x: Tensor) -> Tensor:
    part = x.view(-1, 16, 16).permute(2, 1, 0).contiguous()  # [16, 16, n]
    scale = _search_symmetric(part, 32)
    largest = scale.gather(0, scale.abs().argmax(0, keepdim=True))[0]
    unit = (largest / -128).clamp_(-65504, 65504).half().float()
    scales = _round_((scale * _inverse(unit)).clamp_(-128, 127))
    levels = _round_((part * _inverse(unit * scales)).clamp_(-32, 31)).add_(32)
    levels = levels.to(torch.uint8).permute(2, 1, 0).reshape(len(x), 256)
    return torch.cat([gather(levels & 15, 4, 64), gather(levels >> 4, 2, 32),
                      _bytes(scales.t().to(torch.int8)), _half(unit.view(-1, 1))], dim=1)


def _search_symmetric(x: Tensor, half: int) -> Tensor:
    """Scales [...] of either sign for which ``scale · level``, levels -half … half - 1, is nearest to x [w, ...]."""
    low, high = x.amin(0), x.amax(0)
    furthest = torch.where(high > -low, high, low)
    levels, product = torch.empty_like(x), torch.empty_like(x)

    def fit(inverses: Tensor) -> tuple[Tensor, Tensor]:
        """Round with each of the inverse scales [t, ...], then find the best scale: it, and how it lowers the error."""
        sum_2, sum_x = torch.empty(2, *inverses.shape)
        for i, inverse in enumerate(inverses):
            _round_(torch.mul(x, inverse, out=levels)).clamp_(-half, half - 1)
            torch.sum(torch.mul(levels, levels, out=product), 0, out=sum_2[i])
            torch.sum(torch.mul(levels, x, out=product), 0, out=sum_x[i])
        scale = sum_x * _inverse(sum_2)
        return scale, -scale * sum_x

    trials = torch.tensor([-half - trial for trial in _SYMMETRIC_TRIALS]).view(-1, *[1] * low.ndim)
    scale, gain = _best(*fit(_inverse(furthest) * trials))
    refined = fit(_inverse(scale)[None])
    return _best(*(torch.cat([old[None], new]) for old, new in zip((scale, gain), refined, strict=True)))[0]


_ENCODERS: dict[str, Encoder] = {
    "F32": _bytes, "F16": _half, "BF16": lambda x: _bytes(x.bfloat16()), "Q4_0": _q4_0, "Q4_1": _q4_1,
    "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}
