"""Rows of numbers in 8 bits with a scale for every 32 of them: ggml's Q8_0, as the key-value cache keeps it.

The numbers of a row stand together and its scales behind them (a GGUF file has them by turns), so that both are plain
views of one int8 tensor, which can be cut, joined and gathered like any other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 32
GROUP_BYTES = GROUP + 2  # and a float16 scale


def row_bytes(width: int) -> int:
    """The bytes of a row of ``width`` numbers; a last group that is not full takes as much as a full one."""
    return -(-width // GROUP) * GROUP_BYTES


def pack(x: Tensor) -> Tensor:
    """x [..., d] -> int8 [..., row_bytes(d)]; no number is off by more than half its group's scale, max|x| / 127."""
    width = x.shape[-1]
    groups = -(-width // GROUP)
    wide = F.pad(x.float(), (0, groups * GROUP - width)).unflatten(-1, (groups, GROUP))
    scales = (wide.abs().amax(-1) / 127).half()
    # Divided by the scale as it is stored: its rounding then costs nothing but in the largest number.
    numbers = (wide / scales.float().clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)).round_()
    numbers = numbers.clamp_(-127, 127).to(torch.int8).flatten(-2)
    return torch.cat([numbers, scales.unsqueeze(-1).view(torch.int8).flatten(-2)], dim=-1)


def unpack(packed: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """int8 [..., row_bytes(width)] -> [..., width]; the inverse of `pack` but for its rounding."""
    groups = packed.shape[-1] // GROUP_BYTES
    numbers, scales = packed.split([groups * GROUP, groups * 2], dim=-1)
    wide = numbers.unflatten(-1, (groups, GROUP)).float().mul_(scales.view(torch.float16).float().unsqueeze(-1))
    return wide.flatten(-2)[..., :width].to(dtype)
