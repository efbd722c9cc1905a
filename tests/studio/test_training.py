"""Recipes from a form, uploads, and runs that are found again by their folders."""

import asyncio
import json
import time
from pathlib import Path

import pytest

from dgemma.errors import DgemmaError
from dgemma.studio.training.ask import as_html
from dgemma.studio.training.data import new_folder, safe_name, source_in
from dgemma.studio.training.films import film, films, recording, set_film_prompt
from dgemma.studio.training.recipes import Choices, bases_of, choices_for, goals, ready_recipes, write_recipe
from dgemma.studio.training.runs import Runs

TINY = """
name: tiny
model: sudoku
data: {train: DATA}
max_steps: STEPS
batch_size: 2
save_every: 2
freeze: []
evaluation: {every: 10, examples: 4}
"""


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n}?", "response": f"{n}!"}) + "\n" for n in range(40)))
    return path


def wait(runs, name, *states, seconds=100):
    deadline = time.monotonic() + seconds
    while (run := runs.find(name)).state not in states:
        assert time.monotonic() < deadline, f"{run.state}: {run.log_end()}"
        time.sleep(0.2)
    return run


def test_the_form_makes_the_recipe_that_its_choices_say():
    made = Choices(name="mails", train=("mails.jsonl",), model="org/base", goal="exact")
    assert made.text == """name: mails
model: org/base
data:
  train: [mails.jsonl]
  held_out_share: 0.1
epochs: 3
batch_size: 8
micro_batch: 1
checkpointing: true
adapter:
  r: 16
  alpha: 32
  targets: [attention, mlp]
optimizer: {lr: 0.0001}
evaluation: {every: 25, metric: exact, count: 16}
"""


@pytest.mark.parametrize("kind", ["conversations", "sudoku", "extraction"])
def test_what_the_form_makes_is_a_recipe(tmp_path, kind):
    for model in ("sudoku", "org/base"):
        for goal in goals():
            settings = choices_for(model)
            text = Choices(**{**vars(settings), "kind": kind, "goal": goal, "train": ("x.jsonl",)}).text
            write_recipe(tmp_path / kind, text)


def test_the_packages_recipes_are_offered_with_those_that_they_go_on_from(tmp_path):
    for ready in ready_recipes():
        text = ready.path.read_text()
        write_recipe(tmp_path / ready.title, text, bases_of(text))
    assert {"Sudoku", "Notes to JSON"} <= {ready.title for ready in ready_recipes()}


def test_a_table_of_cells_becomes_conversations(tmp_path):
    folder = new_folder(tmp_path, "my mails.csv")
    (folder / "my-mails.csv").write_text('prompt;response;reasoning\n"a; b";c;\n')
    source = source_in(folder)
    assert [json.loads(line) for line in Path(source).read_text().splitlines()] == [{"prompt": "a; b", "response": "c"}]


def test_names_of_uploads_lead_nowhere_else():
    assert safe_name("../../etc/x.jsonl") == "x.jsonl"
    assert safe_name("..\\a b.png") == "a-b.png"
    with pytest.raises(DgemmaError, match="training reads"):
        safe_name("x.exe")


def test_a_terminals_text_becomes_harmless_html():
    assert as_html("\x1b[32m<b>\x1b[0m & x") == '<span class="loss">&lt;b&gt;</span> &amp; x'


@pytest.mark.slow
def test_a_run_is_found_again_stopped_and_goes_on(tmp_path, data):
    runs = Runs(tmp_path / "runs")
    runs.begin(TINY.replace("DATA", str(data)).replace("STEPS", "2000"))
    again = Runs(tmp_path / "runs")  # as a studio that was restarted
    while not (tmp_path / "runs/tiny/metrics.jsonl").exists() or not again.find("tiny").histories():
        assert again.find("tiny").state == "running", again.find("tiny").log_end()
        time.sleep(0.2)
    with pytest.raises(DgemmaError, match="already"):
        again.go_on(tmp_path / "runs/tiny")
    again.stop(again.find("tiny"))
    run = wait(again, "tiny", "stopped")
    step = run.histories()[""].last_step
    run.recipe.write_text(run.recipe.read_text().replace("2000", str(step + 2)))
    again.go_on(run.folder)
    assert wait(again, "tiny", "finished").histories()[""].last_step == step + 2
    assert all(check["passed"] for check in run.checks())


def test_a_run_that_fails_says_why(tmp_path):
    runs = Runs(tmp_path / "runs")
    runs.begin(TINY.replace("DATA", str(tmp_path / "nothing.jsonl")).replace("STEPS", "2"))
    assert "nothing.jsonl" in wait(runs, "tiny", "failed").log_end()


@pytest.mark.slow
def test_a_finished_run_is_filmed_once(tmp_path, data):
    runs = Runs(tmp_path / "runs")
    runs.begin(TINY.replace("DATA", str(data)).replace("STEPS", "2"))
    run = wait(runs, "tiny", "finished")
    set_film_prompt(run, "1?")
    path = asyncio.run(film(run))
    assert list(films(run).values()) == [path] and recording(path).canvases
    assert asyncio.run(film(run)) is None
