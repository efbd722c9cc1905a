"""Recipes small enough to train in a test."""

from pathlib import Path

import pytest
import yaml

MODEL = {
    "canvas_length": 90,
    "text_config": {
        "vocab_size": 288, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "global_head_dim": 8,
        "num_global_key_value_heads": 1, "sliding_window": 64, "num_experts": 2, "top_k_experts": 1,
        "moe_intermediate_size": 8, "layer_types": ["sliding_attention", "full_attention"],
    },
}


@pytest.fixture
def recipe_data():
    return {"name": "tiny", "model": MODEL, "max_steps": 4, "batch_size": 4, "save_every": 100,
            "generation": {"max_denoising_steps": 2}, "data": {"kind": "sudoku", "bases": 40},
            "objective": {"passes": 2, "rollout": 0.5, "causal_weight": 0.1},
            "optimizer": {"kind": "muon", "lr": 3e-3, "schedule": "linear", "warmup_steps": 2},
            "evaluation": {"every": 100, "count": 1, "examples": 2}}


@pytest.fixture
def talk_data(recipe_data, conversations):
    """A recipe on conversations, which are there at once: making puzzles takes seconds."""
    return {**recipe_data, "data": {"kind": "conversations", "train": [str(conversations)], "fill": "pad"}}


@pytest.fixture
def recipe(tmp_path: Path, talk_data):
    return loaded(tmp_path / "talk.yaml", talk_data)


@pytest.fixture
def sudoku_recipe(tmp_path: Path, recipe_data):
    return loaded(tmp_path / "sudoku.yaml", recipe_data)


def loaded(path, data):
    from dgemma.train.recipe import load_recipe

    path.write_text(yaml.safe_dump(data))
    return load_recipe(path)[""]


@pytest.fixture
def quick(request, monkeypatch):
    """No preflight and no page, seconds that say nothing here, but for tests that ask for the `whole` of a run."""
    from dgemma.train import trainer

    if "whole" not in request.fixturenames:
        monkeypatch.setattr(trainer, "run_preflight", lambda *_, **__: [])
        monkeypatch.setattr(trainer, "write_report", lambda folder: folder / "report.html")


@pytest.fixture
def whole():
    """The run with its preflight and its page."""


@pytest.fixture
def conversations(tmp_path: Path):
    """A file of eight short conversations."""
    import json

    path = tmp_path / "talk.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"say {word}", "response": word * (1 + index % 2)})
                              for index, word in enumerate(("one", "two", "three", "four", "five", "six", "seven",
                                                            "eight"))))
    return path
