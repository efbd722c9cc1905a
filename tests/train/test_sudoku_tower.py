"""The recipe of the Sudoku tower: labels fit what is drawn, it stops and goes on, and a model takes the tower."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from dgemma.config import load_model_config
from dgemma.weights.towers import find_tower

SCRIPT = Path(__file__).parents[2] / "recipes" / "sudoku_tower.py"


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("sudoku_tower", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_cell_of_the_grid_is_the_label_of_some_patch(recipe):
    for seed in range(4):
        seen = recipe.Seen((5, seed), photo=bool(seed % 2), held_out=False)
        told = np.zeros((9, 9), int)
        rows, columns, digits = seen.labels
        within = (rows < 9) & (columns < 9)
        told[rows[within], columns[within]] = digits[within]
        assert np.array_equal(told.ravel(), seen.grid)
        assert (digits[~within] == 0).all()


def test_a_tower_is_written_gone_on_with_and_taken_by_a_model(recipe, tmp_path, capsys):
    settings = dict(batch=2, muon=6e-3, lr=2e-3, seed=1, count=2)
    recipe.train(tmp_path, 1, **settings)
    first = torch.load(tmp_path / "state.pt")
    recipe.train(tmp_path, 2, **settings)
    assert torch.load(tmp_path / "state.pt")["step"] == 2 == first["step"] + 1
    assert "screens in fonts not trained on" in capsys.readouterr().out
    bundled = recipe.BUNDLED
    tower = find_tower(bundled, load_model_config(bundled), vision=tmp_path)
    assert tower is not None
    assert tower.config.vision_soft_token_budgets == (70,)
    vision = tower.load(torch.device("cpu"), None)
    assert vision([torch.rand(16, 16, 1200)])[0].shape == (64, 128)
