"""`vision="org/name"`: of a repository on the hub only the vision tower's tensors are fetched, against a stand-in."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

import dgemma
from dgemma.config import load_model_config
from dgemma.errors import CheckpointError
from dgemma.weights.hub.cache import local_models, repo_folder
from dgemma.weights.hub.repository import NotThereError, fetch, plan_pull
from dgemma.weights.hub.transfer import Listener
from dgemma.weights.hub.vision import locate_tower
from dgemma.weights.load import load_vision
from dgemma.weights.names import is_vision
from dgemma.weights.quantize import convert
from support.hub_server import COMMIT
from support.vision import save_seeing_model

REPO = "org/sees"
SHARDS = [f"model-0000{part}-of-00003.safetensors" for part in (1, 2, 3)]
FILLER = torch.zeros(1 << 20)  # 4 MB of what nobody wants


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_seeing_model(tmp_path_factory.mktemp("sees"))


@pytest.fixture(scope="module")
def repository(folder):
    """The checkpoint in three shards: text, both with text between the parts of the tower, the tower's end."""
    tensors = load_file(folder / "model.safetensors")
    tower = {name: tensor for name, tensor in tensors.items() if is_vision(name)}
    last = max(tower)
    shards = [{"model.decoder.filler": FILLER},
              {name: tensor for name, tensor in tower.items() if name != last}
              | {"model.encoder.language_model.filler": FILLER},
              {last: tower[last], "model.decoder.more": FILLER}]
    index = {"weight_map": {name: file for file, shard in zip(SHARDS, shards, strict=True) for name in shard}}
    return {"config.json": (folder / "config.json").read_bytes(), "README.md": b"# card",
            "model.safetensors.index.json": json.dumps(index).encode(),
            **{file: save(shard, {"format": "pt"}) for file, shard in zip(SHARDS, shards, strict=True)}}


@pytest.fixture
def hub(hub, repository):
    hub.repos = {REPO: dict(repository)}
    return hub


def same_tower(found, folder):
    config = load_model_config(folder)
    ours, theirs = load_vision(found, config).state_dict(), load_vision(folder, config).state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def fetched_bytes(hub, name):
    total = 0
    for file, wanted in hub.downloads():
        if file.endswith(name):
            first, last = wanted.removeprefix("bytes=").split("-")
            total += int(last) + 1 - int(first)
    return total


def test_only_the_towers_ranges_are_fetched(hub, folder):
    found = locate_tower(REPO, Listener)
    assert same_tower(found, folder)
    assert fetched_bytes(hub, SHARDS[0]) == 0
    tower = sum(tensor.nbytes for name, tensor in load_file(folder / "model.safetensors").items() if is_vision(name))
    fetched = fetched_bytes(hub, SHARDS[1]) + fetched_bytes(hub, SHARDS[2])
    assert tower < fetched < tower + 20_000  # the headers
    assert {path.name for path in found.iterdir()} == {"config.json", "model.safetensors"}
    with safe_open(found / "model.safetensors", "pt") as file:
        assert all(is_vision(name) for name in file.keys())  # noqa: SIM118 (it is no dict)
    assert [model.name for model in local_models() if not model.bundled] == []  # it is no model


def test_what_is_here_is_not_asked_for_again(hub, folder):
    first = locate_tower(REPO, Listener)
    hub.requests.clear()
    assert locate_tower(REPO, Listener) == first and not hub.requests


def test_a_whole_checkpoint_in_the_cache_is_used(hub):
    whole = fetch(plan_pull(REPO), Listener())
    hub.requests.clear()
    assert locate_tower(REPO, Listener) == whole and not hub.requests


def test_a_single_file_is_read_in_ranges_too(hub, folder):
    tensors = {"model.decoder.filler": FILLER, **load_file(folder / "model.safetensors")}
    hub.repos[REPO] = {"config.json": (folder / "config.json").read_bytes(), "model.safetensors": save(tensors)}
    assert same_tower(locate_tower(REPO, Listener), folder)
    assert fetched_bytes(hub, "model.safetensors") < FILLER.nbytes


def test_a_server_that_cannot_do_ranges_is_read_as_far_as_needed(hub, folder):
    hub.switches.ranges = False
    assert same_tower(locate_tower(REPO, Listener), folder)


def test_an_interrupted_download_goes_on(hub, folder):
    class Unlucky(Listener):
        """Whose connection brings nothing more once it has broken."""

        def note(self, text):
            hub.switches.cut_after = 0

    hub.switches.cut_after, hub.switches.cuts = 50_000, 1000
    with pytest.raises(CheckpointError, match="connection"):
        locate_tower(REPO, Unlucky)
    parts = (repo_folder(REPO) / "vision" / COMMIT).glob("model-00002-of-*.safetensors.*[0-9]")
    part = max(parts, key=lambda path: int(path.suffix[1:]))
    assert 0 < part.stat().st_size <= 50_000
    kept = int(part.suffix[1:]) + part.stat().st_size
    hub.requests.clear()
    hub.switches.cuts = 0
    assert same_tower(locate_tower(REPO, Listener), folder)
    wanted = [wanted for _, wanted in hub.downloads()]
    assert wanted[0].startswith(f"bytes={kept}-")  # neither config, index nor headers again


def test_what_it_cannot_be_taken_from_is_said(hub, repository):
    with pytest.raises(NotThereError, match="no such repository"):
        locate_tower("org/nothing", Listener)
    hub.repos["org/text"] = {"config.json": b"{}", "model.safetensors": save({"model.decoder.norm.weight": FILLER})}
    with pytest.raises(CheckpointError, match="org/text: there is no vision tower in the safetensors"):
        locate_tower("org/text", Listener)
    hub.repos["org/gguf"] = {"x.gguf": b"GGUF"}
    with pytest.raises(CheckpointError, match="org/gguf: no config.json in this hub repository"):
        locate_tower("org/gguf", Listener)
    hub.repos["org/broken"] = {**repository, SHARDS[1]: b"\xff" * 2000}
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        locate_tower("org/broken", Listener)


def test_a_gguf_model_sees_with_it(hub, folder, tmp_path):
    convert(folder, tmp_path / "model.gguf", "BF16", tower=None)
    with pytest.raises(CheckpointError, match="no such folder; a repository on the hub"):
        dgemma.load(tmp_path / "model.gguf", vision=f"{REPO}:Q4_K_M")
    model = dgemma.load(tmp_path / "model.gguf", vision=REPO, downloads=Listener)
    exact = load_vision(folder, load_model_config(folder)).state_dict()
    assert all(torch.equal(tensor, exact[name]) for name, tensor in model.pictures.load().state_dict().items())
    shutil.rmtree(repo_folder(REPO))
