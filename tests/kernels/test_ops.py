"""The packed products are torch operators, with shapes for tracers."""

import pytest
import torch

import dgemma.kernels  # noqa: F401  (registers them)
from dgemma.kernels import native


def test_shapes_are_known_without_data():
    x, weight = torch.empty(5, 64, device="meta"), torch.empty(7, 68, dtype=torch.uint8, device="meta")
    assert torch.ops.dgemma.packed_linear(x, weight, 8, 64).shape == (5, 7)
    experts = torch.empty(4, 64, 68, dtype=torch.uint8, device="meta")
    down = torch.empty(4, 64, 34, dtype=torch.uint8, device="meta")
    choices = torch.empty(5, 2, device="meta")
    assert torch.ops.dgemma.packed_experts(x, experts, 8, down, 8, 32, choices, choices.long()).shape == (5, 64)


@pytest.mark.skipif(not native.available(), reason="the C++ kernels are not built here")
def test_the_operator_is_the_kernel():
    from dgemma.gguf.blocks import BLOCK_TYPES
    from dgemma.gguf.quantize import quantize

    torch.manual_seed(0)
    kind = BLOCK_TYPES["Q8_0"]
    x, weight = torch.randn(3, 64), quantize(torch.randn(9, 64), kind)
    ours = torch.ops.dgemma.packed_linear(x, weight, kind.code, 64)
    assert torch.equal(ours, native.linear(x, weight, kind.code, 64))
