"""`dgemma pull` and `dgemma models`, against a stand-in for the hub on loopback."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from dgemma.cli.commands import models as models_command
from dgemma.memory import program_bytes
from support.hub_server import COMMIT, HubServer, demo_repos, environment_of, gguf

GGUF = "org/diffuse-GGUF"
COMMAND = [sys.executable, "-c", "from dgemma.cli.main import main; main()"]


def test_pull(hub, dgemma_command, tmp_path):
    outcome = dgemma_command("pull", GGUF)
    path = tmp_path / "hub" / "models--org--diffuse-GGUF" / "snapshots" / COMMIT / "diffuse-Q4_K_M.gguf"
    assert outcome.code == 0
    assert outcome.out.splitlines() == [
        f"{GGUF}:Q4_K_M, commit {COMMIT[:12]}",
        "  300.0 kB  diffuse-Q4_K_M.gguf",
        "1 file, 300.0 kB to download",
        "",
        str(path),
        "",
        f'Run it:  dgemma run -m {GGUF}:Q4_K_M "Why is the sky blue?"',
    ]
    assert outcome.err.splitlines() == ["downloading diffuse-Q4_K_M.gguf (300.0 kB)",
                                        "checking diffuse-Q4_K_M.gguf (300.0 kB)"]
    again = dgemma_command("pull", f"{GGUF}:q4_k_m")
    assert (again.code, again.err) == (0, "")
    assert "1 file, 300.0 kB: all here already" in again.out
    assert len(hub.downloads()) == 1


def test_pull_of_several_files_some_of_which_are_here(hub, dgemma_command):
    assert dgemma_command("pull", GGUF, "--include", "*00001-of*").out.splitlines()[-1].endswith(COMMIT)
    outcome = dgemma_command("pull", f"{GGUF}:BF16")
    assert "2 files, 600.0 kB; 300.0 kB to download, the rest is here already" in outcome.out
    assert "dgemma run -m org/diffuse-GGUF:BF16" in outcome.out


@pytest.mark.parametrize(("arguments", "words"), [
    (["sudoku"], "ships with the package; there is nothing to pull"),
    (["nonsense"], "not the name of a repository on the hub; that is written org/name"),
    (["org/nothing"], "the Hugging Face hub has no such repository"),
    ([f"{GGUF}:Q4_K_M", "--include", "*"], "give either the tag 'Q4_K_M' or --include, not both"),
    ([f"{GGUF}:Q3"], "there are BF16, Q4_K_M, Q8_0, UD-Q2_K_XL"),
    ([GGUF, "--include", "*.zip"], "no file matches *.zip"),
])
def test_pull_refused(hub, dgemma_command, arguments, words):
    outcome = dgemma_command("pull", *arguments)
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith(f"Error: {arguments[0].split(':')[0]}")
    assert words in outcome.err
    assert outcome.err.count("\n") == 1


def test_pull_on_a_full_disk(hub, dgemma_command, free_space):
    free_space(1000)
    outcome = dgemma_command("pull", GGUF)
    assert outcome.code == 1
    assert "300.0 kB are needed, 1.0 kB are free" in outcome.err


def test_pull_without_the_network(hub, dgemma_command):
    dgemma_command("pull", GGUF)
    hub.__exit__()
    outcome = dgemma_command("pull", GGUF)
    assert outcome.code == 0
    assert outcome.err.startswith("Complete on this machine; a newer version was not looked for: ")
    assert outcome.out.strip().endswith(f'dgemma run -m {GGUF} "Why is the sky blue?"')
    assert dgemma_command("pull", "org/diffuse").code == 1


@pytest.mark.skipif(os.name == "nt", reason="SIGINT is another thing there")
def test_ctrl_c_and_going_on_in_processes_of_their_own(tmp_path):
    """As a user would: the hub's address and the cache from the environment, a slow line, Ctrl-C, once more."""
    with HubServer(demo_repos(1_000_000)) as hub:
        hub.switches.chunk, hub.switches.delay = 50_000, 0.2
        settings = environment_of(hub, tmp_path / "home")
        process = subprocess.Popen([*COMMAND, "pull", GGUF], env=settings, text=True, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE, start_new_session=True,
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
        deadline = time.monotonic() + 30
        while not hub.downloads() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.6)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
        assert process.returncode == 130, err
        assert "Traceback" not in err
        assert err.splitlines()[-1] == "Stopped. What has arrived is kept: the same command goes on from here."
        assert "Run it" not in out

        hub.switches.delay = 0
        again = subprocess.run([*COMMAND, "pull", GGUF], env=settings, text=True, capture_output=True, timeout=30)
        assert again.returncode == 0, again.stderr
        assert "already here" in again.stderr
        first, second = hub.downloads()
        assert first[1] is None
        assert second[1].startswith("bytes=") and not second[1].startswith("bytes=0-")
        path = tmp_path / "home/hub/models--org--diffuse-GGUF/snapshots" / COMMIT / "diffuse-Q4_K_M.gguf"
        assert path.read_bytes() == hub.repos[GGUF]["diffuse-Q4_K_M.gguf"]


