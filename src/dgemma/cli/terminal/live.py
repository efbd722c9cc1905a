"""The part of a terminal that is redrawn: rich's `Live`, painted without a flicker.

Works on: lines of segments, and a console. Knows nothing of: tokens, events.

`Live` erases every line before it draws it again, which shows as a flicker. Here only lines that changed are
written, each over its old self, in one write that terminals which know synchronised updates show at once. Automatic
line breaks are off meanwhile: where a terminal disagrees about the width of an emoji, the line is cut off and nothing
else moves.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, ConsoleRenderable
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType, Segment, Segments

Line = list[Segment]

_BEGIN = "\x1b[?2026h\x1b[?7l"  # synchronised update, no automatic line breaks
_END = "\x1b[?7h\x1b[?2026l"
_PLAIN = str.maketrans("·↵⋮▏▎▍▌▋▊▉█", "./:-----===")  # for terminals without Unicode
_ERASE_RIGHT = "\x1b[K"


class LiveRegion(Live):
    """A live area at the bottom of what was printed. `draw` shows lines in it, and text above it for good."""

    def __init__(self, console: Console) -> None:
        super().__init__(console=console, auto_refresh=False, transient=True, vertical_overflow="crop")
        self._lines: list[Line] = []  # to be shown
        self._above: list[Segment] = []  # to be printed for good
        self._on_screen: list[Line] = []
        self._width = console.width

    @property
    def paints(self) -> bool:
        """Whether this console can be painted on at all; otherwise only what is for good is printed."""
        return self.console.is_terminal and not self.console.is_dumb_terminal

    def draw(self, lines: Sequence[Line], above: Sequence[Segment] = ()) -> None:
        """Show `lines`, which must fit the screen, after printing `above`, which ends in a line break or is empty."""
        if not self.paints:
            if above:
                self.console.print(Segments(self._encodable(above)), end="", crop=False)
            return
        self._lines = [self._encodable(line) for line in lines]
        self._above = self._encodable(above)
        with self.console:
            self.console.print(Control(), crop=False, end="")

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Called by the console for everything that it prints while this is live."""
        if not self.paints:
            return renderables
        foreign = [item for item in renderables if not isinstance(item, Control)]
        above, self._above = self._above, []
        resized = self._width != self.console.width
        paint = [_control(_BEGIN), _control("\r" + _up(self._rows_on_screen() - 1))]
        old = self._on_screen
        if foreign or above or resized:
            paint.append(_control(_erased(self._rows_on_screen())))
            old = []
        printed = [_control("\x1b[?7h"), *above, _control("\x1b[?7l")] if above else []
        self._on_screen, self._width = self._lines, self.console.width
        shown = _painted(self._lines, old, self._width)
        if foreign:
            return [Segments([*paint, _control("\x1b[?7h")]), *foreign, Segments([_control("\x1b[?7l"), *shown])]
        return [Segments([*paint, *printed, *shown])]

    def _encodable(self, segments: Sequence[Segment]) -> list[Segment]:
        """The segments in what the terminal's encoding has."""
        encoding = self.console.encoding
        if encoding.startswith("utf"):
            return list(segments)
        return [
            Segment(text.translate(_PLAIN).encode(encoding, "replace").decode(encoding), style)
            for text, style, _ in segments
        ]

    def _rows_on_screen(self) -> int:
        """How many rows the live area has; the terminal may have become narrower, and broken lines, since."""
        width = max(self.console.width, 1)
        widths = [Segment.get_line_length(line) for line in self._on_screen]
        rows = sum(max(1, -(-length // width)) for length in widths)
        return min(rows, self.console.height)


def _control(codes: str) -> Segment:
    return Segment(codes, None, [(ControlType.CLEAR,)])


def _up(rows: int) -> str:
    return f"\x1b[{rows}A" if rows > 0 else ""


def _erased(rows: int) -> str:
    """Empties rows downwards, and goes back. (Erasing to the end of the screen at once, from its first line on, makes
    tmux and others push what was there into the history.)"""
    return "\x1b[B".join(["\x1b[2K"] * rows) + _up(rows - 1)


def _painted(lines: list[Line], old: list[Line], width: int) -> list[Segment]:
    """Draws `lines` over `old` ones, downwards from the cursor."""
    paint: list[Segment] = []
    for i, line in enumerate(lines):
        if i:
            paint.append(Segment.line())
        if i >= len(old) or line != old[i]:
            paint += line
            # After a full line the cursor is still on its last column, which must stay.
            if Segment.get_line_length(line) < width:
                paint.append(_control(_ERASE_RIGHT))
    if not lines:
        paint.append(_control(_erased(len(old))))
    elif extra := max(len(old) - len(lines), 0):
        paint.append(_control("\r\x1b[B" + _erased(extra) + "\x1b[A"))
    return [*paint, _control(_END)]
