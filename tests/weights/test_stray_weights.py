"""Weights that lie about in a checkpoint's folder: the index says what counts, and it is said what does not."""

import json
import shutil
import warnings

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dgemma.cli.commands.inspect import inspect
from dgemma.config import load_model_config
from dgemma.errors import CheckpointError
from dgemma.inspect import inspect_checkpoint
from dgemma.train.data import tokenizer as bundled_tokenizer
from dgemma.weights.files import INDEX_FILE, SINGLE_FILE, weight_files
from dgemma.weights.hub.locate import locate
from dgemma.weights.load import load_network
from dgemma.weights.merge import replace_weights
from dgemma.weights.save import save_checkpoint
from support.gguf_files import write_network
from support.reference import random_network, tiny_config


def load(folder):
    return load_network(folder, load_model_config(folder))


def same(network, other):
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in network.state_dict().items())


@pytest.fixture
def both(single, sharded, copy_of):
    """Shards with their index, and a model.safetensors of other weights beside them."""
    folder = copy_of(sharded)
    save_file({name: tensor + 1 for name, tensor in load_file(single / SINGLE_FILE).items()}, folder / SINGLE_FILE)
    return folder


def test_the_index_wins_and_it_is_said(both, sharded):
    with pytest.warns(UserWarning, match=rf"the weights are those of {INDEX_FILE}; .* left aside: {SINGLE_FILE}$"):
        network = load(both)
    assert same(network, load(sharded))
    report = inspect_checkpoint(both)
    assert SINGLE_FILE not in report.files and report.problems == ()
    assert SINGLE_FILE in report.notes[0]
    app = typer.Typer()
    app.command()(inspect)
    result = CliRunner().invoke(app, [str(both)])
    assert result.exit_code == 0 and f"left aside: {SINGLE_FILE}" in result.output


def test_nothing_is_said_where_there_is_nothing_to_say(single, sharded):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(single) and load(sharded)
    assert inspect_checkpoint(single).notes == inspect_checkpoint(sharded).notes == ()


def test_shards_that_the_index_does_not_name(sharded, copy_of):
    folder = copy_of(sharded)
    shutil.copyfile(next(folder.glob("*.safetensors")), folder / "model-00099-of-00099.safetensors")
    (folder / "adapter_model.safetensors").write_bytes(b"not looked at")
    with pytest.warns(UserWarning, match=r"left aside: model-00099-of-00099\.safetensors$"):
        assert same(load(folder), load(sharded))


def test_an_index_of_which_nothing_is_there_does_not_count(single, sharded, copy_of):
    """As after copying all small files of the checkpoint that a fine-tune began with."""
    folder = copy_of(single)
    shutil.copyfile(sharded / INDEX_FILE, folder / INDEX_FILE)
    assert list(weight_files(folder)) == [folder / SINGLE_FILE]
    with pytest.warns(UserWarning, match=rf"those of {SINGLE_FILE}; .* left aside: {INDEX_FILE}$"):
        assert same(load(folder), load(single))
    out = folder / "out"
    out.mkdir()
    replace_weights(folder, {}, out)
    assert not (out / INDEX_FILE).exists() and inspect_checkpoint(out).notes == ()


def test_shards_that_are_missing_are_named_and_so_is_what_could_be_used(both):
    gone = sorted(path for path in both.glob("model-*.safetensors"))[0]
    gone.unlink()
    with pytest.raises(CheckpointError, match="no such file") as caught:
        load(both)
    assert gone.name in str(caught.value) and f"there is a {SINGLE_FILE}, too" in str(caught.value)
    assert "take the index away" in str(caught.value)


def test_an_index_of_one_file(single, copy_of):
    folder = copy_of(single)
    names = load_file(folder / SINGLE_FILE)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": dict.fromkeys(names, SINGLE_FILE)}))
    assert inspect_checkpoint(folder).notes == ()
    assert same(load(folder), load(single))


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "", "a\0b", "..", "x" * 300, "a\\b",
                                  "\x1b[31m"])
def test_an_index_names_files_of_its_folder(file, sharded, copy_of):
    folder = copy_of(sharded)
    index = json.loads((folder / INDEX_FILE).read_text())
    index["weight_map"]["model.decoder.norm.weight"] = file
    (folder / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=rf"{INDEX_FILE}: 'weight_map' must name files in this folder"):
        load(folder)


def test_a_gguf_file_beside_safetensors_is_left_aside_and_said(single, copy_of):
    folder = copy_of(single)
    write_network(folder / "model-Q8_0.gguf", random_network(tiny_config()))
    assert locate(folder) == folder
    with pytest.warns(UserWarning, match=r"left aside: model-Q8_0\.gguf$"):
        assert same(load(folder), load(single))


def test_what_is_saved_is_what_is_loaded(both):
    """An index that is left of an earlier checkpoint in the folder would lead back to that one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = load(both)
        network.load_state_dict({name: tensor + 2 for name, tensor in network.state_dict().items()})
        save_checkpoint(network, both, json.loads((both / "config.json").read_text()), {}, torch.float32)
        bundled_tokenizer.save(both)
        assert not (both / INDEX_FILE).exists()
        assert same(load(both), network)
