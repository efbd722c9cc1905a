"""RMSNorm over the last axis."""

from __future__ import annotations

import torch
from torch import Tensor

from dgemma.kernels import native


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None = None) -> Tensor:
    """(residual +) x · (mean(x²) + eps)^-0.5 · weight over the last axis, in float32, returned in x's dtype.

    x [..., D]; weight [D]; residual of x's shape. In one pass where the C++ kernels are there, x is float32 on a CPU
    and no gradient is wanted.
    """
    if x.dtype == torch.float32 and x.device.type == "cpu" and not torch.is_grad_enabled() and native.available():
        return native.rms_norm(x, weight, eps, residual)
    wide = x.float()
    out = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    out = (out if weight is None else out * weight.float()).to(x.dtype)
    return out if residual is None else residual + out
