"""The live canvas: text coming into focus on a terminal.

Works on: events and a console. Knows nothing of: models, tokenizers. `view` decides what is to be seen, `live` paints
it; this file decides when.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from itertools import groupby
from typing import Protocol

from rich.console import Console
from rich.segment import Segment
from rich.text import Text

from dgemma.cli.terminal.drafts import PieceOf, Place, spell
from dgemma.cli.terminal.layout import TextRow
from dgemma.cli.terminal.live import Line, LiveRegion
from dgemma.cli.terminal.view import STYLES, CanvasView, segments
from dgemma.diffusion.events import CanvasCommitted, CanvasStarted, Denoised, Event, Finished

FRAME_SECONDS = 1 / 30


class Clock(Protocol):
    """What time it is, and how to let it pass: `time`, or a test's own."""

    def monotonic(self) -> float: ...
    def sleep(self, seconds: float, /) -> None: ...



class LiveCanvas:
    """Shows one request's events as they come; a context manager.

    The canvas that is being denoised and a status line are redrawn in place; what is committed is printed above them
    for good. In the end only the text and a summary are left. On an exception (Ctrl-C, too) what was committed stays
    and the terminal is as it was. On a dumb terminal only what is committed is printed.
    """

    def __init__(self, console: Console, piece_of: PieceOf, *, min_frame_seconds: float = 0.0,
                 clock: Clock = time) -> None:
        """`piece_of`: a token's bytes and whether it is special.

        `min_frame_seconds`: show every step, each for so long at least (for models that are faster than the eye);
        `show` waits meanwhile. Without it steps are left out so that at most 30 frames a second are drawn, by
        the `clock`.
        """
        self.console = console
        self._view = CanvasView(piece_of)
        self._region = LiveRegion(console)
        self._min_frame_seconds, self._clock = min_frame_seconds, clock
        self._drawn_at = float("-inf")
        self._due = False  # a step has come that was not drawn
        self._height = 0
        self._closed = False

    def __enter__(self) -> LiveCanvas:
        self._region.start()
        return self

    def show(self, event: Event) -> None:
        """Take in an event, and draw it if it is time to."""
        if self._due and isinstance(event, (CanvasCommitted, Finished)):
            self._draw()
        self._view.apply(event)
        if isinstance(event, Denoised):
            self._due = True
            if self._min_frame_seconds or self._clock.monotonic() - self._drawn_at >= FRAME_SECONDS:
                self._draw()
        elif isinstance(event, (CanvasStarted, CanvasCommitted)):
            self._draw()
        else:
            self._close()

    def __exit__(self, *_: object) -> None:
        try:
            self._close()
        finally:
            self._region.stop()

    def _draw(self) -> None:
        wait = self._drawn_at + self._min_frame_seconds - self._clock.monotonic()
        if wait > 0:
            self._clock.sleep(wait)
        width, height = self.console.size
        rows = self._view.take_rows(width)
        lines = self._view.frame(width, height)
        # It may grow at once, but shrinks a line at a time, so that the status line glides and does not jump.
        self._height = min(max(len(lines), self._height - len(rows) - 1), height) if lines else 0
        blank: list[Line] = [[] for _ in range(self._height - len(lines))]
        self._region.draw([*lines[:-1], *blank, *lines[-1:]], _permanent(rows))
        self._view.drawn()
        self._due = False
        self._drawn_at = self._clock.monotonic()

    def _close(self) -> None:
        """Leave what was committed, and the summary if the answer is finished."""
        if self._closed:
            return
        self._closed = True
        width = self.console.width
        above = _permanent(self._view.take_rows(width, everything=True))
        if summary := self._view.summary(width):
            above += [*summary, Segment.line()]
        self._region.draw([], above)


class PlainText:
    """For an answer without drafts: prints what each event commits, thoughts faintly; a context manager that leaves
    the cursor on a new line."""

    def __init__(self, console: Console, piece_of: PieceOf) -> None:
        self._console, self._piece_of = console, piece_of
        self._place = Place()

    def __enter__(self) -> PlainText:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._place.line_start:
            self._console.print()

    def show(self, event: Event) -> None:
        """Take in an event."""
        if not isinstance(event, CanvasCommitted):
            return
        spelling = spell(((token, "settled") for token in event.token_ids), self._place, self._piece_of, committed=True)
        self._place = spelling.after
        text = Text()
        for look, run in groupby(spelling.glyphs, key=lambda glyph: glyph[1]):
            text.append("".join(char for char, _ in run), STYLES[look])
        self._console.print(text, end="", soft_wrap=True)


def _permanent(rows: Iterable[TextRow]) -> list[Segment]:
    return [segment for row in rows for segment in (*segments(row.cells), *(() if row.soft else (Segment.line(),)))]
