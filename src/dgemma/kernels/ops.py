"""The packed products as torch operators: ``torch.ops.dgemma.packed_linear`` and ``packed_experts``.

So they have a schema, and shapes for torch's tracers. On the CPU they are the C++ kernels (`native`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dgemma.kernels import native

_LIBRARY = torch.library.Library("dgemma", "DEF")
_LIBRARY.define("packed_linear(Tensor x, Tensor weight, int code, int width) -> Tensor")
_LIBRARY.define("packed_experts(Tensor x, Tensor gate_up, int gate_up_code, Tensor down, int down_code, int inner, "
                "Tensor weights, Tensor experts) -> Tensor")
_LIBRARY.impl("packed_linear", native.linear, "CPU")
_LIBRARY.impl("packed_experts", native.expert_mlp, "CPU")
_LIBRARY.impl("packed_linear", lambda x, weight, code, width: x.new_empty(
    x.shape[0], weight.shape[0], dtype=torch.float32), "Meta")
_LIBRARY.impl("packed_experts", lambda x, *_: torch.empty_like(x, dtype=torch.float32), "Meta")


def packed_linear(x: Tensor, weight: Tensor, code: int, width: int) -> Tensor:
    """x [M, K] · Wᵀ -> [M, N] float32, W in blocks of ggml's type ``code``: uint8 [N, row bytes], K = ``width``."""
    return torch.ops.dgemma.packed_linear(x, weight, code, width)


def packed_experts(x: Tensor, gate_up: Tensor, gate_up_code: int, down: Tensor, down_code: int, inner: int,
                   weights: Tensor, experts: Tensor) -> Tensor:
    """`expert_mlp` over packed experts: uint8 [E, 2I, row bytes] and [E, D, row bytes], I = ``inner``."""
    return torch.ops.dgemma.packed_experts(x, gate_up, gate_up_code, down, down_code, inner, weights, experts)
