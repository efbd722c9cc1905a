"""The packed products are torch operators, with shapes for tracers."""

import pytest
import torch

import dgemma.kernels  # noqa: F401  (registers them)
from dgemma.errors import DgemmaError
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


@pytest.mark.parametrize(("width", "bytes_", "code"), [(64, 34, 8), (32, 68, 8), (64, 67, 8), (64, 68, 999)])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_widths_that_do_not_fit_are_refused_on_every_device(device, width, bytes_, code):
    x, weight = torch.zeros(2, 64, device=device), torch.zeros(7, bytes_, dtype=torch.uint8, device=device)
    with pytest.raises(ValueError, match=r"fit|blocks"):
        torch.ops.dgemma.packed_linear(x, weight, code, width)


def test_on_a_gpu_an_error_says_what_to_do():
    with pytest.raises(DgemmaError, match="run it on the CPU"):
        torch.ops.dgemma.packed_linear.default.redispatch(
            torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), torch.zeros(2, 64),
            torch.zeros(7, 68, dtype=torch.uint8), 8, 64)
