"""A tiny seeing checkpoint that can be taught, and conversations about pictures for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.pictures import random_picture
from support.vision import save_seeing_model

_TEMPLATE = """{% for message in messages %}<|turn>{{ 'model' if message.role == 'assistant' else message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}
{% if part.type == 'image' %}<|image|>{% elif part.type == 'video' %}<|video|>{% else %}{{ part.text }}{% endif %}
{% endfor %}{% endif %}<turn|>
{% endfor %}{% if add_generation_prompt %}{{ '<|turn>model\\n' }}{% endif %}"""
CAPTIONS = ("a cat", "the sea")


def save_pupil(folder: Path, seed: int = 0, **vision: Any) -> Path:
    """`save_seeing_model` with a template that training understands, and the stop tokens of the family."""
    save_seeing_model(folder, seed, **vision)
    (folder / "chat_template.jinja").write_text(_TEMPLATE, encoding="utf-8")
    generation = folder / "generation_config.json"
    settings = json.loads(generation.read_text(encoding="utf-8"))
    generation.write_text(json.dumps({**settings, "eos_token_id": [1, 106, 50]}), encoding="utf-8")
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
