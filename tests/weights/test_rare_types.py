"""Files of the rarer block types: IQ1, IQ2 and IQ3 with their codebooks, ternary ones, 4-bit floats.

Nothing here writes them but llama.cpp, so the weights are random bytes; the `gguf` package says what they stand for.
"""

import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

import dgemma
from dgemma.errors import CheckpointError, DgemmaError
from dgemma.gguf import codebooks
from dgemma.gguf.blocks import BLOCK_TYPES
from dgemma.gguf.keys import gguf_name
from dgemma.gguf.quantize import can_quantize
from dgemma.inspect import inspect_checkpoint
from dgemma.nn.packed import all_packed, packed_bytes
from dgemma.weights.gguf_model import is_matrix
from support.block_bytes import HALVES, packed
from support.gguf_files import write_network
from support.reference import random_network, tiny_config

RARE = ["IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4"]
# Every token takes every expert: a router's close decision, turned over by rounding, would hide what is measured here.
CONFIG = tiny_config(hidden_size=256, intermediate_size=512, moe_intermediate_size=256, head_dim=64,
                     global_head_dim=128, num_experts=3, top_k_experts=3)


def files(folder, kinds):
    """A network's file with matrices of random bytes, of these types in turn; and one of the numbers that they are."""
    network = random_network(CONFIG, feedback=0.2)
    shapes = {gguf_name(name): tuple(tensor.shape) for name, tensor in network.state_dict().items()
              if is_matrix(name, tuple(tensor.shape))}
    types = {name: kinds[i % len(kinds)] for i, name in enumerate(shapes)}
    raw = {name: matrix(types[name], shape, seed) for seed, (name, shape) in enumerate(shapes.items())}
    plain = {name: gguf.quants.dequantize(data, Type[types[name]]).reshape(shapes[name]) for name, data in raw.items()}
    folder.mkdir(exist_ok=True)
    return (write_network(folder / "packed.gguf", network, change=lambda _, tensors: tensors.update(raw),
                          types={name: Type[kind] for name, kind in types.items()}),
            write_network(folder / "plain.gguf", network, change=lambda _, tensors: tensors.update(plain)))


def matrix(kind, shape, seed):
    """Packed rows, uint8, of numbers about as large as a network's weights are."""
    weight = packed(kind, *shape, seed=seed)
    shrink = 2.0 ** np.round(np.log2(0.05 / weight.dequantize().std().item()))
    raw = weight.data.numpy()
    blocks = raw.reshape(-1, weight.type.nbytes)
    for at in HALVES[kind]:
        halves = blocks[:, at : at + 2].copy().view(np.float16)
        blocks[:, at : at + 2] = (halves * np.float16(shrink)).view(np.uint8)
    return raw


@torch.no_grad()
def logits(network, random_ids):
    """Of a canvas behind a prompt, its second step: with self-conditioning."""
    cache = network.new_cache(1)
    network.encode(random_ids(1, 12), cache)
    canvas = random_ids(1, 8)
    soft = network.soft_embeddings(network.logits(network.denoise(canvas, cache)))
    return network.logits(network.denoise(canvas, cache, soft))


@pytest.mark.parametrize("kinds", [*([kind] for kind in RARE), ["IQ3_S", "Q4_K", "IQ3_XXS", "Q6_K", "IQ4_NL"]],
                         ids=lambda kinds: "-".join(kinds))
def test_a_model_is_that_of_its_numbers_and_stays_packed(kinds, tmp_path, random_ids, plain_torch, monkeypatch):
    first, second = (dgemma.load(path) for path in files(tmp_path, kinds))
    ids = [random_ids(1, 12), random_ids(1, 8)]
    ours, wanted = (logits(model.network, lambda _, width: ids[width < 12]) for model in (first, second))
    assert ((ours - wanted).norm() / wanted.norm()).item() < 0.05  # for activations are rounded to int8
    matrices = list(all_packed(first.network))
    assert {weight.type.name for weight in matrices} == set(kinds)
    assert packed_bytes(first.network) == sum(weight.data.numel() for weight in matrices)
    table = first.network.embed_tokens.weight.dequantize()
    assert torch.equal(table, second.network.embed_tokens.weight)

    def answers(model):
        return [model.generate("the", seed=seed, max_tokens=16, max_denoising_steps=1).token_ids for seed in range(3)]

    assert answers(first) == answers(first)
    plain_torch()
    monkeypatch.setattr("dgemma.kernels.products.as_int8", lambda x: x)
    assert answers(first) == answers(second)  # but for the rounding of activations, the same to the token


