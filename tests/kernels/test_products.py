"""Products with plain and packed weights: on the C++ kernels, without them, and which of the two it is."""

import functools
import math
import os
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F

from dgemma.errors import DgemmaError
from dgemma.gguf.blocks import BLOCK_TYPES
from dgemma.gguf.quantize import quantize
from dgemma.kernels import PackedWeight, embedding, expert_mlp, linear, mix_rows, native, products, rms_norm
from dgemma.kernels.products import as_int8
from support.block_bytes import HALVES, exact_activations, packed

TYPES = list(HALVES)
compiled = pytest.mark.skipif(not native.available(), reason=f"the CPU kernels are {native.why_absent()}")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def look_again(environment, monkeypatch):
    """A function that makes `native` look for the library anew with these variables; afterwards all is as it was."""
    before = native.isa()

    def look(**variables):
        environment(**{"DGEMMA_ISA": None, "DGEMMA_NATIVE": None, **variables})
        native._find.cache_clear()
        products._say_slow.cache_clear()

    yield look
    monkeypatch.undo()
    for cached in (native._find, products._say_slow):
        cached.cache_clear()
    if before != "torch":
        native.use(before)


@pytest.fixture
def without_library(look_again):
    look_again(DGEMMA_ISA="torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(params=["torch", pytest.param("native", marks=compiled)])
def path(request):
    """Once without the library and once with it."""
    if request.param == "torch":
        request.getfixturevalue("without_library")
    return request.param


# What the products are


@pytest.mark.parametrize("name", TYPES)
def test_linear(path, name):
    weight, x = packed(name, 45, 512), normal(3, 5, 512)
    wanted = as_int8(x.view(15, 512)).double() @ weight.dequantize().double().T
    ours = linear(x, weight)
    assert (ours.shape, ours.dtype) == ((3, 5, 45), torch.float32)
    assert (ours.view(15, 45) - wanted).norm() < 2e-5 * wanted.norm()
    narrow = linear(x.bfloat16(), weight)
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow, linear(x.bfloat16().float(), weight).bfloat16())


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_types_that_are_numbers_are_plain_products(name):
    numbers = normal(20, 64)
    weight = PackedWeight(quantize(numbers, BLOCK_TYPES[name]), BLOCK_TYPES[name])
    numbers = weight.dequantize()
    assert weight.plain().data_ptr() == weight.data.data_ptr()
    x = normal(7, 64)
    bound = {"F32": 1e-6, "F16": 2e-3, "BF16": 1e-2}[name]
    assert (linear(x, weight) - x @ numbers.T).norm() <= bound * (x @ numbers.T).norm()
    ids = torch.tensor([[3, 19], [0, 3]])
    assert torch.equal(embedding(ids, weight), numbers[ids])
    soft = torch.ones(7, 64)
    mix_rows(soft, torch.full((7,), 0.5), x[:, :20].abs(), weight)
    wanted = 0.5 + x[:, :20].abs() @ numbers
    assert (soft - wanted).norm() <= bound * wanted.norm()


def test_plain_tensors_are_plain_products():
    weight, x = normal(20, 64), normal(7, 64, seed=1)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    assert torch.equal(embedding(torch.tensor([2, 5]), weight), weight[[2, 5]])
    soft = torch.ones(7, 64)
    mix_rows(soft, torch.full((7,), 0.5), x[:, :20], weight)
    torch.testing.assert_close(soft, 0.5 + x[:, :20] @ weight)


@pytest.mark.parametrize("name", TYPES)
def test_embedding(path, name):
    table = packed(name, 50, 256)
    ids = torch.tensor([[[49, 0], [7, 7]]])
    torch.testing.assert_close(embedding(ids, table), table.dequantize()[ids], atol=1e-6, rtol=0)
    assert embedding(torch.empty(2, 0, dtype=torch.long), table).shape == (2, 0, 256)
    for wrong in (-1, 50, 1 << 40):
        with pytest.raises(IndexError, match=r"0\.\.49"):
            embedding(torch.tensor([3, wrong]), table)


