"""What docs/fine-tuning.md shows works as written, with the bundled model in place of the 26B and few steps."""

import json
import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from dgemma.cli.main import app
from dgemma.train.eval.metrics import METRICS
from dgemma.train.objective import Objective
from dgemma.train.recipe import load_recipe
from support.pictures import random_picture
from support.seeing import save_pupil

PAGE = (Path(__file__).parents[1] / "docs" / "fine-tuning.md").read_text()
RECIPE = re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[1]
MODEL = "google/diffusiongemma-26B-A4B-it"
COMMANDS = [shlex.split(line[len("$ dgemma ") :].split(" | ")[0].replace(MODEL, "sudoku"), comments=True)
            for block in re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()
            if line.startswith("$ dgemma ")]
# Only read; recipes that other tests load, and what one makes; what needs a model that sees.
SKIPPED = ("serve", "recipes/", "runs/extraction/", "scans")


@pytest.fixture
def place(tmp_path, working_folder):
    """A folder with conversations and the page's recipe."""
    for name in ("mails", "conversations"):
        (tmp_path / f"{name}.jsonl").write_text("".join(
            json.dumps({"prompt": f"Is {i} odd?", "response": "yes" if i % 2 else "no"}) + "\n" for i in range(10)))
    few = RECIPE.replace(MODEL, "sudoku").replace("epochs: 3", "max_steps: 1").replace("r: 16", "r: 2")
    (tmp_path / "mails.yaml").write_text(few.replace("batch_size: 8 ", "batch_size: 2 "))
    working_folder(tmp_path)
    return tmp_path


def test_the_recipe_is_one(tmp_path):
    (tmp_path / "mails.yaml").write_text(RECIPE)
    recipe = load_recipe(tmp_path / "mails.yaml")[""]
    assert (recipe.name, recipe.model, recipe.evaluation.metric) == ("mails", MODEL, "exact")


def test_the_commands_run_in_order(place):
    run = [words for words in COMMANDS if not any(part in word for word in words for part in SKIPPED)]
    assert {words[0] for words in run} == {"train", "chat", "run", "merge"}
    for words in run:
        done = CliRunner().invoke(app, words, input="Is 7 odd?\n" if words[0] == "chat" else None)
        assert done.exit_code == 0, (words, done.output, done.exception)
    assert (place / "runs" / "mails" / "report.html").exists()
    assert (place / "mails-Q4_K_M.gguf").exists()


def test_the_commands_about_pictures_run_in_order(place):
    pupil = str(save_pupil(place / "pupil"))
    scans = place / "scans"
    scans.mkdir()
    rows = re.search(r"```json\n([^`]*0001.png.*?)```", PAGE, re.DOTALL)[1]
    (scans / "scans.jsonl").write_text(rows * 2)
    for number in (1, 2):
        random_picture(60, 50, seed=number).save(scans / f"{number:04}.png")
    recipe = next(text for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL) if "name: scans" in text)
    for there, here in ((MODEL, pupil), ("max_steps: 300", "max_steps: 1"), ("560", "70"), ("r: 16", "r: 2")):
        recipe = recipe.replace(there, here)
    (place / "scans.yaml").write_text(recipe + "  max_tokens: 4\n")
    run = [[pupil if word == "sudoku" else word for word in words] for words in COMMANDS
           if any("scans" in word for word in words)]
    assert [words[0] for words in run] == ["train", "train", "train", "run"]
    for words in run:
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, (words, done.output, done.exception)


def test_commands_for_a_server_are_ones():
    commands = typer.main.get_command(app).commands
    asked = [words for words in COMMANDS if words[0] == "serve"]
    assert asked
    for words in asked:
        assert commands["serve"].make_context("serve", words[1:]).params["adapter"]


def test_the_python_example_runs(capsys):
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(code, "example", "exec"), {})
    assert capsys.readouterr().out


def test_the_metrics_and_the_objective_s_defaults_are_those_of_the_code():
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("|")]
    metrics = [row[0].strip("`") for row in rows[rows.index(["`metric`", "right is"]) + 2 :]][: len(METRICS)]
    assert set(metrics) == set(METRICS)
    table = [row for row in rows if len(row) == 3][1:]
    start = next(i for i, row in enumerate(table) if row[0] == "`objective:`") + 2
    for names, values, _ in table[start:]:
        for name, value in zip(re.findall("`(.*?)`", names), values.split(", "), strict=True):
            assert str(getattr(Objective(), name)) in (value, f"{value}.0"), name
