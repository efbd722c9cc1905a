"""`dgemma replay` without a terminal, and on one."""

import io

import pytest
import typer
from typer.testing import CliRunner

from dgemma.cli.commands.replay import replay, show
from dgemma.cli.terminal.canvas import LiveCanvas
from dgemma.cli.terminal.console import SafeConsole
from dgemma.diffusion.trace import TraceWriter, read_trace
from dgemma.errors import DgemmaError
from support.clock import Clock

TEXT = "The first line.\nThe second \x1b[2J."


@pytest.fixture
def trace(fake, tmp_path):
    made = fake(TEXT, words=False, canvas=32, steps=3)
    path = tmp_path / "a.jsonl"
    with TraceWriter(path, model="made up", prompt="?", piece_of=made.piece_of) as writer:
        for event in made.events(finish=False):
            writer.write(event)
    return path


def run(*arguments):
    app = typer.Typer()
    app.command()(replay)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_piped(trace):
    result = run(trace)
    assert (result.exit_code, result.stdout) == (0, TEXT + "\n")
    assert run(trace, "--no-visual").stdout == TEXT + "\n"


def test_errors(trace, tmp_path):
    assert isinstance(run(tmp_path / "none").exception, DgemmaError)
    assert "--speed" in str(run(trace, "--speed", 0).exception)


def test_on_a_terminal_time_passes(trace):
    clock, file, recorded = Clock(), io.StringIO(), read_trace(trace)
    console = SafeConsole(file=file, force_terminal=True, width=60, height=20, _environ={})
    with LiveCanvas(console, recorded.pieces.__getitem__, clock=Clock(tick=1)) as canvas:
        show(recorded, canvas, 0.5, clock)
    assert clock.now == pytest.approx((0.2 + 3 * 0.05) / 0.5)
    assert "step 3/48" in file.getvalue().replace("\x1b[0m", "").replace("\x1b[2m", "")
    assert "\x1b[2J" not in file.getvalue()
