"""Products with a weight that is a plain tensor or stays packed, and the gradients through them: one call for both.

Packed weights run on the C++ kernels where they were built, else on plain torch with the same arithmetic: activations
as int8 with one scale per row and `SUPER` inputs. A packed weight stays frozen; the way back through it, which QLoRA
trains through, uses the exact weights, in bfloat16 where the processor multiplies that faster (sums are float32), and
takes no notice of the activations' rounding to int8 on the way there (a straight-through estimate: the derivative of
rounding would be zero). Knows nothing of the model.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dgemma.kernels import native
from dgemma.kernels.attention import fast_bf16
from dgemma.kernels.packed import PackedWeight

Weight = Tensor | PackedWeight

SUPER = 256  # inputs that share an activation scale
PIECE = 1 << 22  # weights expanded at a time, 16 MiB


def linear(x: Tensor, weight: Weight) -> Tensor:
    """x [..., K] · Wᵀ with W [N, K] -> [..., N], in x's dtype. A packed weight passes x's gradient on and has none."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight)
    plain = weight.plain()
    if plain is not None:
        return F.linear(x.to(plain.dtype), plain).to(x.dtype)
    flat = x.reshape(-1, x.shape[-1])
    out: Tensor = _Product.apply(flat, weight) if wants_gradient(x) else _packed_linear(flat, weight)  # type: ignore
    return out.view(*x.shape[:-1], weight.shape[-2]).to(x.dtype)


def embedding(token_ids: Tensor, table: Weight) -> Tensor:
    """Rows of a table [V, D] by index [...] -> [..., D]; float32 from a packed one."""
    if isinstance(table, Tensor):
        return F.embedding(token_ids, table)
    plain = table.plain()
    if plain is not None:
        return F.embedding(token_ids, plain).float()
    flat = token_ids.flatten()
    if len(flat) and not 0 <= int(flat.min()) <= int(flat.max()) < table.shape[0]:
        raise IndexError(f"token ids must be in 0..{table.shape[0] - 1}")
    if on_native(table):
        rows = native.dequantize(table.data, table.type.code, table.shape[-1], flat, torch.float32)
    else:
        rows = table[flat].dequantize()
    return rows.view(*token_ids.shape, table.shape[-1])


def mix_rows(soft: Tensor, decay: Tensor, weights: Tensor, table: Weight) -> None:
    """soft [M, D] = soft · decay [M] + weights [M, n] · T, in place, with T [n, D]; all but T float32.

    The kernels multiply in bfloat16 where the processor has that (sums are float32): weights of a softmax and the
    numbers of a packed table have no more digits to lose than that.
    """
    if isinstance(table, PackedWeight) and on_native(table) and soft.is_contiguous():
        native.mix(soft, decay.contiguous(), weights.contiguous(), table.data, table.type.code)
        return
    if isinstance(table, PackedWeight):
        plain = table.plain()
        table = table.dequantize() if plain is None else plain
    soft.mul_(decay.unsqueeze(1)).add_(weights.to(table.dtype) @ table)


def on_native(weight: PackedWeight) -> bool:
    """Whether the C++ kernels can take this weight; says once, and why, if they are not there."""
    if weight.device.type != "cpu" or weight.type.block == 1:
        return False
    if native.takes(weight.type):
        return True
    _say_slow()
    return False


@functools.cache
def _say_slow() -> None:
    warnings.warn(f"dgemma's CPU kernels are {native.why_absent()}: quantised weights run on plain torch, with the "
                  "same results but many times slower.", stacklevel=4)


def as_int8(x: Tensor) -> Tensor:
    """x [M, K] rounded as the kernels round it: to multiples of a 127th of the largest of every `SUPER` inputs."""
    width = x.shape[-1]
    parts = F.pad(x.float(), (0, -width % SUPER)).view(x.shape[0], -1, SUPER)
    peak = parts.abs().amax(-1, keepdim=True)
    inverse = torch.where(peak > 1e-30, 127.0 / peak, 0.0)
    return ((parts * inverse).round() * (peak / 127.0)).view(x.shape[0], -1)[:, :width]


def _packed_linear(x: Tensor, weight: PackedWeight) -> Tensor:
    if on_native(weight):
        return torch.ops.dgemma.packed_linear(x, weight.data, weight.type.code, weight.shape[-1])
    x = as_int8(x)  # exact weights, rounded activations, float32 sums
    step = max(1, PIECE // weight.shape[-1])
    return torch.cat([x @ weight[start : start + step].dequantize().T
                      for start in range(0, weight.shape[0], step)], dim=1)


def wants_gradient(*tensors: Tensor) -> bool:
    """Whether autograd is recording what becomes of any of these."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def pieces(weight: Weight, dtype: torch.dtype = torch.float32) -> Iterator[tuple[slice, Tensor]]:
    """A matrix [N, K] as numbers, some rows at a time: which they are, and `expanded`."""
    step = max(1, PIECE // weight.shape[-1])
    for start in range(0, weight.shape[0], step):
        rows = slice(start, min(start + step, weight.shape[0]))
        yield rows, expanded(weight[rows], dtype)


def expanded(weight: Weight, dtype: torch.dtype) -> Tensor:
    """The numbers [N, K] of a matrix; float32 or bfloat16."""
    if isinstance(weight, Tensor):
        return weight.to(dtype)
    if weight.device.type == "cpu" and native.takes(weight.type):
        return native.dequantize(weight.data, weight.type.code, weight.shape[-1], None, dtype)
    return weight.dequantize(dtype)


def gradient_dtype(weight: Weight, x: Tensor) -> torch.dtype:
    """What the products on the way back are computed in."""
    if isinstance(weight, Tensor):
        return weight.dtype
    return torch.bfloat16 if x.dtype == torch.bfloat16 or (x.device.type == "cpu" and fast_bf16()) else torch.float32


class _Product(torch.autograd.Function):
    """`_packed_linear` with x's gradient: that of the product, times the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: PackedWeight) -> Tensor:
        ctx.weight, ctx.dtype, ctx.products = weight, x.dtype, gradient_dtype(weight, x)
        return _packed_linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].to(ctx.products)
        out = gradient.new_zeros(gradient.shape[0], ctx.weight.shape[-1], dtype=torch.float32)
        for rows, numbers in pieces(ctx.weight, ctx.products):
            out += gradient[:, rows] @ numbers
        return out.to(ctx.dtype), None
