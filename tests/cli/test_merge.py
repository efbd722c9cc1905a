"""`dgemma merge` and --adapter from end to end, with a tiny random model."""

import json

import pytest
import torch

import dgemma
from dgemma.gguf.reader import read_gguf
from dgemma.nn.adapters import AdapterConfig, adapter_parameters, attach
from dgemma.weights.adapters import save_adapter


@pytest.fixture
def adapter(checkpoint, tmp_path):
    """The folder of an adapter that changes what the model says."""
    network = dgemma.load(checkpoint, device="cpu").network
    config = AdapterConfig(r=2, alpha=4, targets=("attention", "mlp", "experts"))
    attach(network, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(network).values():
            parameter.normal_(std=0.5, generator=generator)
    save_adapter(network, config, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def merge(dgemma_command, checkpoint, adapter):
    return lambda *arguments, model=checkpoint, adapter=adapter: dgemma_command("merge", model, adapter, *arguments)


def test_a_folder(merge, dgemma_command, checkpoint, adapter, tmp_path):
    """The merged model answers as the model with its adapter does, in float32 and given the same seed."""
    out = tmp_path / "out"
    outcome = merge("-o", out)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith(f"{out}: ") and outcome.out.endswith("kB\n")

    def answer(*arguments):
        outcome = dgemma_command("run", "hello", "--json", "--seed", 3, "--device", "cpu", *arguments)
        assert outcome.code == 0, outcome.err
        return json.loads(outcome.out)["token_ids"]

    assert answer("-m", checkpoint, "--adapter", adapter) == answer("-m", checkpoint, "--adapter", adapter)
    assert answer("-m", checkpoint, "--adapter", adapter) != answer("-m", checkpoint)
    assert answer("-m", out) != answer("-m", checkpoint)


def test_a_gguf_file(merge, tmp_path):
    out = tmp_path / "out.gguf"
    outcome = merge("-o", out, "--type", "q8_0")
    assert (outcome.code, outcome.err) == (0, "")
    assert "bits per weight" in outcome.out
    assert read_gguf(out).metadata["general.file_type"] == 7
    outcome = merge("-o", out)
    assert outcome.code == 1 and outcome.err == f"Error: {out}: this file exists; --force replaces it\n"
    assert merge("-o", out, "--force").code == 0
    assert read_gguf(out).metadata["general.file_type"] == 15
    outcome = merge("-o", tmp_path / "again.gguf", "--type", "q8_0", model=out)
    assert outcome.code == 0 and "rounding twice loses quality" in outcome.err


def test_mistakes(merge, checkpoint, adapter, tmp_path):
    def refused(*arguments, **options):
        outcome = merge(*arguments, **options)
        assert outcome.code == 1 and outcome.err.count("Error: ") == 1, outcome
        return outcome.err

    out = tmp_path / "out"
    assert "--type is for a GGUF file" in refused("-o", out, "--type", "Q8_0")
    assert "--mmproj-type is for a GGUF file" in refused("-o", out, "--mmproj-type", "F16")
    assert "no such adapter" in refused("-o", out, adapter=tmp_path / "nothing")
    assert "does not fit this model" in refused("-o", out, model="sudoku")
    assert "does not fit this model" in refused("-o", tmp_path / "x.gguf", model="sudoku")
    assert "this exists already" in refused("-o", checkpoint)
    assert merge().code == 2  # no OUT
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_adapter_is_for_a_model_on_this_machine(dgemma_command, adapter):
    outcome = dgemma_command("run", "hello", "--url", "http://127.0.0.1:9", "--adapter", adapter)
    assert outcome.code == 1 and "--adapter is for a model on this machine" in outcome.err
