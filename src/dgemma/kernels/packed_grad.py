"""The gradient through a product with a packed weight, which itself stays frozen: what QLoRA trains through.

Works on activations and packed blocks, whatever computes the product itself; knows nothing of the model. The way back
uses the exact weights, in bfloat16 where the processor multiplies that faster (sums are float32), and takes no notice
of the activations' rounding to int8 on the way there (a straight-through estimate: the derivative of rounding would be
zero).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dgemma.kernels import native
from dgemma.kernels.attention import fast_bf16
from dgemma.kernels.packed import PackedWeight

PIECE = 1 << 22  # weights expanded at a time, 16 MiB

Compute = Callable[[Tensor, PackedWeight], Tensor]


def differentiable(x: Tensor, weight: PackedWeight, compute: Compute) -> Tensor:
    """``compute(x [M, K], weight [N, K])`` [M, N], and x's gradient: that of the product's, times the weight."""
    return _Product.apply(x, weight, compute)  # type: ignore[return-value]


def wants_gradient(*tensors: Tensor) -> bool:
    """Whether autograd is recording what becomes of any of these."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def pieces(weight: PackedWeight | Tensor) -> Iterator[tuple[slice, Tensor]]:
    """A matrix [N, K] as float32, some rows at a time: which they are, and the numbers."""
    step = max(1, PIECE // weight.shape[-1])
    for start in range(0, weight.shape[0], step):
        rows = slice(start, min(start + step, weight.shape[0]))
        yield rows, expanded(weight[rows], torch.float32)


def expanded(weight: PackedWeight | Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers [N, K] of a matrix; float32 or bfloat16."""
    if isinstance(weight, Tensor):
        return weight.to(dtype)
    if weight.device.type == "cpu" and native.takes(weight.type):
        return native.dequantize(weight.data, weight.type.code, weight.shape[-1], None, dtype)
    return weight.dequantize(dtype)


def gradient_dtype(weight: PackedWeight | Tensor, x: Tensor) -> torch.dtype:
    """What the products on the way back are computed in."""
    if isinstance(weight, Tensor):
        return weight.dtype
    return torch.bfloat16 if x.dtype == torch.bfloat16 or (x.device.type == "cpu" and fast_bf16()) else torch.float32


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: PackedWeight, compute: Compute) -> Tensor:
        ctx.weight, ctx.dtype, ctx.products = weight, x.dtype, gradient_dtype(weight, x)
        return compute(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradients[0].to(ctx.products)
        out = gradient.new_zeros(gradient.shape[0], ctx.weight.shape[-1], dtype=torch.float32)
        step = max(1, PIECE // ctx.weight.shape[-1])
        for start in range(0, ctx.weight.shape[0], step):
            rows = slice(start, start + step)
            out += gradient[:, rows] @ expanded(ctx.weight[rows], ctx.products)
        return out.to(ctx.dtype), None, None
