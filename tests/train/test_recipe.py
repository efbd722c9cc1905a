"""Recipes: what is right loads, what is wrong is named."""

import pytest
import yaml

from dgemma.errors import DgemmaError
from dgemma.train.recipe import load_recipe


def load(tmp_path, data):
    path = tmp_path / "r.yaml"
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return load_recipe(path)


def test_the_bundled_models_recipe_loads():
    from pathlib import Path

    recipe = load_recipe(Path(__file__).parents[2] / "recipes" / "sudoku.yaml")
    assert recipe.task == "sudoku"
    assert recipe.model["canvas_length"] == 90


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path, recipe_data):
    assert load(tmp_path, {**recipe_data, "optimizer": {"muon_lr": "3e-3"}}).optimizer.muon_lr == 3e-3


@pytest.mark.parametrize(("change", "message"), [
    ({"batchsize": 3}, "unknown setting batchsize"),
    ({"objective": {"t_min": 0.9, "t_max": 0.5}}, "objective: t_min and t_max"),
    ({"objective": {"noise": 1}}, "objective: unknown setting noise"),
    ({"max_steps": "many"}, "max_steps must be int"),
    ({"task": "chess"}, "task 'chess' is unknown"),
    ({"data": [1]}, "data: expected a mapping"),
])
def test_a_mistake_is_named_with_its_file_and_section(tmp_path, recipe_data, change, message):
    with pytest.raises(DgemmaError, match=message):
        load(tmp_path, {**recipe_data, **change})


def test_what_is_missing_is_named(tmp_path, recipe_data):
    del recipe_data["model"]
    with pytest.raises(DgemmaError, match="missing model"):
        load(tmp_path, recipe_data)


@pytest.mark.parametrize("text", ["a: [", "- 1", ""])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text):
    with pytest.raises(DgemmaError, match=r"r\.yaml"):
        load(tmp_path, text)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DgemmaError, match=r"nowhere\.yaml"):
        load_recipe(tmp_path / "nowhere.yaml")