@pytest.fixture(scope="module")
def iq3_file(tmp_path_factory):
    return files(tmp_path_factory.mktemp("iq3"), ["IQ3_S"])[0]


def test_inspect_names_and_counts_them(iq3_file):
    report = inspect_checkpoint(iq3_file)
    assert not report.problems
    assert "IQ3_S" in str(report)


class TestWithoutTheGgufPackage:
    """It is needed for codebooks only, and asked for before anything is computed."""

    @pytest.fixture(autouse=True)
    def absent(self, iq3_file, not_installed):
        codebooks.grid.cache_clear()
        not_installed("gguf")
        yield
        codebooks.grid.cache_clear()

    def test_a_file_that_needs_it_says_what_to_install(self, iq3_file):
        with pytest.raises(CheckpointError, match=r"IQ3_S weights: .*gguf package.*pip install 'dgemma\[iq\]'"):
            dgemma.load(iq3_file)
        assert "pip install 'dgemma[iq]'" in str(inspect_checkpoint(iq3_file).problems)
        with pytest.raises(DgemmaError, match=r"pip install 'dgemma\[iq\]'"):
            packed("IQ2_S", 2, 256).dequantize()

    def test_a_check_says_what_it_did_not_read(self, iq3_file):
        report = inspect_checkpoint(iq3_file, check=True)
        assert report.checked and report.unread == ("IQ3_S",)
        assert [problem.kind for problem in report.problems] == ["codebooks"]

    @pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0", "MXFP4", "NVFP4"])
    def test_the_others_do_without(self, kind, tmp_path):
        path, _ = files(tmp_path, [kind])
        assert dgemma.load(path).generate("the", seed=3, max_tokens=8, max_denoising_steps=1).token_ids


def test_a_package_without_the_codebook_is_said_to_be_too_old(monkeypatch):
    codebooks.grid.cache_clear()
    monkeypatch.delattr(gguf.quants, "IQ2_S")
    with pytest.raises(DgemmaError, match="IQ2_S weights: this gguf package has no codebook"):
        codebooks.grid("IQ2_S")
    codebooks.grid.cache_clear()


@pytest.mark.parametrize("kind", codebooks.GRIDS)
def test_codebooks_are_small_whole_numbers(kind):
    """The kernels count on it: signs are put to numbers above 0, and sums of four must fit in 16 bits."""
    numbers = codebooks.grid(kind)
    assert numbers.shape == codebooks.GRIDS[kind] and numbers.dtype == torch.int8
    assert set(np.unique(numbers)) == {-1, 0, 1} if kind.startswith("IQ1") else 1 <= numbers.min() <= numbers.max() < 64


def test_a_second_scale_is_refused_by_name(tmp_path):
    """Converters write one beside an NVFP4 tensor; to leave it out would be silently wrong."""
    network = random_network(CONFIG)
    name = "blk.1.attn_q"
    raw = matrix("NVFP4", tuple(network.layers[1].self_attn.q_proj.weight.shape), 0)
    change = {f"{name}.weight": raw, f"{name}.scale": np.ones(1, np.float32)}
    path = write_network(tmp_path / "scaled.gguf", network, change=lambda _, tensors: tensors.update(change),
                         types={f"{name}.weight": Type.NVFP4})
    with pytest.raises(CheckpointError, match=rf"second scales of NVFP4 tensors.*(?s:.)*{name}\.scale"):
        dgemma.load(path)


def test_they_are_read_and_not_offered_for_writing():
    assert not any(can_quantize(BLOCK_TYPES[kind]) for kind in RARE)
    done = subprocess.run([sys.executable, "-m", "dgemma.cli.main", "quantize", "--help"], capture_output=True,
                          text=True, check=True)
    assert not any(kind in done.stdout for kind in RARE)
