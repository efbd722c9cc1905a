"""The picture of an answer that is being denoised: events in, styled rows and a status line out.

Works on: events. Knows nothing of: cursors, clocks, how often it is drawn. `LiveCanvas` shows it on a terminal.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from rich.cells import set_cell_size
from rich.segment import Segment
from rich.style import Style

from dgemma.cli.terminal.drafts import DOT, PieceOf, Place, looks_of, spell
from dgemma.cli.terminal.layout import Cell, Margin, TextRow, join, wrap
from dgemma.cli.terminal.live import Line
from dgemma.diffusion.events import CanvasCommitted, CanvasStarted, Denoised, Event, Finished, Generation
from dgemma.formats import count_text, duration_text, rate_text

# Attributes and the six plain colours only: they follow the terminal's own theme, light or dark.
STYLES = {look: Style.parse(style) for look, style in {
    "noise": "dim", "vague": "dim", "leaning": "cyan", "marker": "dim", "fixed": "bold yellow", "new": "bold green",
    "pinned": "bold magenta", "thought": "dim italic", "settled": "none"}.items()}
FAINT, LIVELY = Style.parse("dim"), Style.parse("cyan")
BAR_CELLS, EIGHTHS = 6, " ▏▎▍▌▋▊▉█"


@dataclass(frozen=True)
class Part:
    """A piece of a status line; the highest `rank` is left out first where the line is too long."""

    text: str
    rank: int
    style: Style = FAINT
    joined: bool = False  # to the part after it


class CanvasView:
    """Follows one request's events. `frame` is what to show now; `take_rows` what will not change any more."""

    def __init__(self, piece_of: PieceOf) -> None:
        self._piece_of = piece_of
        self._place, self._margin = Place(), Margin()
        self._carry: list[Cell] = []  # committed, but not taken yet: at least the row that may still grow
        self._started: CanvasStarted | None = None
        self._step: Denoised | None = None
        self._shown: Denoised | None = None  # the last step that was drawn
        self._peak = 0.0  # the highest mean entropy of this canvas
        self._committed = 0  # tokens
        self._commits: list[int] = []  # steps of each
        self._seconds = 0.0
        self._draft_length = 0  # positions before the draft's stop token
        self.generation: Generation | None = None

    def apply(self, event: Event) -> None:
        """Take in one event."""
        if isinstance(event, CanvasStarted):
            self._started, self._step, self._shown, self._peak = event, None, None, 0.0
        elif isinstance(event, Denoised):
            self._step, self._seconds = event, event.seconds
            self._peak = max(self._peak, event.mean_entropy)
        elif isinstance(event, CanvasCommitted):
            self._commit(event.token_ids)
            self._commits.append(event.steps)
            self._started = self._step = self._shown = None
            self._seconds = event.seconds
        elif isinstance(event, Finished):
            self.generation = event.generation
            self._commit(event.generation.token_ids[self._committed :])
            self._started = self._step = self._shown = None

    def drawn(self) -> None:
        """The present step was shown: only what is accepted after it counts as new."""
        self._shown = self._step

    def frame(self, width: int, height: int) -> list[Line]:
        """What is to be seen now: the text's last rows that fit, and the status line; none when nothing is open.

        At most `height` lines, each at most `width` wide.
        """
        if self._started is None and not self._commits:
            return []
        draft = spell(self._tokens(), self._place, self._piece_of)
        self._draft_length = draft.length
        rows = wrap(join(self._carry, draft.glyphs), width, self._margin)
        room = height - 1
        lines = [segments(row.cells) for row in (rows[-room:] if room else [])]
        if len(rows) > room >= 4:
            hidden = len(rows) - room + 1
            lines[0] = status_line([Part(f"⋮ {count_text(hidden, 'more line')} above", 0)], width)
        return [*lines, self.status(width)]

    def take_rows(self, width: int, everything: bool = False) -> list[TextRow]:
        """The committed rows that no later text can change, once each; with `everything`, all that is committed."""
        if not self._carry:
            return []
        rows = wrap(self._carry, width, self._margin)
        if everything:
            self._carry = []
            return rows[:-1] if not rows[-1].cells else rows
        keep = len(rows) - 1
        while keep and rows[keep - 1].soft:  # the terminal can only break a line whose rest follows at once
            keep -= 1
        self._carry, self._margin = self._carry[rows[keep].start :], rows[keep].margin
        return rows[:keep]

    def status(self, width: int) -> Line:
        """Where the present canvas stands, in one line."""
        started, step = self._started, self._step
        if started is None:
            parts = [Part(f"canvas {len(self._commits)}", 1)]
            parts.append(Part(f"committed after {count_text(self._commits[-1], 'step')}", 0, Style.null()))
        else:
            parts = [Part(f"canvas {started.canvas + 1}", 2)]
            done = step.step if step else started.steps_before
            parts.append(Part(f"step {done}/{started.max_steps}", 0, Style.null()))
        if step:
            bar = _bar(step.mean_entropy / self._peak if self._peak else 0.0)
            parts.append(Part(bar, 4, LIVELY, joined=True))
            digits = 2 if step.mean_entropy >= 0.1 else 3
            parts.append(Part(f"{step.mean_entropy:.{digits}f} nats", 1))
            settled = f"{sum(step.accepted)}/{len(step.accepted)} settled"
            in_text = sum(step.accepted[: self._draft_length])
            if not self._committed and in_text and step.seconds:
                settled += f" ({rate_text(in_text, step.seconds)}/s)"
            parts.append(Part(settled, 3))
        if self._committed and self._seconds:
            parts.append(Part(f"{rate_text(self._committed, self._seconds)} tok/s", 5))
        parts.append(Part(duration_text(self._seconds), 6))
        return status_line(parts, width)

    def summary(self, width: int) -> Line:
        """The finished answer in one line; empty before it is."""
        done = self.generation
        if done is None:
            return []
        parts = [
            Part(count_text(self._committed, "token"), 0),
            Part(count_text(len(done.steps), "canvas", "es"), 3),
            Part(count_text(sum(done.steps), "step"), 2),
            Part(f"{done.tokens_per_forward:.1f} tokens/forward", 4),
            Part(f"{rate_text(self._committed, done.seconds)} tok/s", 1),
            Part(duration_text(done.seconds), 5),
            Part(done.finish_reason, 6),
        ]
        return status_line(parts, width)

    def _commit(self, token_ids: Sequence[int]) -> None:
        spelling = spell(((i, "settled") for i in token_ids), self._place, self._piece_of, committed=True)
        self._place = spelling.after
        self._carry = join(self._carry, spelling.glyphs)
        self._committed += len(token_ids)

    def _tokens(self) -> Iterable[tuple[int, str]]:
        started, step = self._started, self._step
        if started is None:
            return []
        if step is None:
            looks: list[str] = ["pinned" if pinned else "noise" for pinned in started.pinned]
            return zip(started.token_ids, looks, strict=True)
        return zip(step.token_ids, looks_of(step, started.pinned, self._shown), strict=True)


def status_line(parts: Sequence[Part], width: int) -> Line:
    """The parts side by side, less those that do not fit; the last one that remains is cut off."""
    parts = list(parts)
    while True:
        line: Line = []
        for i, part in enumerate(parts):
            line.append(Segment(part.text, part.style))
            if i < len(parts) - 1:
                line.append(Segment(" " if part.joined else " · ", FAINT))
        if Segment.get_line_length(line) <= width:
            return line
        if len(parts) == 1:
            return [Segment(set_cell_size(parts[0].text, width), parts[0].style)]
        parts.remove(max(parts, key=lambda part: part.rank))


def segments(cells: Sequence[Cell]) -> Line:
    """Text in its looks."""
    return [Segment("".join(cell.text for cell in run), STYLES[look])
            for look, run in groupby(cells, key=lambda cell: cell.look)]


def _bar(fraction: float) -> str:
    eighths = round(min(max(fraction, 0.0), 1.0) * BAR_CELLS * 8)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (EIGHTHS[rest] if rest else "")).ljust(BAR_CELLS, DOT)
