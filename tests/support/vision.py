"""Small random vision towers for the tests: transformers' as the oracle, ours with the same weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from dgemma.config import VisionConfig, model_config_from_dict
from dgemma.nn.vision import Vision
from dgemma.train.data import tokenizer as bundled_tokenizer
from support.reference import SHAPES, randomise, reference_model

TEXT_WIDTH = 40
SMALL: dict[str, Any] = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
                             num_key_value_heads=4, head_dim=12, position_embedding_size=64)


# What `save_seeing_model` makes: the width of its embeddings, its tower, its template and its tokens for pictures.
SEEING_WIDTH: int = SHAPES["alternating"]["hidden_size"]
_SEEING = SMALL | {"hidden_size": 64, "head_dim": 16, "position_embedding_size": 256, "standardize": True}
_TEMPLATE = """{% for message in messages %}<|turn>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}
{% if part.type == 'image' %}<|image|>{% elif part.type == 'video' %}<|video|>{% else %}{{ part.text }}{% endif %}
{% endfor %}{% endif %}<turn|>
{% endfor %}<|turn>model
"""
_IDS = {"boi_token_id": "<|image>", "image_token_id": "<|image|>", "eoi_token_id": "<image|>",
        "video_token_id": "<|video|>"}


def save_seeing_model(folder: Path, seed: int = 0, **vision: Any) -> Path:
    """A tiny random checkpoint with a tower, a tokenizer and a template; float32 numbers that bfloat16 holds."""
    shape = SHAPES["alternating"] | {"vocab_size": bundled_tokenizer.VOCAB_SIZE, "max_position_embeddings": 1000}
    reference_model(shape, vision=_SEEING | vision, seed=seed).bfloat16().float().save_pretrained(folder)
    bundled_tokenizer.save(folder)
    (folder / "chat_template.jinja").write_text(_TEMPLATE, encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {name: bundled_tokenizer.SPECIAL_IDS[token] for name, token in _IDS.items()}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


class ReferenceVision(torch.nn.Module):
    """transformers' tower and embedder under the names that a checkpoint has for them in ``model.encoder``."""

    def __init__(self, vision: dict[str, Any], seed: int):
        from transformers import DiffusionGemmaTextConfig, Gemma4VisionConfig
        from transformers.models.diffusion_gemma.modeling_diffusion_gemma import DiffusionGemmaMultimodalEmbedder
        from transformers.models.gemma4.modeling_gemma4 import Gemma4VisionModel

        super().__init__()
        self.config = Gemma4VisionConfig(**vision)
        self.vision_tower = Gemma4VisionModel(self.config)
        self.embed_vision = DiffusionGemmaMultimodalEmbedder(self.config,
                                                             DiffusionGemmaTextConfig(hidden_size=TEXT_WIDTH))
        self.eval().requires_grad_(False)
        randomise(self, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        for name, tensor in self.named_buffers():
            if name.endswith("std_bias"):
                tensor.normal_(0.0, 3.0, generator=generator)
            elif name.endswith("std_scale"):
                tensor.uniform_(0.2, 2.0, generator=generator)
            elif name.endswith(("_min", "_max")):  # narrow enough to clip some numbers
                tensor.uniform_(0.5, 1.5, generator=generator).mul_(-1 if name.endswith("_min") else 1)

    def forward(self, patches: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Padded patches [B, P, 3p²] and positions [B, P, 2] (-1: padding) -> the soft tokens of all, [n, D]."""
        return self.embed_vision(self.vision_tower(patches, positions).last_hidden_state)


def vision_config(reference: ReferenceVision) -> VisionConfig:
    """The tower's shape as our reader finds it in the ``config.json`` that transformers writes."""
    text = dict(vocab_size=50, hidden_size=TEXT_WIDTH, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                num_experts=4, top_k_experts=2, moe_intermediate_size=16, sliding_window=8)
    config = model_config_from_dict({"model_type": "diffusion_gemma", "text_config": text,
                                     "vision_config": reference.config.to_dict()}).vision
    assert config is not None
    return config


def vision_like(reference: ReferenceVision) -> Vision:
    """Ours with the weights of transformers' tower, under the same names."""
    vision = Vision(vision_config(reference), TEXT_WIDTH)
    vision.load_state_dict(reference.state_dict())
    return vision.eval().requires_grad_(False)


def random_pictures(shapes: list[tuple[int, int]], patch_size: int = 16, seed: int = 0) -> list[torch.Tensor]:
    """Patches [rows, columns, 3p²] between 0 and 1, of pictures of these sizes in patches."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(*shape, 3 * patch_size**2, generator=generator) for shape in shapes]


def padded(pictures: list[torch.Tensor], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same pictures as transformers takes them: patches [B, length, 3p²] and positions [B, length, 2]."""
    patches = torch.zeros(len(pictures), length, pictures[0].shape[2])
    positions = torch.full((len(pictures), length, 2), -1)
    for index, picture in enumerate(pictures):
        rows, columns, _ = picture.shape
        patches[index, : rows * columns] = picture.flatten(0, 1)
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        positions[index, : rows * columns] = torch.stack([x, y], dim=-1).flatten(0, 1)
    return patches, positions
