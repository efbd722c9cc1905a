"""A tiny random checkpoint that sees, its template written for pictures and films."""

from __future__ import annotations

import json
from pathlib import Path

from dgemma.train.data import tokenizer as bundled_tokenizer
from support.reference import SHAPES, reference_model
from support.vision import SMALL

TEMPLATE = """{% for message in messages %}<|turn>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}
{% if part.type == 'image' %}<|image|>{% elif part.type == 'video' %}<|video|>{% else %}{{ part.text }}{% endif %}
{% endfor %}{% endif %}<turn|>
{% endfor %}<|turn>model
"""
IDS = {"boi_token_id": "<|image>", "image_token_id": "<|image|>", "eoi_token_id": "<image|>",
       "video_token_id": "<|video|>"}


def save_seeing(folder: Path) -> Path:
    """Writes the checkpoint there; it has the bundled model's tokens."""
    shape = SHAPES["alternating"] | {"vocab_size": bundled_tokenizer.VOCAB_SIZE, "max_position_embeddings": 1000}
    reference_model(shape, vision=SMALL | {"position_embedding_size": 256}).save_pretrained(folder)
    bundled_tokenizer.save(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {name: bundled_tokenizer.SPECIAL_IDS[token] for name, token in IDS.items()}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