@pytest.mark.parametrize("name", TYPES)
def test_mix_rows(path, name):
    table, weights, decay = packed(name, 70, 256), torch.softmax(normal(9, 70), dim=1), torch.rand(9)
    wanted = decay.unsqueeze(1) + weights @ table.dequantize()
    for soft in (torch.ones(9, 256), torch.ones(256, 9).T):
        mix_rows(soft, decay, weights, table)
        assert (soft - wanted).norm() < 4e-3 * wanted.norm()  # bfloat16 where the processor has it


@pytest.mark.parametrize(("gate_up", "down"), [("Q4_K", "Q6_K"), ("Q8_0", "F16"), ("Q5_0", "IQ4_NL")])
def test_experts_take_a_type_each(path, gate_up, down):
    """The kernels' sums against plain torch's, a pair of types that the kernels do not take among them."""
    stack = normal(3, 256, 256, seed=1) / 16
    weights = PackedWeight(quantize(stack, BLOCK_TYPES[down]), BLOCK_TYPES[down]) if down == "F16" else packed(
        down, 3, 256, 256, seed=1)
    first = packed(gate_up, 3, 512, 256)
    x, scores = exact_activations(9, 256) / 2**9, torch.rand(9, 2)
    experts = torch.tensor([[0, 1], [2, 1], [0, 2]] * 3)
    ours = expert_mlp(x, first, weights, scores, experts)
    wanted = expert_mlp(x, first.dequantize(), weights.dequantize(), scores, experts)
    assert (ours - wanted).norm() < 0.02 * wanted.norm()  # x is rounded, and what is between the matrices


@compiled
@pytest.mark.parametrize("name", ["Q8_0", "Q4_K"])
def test_both_paths_agree_on_nan_and_infinity(look_again, name):
    weight, x = packed(name, 20, 512), normal(5, 512)
    x[1, 3], x[2, 300], x[3] = math.nan, math.inf, 0.0
    ours = linear(x, weight)
    look_again(DGEMMA_ISA="torch")
    with pytest.warns(UserWarning, match="switched off"):
        theirs = linear(x, weight)
    assert ours.isnan().all(1).tolist() == [False, True, True, False, False]
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4, equal_nan=True)


def test_rounding():
    """One scale per row and 256 inputs; nothing is further than half a step from what it was."""
    x = normal(4, 600)
    x[2] = 0
    rounded = as_int8(x)
    for start in range(0, 600, 256):
        part = x[:, start : start + 256]
        step = part.abs().amax(1, keepdim=True) / 127
        assert ((rounded[:, start : start + 256] - part).abs() <= 0.501 * step).all()
    x = exact_activations(7, 600)
    assert torch.equal(as_int8(x), x)


@compiled
def test_norm_with_and_without_gradient():
    """Where a gradient is wanted it is torch that computes."""
    x, weight, residual = normal(5, 48), normal(48), normal(5, 48)
    with torch.no_grad():
        ours = rms_norm(x, weight, 1e-6, residual)
    theirs = rms_norm(x.requires_grad_(), weight, 1e-6, residual)
    assert theirs.requires_grad
    torch.testing.assert_close(ours, theirs.detach())


# Which path it is


@compiled
def test_every_instruction_set_can_be_forced(look_again):
    wanted = linear(normal(3, 256), packed("Q5_K", 20, 256))
    for isa in native.isas():
        look_again(DGEMMA_ISA=isa)
        assert native.isa() == isa
        torch.testing.assert_close(linear(normal(3, 256), packed("Q5_K", 20, 256)), wanted, atol=1e-4, rtol=1e-5)
    look_again(DGEMMA_ISA="torch")
    assert (native.isa(), native.isas(), native.available()) == ("torch", [], False)


def warned(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught]


