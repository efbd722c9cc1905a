"""`dgemma studio` as a process of its own, and what its tests ask the bundled model."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from support.server_process import Process

TESTS = Path(__file__).parents[1]

PUZZLE = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"


@contextmanager
def studio(folder, *arguments, **environment):
    """The process, with its data in a folder; `launch_link` has the link that it shows."""
    process = Process("--port", "0", "--no-browser", "--data", str(folder), *arguments, command="studio", **environment)
    try:
        yield process
    finally:
        if process.process.poll() is None:
            process.process.kill()
            process.process.wait()


def launch_link(process):
    """The link that the studio shows when it is ready."""
    return process.wait_for(r"open (http://\S+/launch\?token=\S+) ")[1]


@contextmanager
def demo_process(folder, *, seconds=0.1, steps=20, model="sudoku"):
    """A studio whose model takes its time (`support.studio_demo`): its launch link, and its process's id."""
    process = subprocess.Popen(
        [sys.executable, "-m", "support.studio_demo", "--data", str(folder), "--seconds", str(seconds), "--steps",
         str(steps), "--model", str(model)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1",
             "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent / "src")])})
    try:
        yield process.stdout.readline().removeprefix("open ").strip(), process.pid
    finally:
        process.terminate()
        process.wait(20)
        process.stdout.close()


@contextmanager
def demo(folder, *, seconds=0.1, steps=20, model="sudoku"):
    """The same, for those who need the link alone."""
    with demo_process(folder, seconds=seconds, steps=steps, model=model) as (link, _):
        yield link
