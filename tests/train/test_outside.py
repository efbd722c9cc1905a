"""What stands in a run's and a data set's files is read, or refused in words that name the file: never a traceback."""

import json
import random

import pytest

from dgemma.errors import DgemmaError
from dgemma.tasks.evaluate import read_puzzles
from dgemma.train.data.conversations import read_conversations
from dgemma.train.log.history import read_run
from dgemma.train.recipe import read_yaml
from dgemma.train.runs.run import is_finished
from support.mutations import byte_mutations

RECIPE = b"name: x\ndata: {kind: sudoku}\nmodel: sudoku\n"
ROW = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
RECORD = b'{"step": 1, "kind": "train", "values": {"train/loss": 1.0}}\n'


def read_of(name, path):
    if name == "recipe.yaml":
        return read_yaml(path)
    if name.endswith("jsonl") and name.startswith("data"):
        return read_conversations([path])
    if name == "puzzles.jsonl":
        return read_puzzles(path)
    return read_run(path.parent)


@pytest.mark.parametrize(("name", "good"), [
    ("recipe.yaml", RECIPE), ("data.jsonl", ROW), ("puzzles.jsonl", b'{"puzzle": "1", "solution": "2"}\n'),
    ("metrics.jsonl", RECORD), ("run.json", b'{"finished": true, "1": 1}'), ("plan.json", b'{"steps": 1}'),
    ("preflight.json", b'[{"name": "x", "1": 1}]')])
def test_any_bytes_of_a_file(name, good, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(RECORD)
    path = tmp_path / name
    refused = 0
    for what, content in byte_mutations(good, random.Random(1), 60):
        path.write_bytes(content)
        try:
            read_of(name, path)
        except DgemmaError as error:
            refused += str(tmp_path) in str(error)
        except Exception as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    assert refused > 3


def test_a_run_whose_files_are_nested_without_end(tmp_path):
    (tmp_path / "run.json").write_text("[" * 100_000)
    with pytest.raises(DgemmaError, match="is no folder of a run"):
        is_finished(tmp_path, None)
    (tmp_path / "run.json").write_text(json.dumps({"finished": True}))
    (tmp_path / "recipe.yaml").write_text("[" * 100_000)
    with pytest.raises(DgemmaError, match="is no folder of a run"):
        is_finished(tmp_path, None)


@pytest.mark.parametrize("text", ["a: 2001-99-99", "[" * 100_000, "a: !!python/object:os.system x", "{", "\t"])
def test_yaml_that_is_none(text, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(DgemmaError, match=r"r\.yaml: "):
        read_yaml(tmp_path / "r.yaml")