def test_switched_off_it_says_so_once(look_again):
    look_again(DGEMMA_ISA="torch")
    call = functools.partial(linear, normal(2, 32), packed("Q8_0", 4, 32))
    (message,) = warned(lambda: [call() for _ in range(3)])
    assert "switched off by DGEMMA_ISA=torch" in message and "many times slower" in message
    assert warned(call) == []


def test_not_built_it_says_so_once(look_again, monkeypatch):
    monkeypatch.setattr(native, "_installed", lambda name: None)
    look_again()
    call = functools.partial(linear, normal(2, 32), packed("Q8_0", 4, 32))
    (message,) = warned(lambda: [call(), embedding(torch.tensor([1]), packed("Q8_0", 4, 32)), call()])
    assert "not built here (install a C++ compiler" in message
    assert not native.available()
    look_again(DGEMMA_ISA="avx2")
    with pytest.raises(DgemmaError, match="DGEMMA_ISA=avx2: the CPU kernels are not built here"):
        native.available()


def test_a_library_that_is_none(look_again, monkeypatch, tmp_path):
    """A file that cannot be loaded: an error when it was asked for, else a warning that gives the cause."""
    broken = tmp_path / "broken.so"
    broken.write_bytes(b"no library")
    look_again(DGEMMA_NATIVE=str(broken))
    with pytest.raises(DgemmaError, match="DGEMMA_NATIVE: the CPU kernels are not to be loaded"):
        native.available()
    monkeypatch.setattr(native, "_installed", lambda name: broken)
    look_again()
    (message,) = warned(lambda: linear(normal(2, 32), packed("Q8_0", 4, 32)))
    assert "broken.so" in message


@compiled
def test_a_library_of_another_version(look_again, monkeypatch):
    monkeypatch.setattr(native, "ABI", 0)
    look_again()
    (message,) = warned(lambda: linear(normal(2, 32), packed("Q8_0", 4, 32)))
    assert "of another version of dgemma" in message


def test_no_warning_where_nothing_is_packed(without_library):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linear(normal(2, 32), normal(4, 32))
        linear(normal(2, 32), PackedWeight(normal(4, 32).view(torch.uint8), BLOCK_TYPES["F32"]))


def command(*arguments, **variables):
    environment = {name: value for name, value in os.environ.items() if name != "DGEMMA_ISA"}
    return subprocess.run([sys.executable, "-m", "dgemma.cli.main", *map(str, arguments)], capture_output=True,
                          text=True, env=environment | variables, timeout=120)


@compiled
def test_a_wrong_name_on_the_command_line():
    done = command("run", "--seed", 1, "hi", DGEMMA_ISA="nonsense")
    assert done.returncode == 1 and done.stdout == ""
    *_, line = done.stderr.splitlines()
    assert line.startswith("Error: DGEMMA_ISA=nonsense: not an instruction set that this machine and build can run")
    assert "portable, torch" in line and "Traceback" not in done.stderr


SUDOKU = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"


def test_the_bundled_model_says_the_same_without_the_library(look_again, tmp_path):
    """Packed as Q8_0, for one seed: the same text from the kernels and from plain torch, and one warning from torch."""
    import dgemma
    from dgemma.weights.files import bundled_path
    from dgemma.weights.quantize import convert

    convert(bundled_path("sudoku"), tmp_path / "sudoku.gguf", "Q8_0")
    answers = []

    def ask():
        model = dgemma.load(tmp_path / "sudoku.gguf")
        answers.append(model.generate(f"Please solve this Sudoku: {SUDOKU}", seed=1))

    look_again(DGEMMA_ISA="torch")
    (message,) = warned(ask)
    assert "DGEMMA_ISA=torch" in message
    assert answers[0].text.replace(" ", "").startswith("534678912")
    look_again()
    if native.available():
        assert warned(ask) == []
        assert answers[1].token_ids == answers[0].token_ids
