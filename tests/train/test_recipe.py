"""Recipes: what is right loads, what is wrong is named."""

from pathlib import Path

import pytest
import yaml

from dgemma.errors import DgemmaError
from dgemma.nn.adapters import AdapterConfig
from dgemma.train.recipe import ConversationData, SudokuData, beginning, load_recipe, recipe_of
from dgemma.train.runs.run import settings_of

RECIPES = Path(__file__).parents[2] / "recipes"


def load(tmp_path, data):
    path = tmp_path / "r.yaml"
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return load_recipe(path)


def talk(**others):
    return {"name": "talk", "model": "sudoku", "max_steps": 3, "data": {"train": "talk.jsonl"}, **others}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_that_is_shipped_loads(path):
    assert load_recipe(path)


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path, recipe_data):
    assert load(tmp_path, {**recipe_data, "optimizer": {"lr": "3e-3"}})[""].optimizer.lr == 3e-3


def test_sections_become_what_they_stand_for(tmp_path):
    recipe = load(tmp_path, talk(adapter={"r": 4, "targets": ["experts"]}, dtype="bfloat16", epochs=None))[""]
    assert recipe.adapter == AdapterConfig(r=4, targets=("experts",))
    assert recipe.data == ConversationData(("talk.jsonl",))
    assert (recipe.dtype, recipe.epochs, recipe.fresh) == ("bfloat16", None, False)


def test_files_are_found_beside_the_recipe(tmp_path):
    (tmp_path / "talk.jsonl").write_text("{}")
    assert load(tmp_path, talk())[""].data.train == (str(tmp_path / "talk.jsonl"),)
    assert load(tmp_path, {**talk(), "data": {"train": ["org/set"]}})[""].data.train == ("org/set",)


def test_a_recipe_is_what_its_plain_values_say(tmp_path, recipe_data):
    for data in (recipe_data, talk(adapter={"r": 2}, wandb="mine")):
        recipe = load(tmp_path, data)[""]
        assert recipe_of(yaml.safe_load(yaml.safe_dump(settings_of(recipe))), tmp_path / "r.yaml") == recipe


def test_variants_differ_in_what_they_say_and_share_the_rest(tmp_path, recipe_data):
    found = load(tmp_path, {**recipe_data, "variants": {
        "a": None, "b": {"objective": {"passes": 3}, "data": {"plain": True}}, "c": {"optimizer": None}}})
    assert list(found) == ["a", "b", "c"]
    assert (found["a"].objective.passes, found["b"].objective.passes) == (2, 3)
    assert found["b"].objective.rollout == 0.5
    assert found["b"].data == SudokuData(bases=40, plain=True)
    assert found["c"].optimizer.kind == "adamw"


def test_the_base_recipe_is_found_beside_this_one(tmp_path):
    recipe = load(tmp_path, {**talk(), "model": {"recipe": "base.yaml"}})[""]
    assert recipe.model == {"recipe": str(tmp_path / "base.yaml")}


@pytest.mark.parametrize(("change", "message"), [
    ({"batchsize": 3}, "unknown setting batchsize"),
    ({"objective": {"t_min": 0.9, "t_max": 0.5}}, "objective: t_min and t_max"),
    ({"objective": {"noise": 1}}, "objective: unknown setting noise"),
    ({"max_steps": "many"}, "max_steps must be int"),
    ({"max_steps": 0}, "max_steps must be at least 1"),
    ({"max_steps": None}, "either max_steps or epochs"),
    ({"epochs": 2}, "either max_steps or epochs"),
    ({"max_steps": None, "epochs": 2}, "for data that has an end"),
    ({"data": {"kind": "chess"}}, "kind 'chess' is unknown"),
    ({"data": [1]}, "data: expected a mapping"),
    ({"data": {"kind": "sudoku", "givens": [1, 2, 3]}}, "givens must be a list of 2"),
    ({"dtype": "int8"}, "dtype must be one of float32"),
    ({"adapter": {"r": 4}}, "nothing to adapt in a model of random weights"),
    ({"model": "sudoku"}, "generation is for new models"),
    ({"model": "sudoku", "generation": {}, "adapter": {"r": 4}, "freeze": ["router"]}, "frozen already"),
    ({"model": "sudoku", "generation": {}, "adapter": {"r": 0}}, "adapter: an adapter's rank"),
    ({"model": 3}, "model must be"),
    ({"optimizer": {"schedule": "steep"}}, "schedule must be one of cosine"),
    ({"optimizer": {"lr": 0}}, "optimizer: lr must be above 0"),
    ({"optimizer": {"ema": 1.0}}, "ema must be"),
    ({"evaluation": {"every": 0}}, "evaluation: every must be at least 1"),
    ({"evaluation": {"sweep": [4, 0], "metric": "sudoku"}}, "numbers of denoising steps are at least 1"),
    ({"evaluation": {"sweep": [4]}}, "name a metric"),
    ({"evaluation": {"max_tokens": 0}}, "max_tokens must be at least 1"),
    ({"optimizer": {"lr": float("nan")}}, "lr must be a number"),
    ({"seed": -1}, "seed must be a whole number from 0"),
    ({"name": "../x"}, "cannot be the name of a folder"),
    ({"data": {"kind": "sudoku", "givens": [40, 30]}}, "givens must be two numbers"),
    ({"data": {"train": "talk.jsonl", "held_out_share": 1.0}}, "held_out_share must be"),
    ({"data": {"train": "talk.jsonl", "max_context": 0}}, "max_context must be"),
    ({"data": {"kind": "extraction", "count": 0}}, "count must be at least 1"),
    ({"data": {"kind": "extraction", "keys": ["who", "date"]}}, "keys must be some of type, date, .* in that order"),
    ({"data": {"kind": "extraction", "distractors": 4}}, "distractors must be from 0 to 3"),
    ({"max_steps": None, "epochs": float("inf"), "data": {"train": "talk.jsonl"}}, "epochs must be above 0"),
    ({"variants": {"a/b": {}}}, "cannot be the name of a folder"),
    ({"variants": {"a": {"max_steps": -1}}}, "variants: a: max_steps must be at least 1"),
    ({"variants": []}, "variants: expected a mapping"),
])
def test_a_mistake_is_named_with_its_file_and_section(tmp_path, recipe_data, change, message):
    with pytest.raises(DgemmaError, match=message):
        load(tmp_path, {**recipe_data, **change})


def test_a_model_and_a_metric_are_found_beside_the_recipe(tmp_path):
    for name in ("base.gguf", "metric.py"):
        (tmp_path / name).touch()
    recipe = load(tmp_path, talk(model="base.gguf", evaluation={"metric": "metric.py:score"}))[""]
    assert recipe.model == str(tmp_path / "base.gguf")
    assert recipe.evaluation.metric == f"{tmp_path / 'metric.py'}:score"


def test_yaml_s_on_and_off_are_words(tmp_path):
    recipe = load(tmp_path, "{name: talk, model: sudoku, max_steps: 3, data: {train: talk.jsonl, thinking: off}}")[""]
    assert recipe.data == ConversationData(("talk.jsonl",), thinking="off")


@pytest.mark.parametrize(("base", "message"), [
    (talk(model={"recipe": "r.yaml"}), "cannot go on from itself"), (talk(adapter={"r": 2}), "trains an adapter"),
    (talk(variants={"a": {}}), "has variants")])
def test_a_base_that_is_none_is_named(tmp_path, base, message):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    recipe = load(tmp_path, talk(model={"recipe": "base.yaml"}))[""]
    with pytest.raises(DgemmaError, match=message):
        beginning(recipe)


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
