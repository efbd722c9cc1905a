"""`dgemma quantize` from end to end, with a tiny random model."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dgemma.cli.commands.quantize import TypeName
from dgemma.gguf.reader import read_gguf
from dgemma.weights.quantize import MIXTURES


@pytest.fixture
def quantize(dgemma_command, checkpoint):
    return lambda *arguments, source=checkpoint: dgemma_command("quantize", source, *arguments)


def test_the_types_to_choose_from_are_those_there_are():
    assert [entry.value for entry in TypeName] == list(MIXTURES)


def test_a_checkpoint_becomes_a_gguf_file(quantize, tmp_path):
    out = tmp_path / "model.gguf"
    outcome = quantize(out, "--type", "q8_0")
    assert (outcome.code, outcome.err) == (0, "")  # no bar in a pipe
    lines = outcome.out.splitlines()
    assert lines[0].split()[0] in ("Q8_0", "F16") and "tensors" in lines[0]
    assert lines[-1].startswith(f"{out}: ") and " kB, " in lines[-1] and "bits per weight" in lines[-1]
    assert read_gguf(out).metadata["general.file_type"] == 7
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_the_usual_type(quantize, tmp_path):
    assert quantize(tmp_path / "model.gguf").code == 0
    assert read_gguf(tmp_path / "model.gguf").metadata["general.file_type"] == 15


def test_an_existing_file_needs_force(quantize, tmp_path):
    out = tmp_path / "model.gguf"
    out.write_bytes(b"precious")
    outcome = quantize(out)
    assert outcome.code == 1 and outcome.out == ""
    assert outcome.err == f"Error: {out}: this file exists; --force replaces it\n"
    assert out.read_bytes() == b"precious"
    assert quantize(out, "--force").code == 0


def test_a_packed_source_is_warned_of(quantize, tmp_path):
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    quantize(first, "--type", "Q8_0", source="sudoku")
    outcome = quantize(second, "--type", "Q4_K_M", source=first)
    assert outcome.code == 0
    assert "Note: The source was quantised already (Q8_0)" in outcome.err
    assert quantize(tmp_path / "third.gguf", "--type", "Q8_0", source=first).err == ""
    outcome = quantize(first, source=first)
    assert outcome.code == 1 and "this is the checkpoint itself" in outcome.err


def test_mistakes(quantize, tmp_path):
    assert quantize(tmp_path / "x.gguf", "--type", "Q3_K").code == 2
    outcome = quantize(tmp_path / "x.gguf", source=tmp_path / "nothing")
    assert outcome.code == 1 and outcome.err.startswith("Error: ") and "nothing" in outcome.err
    outcome = quantize(tmp_path)
    assert outcome.code == 1 and "this is a folder" in outcome.err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
def test_ctrl_c_leaves_nothing_behind(tmp_path):
    from support.gemma_files import write_checkpoint

    write_checkpoint(tmp_path / "model", hidden_size=256, num_experts=96, moe_intermediate_size=256)
    out = tmp_path / "out"
    out.mkdir()
    source = str(Path(__file__).parents[2] / "src")
    process = subprocess.Popen(
        [sys.executable, "-m", "dgemma.cli.main", "quantize", str(tmp_path / "model"), str(out / "x.gguf")],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": source,
                                                            "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 60
    while not list(out.iterdir()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    printed, said = process.communicate(timeout=200)
    assert process.returncode == 130, said
    assert b"Traceback" not in said and printed == b""
    assert not list(out.iterdir())
