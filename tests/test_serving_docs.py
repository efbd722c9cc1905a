"""What docs/serving.md shows works as written, against a server that runs as it says."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "serving.md").read_text()
COMMANDS = [line[2:] for block in re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()
            if "localhost:8000" in line]
DGEMMA = f"{sys.executable} -m dgemma.cli.main"


@pytest.fixture(scope="module")
def port(tmp_path_factory):
    """The port of `dgemma serve`, which ends in good order when it is told to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("serve") / "log"
    with log.open("w") as sink:
        server = subprocess.Popen([*DGEMMA.split(), "serve", "--port", str(port)], stderr=sink, env=environment())
    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        yield port
    finally:
        server.terminate()
        assert server.wait(60) == 0, log.read_text()


def environment():
    kept = {name: value for name, value in os.environ.items() if not name.endswith("_API_KEY")}
    return {**kept, "NO_PROXY": "localhost,127.0.0.1", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("command", COMMANDS, ids=range(len(COMMANDS)))
def test_a_command_runs(command, port):
    if command.startswith("curl") and not shutil.which("curl"):
        pytest.skip("curl is not here")
    command = command.replace("localhost:8000", f"localhost:{port}").replace("curl -s", "curl -s --fail-with-body")
    command = re.sub(r"\bdgemma (?=run|chat)", f"{DGEMMA} ", command)
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()
    if "schema" in command:
        assert isinstance(json.loads(text_of(done.stdout))["yes"], bool)
    if '"choice"' in command:
        assert text_of(done.stdout) in ("yes", "no")
    if "regex" in command:
        assert re.fullmatch("[0-2][0-9]:[0-5][0-9]", text_of(done.stdout))


def text_of(body):
    return json.loads(body)["choices"][0]["message"]["content"]


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL),
                         ids=["openai", "anthropic", "ollama", "drafts", "infill"])
def test_an_example_runs(code, port, capsys, environment):
    environment(NO_PROXY="localhost,127.0.0.1")
    exec(compile(code.replace("localhost:8000", f"localhost:{port}"), "example", "exec"), {})
    said = capsys.readouterr().out
    assert ("534678912" in said) or ("Sudoku" in said) or ("48" in said)


def test_the_flags_are_those_of_the_command():
    done = subprocess.run([*DGEMMA.split(), "serve", "--help"], capture_output=True, text=True, check=True,
                          env={**environment(), "COLUMNS": "200"})
    table = PAGE.split("| `dgemma serve` |")[1].split("\n\n")[0]
    ours = [row.split("|")[2] for row in table.splitlines()[2:]]
    flags = set(re.findall(r"`(--[a-z-]+)`", " ".join(ours)))
    flags |= set(re.findall(r"`(--[a-z-]+)", PAGE.split("## Many users")[1].split("## Flags")[0])) - {"--buffering"}
    assert len(flags) > 12
    assert not [flag for flag in flags if flag not in done.stdout]
