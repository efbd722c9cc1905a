"""Looking for models on the hub, and at all that a repository has."""

import pytest

from dgemma.errors import CheckpointError
from dgemma.weights.hub.repository import plan_all
from dgemma.weights.hub.search import search_hub
from support.hub_server import HubServer, connect, demo_repos, gguf


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubServer(demo_repos()) as server:
        connect(monkeypatch, server, tmp_path / "hub")
        yield server


def test_repositories_are_found_by_words_of_their_names(hub):
    [found] = search_hub("diffuse-g")
    assert (found.repo, found.downloads, found.likes, found.gated) == ("org/diffuse-GGUF", 12_345, 6, False)
    assert search_hub("nothing of this name") == ()


def test_a_hub_that_cannot_be_asked_is_an_error(hub):
    hub.switches.token = "another"
    with pytest.raises(CheckpointError):
        search_hub("diffuse")


def test_every_model_of_a_repository_can_be_fetched_with_the_tower_beside_it(hub):
    hub.repos["org/diffuse-GGUF"]["mmproj-BF16.gguf"] = gguf(1000, "clip")
    pulls = {pull.model: [file.name for file in pull.files] for pull in plan_all("org/diffuse-GGUF")}
    assert pulls["org/diffuse-GGUF:Q4_K_M"] == ["diffuse-Q4_K_M.gguf", "mmproj-BF16.gguf"]
    assert len(pulls["org/diffuse-GGUF:BF16"]) == 3 and len(pulls) == 4
    [whole] = plan_all("org/diffuse")
    assert whole.model == "org/diffuse" and whole.to_fetch == whole.size
