"""A tiny random DiffusionGemma as transformers writes it, in one file and in shards."""

import shutil

import pytest
import torch

from dgemma.train.data import tokenizer as bundled_tokenizer


@pytest.fixture(scope="session")
def reference():
    """The oracle: transformers' network, with weights that make every norm, scale and scalar count."""
    from transformers import (
        DiffusionGemmaConfig,
        DiffusionGemmaForBlockDiffusion,
        DiffusionGemmaTextConfig,
        Gemma4VisionConfig,
    )

    torch.manual_seed(0)
    text = DiffusionGemmaTextConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, global_head_dim=32, num_global_key_value_heads=1, sliding_window=12,
        num_experts=8, top_k_experts=2, moe_intermediate_size=32, use_bidirectional_attention="vision",
        layer_types=["sliding_attention", "full_attention"] * 2, initializer_range=0.2)
    vision = Gemma4VisionConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        head_dim=32, position_embedding_size=64)
    config = DiffusionGemmaConfig(text_config=text, vision_config=vision, canvas_length=16)
    model = DiffusionGemmaForBlockDiffusion(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("scale"):
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.uniform_(0.5, 1.5)
    return model


@pytest.fixture(scope="session")
def single(reference, tmp_path_factory):
    """A folder with one model.safetensors; not to be written to."""
    folder = tmp_path_factory.mktemp("single")
    reference.save_pretrained(folder)
    bundled_tokenizer.save(folder)
    return folder


@pytest.fixture(scope="session")
def sharded(reference, tmp_path_factory):
    """The same network in several shards and an index; not to be written to."""
    folder = tmp_path_factory.mktemp("sharded")
    reference.save_pretrained(folder, max_shard_size="250KB")
    bundled_tokenizer.save(folder)
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture
def copy_of(tmp_path):
    """A function that copies a checkpoint folder to a place where a test may break it."""

    def copy(folder):
        return shutil.copytree(folder, tmp_path / "copy")

    return copy


@pytest.fixture
def rewrite():
    """A function that applies ``change(tensors: dict)`` to a folder's model.safetensors."""
    from safetensors.torch import load_file, save_file

    def apply(folder, change):
        path = folder / "model.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return apply
