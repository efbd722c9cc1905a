"""Packing weights: bit for bit where ggml's rounding is fixed, and as near as llama.cpp's search where it is not."""

import ctypes
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from dgemma.gguf import quantize as module
from dgemma.gguf.blocks import BLOCK_TYPES, dequantize
from dgemma.gguf.quantize import can_quantize, quantize

FIXED = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]
SEARCHED = ["Q4_K", "Q5_K", "Q6_K"]


def samples(rows=48, width=2048, seed=0):
    """Weights as they occur: normal, heavy-tailed, and with an offset of its own in every 32."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, width, generator=generator)
    chi = torch.randn(5, rows, width, generator=generator).square().mean(0)
    offsets = torch.randn(rows, width // 32, 1, generator=generator).expand(-1, -1, 32).reshape(rows, width)
    return {"normal": 0.02 * normal, "heavy": 0.02 * normal / chi.sqrt(), "offset": 0.02 * normal + 0.01 * offsets}


def relative_error(x, packed, name):
    return float((dequantize(packed, BLOCK_TYPES[name]) - x).norm() / x.norm())


@pytest.mark.parametrize("name", FIXED)
def test_fixed_types_are_bit_exact(name):
    special = torch.zeros(6, 256)
    special[1] = torch.linspace(-1, 1, 256)
    special[2, ::2], special[2, 1::2] = 0.5, -0.5  # the largest twice, with both signs
    special[3] = 1e-4
    special[4, 7] = -3.0
    special[5] = torch.arange(256) * 0.5  # halves to be rounded
    for x in [*samples().values(), special]:
        theirs = gguf.quants.quantize(x.numpy(), gguf.GGMLQuantizationType[name])
        assert torch.equal(quantize(x, BLOCK_TYPES[name]), torch.from_numpy(np.ascontiguousarray(theirs)).view(
            torch.uint8).view(len(x), -1))


# Root-mean-square errors, relative to the weights, that llama.cpp's own search reaches on these samples.
REACHED = {"Q4_K": {"normal": 0.0713, "heavy": 0.0829, "offset": 0.0709},
           "Q5_K": {"normal": 0.0361, "heavy": 0.0418, "offset": 0.0359},
           "Q6_K": {"normal": 0.0177, "heavy": 0.0215, "offset": 0.0177}}


@pytest.mark.parametrize("name", SEARCHED)
@pytest.mark.parametrize("kind", ["normal", "heavy", "offset"])
def test_searched_types_reach_the_reference_s_error(name, kind):
    x = samples()[kind]
    assert relative_error(x, quantize(x, BLOCK_TYPES[name]), name) < 1.01 * REACHED[name][kind]


@pytest.mark.parametrize("name", SEARCHED)
def test_no_worse_than_llama_cpp_itself(name):
    """Its reference packs the same numbers here, where a build that exports it is installed."""
    xllamacpp = pytest.importorskip("xllamacpp")
    library = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))
    function = getattr(library, f"quantize_row_{name.replace('Q', 'q')}_ref", None)
    if function is None:
        pytest.skip("this build keeps its reference to itself")
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
    for x in samples().values():
        theirs = torch.empty(len(x), BLOCK_TYPES[name].row_bytes(x.shape[1]), dtype=torch.uint8)
        function(x.data_ptr(), theirs.data_ptr(), x.numel())
        ours = relative_error(x, quantize(x, BLOCK_TYPES[name]), name)
        assert ours < 1.005 * relative_error(x, theirs, name)


@pytest.mark.parametrize("top", [15, 31])
def test_the_search_is_near_the_best_there_is(top):
    """Against a fine grid of all scales and minima, refined, for a few blocks."""
    x = samples(rows=1)["normal"].view(-1, 32)[:40]
    scale, minimum = module._search_affine(x.t().contiguous(), top)

    def error(scale, minimum):  # [..., 40] each
        levels = ((x.t()[..., None] + minimum) / scale).round().clamp(0, top)
        return (scale * levels - minimum - x.t()[..., None]).square().sum(0)

    ours = error(scale[:, None], minimum[:, None])[:, 0]
    width = (x.amax(1) - x.amin(1).clamp(max=0))[:, None]
    low = -x.amin(1).clamp(max=0)[:, None]
    best = torch.full_like(ours, torch.inf)
    for stretch in torch.linspace(0.75, 1.05, 61):
        for shift in torch.linspace(0.0, 0.15, 31):
            best = torch.minimum(best, error(width * stretch / top, low - shift * width)[:, 0])
    assert float(ours.mean().sqrt()) < 1.03 * float(best.mean().sqrt())


@pytest.mark.parametrize("name", [name for name in BLOCK_TYPES if can_quantize(BLOCK_TYPES[name])])
@pytest.mark.parametrize("value", [0.0, 1e-30, -1e-30, 2.0**-10, -(2.0**-10), 1.5, -1.5, 1000.0, -1000.0])
def test_a_constant_row_stays_one(name, value):
    block_type = BLOCK_TYPES[name]
    x = torch.full((2, 256), value)
    back = dequantize(quantize(x, block_type), block_type)
    assert back.isfinite().all()
    assert (back - x).abs().max() <= max(0.05 * abs(value), 1e-7)


@pytest.mark.parametrize("name", SEARCHED)
def test_zeros_beside_numbers_and_lone_peaks(name):
    x = torch.zeros(8, 256)
    x[0, 13] = 1.0
    x[1, 13] = -1.0
    x[2, :32] = 1.0
    x[3, 32:] = -0.5
    x[4, ::2] = 1.0
    x[5] = torch.arange(256) / 255
    x[6] = -torch.arange(256) / 255
    x[7, 100], x[7, 200] = 60000.0, -1e-3
    back = dequantize(quantize(x, BLOCK_TYPES[name]), BLOCK_TYPES[name])
    assert back.isfinite().all()
    assert ((back - x).norm(dim=1) <= 0.06 * x.norm(dim=1)).all()


@pytest.mark.parametrize("name", SEARCHED)
def test_scale_does_not_matter(name):
    x = samples(rows=8)["heavy"]
    for power in (-6, 12):
        error = relative_error(x * 2.0**power, quantize(x * 2.0**power, BLOCK_TYPES[name]), name)
        assert error < 1.05 * relative_error(x, quantize(x, BLOCK_TYPES[name]), name)


@pytest.mark.parametrize("name", ["Q8_0", "Q5_0", *SEARCHED])
def test_the_same_whatever_the_chunks_and_shape(name):
    x = samples(rows=64)["normal"]
    whole = quantize(x, BLOCK_TYPES[name])
    assert torch.equal(quantize(x.view(4, 16, -1), BLOCK_TYPES[name]).view_as(whole), whole)
    assert torch.equal(quantize(x[5:6], BLOCK_TYPES[name]), whole[5:6])
    assert torch.equal(torch.cat([quantize(row, BLOCK_TYPES[name]) for row in x.split(3)]), whole)


def test_other_floats_and_strides():
    x = samples(rows=8)["normal"]
    q4_k = BLOCK_TYPES["Q4_K"]
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(quantize(x.to(dtype), q4_k), quantize(x.to(dtype).float(), q4_k))
    assert torch.equal(quantize(x.t().contiguous().t(), q4_k), quantize(x, q4_k))
    assert torch.equal(quantize(torch.nn.Parameter(x), q4_k), quantize(x, q4_k))


def test_no_rows():
    assert quantize(torch.empty(0, 256), BLOCK_TYPES["Q4_K"]).shape == (0, 144)


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(ValueError, match="704 weights is no whole number of Q4_K blocks of 256"):
        quantize(torch.zeros(2, 704), BLOCK_TYPES["Q4_K"])
    with pytest.raises(ValueError, match="IQ4_XS can be read but not written"):
        quantize(torch.zeros(2, 256), BLOCK_TYPES["IQ4_XS"])
