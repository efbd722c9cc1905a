"""Checkpoint folders are written whole, for everybody to read, or refused in one line."""

import json
import os
import stat

import pytest

from dgemma.config import load_generation_config, load_model_config
from dgemma.errors import DgemmaError
from dgemma.train.data import tokenizer as bundled_tokenizer
from dgemma.weights.load import load_network
from dgemma.weights.save import save_checkpoint
from support.reference import random_network, tiny_config

CONFIG = {
    "model_type": "diffusion_gemma", "canvas_length": 8,
    "text_config": {
        "vocab_size": 50, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 12,
        "num_global_key_value_heads": 1, "sliding_window": 6, "num_experts": 4, "top_k_experts": 2,
        "moe_intermediate_size": 16, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
}


@pytest.fixture(scope="module")
def network():
    return random_network(tiny_config())


def save(network, folder):
    save_checkpoint(network, folder, CONFIG, {"max_denoising_steps": 7})
    bundled_tokenizer.save(folder)


def test_what_is_written(network, tmp_path):
    folder = tmp_path / "a" / "b"
    before = os.umask(0o022)
    try:
        save(network, folder)
        save(network, folder)  # over what is there
    finally:
        os.umask(before)
    files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert files == dict.fromkeys(["model.safetensors", "config.json", "generation_config.json", "tokenizer.json",
                                   "tokenizer_config.json", "chat_template.jinja"], 0o644)
    config = load_model_config(folder)
    assert json.loads((folder / "config.json").read_text())["dtype"] == config.dtype == "bfloat16"
    assert load_generation_config(folder, config).max_denoising_steps == 7
    assert load_network(folder, config).state_dict().keys() == network.state_dict().keys()


def test_a_failure_leaves_the_old_checkpoint(network, tmp_path, full_disk):
    save(network, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    full_disk()
    with pytest.raises(DgemmaError, match=r"model\.safetensors: cannot be written \(I/O error: No space left"):
        save(network, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_place_that_cannot_be_a_folder(network, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DgemmaError, match="file/a: this folder cannot be made"):
        save(network, tmp_path / "file" / "a")
    with pytest.raises(DgemmaError, match="file/a: this folder cannot be made"):
        bundled_tokenizer.save(tmp_path / "file" / "a")
