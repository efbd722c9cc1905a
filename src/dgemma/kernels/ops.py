"""The packed products as torch operators: ``torch.ops.dgemma.packed_linear`` and ``packed_experts``.

So they have a schema, and shapes for torch's tracers. On the CPU they are the C++ kernels (`native`). What does not fit
is a ValueError on every device.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from dgemma.errors import DgemmaError
from dgemma.kernels import native

_LIBRARY = torch.library.Library("dgemma", "DEF")
_LIBRARY.define("packed_linear(Tensor x, Tensor weight, int code, int width) -> Tensor")
_LIBRARY.define("packed_experts(Tensor x, Tensor gate_up, int gate_up_code, Tensor down, int down_code, int inner, "
                "Tensor weights, Tensor experts) -> Tensor")


def _linear_shape(x: Tensor, weight: Tensor, code: int, width: int) -> Tensor:
    native.check_linear(x, weight, code, width)
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.float32)


def _experts_shape(x: Tensor, *arguments) -> Tensor:
    native.check_experts(x, *arguments)
    return torch.empty_like(x, dtype=torch.float32)


def _not_there(*_: object) -> NoReturn:
    raise DgemmaError("there are no kernels for packed weights on a GPU yet: load the model there without keeping it "
                      "packed (dgemma.load unpacks it), or run it on the CPU")


for _name, _cpu, _meta in (("packed_linear", native.linear, _linear_shape),
                           ("packed_experts", native.expert_mlp, _experts_shape)):
    _LIBRARY.impl(_name, _cpu, "CPU")
    _LIBRARY.impl(_name, _meta, "Meta")
    _LIBRARY.impl(_name, _not_there, "CUDA")


def packed_linear(x: Tensor, weight: Tensor, code: int, width: int) -> Tensor:
    """x [M, K] · Wᵀ -> [M, N] float32, W in blocks of ggml's type ``code``: uint8 [N, row bytes], K = ``width``."""
    return torch.ops.dgemma.packed_linear(x, weight, code, width)


def packed_experts(x: Tensor, gate_up: Tensor, gate_up_code: int, down: Tensor, down_code: int, inner: int,
                   weights: Tensor, experts: Tensor) -> Tensor:
    """`expert_mlp` over packed experts: uint8 [E, 2I, row bytes] and [E, D, row bytes], I = ``inner``."""
    return torch.ops.dgemma.packed_experts(x, gate_up, gate_up_code, down, down_code, inner, weights, experts)