def test_models(hub, dgemma_command, machine_memory, tmp_path):
    machine_memory(16_000_000_000, 32_000_000_000)
    empty = dgemma_command("models")
    assert empty.code == 0
    assert empty.out.splitlines()[0].split() == ["model", "kind", "size", "needs", "fits"]
    assert empty.out.splitlines()[1].split()[:2] == ["sudoku", "safetensors"]
    assert "Nothing from the hub yet; `dgemma pull org/name`" in empty.out
    hub.repos["long-organisation/" + "a-very-long-name" * 4] = {"x-Q8_0.gguf": gguf(3_000_000)}
    for name in hub.repos:
        dgemma_command("pull", name)
    lines = dgemma_command("models").out.splitlines()
    assert [line.split() for line in lines[2:5]] == [
        [f"long-organisation/{'a-very-long-name' * 4}:Q8_0", "GGUF", "3.0", "MB", "595.6", "MB", "yes"],
        ["org/diffuse", "safetensors", "600.1", "kB", "593.1", "MB", "yes"],
        [f"{GGUF}:Q4_K_M", "GGUF", "300.0", "kB", "592.8", "MB", "yes"],
    ]
    assert lines[-1] == f"Memory: 16.0 GB of 32.0 GB available. Cache: {tmp_path / 'hub'}"
    terminal = dgemma_command("models", terminal=True)  # 120 columns hold it
    assert f"{GGUF}:Q4_K_M" in terminal.out


def test_models_on_a_narrow_terminal(hub, dgemma_command, environment):
    dgemma_command("pull", GGUF)
    environment(COLUMNS="50")
    lines = re.sub(r"\x1b\[[\d;]*m", "", dgemma_command("models", terminal=True).out).splitlines()
    at = lines.index(f"{GGUF}:Q4_K_M")
    assert "GGUF, 300.0 kB, needs 592.8 MB, fits: " in lines[at + 1]


def test_models_as_json(hub, dgemma_command, machine_memory):
    machine_memory(400_000_000, 32_000_000_000)
    dgemma_command("pull", GGUF)
    found = json.loads(dgemma_command("models", "--json").out)
    assert (found["memory_available"], found["memory_total"]) == (400_000_000, 32_000_000_000)
    sudoku, model = found["models"]
    assert sudoku["bundled"] and sudoku["complete"]
    assert model["path"].endswith("diffuse-Q4_K_M.gguf")
    assert {**model, "path": ""} == {
        "name": f"{GGUF}:Q4_K_M", "kind": "GGUF", "quantisation": "Q4_K_M", "size": 300_000, "full_size": 300_000,
        "memory_needed": 315_000 + program_bytes(262_144), "fits": False, "complete": True, "bundled": False,
        "path": ""}


def test_a_partial_model_is_shown_as_such(hub, dgemma_command):
    hub.switches.cut_after, hub.switches.cuts, hub.switches.ranges = 100_000, 100, False
    assert dgemma_command("pull", GGUF).code == 1
    out = dgemma_command("models").out
    assert "100.0 kB of 300.0 kB" in out and "partial" in out
    assert f"`dgemma pull {GGUF}:Q4_K_M` goes on with the partial one" in out
    assert not json.loads(dgemma_command("models", "--json").out)["models"][1]["complete"]
    assert dgemma_command("models", "remove", f"{GGUF}:Q4_K_M", "--yes").out == (
        f"Removed {GGUF}:Q4_K_M: 100.1 kB freed\n")


def test_remove(hub, dgemma_command):
    dgemma_command("pull", GGUF)
    dgemma_command("pull", f"{GGUF}:Q8_0")
    refused = dgemma_command("models", "remove", f"{GGUF}:Q8_0")
    assert refused.code == 1
    assert "nothing was removed: add --yes, as there is nobody to ask" in refused.err
    removed = dgemma_command("models", "remove", f"{GGUF}:q8_0", "--yes")
    assert (removed.code, removed.out) == (0, f"Removed {GGUF}:Q8_0: 600.0 kB freed\n")
    assert [model["name"] for model in json.loads(dgemma_command("models", "--json").out)["models"]] == [
        "sudoku", f"{GGUF}:Q4_K_M"]
    for name, words in (("sudoku", "cannot be removed"), ("org/nothing", "no model of that name on this machine")):
        outcome = dgemma_command("models", "remove", name, "--yes")
        assert outcome.code == 1 and words in outcome.err


def test_remove_says_what_is_left_where_it_is(hub, dgemma_command):
    hub.repos[GGUF]["mmproj-F16.gguf"] = gguf(500, "clip")
    for name in ("*Q4_K_M*", "mmproj*", "imatrix*", "README.md"):
        dgemma_command("pull", GGUF, "--include", name)
    outcome = dgemma_command("models", "remove", GGUF, "--yes")
    assert outcome.code == 0
    assert outcome.out.splitlines() == [
        f"Removed {GGUF}:Q4_K_M: 300.0 kB freed",
        f"Left where they are: 3 other files of {GGUF}, 1.0 kB (README.md, imatrix_unsloth.gguf, mmproj-F16.gguf); "
        f"`hf cache rm model/{GGUF}` deletes all that is there."]
    assert dgemma_command("models", "remove", GGUF, "--yes").code == 1


@pytest.mark.parametrize(("answer", "left"), [("y", 1), ("n", 2), ("", 2)])
def test_remove_asks(hub, dgemma_command, answer, left):
    dgemma_command("pull", GGUF)
    outcome = dgemma_command("models", "remove", f"{GGUF}:Q4_K_M", stdin=f"{answer}\n", asked=True)
    assert f"Delete {GGUF}:Q4_K_M (300.0 kB) from this machine?" in outcome.out
    assert outcome.code == (0 if answer == "y" else 1)
    assert len(json.loads(dgemma_command("models", "--json").out)["models"]) == left


def test_this_machine_s_memory():
    available, total = models_command.machine_memory()
    assert total is None or 0 < available <= total
