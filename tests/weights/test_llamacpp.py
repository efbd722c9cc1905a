"""llama.cpp reads what we write and computes what our encoder computes: an oracle that nobody here wrote."""

import pytest
import torch

from dgemma.gguf.blocks import BLOCK_TYPES, dequantize
from dgemma.gguf.keys import gguf_name
from dgemma.gguf.reader import map_tensors
from dgemma.weights.gguf_model import open_gguf
from dgemma.weights.load import empty_network
from dgemma.weights.quantize import convert
from support.gemma_files import write_checkpoint
from support.llamacpp import log_probabilities, relabelled

pytest.importorskip("xllamacpp")

# Around the sliding window of 16, and far past it.
LENGTHS = (1, 12, 16, 17, 70)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma")
    write_checkpoint(folder, hidden_size=256)
    return folder


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(10, 300, (length,), generator=generator).tolist() for length in LENGTHS]


def unpacked_network(path):
    """Our network in float32 with the numbers that the file stands for."""
    model = open_gguf(path)
    network = empty_network(model.config)
    data = map_tensors(model.file)
    weights = {}
    for name, expected in network.state_dict().items():
        tensor = model.file.tensors[gguf_name(name)]
        weights[name] = dequantize(data[tensor.name], tensor.type).view(expected.shape)
    network.load_state_dict(weights, assign=True)
    return network.eval()


def ours(network, prompt):
    hidden = network.encode(torch.tensor([prompt]), network.new_cache(1))
    return network.logits(hidden)[0, -1].log_softmax(-1)


# What llama.cpp does with a type: unpacked to F32 nothing but a table for its GELU, in half precision; in F16 and BF16
# it rounds activations to these; with packed weights to 8 bits.
@pytest.mark.parametrize(("mixture", "as_type", "tolerance"), [
    ("BF16", "F32", 0.0005), ("BF16", "F16", 0.002), ("BF16", None, 0.01),
    ("Q8_0", "F32", 0.0005), ("Q8_0", None, 0.03),
    ("Q4_K_M", "F32", 0.0005), ("Q4_K_M", None, 0.03), ("Q5_K_M", None, 0.03), ("Q6_K", None, 0.03),
])
def test_prefill_logits_are_our_encoder_s(mixture, as_type, tolerance, checkpoint, prompts, tmp_path):
    path = tmp_path / "ours.gguf"
    convert(checkpoint, path, mixture)
    theirs = log_probabilities(relabelled(path, tmp_path / "theirs.gguf", as_type), prompts)
    network = unpacked_network(path)
    for prompt, found in zip(prompts, theirs, strict=True):
        expected, found = ours(network, prompt), torch.tensor(found)
        assert found.shape == expected.shape
        assert (found - expected).norm() < tolerance * (expected - expected.mean()).norm()


def test_the_mixture_holds_every_type_that_was_to_be_tried(checkpoint, tmp_path):
    convert(checkpoint, tmp_path / "ours.gguf", "Q4_K_M")
    types = {tensor.type.name for tensor in open_gguf(tmp_path / "ours.gguf").file.tensors.values()}
    assert types == {"F32", "Q4_K", "Q6_K", "Q5_0", "Q8_0"}
    assert types <= set(BLOCK_TYPES)
