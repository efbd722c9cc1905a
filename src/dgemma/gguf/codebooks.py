"""The block types whose weights are rows of a codebook: IQ1, IQ2 and IQ3, read as ggml reads them.

A codebook ("grid") is a list of a few hundred groups of 8 or 4 small whole numbers, found by optimisation and written
down in ggml's sources. It cannot be computed, so it is read from the `gguf` package, which is asked for when a file has
such a type and not before.

Every type comes down to the same: indices into the grid, a sign for each number, a scale for each 16 or 32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from dgemma.errors import DgemmaError

GRIDS = {"IQ2_XXS": (256, 8), "IQ2_XS": (512, 8), "IQ2_S": (1024, 8), "IQ3_XXS": (256, 4), "IQ3_S": (512, 4),
         "IQ1_S": (2048, 8), "IQ1_M": (2048, 8)}  # type -> (groups, numbers in each)

_DELTA = 0.125  # what IQ1 shifts its numbers by, up or down


def number_at(blocks: Tensor, kind: torch.dtype, at: int = 0) -> Tensor:
    """The number of ``kind`` at byte ``at`` of every block, float32 [n, 1]."""
    # A clone: a slice of a mapped file may start at an odd address, where no float can be viewed.
    field = blocks[:, at : at + kind.itemsize].clone(memory_format=torch.contiguous_format)
    return field.view(kind).float()


def half(blocks: Tensor, at: int = 0) -> Tensor:
    """The float16 at byte ``at`` of every block, float32 [n, 1]."""
    return number_at(blocks, torch.float16, at)


def missing_grid(name: str) -> str:
    """Why weights of this type cannot be read here, and what to do; empty when they can."""
    try:
        if name in GRIDS:
            grid(name)
    except DgemmaError as error:
        return str(error)
    return ""


@cache
def grid(name: str) -> Tensor:
    """A type's codebook, int8 [groups, numbers].

    Raises DgemmaError when the `gguf` package is not there, or has no such codebook.
    """
    advice = "pip install 'dgemma[iq]'"
    try:
        from gguf import quants
    except ImportError as error:
        raise DgemmaError(f"{name} weights: their codebook comes with the gguf package, which is not installed: "
                          f"{advice}") from error
    try:
        theirs = getattr(quants, name)
        theirs.init_grid()
        numbers = np.asarray(theirs.grid).reshape(GRIDS[name])
    except (AttributeError, ValueError) as error:
        raise DgemmaError(f"{name} weights: this gguf package has no codebook for them ({error}): {advice}") from error
    return torch.from_numpy(numbers.astype(np.int8))


def _bits(words: Tensor, width: int, count: int) -> Tensor:
    """The lowest ``count`` fields of ``width`` bits in each word, int [..., n] -> [..., n, count]."""
    shifts = torch.arange(count, dtype=words.dtype, device=words.device) * width
    return (words.unsqueeze(-1) >> shifts) & ((1 << width) - 1)


def _numbers(blocks: Tensor, start: int, stop: int, kind: torch.dtype) -> Tensor:
    """Bytes start to stop of every block as whole numbers of ``kind``, int32 (int64 for 32 bits) [n, …]."""
    part = blocks[:, start:stop].clone(memory_format=torch.contiguous_format)
    if kind == torch.uint8:
        return part.int()
    return part.view(kind).int() & 0xFFFF if kind == torch.int16 else part.view(kind).long() & 0xFFFF_FFFF


def _eight_signs(seven: Tensor) -> Tensor:
    """Seven sign bits -> eight: the last makes their number even."""
    return seven | (_bits(seven, 1, 7).sum(-1, dtype=seven.dtype) & 1) << 7


def _signed(name: str, indices: Tensor, signs: Tensor, scales: Tensor) -> Tensor:
    """indices [n, 256 / numbers] into the grid, signs [n, 32] of eight bits, scales [n, g] -> [n, 256] float32."""
    values = grid(name).to(indices.device)[indices.flatten()].float().view(len(indices), 32, 8)
    values = torch.where(_bits(signs, 1, 8) == 1, -values, values)
    return (values.view(*scales.shape, -1) * scales.unsqueeze(-1)).flatten(1)


def _quarters(scales: Tensor, factor: float) -> Tensor:
    """Scales as IQ2 and IQ3_XXS write them: (s + ½) · factor."""
    return (scales.float() + 0.5) * factor


def _iq2_xxs(blocks: Tensor) -> Tensor:
    words = _numbers(blocks, 2, 66, torch.int32).view(-1, 8, 2)  # four indices, then 4 · 7 signs and the scale
    signs = _eight_signs(_bits(words[..., 1], 7, 4)).flatten(1)
    return _signed("IQ2_XXS", _bits(words[..., 0], 8, 4).flatten(1), signs,
                   half(blocks, 0) * _quarters(words[..., 1] >> 28, 0.25))


def _iq2_xs(blocks: Tensor) -> Tensor:
    words = _numbers(blocks, 2, 66, torch.int16)  # an index of 9 bits and 7 signs
    scales = _bits(_numbers(blocks, 66, 74, torch.uint8), 4, 2).flatten(1)
    return _signed("IQ2_XS", words & 511, _eight_signs(words >> 9), half(blocks, 0) * _quarters(scales, 0.25))


def _iq2_s(blocks: Tensor) -> Tensor:
    high = _bits(_numbers(blocks, 66, 74, torch.uint8), 2, 4).flatten(1)
    scales = _bits(_numbers(blocks, 74, 82, torch.uint8), 4, 2).flatten(1)
    return _signed("IQ2_S", _numbers(blocks, 2, 34, torch.uint8) | high << 8, _numbers(blocks, 34, 66, torch.uint8),
                   half(blocks, 0) * _quarters(scales, 0.25))


def _iq3_xxs(blocks: Tensor) -> Tensor:
    words = _numbers(blocks, 66, 98, torch.int32)  # 4 · 7 signs and the scale
    return _signed("IQ3_XXS", _numbers(blocks, 2, 66, torch.uint8), _eight_signs(_bits(words, 7, 4)).flatten(1),
                   half(blocks, 0) * _quarters(words >> 28, 0.5))


def _iq3_s(blocks: Tensor) -> Tensor:
    high = _bits(_numbers(blocks, 66, 74, torch.uint8), 1, 8).flatten(1)
    scales = _bits(_numbers(blocks, 106, 110, torch.uint8), 4, 2).flatten(1)
    return _signed("IQ3_S", _numbers(blocks, 2, 66, torch.uint8) | high << 8, _numbers(blocks, 74, 106, torch.uint8),
                   half(blocks, 0) * (1 + 2 * scales).float())


def _shifted(name: str, indices: Tensor, down: Tensor, scales: Tensor) -> Tensor:
    """indices [n, 32] into the grid, whether each eight is shifted down, scales [n, g] -> [n, 256] float32."""
    values = grid(name).to(indices.device)[indices.flatten()].float().view(len(indices), 32, 8)
    values += torch.where(down == 0, _DELTA, -_DELTA).unsqueeze(-1)
    return (values.view(*scales.shape, -1) * scales.unsqueeze(-1)).flatten(1)


def _iq1_s(blocks: Tensor) -> Tensor:
    words = _numbers(blocks, 34, 50, torch.int16)  # 4 · 3 high bits of indices, a scale of 3 bits, the shift
    indices = _numbers(blocks, 2, 34, torch.uint8) | _bits(words, 3, 4).flatten(1) << 8
    return _shifted("IQ1_S", indices, (words >> 15).repeat_interleave(4, dim=1),
                    half(blocks, 0) * (2 * (words >> 12 & 7) + 1).float())


def _iq1_m(blocks: Tensor) -> Tensor:
    words = _numbers(blocks, 48, 56, torch.int16)  # 4 · 3 bits of scales, and four bits of the scale of all
    whole = (_bits(words, 12, 2)[..., 1] << torch.arange(0, 16, 4, dtype=torch.int32, device=words.device)).sum(1)
    whole = whole.to(torch.uint16).view(torch.float16).float().unsqueeze(1)
    high = _bits(_numbers(blocks, 32, 48, torch.uint8), 4, 2).flatten(1)  # 3 high bits of an index and a shift
    indices = _numbers(blocks, 0, 32, torch.uint8) | (high & 7) << 8
    return _shifted("IQ1_M", indices, high >> 3, whole * (2 * _bits(words, 3, 4).flatten(1) + 1).float())


DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "IQ2_XXS": _iq2_xxs, "IQ2_XS": _iq2_xs, "IQ2_S": _iq2_s, "IQ3_XXS": _iq3_xxs, "IQ3_S": _iq3_s, "IQ1_S": _iq1_s,
    "IQ1_M": _iq1_m,
}  # uint8 [n, nbytes] -> float32 [n, 256]
