"""The vision tower on the command line: written by quantize, taken along by pull, named with --mmproj and --vision."""

import json

import pytest

from dgemma.cli.commands.quantize import TowerType
from dgemma.weights.files import TOWER_TYPES
from support.hub_server import gguf
from support.vision import save_seeing_model


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    return save_seeing_model(tmp_path_factory.mktemp("seeing"))


def test_the_types_of_towers_are_those_there_are():
    assert [entry.value for entry in TowerType] == [*TOWER_TYPES, "none"]


def test_quantize_writes_the_tower_beside(dgemma_command, seeing, tmp_path):
    out = tmp_path / "model.gguf"
    outcome = dgemma_command("quantize", seeing, out, "--type", "q8_0", "--mmproj-type", "q8_0")
    assert (outcome.code, outcome.err) == (0, "")
    tower = tmp_path / "mmproj-model.gguf"
    assert outcome.out.splitlines()[-1].startswith(f"{tower}: the vision tower, ")
    report = json.loads(dgemma_command("inspect", out, "--json").out)
    assert report["tower"]["path"] == str(tower)
    tower.unlink()
    outcome = dgemma_command("quantize", seeing, out, "--force", "--mmproj-type", "none")
    assert outcome.code == 0 and "The vision tower" in outcome.err and "was left out" in outcome.err
    assert not tower.exists()


def test_a_tower_is_named_for_every_command_that_loads(dgemma_command, seeing, tmp_path):
    out = tmp_path / "model.gguf"
    dgemma_command("quantize", seeing, out)
    tower = (tmp_path / "mmproj-model.gguf").rename(tmp_path / "tower.gguf")
    quick = ("--max-tokens", "4", "--max-denoising-steps", "1")
    for options in (("--mmproj", tower), ("--vision", seeing)):
        assert dgemma_command("run", "Hi", "-m", out, *options, *quick).code == 0
    for command in (("run", "Hi", *quick), ("chat",), ("eval", "sudoku", "--puzzles", "1"), ("serve", "--port", "0")):
        outcome = dgemma_command(*command, "-m", out, "--mmproj", out)
        assert outcome.code == 1 and "no vision tower (mmproj)" in outcome.err, command
        outcome = dgemma_command(*command, "-m", out, "--vision", tmp_path)
        assert outcome.code == 1 and "no config.json here" in outcome.err, command
    outcome = dgemma_command("run", "Hi", "--url", "http://localhost:9", "--mmproj", tower)
    assert outcome.code == 1 and "--mmproj is for a model on this machine" in outcome.err


def test_pull_takes_the_tower_along(hub, dgemma_command):
    hub.repos["org/x"] = {"x-Q4_K_M.gguf": gguf(300_000), "mmproj-F16.gguf": gguf(500, "clip"),
                          "mmproj-BF16.gguf": gguf(600, "clip")}
    outcome = dgemma_command("pull", "org/x")
    assert outcome.code == 0
    assert "mmproj-BF16.gguf" in outcome.out and "mmproj-F16.gguf" not in outcome.out
    assert [name for name, _ in hub.downloads()] == ["mmproj-BF16.gguf", "x-Q4_K_M.gguf"]
