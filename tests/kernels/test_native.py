"""The C++ kernels against float64, on every instruction set that can run here and for every packed type.

``DGEMMA_FUZZ`` is the number of random shapes per test; the sanitizers' build is slow and takes fewer.
"""

import ctypes
import math
import mmap
import os
import sys
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dgemma.gguf.blocks import BLOCK_TYPES
from dgemma.kernels import native
from dgemma.kernels.packed import PackedWeight
from dgemma.kernels.products import as_int8
from dgemma.nn.head import _Sums
from support.block_bytes import HALVES, exact_activations, packed, with_half

pytestmark = pytest.mark.skipif(not native.available(), reason=f"the CPU kernels are {native.why_absent()}")

TYPES = list(HALVES)
for _name in TYPES:
    native.takes(BLOCK_TYPES[_name])  # who calls the kernels directly hands over the codebooks, too
OFFSET = ["Q4_1", "Q5_1", "Q2_K", "Q4_K", "Q5_K"]  # weights are scale · number + offset: two roundings or one
BFLOAT16 = ["amx", "avx512bf16"]  # where `mix` multiplies in bfloat16

fuzz = settings(max_examples=int(os.environ.get("DGEMMA_FUZZ", "25")), deadline=None,
                suppress_health_check=[HealthCheck.too_slow])
seeds = st.integers(0, 1 << 16)


@pytest.fixture(scope="module", params=native.isas() or ["none"])
def isa(request):
    before = native.isa()
    native.use(request.param)
    yield request.param
    native.use(before)


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def linear(x, weight: PackedWeight):
    return native.linear(x, weight.data, weight.type.code, weight.shape[-1])


def expert_mlp(x, gate_up: PackedWeight, down: PackedWeight, weights, experts):
    return native.expert_mlp(x, gate_up.data, gate_up.type.code, down.data, down.type.code, down.shape[-1], weights,
                             experts)


def numbers(weight: PackedWeight, rows=None, dtype=torch.float32):
    return native.dequantize(weight.data, weight.type.code, weight.shape[-1], rows, dtype)


def exact(weight: PackedWeight):
    return weight.dequantize().double()


def relative(ours, wanted):
    """The relative error in the norm of the whole."""
    return ((ours.double() - wanted).norm() / wanted.norm()).item()


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def width_of(name, blocks):
    return blocks * BLOCK_TYPES[name].block


# Products


@pytest.mark.parametrize("name", TYPES)
def test_linear_sums_exactly(isa, name):
    """Activations that int8 holds: nothing is left but float32 sums over a weight's groups."""
    weight = packed(name, 45, width_of(name, 21 if BLOCK_TYPES[name].block == 32 else 3))
    x = exact_activations(9, weight.shape[1])
    assert torch.equal(as_int8(x), x)
    assert relative(linear(x, weight), x.double() @ exact(weight).T) < 1e-6


@pytest.mark.parametrize("name", TYPES)
def test_linear_of_any_numbers(isa, name):
    """What int8 activations explain, and nothing else.

    Rounding to multiples of s = peak / 127 is an error of s/√12 in the mean square. The largest of 256 normal numbers
    is about 3 of their deviations, so the error is 3 / (127 · √12) = 0.68 % of the row, and as much of any product with
    weights that know nothing of it.
    """
    weight = packed(name, 200, width_of(name, 16 if BLOCK_TYPES[name].block == 32 else 2))
    x = normal(64, weight.shape[1])
    ours = linear(x, weight)
    # An activation on a rounding tie may fall either way: a single one of 64 · 512 makes 2e-5.
    assert relative(ours, as_int8(x).double() @ exact(weight).T) < 1e-4
    assert 0.004 < relative(ours, x.double() @ exact(weight).T) < 0.009


@given(st.sampled_from(TYPES), st.integers(1, 40), st.integers(1, 70), st.integers(1, 19), seeds)
@example("Q8_0", 1, 1, 1, 0)
@example("Q4_K", 1, 17, 1, 0)
@fuzz
def test_linear_of_any_shape(isa, name, rows, columns, blocks, seed):
    """Bytes and scales of every sort; then the same on two threads, and each row alone."""
    width = width_of(name, blocks if BLOCK_TYPES[name].block == 32 else 1 + blocks % 3)
    weight, x = packed(name, columns, width, seed=seed, wild=bool(seed % 2)), exact_activations(rows, width, seed)
    ours = linear(x, weight)
    wanted, sizes = x.double() @ exact(weight).T, x.abs().double() @ exact(weight).abs().T
    assert ((ours - wanted).norm() <= 1e-6 * sizes.norm()).item()
    with threads(2):
        assert torch.equal(linear(x, weight), ours)
    row = seed % rows
    assert torch.equal(linear(x[row : row + 1], weight)[0], ours[row])


