"""Running recipes: the base first, variants beside each other, and nothing twice."""

from pathlib import Path

import pytest
import torch
import yaml

from dgemma.errors import DgemmaError
from dgemma.train import trainer as trainer_module
from dgemma.train.parallel.distributed import Ranks
from dgemma.train.runs.variants import plans, train

RANKS = Ranks(torch.device("cpu"))


def write(folder, name, data):
    path = folder / name
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.fixture
def base(tmp_path, recipe_data):
    return write(tmp_path, "base.yaml", {**recipe_data, "name": "base", "max_steps": 1})


@pytest.fixture
def tuned(tmp_path, recipe_data, base):
    data = {**recipe_data, "name": "tuned", "model": {"recipe": "base.yaml"}, "generation": {}, "max_steps": 1,
            "variants": {"all": {"freeze": []}, "adapter": {"adapter": {"r": 2}}}}
    return write(tmp_path, "tuned.yaml", data)


def test_the_base_is_trained_first_and_all_variants_are_compared(tuned, tmp_path):
    told = []
    assert train(tuned, tmp_path / "runs" / "tuned", RANKS, told.append)
    runs = tmp_path / "runs"
    assert (runs / "base" / "best" / "model.safetensors").exists()
    assert (runs / "tuned" / "adapter" / "best" / "adapter_model.safetensors").exists()
    page = (runs / "tuned" / "report.html").read_text()
    assert "adapter" in page
    assert told[0].startswith("first the recipe that it goes on from")
    assert "all variants are done" in told[-1]


def test_what_is_finished_is_not_trained_again(tuned, tmp_path, monkeypatch):
    train(tuned, tmp_path / "tuned", RANKS, print)
    monkeypatch.setattr(trainer_module.Trainer, "__init__", lambda *_, **__: pytest.fail("trained again"))
    assert train(tuned, tmp_path / "tuned", RANKS, print)


def test_a_run_finished_before_a_setting_existed_is_not_trained_again(tuned, tmp_path, monkeypatch):
    train(tuned, tmp_path / "tuned", RANKS, print)
    for path in tmp_path.glob("**/recipe.yaml"):
        settings = yaml.safe_load(path.read_text())
        del settings["objective"]["fill_weight"], settings["optimizer"]["betas"]
        path.write_text(yaml.safe_dump(settings))
    monkeypatch.setattr(trainer_module.Trainer, "__init__", lambda *_, **__: pytest.fail("trained again"))
    assert train(tuned, tmp_path / "tuned", RANKS, print)


def test_a_recipe_is_the_same_however_its_file_is_called(tuned, tmp_path, monkeypatch):
    train(tuned, tmp_path / "tuned", RANKS, print)
    monkeypatch.setattr(trainer_module.Trainer, "__init__", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.chdir(tuned.parent)
    assert train(Path(tuned.name), tmp_path / "tuned", RANKS, print)


def test_a_finished_run_with_other_settings_goes_on(base, tmp_path, recipe_data):
    train(base, tmp_path / "base", RANKS, print)
    longer = write(tmp_path, "base.yaml", {**recipe_data, "name": "base", "max_steps": 2})
    told = []
    assert train(longer, tmp_path / "base", RANKS, told.append)
    assert "finished already" not in " ".join(told)


def test_a_stopped_base_stops_the_rest(tuned, tmp_path, monkeypatch):
    original = trainer_module.Trainer.train

    def stopped(self):
        self.stop()
        return original(self)

    monkeypatch.setattr(trainer_module.Trainer, "train", stopped)
    data = yaml.safe_load((tmp_path / "base.yaml").read_text())
    write(tmp_path, "base.yaml", {**data, "max_steps": 3})
    assert not train(tuned, tmp_path / "tuned", RANKS, print)
    assert not (tmp_path / "tuned" / "all").exists()


def test_a_recipe_that_goes_on_from_itself_is_an_error(tmp_path, recipe_data):
    path = write(tmp_path, "r.yaml", {**recipe_data, "model": {"recipe": "r.yaml"}, "generation": {}})
    with pytest.raises(DgemmaError, match="cannot go on from itself"):
        train(path, tmp_path / "r", RANKS, print)


def test_two_recipes_of_one_name_do_not_share_a_folder(tmp_path, recipe_data, base):
    data = {**recipe_data, "name": "base", "model": {"recipe": "base.yaml"}, "generation": {}}
    path = write(tmp_path, "r.yaml", data)
    with pytest.raises(DgemmaError, match="give it another name"):
        train(path, tmp_path / "base", RANKS, print)


def test_the_plan_of_recipes_in_a_circle_is_an_error(tmp_path, recipe_data):
    for name, other in (("a", "b"), ("b", "a")):
        write(tmp_path, f"{name}.yaml", {**recipe_data, "model": {"recipe": f"{other}.yaml"}, "generation": {}})
    with pytest.raises(DgemmaError, match="cannot go on from itself"):
        plans(tmp_path / "a.yaml", RANKS)


def test_what_no_run_has_written_is_not_replaced(base, tmp_path, recipe_data):
    (tmp_path / "best").mkdir()
    with pytest.raises(DgemmaError, match="best: exists, and is no run's"):
        train(base, tmp_path, RANKS, print)
    recipe = write(tmp_path, "recipe.yaml", recipe_data)
    (tmp_path / "best").rmdir()
    with pytest.raises(DgemmaError, match="would write its own recipe in this one's place"):
        train(recipe, tmp_path, RANKS, print)
    assert yaml.safe_load(recipe.read_text()) == recipe_data


def test_a_folder_that_holds_something_else_is_named(base, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(DgemmaError, match="is no folder of a run"):
        train(base, tmp_path / "run", RANKS, print)
