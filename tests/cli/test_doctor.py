"""`dgemma doctor`: what is found is said, what is missing has the line that mends it, and only the base decides."""

import json
import shutil
from importlib import metadata

import pytest
import torch

from dgemma import openmp
from dgemma.kernels import native


@pytest.fixture
def examined(hub, dgemma_command):
    """A function: the checks by name, and the exit code."""
    def examine():
        outcome = dgemma_command("doctor", "--json")
        found = json.loads(outcome.out)
        assert found["works"] == (outcome.code == 0)
        return {check["name"]: check for check in found["checks"]}, outcome.code
    return examine


def test_all_is_looked_at(examined, hub):
    found, code = examined()
    assert code == 0
    assert list(found) == ["python", "torch", "threads", "model", "kernels", "compiler", "gpu", "memory", "disk", "hub",
                           "sandbox", "serve", "train", "vision", "tools", "iq"]
    assert torch.__version__ in found["torch"]["found"]
    assert "the bundled model answers" in found["model"]["found"]
    assert found["kernels"]["found"].startswith(native.isa()) or not native.available()
    assert found["hub"]["state"] == "ok" and hub.url in found["hub"]["found"]
    assert found["threads"]["found"] == f"how they wait: {openmp.waiting()}"
    assert found["iq"]["found"] == "the block types IQ1, IQ2 and IQ3: gguf"
    assert "fastapi" in found["serve"]["found"] and "pyyaml" in found["train"]["found"]
    for check in found.values():
        assert (check["mend"] is None) == (check["state"] == "ok"), check


def test_on_a_terminal_and_in_a_pipe(hub, dgemma_command):
    hub.__exit__()
    piped, seen = dgemma_command("doctor"), dgemma_command("doctor", terminal=True)
    assert piped.code == seen.code == 0
    lines = piped.out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("--  hub "))
    assert "cannot be reached" in lines[at] and "models that are here already run without it" in lines[at]
    assert lines[at + 1].strip().startswith("-> export HTTPS_PROXY=")
    assert lines[-1] == "Models run here."
    assert "\x1b[" not in piped.out and "\x1b[32mModels run here." in seen.out


def test_a_part_that_is_missing_has_its_line(examined, free_space, monkeypatch):
    real = metadata.version

    def version(name):
        if name in ("fastapi", "tensorboard", "gguf"):
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(openmp, "waiting", lambda: "spinning")
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(native, "why_absent", lambda: "not built here (…)")
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi" if name == "nvidia-smi" else None)
    free_space(10**9)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("sys.platform", "darwin")
    found, code = examined()
    assert code == 0
    mended = {name: check["mend"] for name, check in found.items() if check["state"] == "missing"}
    assert mended.keys() == {"kernels", "compiler", "gpu", "disk", "hub", "serve", "train", "iq", "threads", "sandbox"}
    assert mended["iq"] == "pip install 'dgemma[iq]'" and mended["threads"] == openmp.ADVICE
    assert mended["compiler"] == "xcode-select --install"
    assert mended["kernels"].startswith("xcode-select --install, then pip install")
    assert "pip install" in mended["gpu"] and "whl/cu" in mended["gpu"]
    assert mended["serve"] == "pip install 'dgemma[serve]'" and "fastapi" in found["serve"]["found"]
    assert "tensorboard" in found["train"]["found"] and "pyyaml" not in found["train"]["found"]
    assert mended["hub"] == "unset HF_HUB_OFFLINE"
    assert "dgemma models remove" in mended["disk"]


def test_what_an_answer_needs_decides(examined, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr("dgemma.load", broken)
    found, code = examined()
    assert code == 1
    assert found["model"]["state"] == "broken" and "no such instruction" in found["model"]["found"]
    assert found["kernels"]["state"] == "ok" or not native.available()  # the others were looked at all the same


def test_a_hub_that_refuses(examined, hub):
    hub.switches.token = "secret"
    found, code = examined()
    assert code == 0
    assert (found["hub"]["state"], "HTTP 401" in found["hub"]["found"]) == ("missing", True)


def test_a_cache_that_cannot_be_written(examined, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_, **__: False)
    found, code = examined()
    assert code == 0
    assert found["disk"]["state"] == "broken" and "HF_HOME" in found["disk"]["mend"]


def test_memory_is_the_control_group_s(examined, machine_memory):
    machine_memory(3_000_000_000, 4_000_000_000)
    assert examined()[0]["memory"]["found"].startswith("3.0 GB of 4.0 GB available")