@pytest.mark.parametrize("half", [0x7C00, 0xFC00, 0x7C01, 0x7E00, 0x7FFF, 0xFFFF])
@pytest.mark.parametrize("name", [name for name in TYPES if name not in ("MXFP4", "NVFP4")])
def test_a_broken_scale_is_never_a_number(isa, name, half):
    """Infinite and NaN, of every bit pattern's kind: what such a row gives is not finite; the other rows are as they
    were."""
    sound = packed(name, 20, width_of(name, 8 if BLOCK_TYPES[name].block == 32 else 1))
    weight = with_half(sound, 3, half)
    wanted = exact(weight)
    assert not wanted[3].isfinite().all()
    for dtype in (torch.float32, torch.bfloat16):
        ours = numbers(weight, dtype=dtype)
        assert torch.equal(ours.isnan(), wanted.isnan()) and torch.equal(ours.isinf(), wanted.isinf())
    x = exact_activations(5, weight.shape[1])
    ours, others = linear(x, weight), torch.arange(20) != 3
    assert not ours[:, 3].isfinite().any()
    assert torch.equal(ours[:, others], linear(x, sound)[:, others])
    soft = torch.zeros(2, weight.shape[1])
    native.mix(soft, torch.ones(2), torch.full((2, 20), 0.05), weight.data, weight.type.code)
    assert torch.equal(soft.isfinite(), wanted[3].isfinite().expand(2, -1))


@pytest.mark.parametrize(("name", "places"), [("MXFP4", [0]), ("NVFP4", [0, 1, 2, 3])])
def test_scales_of_one_byte_are_ggmls_for_every_byte(isa, name, places):
    """The two that other readers take for NaN, too: 255 of MXFP4 is a power of two, 127 of NVFP4 is nothing."""
    weight = packed(name, 256, width_of(name, 1))
    for at in places:
        weight.data[:, at] = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(numbers(weight), weight.dequantize())


def test_linear_takes_any_strides_and_dtypes(isa):
    weight = packed("Q4_K", 50, 512)
    x = normal(7, 512)
    wanted = linear(x, weight)
    assert torch.equal(linear(x.T.contiguous().T, weight), wanted)
    assert torch.equal(linear(F.pad(x, (3, 5))[:, 3:-5], weight), wanted)
    assert torch.equal(linear(x.double(), weight), wanted)
    assert torch.equal(linear(x, weight[8:41]), wanted[:, 8:41])  # a slice of rows, at an odd place
    apart = PackedWeight(F.pad(weight.data, (0, 13))[:, :-13], weight.type)  # rows with gaps between
    assert torch.equal(linear(x, apart), wanted)
    assert torch.equal(linear(x.bfloat16(), weight), linear(x.bfloat16().float(), weight))


def test_nothing_of_nothing(isa):
    weight = packed("Q8_0", 5, 64)
    assert linear(torch.empty(0, 64), weight).shape == (0, 5)
    assert linear(normal(3, 64), weight[:0]).shape == (3, 0)
    assert numbers(weight, torch.empty(0, dtype=torch.long)).shape == (0, 64)
    assert native.rms_norm(torch.empty(0, 8), None, 1e-6, None).shape == (0, 8)
    gate_up, down = packed("Q8_0", 2, 64, 32), packed("Q8_0", 2, 32, 32)
    none = torch.empty(0, 1)
    assert expert_mlp(torch.empty(0, 32), gate_up, down, none, none.long()).shape == (0, 32)
    none = torch.empty(4, 0)
    assert torch.equal(expert_mlp(normal(4, 32), gate_up, down, none, none.long()), torch.zeros(4, 32))
    soft, table = normal(3, 64), packed("Q8_0", 0, 64)
    wanted = soft * 0.5
    native.mix(soft, torch.full((3,), 0.5), torch.empty(3, 0), table.data, table.type.code)
    torch.testing.assert_close(soft, wanted)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_K", "Q6_K", "IQ4_XS"])
