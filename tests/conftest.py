"""What several rooms' tests share; the networks themselves are built in `reference.py`."""

import contextlib
import errno
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

import dgemma  # noqa: F401  before torch: its threads wait asleep then (dgemma/openmp.py)

# Whoever runs the tests in the background has Ctrl-C ignored, here and in all that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def no_certificates(tmp_path_factory):
    """No test speaks to anybody but this machine, and every HTTP client would read the system's certificates first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_DIR", str(tmp_path_factory.mktemp("certificates")))
        yield


@pytest.fixture(scope="session")
def tiny_network():
    """Our network alone: two sliding layers and a full one, canvas of 8; not to be changed."""
    from support.reference import random_network, tiny_config

    return random_network(tiny_config(), feedback=0.2)


@pytest.fixture
def random_ids():
    """A function (rows, columns) -> random token ids of the tiny networks' vocabulary, seeded."""
    import torch

    generator = torch.Generator().manual_seed(7)
    return lambda *shape, vocab=50: torch.randint(vocab, shape, generator=generator)


# ---- the machine and the process as a test wants them ----


@pytest.fixture
def working_folder():
    """A function that goes to a folder for the rest of the test."""
    with contextlib.ExitStack() as stack:
        yield lambda folder: stack.enter_context(contextlib.chdir(folder))


@pytest.fixture
def environment(monkeypatch):
    """A function that sets environment variables for the rest of the test; None takes one away."""

    def change(**variables):
        for name, value in variables.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)

    return change


@pytest.fixture
def free_space(monkeypatch):
    """A function that leaves so many bytes free on every disk; the list that it returns grows by who is asked about."""

    def leave(free):
        asked = []
        usage = shutil._ntuple_diskusage(10**12, 10**12 - free, free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or usage)
        return asked

    return leave


@pytest.fixture
def full_disk(monkeypatch):
    """A function that lets writing tensors to a file fail half-way, or only where ``when`` says so of its path."""
    import safetensors.torch

    write = safetensors.torch.save_file

    def fill(when=lambda path: True):
        def full(tensors, path, metadata=None):
            if when(str(path)):
                with open(path, "wb") as file:
                    file.write(b"half")
                raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")
            write(tensors, path, metadata=metadata)

        monkeypatch.setattr(safetensors.torch, "save_file", full)

    return fill


@pytest.fixture
def not_installed(monkeypatch):
    """A function that makes a module one that is not installed; what has imported it is forgotten if a ``room`` of the
    package is named."""

    def hide(name, room=None):
        monkeypatch.setitem(sys.modules, name, None)
        for loaded in [loaded for loaded in sys.modules if room and loaded.startswith(f"{room}.")]:
            monkeypatch.delitem(sys.modules, loaded)

    return hide


@pytest.fixture
def plain_torch(monkeypatch):
    """A function after which products with packed weights are those of plain torch, without the kernels."""

    def switch():
        for module in ("products", "experts"):
            monkeypatch.setattr(f"dgemma.kernels.{module}.on_native", lambda weight: False)

    return switch


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A stand-in for the hub on loopback, which the hub's library asks from now on; its cache is `tmp_path` / "hub"."""
    from support.hub_server import HubServer, connect, demo_repos

    with HubServer(demo_repos()) as server:
        connect(monkeypatch, server, tmp_path / "hub")
        yield server


@pytest.fixture
def without_links(monkeypatch):
    """As on Windows: what would be a link is the file."""

    def refuse(*_, **__):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "symlink", refuse)
    monkeypatch.setattr(Path, "symlink_to", refuse)
    monkeypatch.setattr("huggingface_hub.file_download.are_symlinks_supported", lambda *_, **__: False)


@pytest.fixture
def bundled(tmp_path, monkeypatch):
    """The folder of two models that come with the package instead of its own, and of a folder that is none."""
    for name in ("sudoku", "chess"):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "config.json").write_text("{}")
    (tmp_path / "models" / "__pycache__").mkdir()
    monkeypatch.setattr("dgemma.weights.files.BUNDLED_FOLDER", tmp_path / "models")
    return tmp_path / "models"


@pytest.fixture
def dgemma_command(monkeypatch):
    """A function that runs the `dgemma` command in this process: arguments, stdin; what comes of it.

    On a ``terminal`` stdout is one; with ``asked`` stdin is one, too.
    """
    from dgemma.cli.main import main
    from support.command import Outcome, Stream

    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments, stdin: str | bytes = "", terminal: bool = False, asked: bool = False,
            encoding: str = "utf-8"):
        data = stdin if isinstance(stdin, bytes) else stdin.encode()
        out, err = Stream(terminal=terminal or asked, encoding=encoding), Stream(encoding=encoding)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["dgemma", *map(str, arguments)])
            patch.setattr(sys, "stdin", Stream(data, terminal=asked))
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            code = 0
            try:
                main()
            except SystemExit as error:
                code = error.code or 0
        return Outcome(code, out.text(), err.text())

    return run
