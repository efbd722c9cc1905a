"""Text as it comes, for an answer without a canvas to show.

Works on: committed events and a console; `LiveCanvas` without the picture. Knows nothing of: where they come from.
"""

from __future__ import annotations

from itertools import groupby

from rich.console import Console
from rich.text import Text

from dgemma.cli.terminal.drafts import PieceOf, Place, spell
from dgemma.cli.terminal.view import STYLES
from dgemma.diffusion.events import CanvasCommitted, Event


class PlainText:
    """Prints what each event commits, thoughts faintly; a context manager that leaves the cursor on a new line."""

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