def test_extreme_activations(isa, name):
    """Zeros give zeros, sizes scale, and below 1e-30 is nothing; a row with NaN or infinity is NaN, and alone in it."""
    weight = packed(name, 37, 512)
    x = exact_activations(8, 512)
    plain = linear(x, weight)
    x[1] = 0
    x[2] *= 2.0**100
    x[3] *= 2.0**-80
    x[4] *= 1e-36
    x[5, 100], x[6, 300], x[7, 511] = math.nan, math.inf, -math.inf
    ours = linear(x, weight)
    assert torch.equal(ours[0], plain[0])
    assert (ours[1] == 0).all()
    assert torch.equal(ours[2], plain[2] * 2.0**100)
    assert torch.equal(ours[3], plain[3] * 2.0**-80)
    assert (ours[4] == 0).all()
    assert ours[5:].isnan().all()
    x = torch.full((1, 256), 3e38)  # too large for the sum, but not for the activations' scale
    assert not linear(x, packed(name, 37, 256)).isnan().any()


# Experts


def expert_reference(x, gate_up, down, weights, experts):
    """The loop over slots in float64 with both roundings: result, what ties of the second one may change, and sizes."""
    x = as_int8(x).double()
    gate_up, down = exact(gate_up), exact(down)
    out, slack, sizes = torch.zeros(3, *x.shape, dtype=torch.float64)
    for token, chosen in enumerate(experts.tolist()):
        for place, expert in enumerate(chosen):
            gate, up = (gate_up[expert] @ x[token]).chunk(2)
            inner = F.gelu(gate, approximate="tanh") * up
            parts = F.pad(inner, (0, -len(inner) % 256)).view(-1, 256)
            step = parts.abs().amax(1, keepdim=True).clamp(min=1e-300) / 127
            near = ((parts / step).frac().abs() - 0.5).abs() < 2e-3
            rounded = ((parts / step).round() * step).flatten()[: len(inner)]
            weight = weights[token, place].double()
            out[token] += weight * (down[expert] @ rounded)
            slack[token] += weight.abs() * (down[expert].abs() @ (near * step).flatten()[: len(inner)])
            sizes[token] += weight.abs() * (down[expert].abs() @ rounded.abs())
    return out, slack, sizes


