"""RMSNorm over the last axis, and the rotary embedding that follows it in queries and keys.

In one pass of C++ where the kernels are there, the numbers are float32 on a CPU and no gradient is wanted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dgemma.kernels import native

Rope = tuple[Tensor, Tensor]  # cos and sin [B, T, 1, d], halves repeated (the half-split layout)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None = None) -> Tensor:
    """(residual +) x · (mean(x²) + eps)^-0.5 · weight over the last axis, in float32, returned in x's dtype.

    x [..., D]; weight [D]; residual of x's shape.
    """
    if _natively(x):
        return native.rms_norm(x, weight, eps, residual)
    wide = x.float()
    out = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    out = (out if weight is None else out * weight.float()).to(x.dtype)
    return out if residual is None else residual + out


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Apply rotary embedding to x [B, T, H, d]."""
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def norm_rotate(x: Tensor, weight: Tensor, eps: float, rope: Rope) -> Tensor:
    """`rms_norm` of every head of x [B, T, H, d] with weight [d], then `rotate`."""
    if _natively(x) and rope[0].shape[:2] == x.shape[:2]:
        return native.norm_rotate(x, weight, eps, *rope)
    return rotate(rms_norm(x, weight, eps), rope)


def _natively(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_grad_enabled() and native.available()
