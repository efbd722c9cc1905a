"""`dgemma replay`: watch a trace again, without a model.

Works on: a trace file and the terminal. Knows nothing of: how the trace was made.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dgemma.cli.streams import print_text
from dgemma.cli.terminal.console import SafeConsole

if TYPE_CHECKING:
    from dgemma.cli.terminal.canvas import Clock, LiveCanvas
    from dgemma.diffusion.trace import Trace

LONGEST_GAP = 1.0  # seconds between two events of a replay, whatever happened in between


def replay(
    file: Annotated[Path, typer.Argument(help="A trace, as `--trace` writes it.")],
    speed: Annotated[float, typer.Option(help="How many times as fast as it happened; 0.1 shows a fast model step by "
                                         "step.")] = 1.0,
    visual: Annotated[bool, typer.Option(help="Show the canvas; otherwise, and when piped, print only the "
                                         "text.")] = True,
) -> None:
    """Watch a recorded answer come into focus again."""

    from dgemma.cli.terminal.canvas import LiveCanvas
    from dgemma.diffusion.trace import read_trace
    from dgemma.errors import DgemmaError

    if speed <= 0:
        raise DgemmaError(f"--speed must be above 0, not {speed:g}")
    trace = read_trace(file)
    console = SafeConsole(highlight=False)
    if not (visual and console.is_terminal and not console.is_dumb_terminal):
        print_text(_text_of(trace))
        return
    with LiveCanvas(console, trace.pieces.__getitem__) as canvas:
        show(trace, canvas, speed)


def show(trace: Trace, canvas: LiveCanvas, speed: float, clock: Clock = time) -> None:
    """Show a trace's events one after the other, ``speed`` times as fast as they happened."""
    happened, due = 0.0, clock.monotonic()
    for event in trace.events:
        seconds = getattr(event, "seconds", happened)
        due = max(due + min((seconds - happened) / speed, LONGEST_GAP), clock.monotonic())
        happened = seconds
        clock.sleep(max(0.0, due - clock.monotonic()))
        canvas.show(event)


def _text_of(trace) -> str:
    """The answer's text; of an interrupted trace, what was committed."""
    from dgemma.chat.thoughts import split_thoughts
    from dgemma.diffusion.events import CanvasCommitted, Finished

    if trace.events and isinstance(trace.events[-1], Finished):
        return trace.events[-1].generation.text
    tokens = [i for event in trace.events if isinstance(event, CanvasCommitted) for i in event.token_ids]
    raw = b"".join(trace.pieces[i][0] for i in tokens).decode(errors="replace")
    return split_thoughts(raw)[1]
