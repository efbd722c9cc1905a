"""Running recipes: the base first, variants beside each other, and nothing twice."""

import signal
from pathlib import Path

import pytest
import torch
import typer
import yaml

from dgemma.cli.commands.train import train as command
from dgemma.errors import DgemmaError
from dgemma.train.log.events import Noted
from dgemma.train.parallel.distributed import Ranks
from dgemma.train.trainer import plans, train
from support.told import StopAt, Told, working

RANKS = Ranks(torch.device("cpu"))

pytestmark = pytest.mark.usefixtures("quick")


def write(folder, name, data):
    path = folder / name
    path.write_text(yaml.safe_dump(data))
    return path


@pytest.fixture
def base(tmp_path, talk_data):
    return write(tmp_path, "base.yaml", {**talk_data, "name": "base", "max_steps": 1})


@pytest.fixture
def tuned(tmp_path, talk_data, base):
    data = {**talk_data, "name": "tuned", "model": {"recipe": "base.yaml"}, "generation": {}, "max_steps": 1,
            "variants": {"all": {"freeze": []}, "adapter": {"adapter": {"r": 2}}}}
    return write(tmp_path, "tuned.yaml", data)


def test_the_base_is_trained_first_and_all_variants_are_compared(whole, tuned, tmp_path):
    told = Told()
    assert train(tuned, tmp_path / "runs" / "tuned", RANKS, [told])
    runs = tmp_path / "runs"
    assert (runs / "base" / "best" / "model.safetensors").exists()
    assert (runs / "tuned" / "adapter" / "best" / "adapter_model.safetensors").exists()
    page = (runs / "tuned" / "report.html").read_text()
    assert "adapter" in page
    assert told.notes.startswith("first the recipe that it goes on from")
    assert "all variants are done" in told.notes.splitlines()[-1]


def test_what_is_finished_is_not_trained_again(tuned, tmp_path, working_folder):
    """Not where its file has another name, nor where settings did not exist when it was trained."""
    train(tuned, tmp_path / "tuned", RANKS)
    told = Told()
    working_folder(tuned.parent)
    assert train(Path(tuned.name), tmp_path / "tuned", RANKS, [told])
    for path in tmp_path.glob("**/recipe.yaml"):
        settings = yaml.safe_load(path.read_text())
        del settings["objective"]["fill_weight"], settings["optimizer"]["betas"]
        path.write_text(yaml.safe_dump(settings))
    assert train(tuned, tmp_path / "tuned", RANKS, [told])
    assert all(isinstance(event, Noted) for event in told.events)
    assert told.notes.count("finished already") == 4  # both variants, each time


def test_a_finished_run_with_other_settings_goes_on(base, tmp_path, talk_data):
    train(base, tmp_path / "base", RANKS)
    longer = write(tmp_path, "base.yaml", {**talk_data, "name": "base", "max_steps": 2})
    told = Told()
    assert train(longer, tmp_path / "base", RANKS, [told])
    assert "finished already" not in told.notes


def test_a_stopped_base_stops_the_rest(tuned, tmp_path):
    stop = StopAt(working("validating"))
    data = yaml.safe_load((tmp_path / "base.yaml").read_text())
    write(tmp_path, "base.yaml", {**data, "max_steps": 3})
    assert not train(tuned, tmp_path / "tuned", RANKS, [stop], stop)
    assert not (tmp_path / "tuned" / "all").exists()


def test_a_recipe_that_goes_on_from_itself_is_an_error(tmp_path, talk_data):
    path = write(tmp_path, "r.yaml", {**talk_data, "model": {"recipe": "r.yaml"}, "generation": {}})
    with pytest.raises(DgemmaError, match="cannot go on from itself"):
        train(path, tmp_path / "r", RANKS)


def test_two_recipes_of_one_name_do_not_share_a_folder(tmp_path, talk_data, base):
    data = {**talk_data, "name": "base", "model": {"recipe": "base.yaml"}, "generation": {}}
    path = write(tmp_path, "r.yaml", data)
    with pytest.raises(DgemmaError, match="give it another name"):
        train(path, tmp_path / "base", RANKS)


def test_the_plan_of_recipes_in_a_circle_is_an_error(tmp_path, talk_data):
    for name, other in (("a", "b"), ("b", "a")):
        write(tmp_path, f"{name}.yaml", {**talk_data, "model": {"recipe": f"{other}.yaml"}, "generation": {}})
    with pytest.raises(DgemmaError, match="cannot go on from itself"):
        plans(tmp_path / "a.yaml", RANKS)


def test_what_no_run_has_written_is_not_replaced(base, tmp_path, talk_data):
    (tmp_path / "best").mkdir()
    with pytest.raises(DgemmaError, match="best: exists, and is no run's"):
        train(base, tmp_path, RANKS)
    recipe = write(tmp_path, "recipe.yaml", talk_data)
    (tmp_path / "best").rmdir()
    with pytest.raises(DgemmaError, match="would write its own recipe in this one's place"):
        train(recipe, tmp_path, RANKS)
    assert yaml.safe_load(recipe.read_text()) == talk_data


def test_a_folder_that_holds_something_else_is_named(base, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(DgemmaError, match="is no folder of a run"):
        train(base, tmp_path / "run", RANKS)


def test_ctrl_c_ends_the_command_after_the_step_and_the_next_one_goes_on(tmp_path, talk_data, capsys):
    """It comes while the answers before the first step are judged."""
    (tmp_path / "metric.py").write_text("""import os, signal, pathlib
def score(question, answer):
    if not pathlib.Path(__file__).with_name("once").exists():
        pathlib.Path(__file__).with_name("once").touch()
        os.kill(os.getpid(), signal.SIGINT)
    return 1.0
""")
    evaluation = {"every": 100, "examples": 1, "metric": f"{tmp_path}/metric.py:score", "count": 1, "max_tokens": 2}
    path = write(tmp_path, "r.yaml", {**talk_data, "max_steps": 1, "evaluation": evaluation})
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(typer.Exit) as stopped:
        command(path, tmp_path / "run", "cpu")
    assert stopped.value.exit_code == 130 and signal.getsignal(signal.SIGINT) is handler
    assert "stopped; run the same command again to go on at step 0" in capsys.readouterr().out
    command(path, tmp_path / "run", "cpu")
    assert "done at step 1" in capsys.readouterr().out
