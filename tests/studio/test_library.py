"""What models are on this machine, and whether they fit it."""

import json
import shutil

import pytest
import torch

from dgemma.errors import DgemmaError
from dgemma.studio.library import (
    adapters_here,
    add_path,
    fit_of,
    forget_path,
    last_model,
    models_here,
    note_last,
    own_paths,
    title_of,
)
from dgemma.weights.files import bundled_path
from dgemma.weights.hub.cache import local_models
from support.hub_server import HubServer, connect

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    with HubServer() as server:
        connect(monkeypatch, server, tmp_path / "hub")
        yield


def test_the_users_own_folders_and_trained_models_are_listed(store, tmp_path):
    mine, runs = tmp_path / "mine", tmp_path / "runs"
    shutil.copytree(bundled_path("sudoku"), mine / "first")
    shutil.copytree(bundled_path("sudoku"), runs / "puzzles" / "best")
    (runs / "tuned" / "best").mkdir(parents=True)
    (runs / "tuned" / "best" / "adapter_model.safetensors").write_bytes(b"")
    assert [model.name for model in add_path(store, str(mine))] == [str(mine / "first")]
    found = {here.title: here.origin for here in models_here(store, [runs])}
    assert found == {"sudoku": "bundled", "first": "yours", "puzzles (best)": "run"}
    assert adapters_here([runs]) == [runs / "tuned" / "best"]
    forget_path(store, mine / "first")
    assert own_paths(store) == [] and (mine / "first").is_dir()


def test_what_was_loaded_last_is_remembered_while_it_is_here(store, tmp_path):
    assert last_model(store, []) is None
    note_last(store, "org/model:Q4_K_M")
    assert last_model(store, []) is None
    note_last(store, "sudoku")
    assert last_model(store, []) == "sudoku"


def test_where_no_model_is_nothing_is_added(store, tmp_path):
    (tmp_path / "empty").mkdir()
    for words, why in (("", "which folder"), (str(tmp_path / "nowhere"), "no such file"),
                       (str(tmp_path / "empty"), "no model here")):
        with pytest.raises(DgemmaError, match=why):
            add_path(store, words)
    assert own_paths(store) == []


def test_a_fit_says_of_what_the_need_is_made():
    fit = fit_of(local_models()[0], CPU)
    assert fit.verdict == "yes" and "parameters" in fit.facts
    assert "6.8 MB weights" in fit.why and "keys and values of 8,192 tokens" in fit.why


def test_a_damaged_model_says_what_is_wrong(store, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(bundled_path("sudoku"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    [model] = add_path(store, str(folder))
    assert "DiffusionGemma" in fit_of(model, CPU).problem


@pytest.mark.parametrize(("name", "title"), [
    ("org/model:Q4_K_M", "org/model:Q4_K_M"), ("sudoku", "sudoku"), ("/a/model-Q8_0.gguf", "model-Q8_0"),
    ("/a/runs/mails/best", "mails (best)"), ("/a/model", "model")])
def test_titles_are_short(name, title):
    assert title_of(name) == title
