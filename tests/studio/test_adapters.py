"""Where an adapter is found that is asked for by a path or a name on the hub."""

import pytest

from dgemma.errors import DgemmaError
from dgemma.studio.widgets.adapters import located
from support.hub_server import HubServer, connect, gguf


def test_a_path_is_itself_and_a_name_is_fetched_from_the_hub(monkeypatch, tmp_path):
    with HubServer({"org/tuned": {"adapter_config.json": b"{}", "adapter_model.safetensors": gguf(1000),
                                  "optimizer.pt": b"large"}}) as hub:
        connect(monkeypatch, hub, tmp_path / "hub")
        assert located(str(tmp_path)) == tmp_path
        folder = located("org/tuned")
        assert {path.name for path in folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
        for nowhere in ("/no/such/folder", "org/nothing"):
            with pytest.raises(DgemmaError, match="no such"):
                located(nowhere)