def check_experts(x, gate_up, down, weights, experts):
    ours = expert_mlp(x, gate_up, down, weights, experts)
    wanted, slack, sizes = expert_reference(x, gate_up, down, weights, experts)
    assert ((ours - wanted).abs() <= slack + 2e-5 * sizes.amax()).all()
    with threads(2):
        assert torch.equal(expert_mlp(x, gate_up, down, weights, experts), ours)
    for row in {0, len(x) // 2, len(x) - 1}:
        one = slice(row, row + 1)
        assert torch.equal(expert_mlp(x[one], gate_up, down, weights[one], experts[one]), ours[one])
    return ours


@pytest.mark.parametrize("name", TYPES)
def test_experts(isa, name):
    inner = 96 if BLOCK_TYPES[name].block == 32 else 256
    gate_up, down = packed(name, 5, 2 * inner, 256), packed(name, 5, 256, inner, seed=1)
    x = exact_activations(11, 256) / 500
    generator = torch.Generator().manual_seed(0)
    experts = torch.stack([torch.randperm(5, generator=generator)[:2] for _ in x])
    check_experts(x, gate_up, down, torch.rand(11, 2, generator=generator), experts)


@given(st.sampled_from(TYPES), st.sampled_from(TYPES), st.integers(1, 24), st.integers(1, 6), st.integers(1, 3),
       st.booleans(), seeds)
@example("Q4_K", "Q5_0", 1, 1, 1, False, 0)
@fuzz
def test_experts_of_any_shape(isa, gate_up_name, down_name, tokens, count, top_k, crowded, seed):
    """From no token of an expert to all of them, an expert chosen twice, every expert chosen."""
    generator = torch.Generator().manual_seed(seed)
    hidden, inner = (256 if block == 256 else block * (1 + seed % most)
                     for block, most in ((BLOCK_TYPES[gate_up_name].block, 5), (BLOCK_TYPES[down_name].block, 3)))
    gate_up = packed(gate_up_name, count, 2 * inner, hidden, seed=seed)
    down = packed(down_name, count, hidden, inner, seed=seed + 1)
    if crowded:
        experts = torch.full((tokens, top_k), seed % count)
    elif seed % 3:
        experts = torch.randint(count, (tokens, top_k), generator=generator)
    else:
        experts = torch.arange(count).expand(tokens, count)
    weights = torch.rand(experts.shape, generator=generator)
    check_experts(exact_activations(tokens, hidden, seed) / 2**9, gate_up, down, weights, experts)


def test_a_token_of_nan_leaves_the_others(isa):
    gate_up, down = packed("Q8_0", 2, 64, 64), packed("Q8_0", 2, 64, 32)
    x, weights, experts = normal(5, 64), torch.ones(5, 1), torch.tensor([[0], [1], [0], [1], [0]])
    wanted = expert_mlp(x, gate_up, down, weights, experts)
    x[2, 7] = math.nan
    ours = expert_mlp(x, gate_up, down, weights, experts)
    assert ours[2].isnan().all()
    assert torch.equal(ours[[0, 1, 3, 4]], wanted[[0, 1, 3, 4]])


# Rows as numbers, and sums of rows


def check_numbers(weight, rows):
    wanted = weight.dequantize()
    if rows is not None:
        wanted = wanted[rows]
    ours, narrow = numbers(weight, rows), numbers(weight, rows, torch.bfloat16)
    if weight.type.name in OFFSET:  # one rounding where the reference has two
        atol = 3e-7 * wanted.abs().amax().item() if wanted.numel() else 0.0
        torch.testing.assert_close(ours, wanted, atol=atol, rtol=0)
        torch.testing.assert_close(narrow.float(), wanted, atol=atol, rtol=2**-8)
    else:
        assert torch.equal(ours, wanted)
        assert torch.equal(narrow, wanted.bfloat16())


@pytest.mark.parametrize("name", TYPES)
def test_numbers(isa, name):
    weight = packed(name, 37, width_of(name, 11 if BLOCK_TYPES[name].block == 32 else 2))
    check_numbers(weight, None)
    check_numbers(weight[16:32], None)
    check_numbers(weight, torch.tensor([36, 0, 5, 5, 17]))


@given(st.sampled_from(TYPES), st.integers(1, 40), st.integers(1, 19), st.integers(0, 40), seeds)
@fuzz
def test_numbers_of_any_shape(isa, name, rows, blocks, count, seed):
    width = width_of(name, blocks if BLOCK_TYPES[name].block == 32 else 1 + blocks % 2)
    index = torch.randint(rows, (count,), generator=torch.Generator().manual_seed(seed))
    check_numbers(packed(name, rows, width, seed=seed), None if seed % 3 == 0 else index)


def check_mix(isa, soft, decay, weights, table):
    start = soft.clone()
    native.mix(soft, decay, weights, table.data, table.type.code)
    wanted = start.double() * decay.double().unsqueeze(1) + weights.double() @ exact(table)
    sizes = start.abs().double() * decay.double().unsqueeze(1) + weights.double() @ exact(table).abs()
    # bfloat16 rounds both factors by up to 2^-8 of their size; the sums are float32.
    bound = 2**-7 if isa in BFLOAT16 else 1e-5
    assert ((soft - wanted).abs() <= 1.01 * bound * sizes + 1e-8 * exact(table).abs().amax()).all()
    with threads(2):
        again = start.clone()
        native.mix(again, decay, weights, table.data, table.type.code)
    assert torch.equal(again, soft)
    row = len(soft) // 2
    alone = start[row : row + 1].clone()
    native.mix(alone, decay[row : row + 1], weights[row : row + 1], table.data, table.type.code)
    assert torch.equal(alone[0], soft[row])


@pytest.mark.parametrize("name", TYPES)
def test_mix(isa, name):
    table = packed(name, 100, 512)
    weights = torch.softmax(3 * normal(21, 100), dim=1)
    weights[4] = 0
    weights[5] *= 1e-12  # nothing beside what the row has
    soft = normal(21, 512)
    check_mix(isa, soft, torch.linspace(0, 1, 21), weights, table)
    assert relative(soft[10:], normal(21, 512)[10:].double() * torch.linspace(0, 1, 21)[10:, None]
                    + weights[10:].double() @ exact(table)) < (3e-3 if isa in BFLOAT16 else 1e-6)


@given(st.sampled_from(TYPES), st.integers(1, 20), st.integers(1, 140), st.integers(1, 19), seeds)
@fuzz
def test_mix_of_any_shape(isa, name, rows, count, blocks, seed):
    width = width_of(name, blocks if BLOCK_TYPES[name].block == 32 else 1 + blocks % 2)
    weights = torch.rand(rows, count, generator=torch.Generator().manual_seed(seed))
    weights[weights < 0.3] = 0
    weights[seed % rows] *= seed % 2
    check_mix(isa, normal(rows, width, seed=seed), torch.rand(rows), weights, packed(name, count, width, seed=seed))


# The head's sums and the norm


@given(st.integers(1, 30), st.lists(st.integers(1, 70), min_size=1, max_size=4), st.sampled_from([0.1, 3.0, 100.0]),
       seeds)
@example(1, [1], 3.0, 0)
@example(5, [16, 32, 48], 3.0, 1)
@fuzz
def test_head_tiles(isa, rows, tiles, size, seed):
    generator = torch.Generator().manual_seed(seed)
    # Draws from the probabilities themselves, and from powers of them.
    sharpness = None if seed % 2 else torch.rand(rows, generator=generator).mul(3).add(0.3).round(decimals=1)
    ours, wanted = (_Sums(rows, torch.device("cpu"), sharpness) for _ in range(2))
    inverse_t = 1 / (0.4 + torch.rand(rows, generator=generator))
    logits, targets, start = [], [], 0
    for count in tiles:
        scores = size * torch.randn(rows, count, generator=generator)
        gumbel = -torch.log(-torch.log(torch.rand(rows, generator=generator).clamp(1e-20, 1 - 1e-7)))
        inside = torch.rand(rows, generator=generator)
        theirs = scores.clone()
        logits.append(30 * torch.tanh(scores.double() / 30) * inverse_t.unsqueeze(1))
        targets.append(inside)
        ours.add_tile_natively(scores, start, 30.0, inverse_t, gumbel, inside)
        wanted.add_tile(theirs, start, 30.0, inverse_t, gumbel, inside)
        torch.testing.assert_close(scores, theirs, atol=1e-6, rtol=1e-4)
        start += count
        for name in ("best", "mass", "weighted", "best_key", "decay"):  # a logit is right to 4e-6; sums add that up
            torch.testing.assert_close(getattr(ours, name), getattr(wanted, name), atol=2e-5 + 5e-6 * start, rtol=2e-5,
                                       msg=name)
    # Logits may be equal but for rounding, which is that of the cap's size; then either is the largest.
    everything = torch.cat(logits, dim=1)
    chosen = everything.gather(1, ours.argmax.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(chosen, everything.amax(1), atol=3e-5, rtol=0)
    # And a draw may fall on the line between two tokens.
    for row in (ours.sample != wanted.sample).nonzero().flatten().tolist():
        low, high = sorted([ours.sample[row].item(), wanted.sample[row].item()])
        tile = next(i for i in range(len(tiles)) if low < sum(tiles[: i + 1]))
        first = sum(tiles[:tile])
        assert high < first + tiles[tile]
        power = 1 if sharpness is None else sharpness[row]
        reached = (logits[tile][row] * power).softmax(0).cumsum(0)[low - first : high - first]
        assert ((reached - targets[tile][row]).abs() < 1e-5).all()


def test_head_tiles_at_the_noise_s_ends(isa):
    """The first and the last token that have any mass, never one without."""
    scores = torch.full((2, 33), -300.0)
    scores[:, 3:29] = 10.0
    sums = _Sums(2, torch.device("cpu"))
    sums.add_tile_natively(scores, 0, 30.0, torch.full((2,), 10.0), torch.zeros(2), torch.tensor([0.0, 1.0]))
    assert sums.sample.tolist() == [3, 28]
    assert sums.argmax.tolist() == [3, 3]


def test_head_tiles_of_nan(isa):
    """A row of NaN says so in its entropy; the others do not notice."""
    clean, dirty = _Sums(3, torch.device("cpu")), _Sums(3, torch.device("cpu"))
    for start in (0, 40):
        for sums, scores in ((clean, normal(3, 40, seed=start)), (dirty, normal(3, 40, seed=start))):
            if sums is dirty:
                scores[1, :: 1 + start] = math.nan  # all of them, then only a few
            sums.add_tile_natively(scores, start, 30.0, torch.ones(3), torch.zeros(3), torch.full((3,), 0.5))
    assert (dirty.mass.log() - dirty.weighted / dirty.mass).isnan().tolist() == [False, True, False]
    for name, tensor in vars(clean).items():
        assert tensor is None or torch.equal(getattr(dirty, name)[[0, 2]], tensor[[0, 2]]), name


@pytest.mark.parametrize("width", [1, 7, 16, 17, 48, 100, 2816])
@pytest.mark.parametrize("weight", [None, torch.float32, torch.bfloat16], ids=str)
def test_norm(isa, width, weight):
    x, residual = 3 * normal(2, 5, width), normal(2, 5, width, seed=1)
    scale = None if weight is None else (1 + normal(width, seed=2)).to(weight)
    wide = x.double()
    wanted = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (1 if scale is None else scale.double())
    assert relative(native.rms_norm(x, scale, 1e-6, None), wanted) < 3e-7
    assert relative(native.rms_norm(x, scale, 1e-6, residual), wanted + residual) < 3e-7
    turned = x.transpose(0, 1)
    assert relative(native.rms_norm(turned, scale, 1e-6, residual.transpose(0, 1)),
                    (wanted + residual).transpose(0, 1)) < 3e-7
    with threads(2):
        assert torch.equal(native.rms_norm(x.repeat(20, 1, 1), scale, 1e-6, None)[-2:],
                           native.rms_norm(x, scale, 1e-6, None))


@pytest.mark.parametrize("dim", [2, 10, 32, 36, 128, 512])
def test_norm_and_rotation(isa, dim):
    x, weight, angles = 3 * normal(2, 3, 5, dim), 1 + normal(dim, seed=1), normal(2, 3, 1, dim // 2, seed=2)
    cos, sin = torch.cat([angles.cos()] * 2, dim=-1), torch.cat([angles.sin()] * 2, dim=-1)
    wide = x.double()
    wide = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
    first, second = wide.chunk(2, dim=-1)
    wanted = wide * cos.double() + torch.cat([-second, first], dim=-1) * sin.double()
    ours = native.norm_rotate(x, weight, 1e-6, cos, sin)
    assert relative(ours, wanted) < 3e-7
    turned = x.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
    assert torch.equal(native.norm_rotate(turned, weight.bfloat16(), 1e-6, cos, sin),
                       native.norm_rotate(x, weight.bfloat16().float(), 1e-6, cos, sin))
    with threads(2):
        many = native.norm_rotate(x.repeat(20, 1, 1, 1), weight, 1e-6, *(t.repeat(20, 1, 1, 1) for t in (cos, sin)))
    assert torch.equal(many[-2:], ours)


def test_norm_of_extremes(isa):
    x = torch.stack([torch.zeros(20), torch.full((20,), 1e-30), torch.full((20,), math.nan)])
    ours = native.rms_norm(x, None, 1e-6, None)
    assert (ours[0] == 0).all()
    torch.testing.assert_close(ours[1], torch.full((20,), 1e-27))
    assert ours[2].isnan().all()
    narrow = native.rms_norm(torch.ones(2, 20), None, 1e-6, torch.ones(20, dtype=torch.bfloat16))
    torch.testing.assert_close(narrow, torch.full((2, 20), 2.0))


# Memory and arguments


@contextmanager
def fenced(data):
    """A copy of uint8 data between two pages that nobody may touch, its last byte the last before the second."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    page = mmap.PAGESIZE
    inside = -(-data.nbytes // page) * page
    start = libc.mmap(None, inside + 2 * page, mmap.PROT_READ | mmap.PROT_WRITE,
                      mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    assert start not in (None, ctypes.c_void_p(-1).value)
    for at in (start, start + page + inside):
        assert libc.mprotect(at, page, 0) == 0
    try:
        buffer = (ctypes.c_uint8 * data.nbytes).from_address(start + page + inside - data.nbytes)
        copy = torch.frombuffer(buffer, dtype=torch.uint8).view(data.shape)
        copy.copy_(data)
        yield copy
    finally:
        libc.munmap(start, inside + 2 * page)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="fences memory with Linux's mmap and mprotect")
@pytest.mark.parametrize("name", TYPES)
def test_nothing_is_read_beyond_the_weights(isa, name):
    """A mapped file ends where its last tensor does: reading on would end the process."""
    block = BLOCK_TYPES[name].block
    for rows, width in ((1, block), (16, 256), (32, 512), (33, 256 + block), (45, 3 * block)):
        weight = packed(name, rows, width)
        with fenced(weight.data) as data:
            inside = PackedWeight(data, weight.type)
            assert torch.equal(linear(normal(7, width), inside), linear(normal(7, width), weight))
            for index in (None, torch.tensor([rows - 1])):
                assert torch.equal(numbers(inside, index), numbers(weight, index))
            soft = torch.zeros(3, width)
            native.mix(soft, torch.ones(3), torch.ones(3, rows), data, weight.type.code)
            assert soft.isfinite().all()
    inner = 48 if block == 16 else block
    gate_up, down = packed(name, 3, 2 * inner, 256), packed(name, 3, 256, inner)
    arguments = normal(9, 256), torch.ones(9, 2), torch.arange(18).view(9, 2) % 3
    wanted = expert_mlp(arguments[0], gate_up, down, *arguments[1:])
    with fenced(gate_up.data) as first, fenced(down.data) as second:
        ours = expert_mlp(arguments[0], PackedWeight(first, gate_up.type), PackedWeight(second, down.type),
                          *arguments[1:])
    assert torch.equal(ours, wanted)


@pytest.mark.parametrize("code", [-1, 0, 1, 4, 9, 15, 24, 30, 41, 1000])
def test_types_that_are_none(isa, code):
    x, data = normal(2, 256), packed("Q8_0", 4, 256).data
    with pytest.raises(ValueError, match="block type"):
        native.linear(x, data, code, 256)
    with pytest.raises(ValueError, match="block type"):
        native.dequantize(data, code, 256, None, torch.float32)
    with pytest.raises(ValueError, match="block type"):
        native.mix(x, torch.ones(2), torch.ones(2, 4), data, code)
    stack = packed("Q8_0", 1, 512, 256).data, 8, packed("Q8_0", 1, 256, 256).data, 8
    for place in (1, 3):
        wrong = [*stack[:place], code, *stack[place + 1 :]]
        with pytest.raises(ValueError, match="block type|do not fit"):
            native.expert_mlp(x, *wrong, 256, torch.ones(2, 1), torch.zeros(2, 1))


@pytest.mark.parametrize("expert", [-1, 2, 1 << 40])
def test_experts_that_are_none(isa, expert):
    gate_up, down = packed("Q8_0", 2, 64, 32), packed("Q8_0", 2, 32, 32)
    with pytest.raises(ValueError, match="index is out of range"):
        expert_mlp(normal(2, 32), gate_up, down, torch.ones(2, 1), torch.tensor([[0], [expert]]))


def test_shapes_that_do_not_fit(isa):
    gate_up, down = packed("Q8_0", 2, 64, 32), packed("Q8_0", 2, 32, 32)
    one, first = torch.ones(2, 1), torch.zeros(2, 1)
    with pytest.raises(ValueError, match="rows of 64 numbers do not fit rows of 32 weights"):
        linear(normal(2, 64), packed("Q8_0", 4, 32))
    for x, a, b, weights, experts in (
        (normal(2, 64), gate_up, down, one, first),
        (normal(3, 32), gate_up, down, one, first),
        (normal(2, 32), gate_up, down[:1], one, first),
        (normal(2, 32), packed("Q8_0", 2, 32, 32), down, one, first),
        (normal(2, 32), packed("Q8_0", 2, 64, 64), down, one, first),
        (normal(2, 32), gate_up, down, torch.ones(2, 2), first),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            expert_mlp(x, a, b, weights, experts)


def test_a_wrong_instruction_set(isa):
    with pytest.raises(ValueError, match=f"'sse9' cannot run here; there are .*{isa}"):
        native.use("sse9")
    assert native.isa() == isa
