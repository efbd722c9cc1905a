"""A tiny seeing checkpoint that can be taught, and conversations about pictures for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from dgemma.train.recipe import Recipe, SudokuData
from dgemma.train.runs.state import begin, parts_of
from support.pictures import random_picture
from support.vision import save_seeing_model

_TEMPLATE = """{% for message in messages %}<|turn>{{ 'model' if message.role == 'assistant' else message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}
{% if part.type == 'image' %}<|image|>{% elif part.type == 'video' %}<|video|>{% else %}{{ part.text }}{% endif %}
{% endfor %}{% endif %}<turn|>
{% endfor %}{% if add_generation_prompt %}{{ '<|turn>model\\n' }}{% endif %}"""
CAPTIONS = ("a cat", "the sea")
# What a recipe gives a model to see with: pictures of 320 x 320 pixels are 64 soft tokens.
TOWER = {
    "vision_soft_tokens_per_image": 70, "vision_soft_token_budgets": [70],
    "vision_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                      "num_key_value_heads": 2, "head_dim": 8, "patch_size": 20, "pooling_kernel_size": 2,
                      "position_embedding_size": 64},
}


def save_pupil(folder: Path, seed: int = 0, **vision: Any) -> Path:
    """`save_seeing_model` with a template that training understands, and the stop tokens of the family."""
    save_seeing_model(folder, seed, **vision)
    (folder / "chat_template.jinja").write_text(_TEMPLATE, encoding="utf-8")
    generation = folder / "generation_config.json"
    settings = json.loads(generation.read_text(encoding="utf-8"))
    generation.write_text(json.dumps({**settings, "eos_token_id": [1, 106, 50]}), encoding="utf-8")
    return folder


def save_seeing_sudoku(folder: Path) -> Path:
    """The bundled model with a random tower of `TOWER`'s shape."""
    recipe = Recipe("seeing", "sudoku", SudokuData(pictures=1.0), vision=TOWER, max_steps=1)
    begin(recipe, parts_of(recipe), torch.device("cpu")).export(folder)
    return folder


def captioned(source: Any, caption: str, words: str = "What is this?") -> dict[str, Any]:
    """A row: a picture, a question, and what is to be said of it."""
    return {"messages": [{"role": "user", "content": [{"type": "image", "path": source},
                                                      {"type": "text", "text": words}]},
                         {"role": "assistant", "content": caption}]}


def save_captions(folder: Path) -> Path:
    """Two pictures of one size in a folder, and a file beside them that says what they are."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(len(CAPTIONS)):
        random_picture(60, 50, seed=index).save(folder / f"{index}.png")
    rows = [captioned(f"{index}.png", caption) for index, caption in enumerate(CAPTIONS)]
    path = folder / "captions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
