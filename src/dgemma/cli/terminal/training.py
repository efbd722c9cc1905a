"""A long training run as a person sees it: a calm block that stays in place on a terminal, elsewhere a line at times.

Works on a run's events. Knows nothing of networks or of what the numbers mean, but that a task's main value is what
the user wants and ``validation/loss`` is the next best.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

from dgemma.cli.terminal.console import SafeConsole
from dgemma.formats import long_duration_text, size_text
from dgemma.train.log.events import Ended, Evaluated, Event, Noted, Started, Stepped, Working

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

HINT = "Ctrl-C saves and stops"
_LINE_STEPS, _LINE_SECONDS = 20, 30.0  # between two lines where there is no terminal: both must have passed
_REFRESHES = 4  # a second
_SMOOTH = 0.9  # how much of a smoothed value is kept from one step to the next
_SPARKS = "▁▂▃▄▅▆▇█"
_SPARK_CELLS = 16
_BAR_CELLS = 40


def sparkline(values: list[float], cells: int = _SPARK_CELLS) -> str:
    """A curve in one line: means over equal stretches of the values, between their least and greatest."""
    if len(values) < 2:
        return ""
    cells = min(cells, len(values))
    edges = [round(i * len(values) / cells) for i in range(cells + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_SPARKS[round((mean - low) * scale)] for mean in means)


class TrainingDisplay:
    """Shows the runs that it is told of, one after the other, while the ``with`` lasts; on stdout by default."""

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console or SafeConsole(highlight=False), clock
        self._live: Live | None = None
        self._begin(Started("", 0, 0))
        self._open = False

    def _begin(self, run: Started) -> None:
        self._run, self._last = run, Stepped(run.step, {}, 0.0, 0.0, 0)
        self._loss: float | None = None  # smoothed
        self._losses: deque[float] = deque(maxlen=4096)
        self._working: Working | None = None
        self._evaluated: Evaluated | None = None
        self._best: Evaluated | None = None
        self._told_step: int | None = None  # of the last plain line
        self._told_at, self._began_at, self._open = 0.0, self._clock(), True

    def __enter__(self) -> TrainingDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def __call__(self, event: Event) -> None:
        """Show what happened."""
        match event:
            case Noted(text):
                self._print(text)
            case Started():
                self._begin(event)
                self._show()
            case Stepped():
                self._take(event)
            case Working():
                began = self._working is None or self._working.what != event.what
                self._working = event
                if self._live is None and (began or self._clock() - self._told_at >= _LINE_SECONDS):
                    self._told_at = self._clock()
                    self._print(f"{event.what} {event.done}/{event.total}")
            case Evaluated():
                self._working, self._evaluated = None, event
                if event.best:
                    self._best = event
                said = ", ".join(f"{name.removeprefix('task/')} {_number(value)}"
                                 for name, value in event.values.items())
                self._print(f"step {event.step}: {said}{'  (best so far)' if event.best else ''}")
            case Ended():
                what = "done" if event.complete else "stopped; run the same command again to go on"
                report = f"report in {event.report}" if event.report else f"no report: {event.problem}"
                self._print(f"{what} at step {event.step:,}; results in {event.folder}, {report}")
                self._end()

    def _show(self) -> None:
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            from rich.live import Live

            self._live = Live(get_renderable=self._block, console=self._console, refresh_per_second=_REFRESHES)
            self._live.start()
        else:
            first, last = self._run.step, self._run.max_steps
            self._print(f"{self._run.name}: {f'steps {first} to {last}' if first else f'{last} steps'}. {HINT}.")

    def _end(self) -> None:
        """What stays on the screen has no hint."""
        if not self._open:
            return
        self._open, self._working = False, None
        if self._live is not None:
            self._live.stop()
            self._live = None
        elif self._told_step is not None and self._told_step != self._last.step:
            self._print(self._line())

    def _take(self, event: Stepped) -> None:
        self._last, self._working = event, None
        loss = event.values.get("loss")
        if loss is not None and abs(loss) < float("inf"):  # neither infinite nor NaN, which would stay for good
            self._loss = loss if self._loss is None else _SMOOTH * self._loss + (1 - _SMOOTH) * loss
            self._losses.append(self._loss)
        due = (self._told_step is None or event.step >= self._run.max_steps
               or (event.step - self._told_step >= _LINE_STEPS and self._clock() - self._told_at >= _LINE_SECONDS))
        if self._live is None and due:
            self._told_step, self._told_at = event.step, self._clock()
            self._print(self._line())

    def _line(self) -> str:
        return "  ".join([f"step {self._last.step}/{self._run.max_steps}", *self._figures(), *self._time_left()])

    def _figures(self) -> list[str]:
        """What the last step says, the most important first."""
        shown = []
        if self._loss is not None:
            shown.append(f"loss {_number(self._loss)}")
        if "learning_rate" in self._last.values:
            shown.append(f"learning rate {self._last.values['learning_rate']:.2g}")
        if self._last.tokens_per_second:
            shown.append(f"{self._last.tokens_per_second:,.0f} tokens/s")
        if self._last.seconds_per_step:
            shown.append(f"{self._last.seconds_per_step:.2f} s/step")
        if self._last.memory_bytes:
            shown.append(size_text(self._last.memory_bytes))
        return shown

    def _time_left(self) -> list[str]:
        left = (self._run.max_steps - self._last.step) * self._last.seconds_per_step
        return [f"{long_duration_text(left)} left"] if left > 0 else []

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=self._live is None)

    def _block(self) -> Group:
        """What `Live` draws: the display as it is at that moment."""
        from rich.console import Group

        return Group(*self._rows(max(self._console.width - 1, 20), self._console.options.ascii_only))

    def _rows(self, width: int, ascii_only: bool) -> list[Text]:
        """The block's lines, each within ``width`` columns."""
        from rich.text import Text

        rows = [self._head(width, ascii_only), Text()]
        for part in self._figures():
            figure = Text(part, "bold" if part.startswith("loss") else "")
            if part.startswith("loss") and not ascii_only and self._losses:
                figure.append(f" {sparkline(list(self._losses))}", "not bold cyan")
            if rows[-1] and rows[-1].cell_len + 2 + figure.cell_len > width:
                rows.append(Text())
            rows[-1].append("  " if rows[-1] else "").append_text(figure)
        if self._evaluated is not None:
            rows.append(self._standing())
        working = self._working  # once: another thread draws
        if working is not None:
            rows.append(Text(f"{working.what} {working.done}/{working.total}", "yellow"))
        if self._open:
            rows.append(Text(HINT, "dim"))
        for row in rows:
            row.truncate(width)
        return [row for row in rows if row]

    def _head(self, width: int, ascii_only: bool) -> Text:
        from rich.text import Text

        step, last = self._last.step, self._run.max_steps
        share, after = step / last if last else 1.0, f" {step:,}/{last:,}"
        spent = long_duration_text(self._clock() - self._began_at)
        times = [*self._time_left(), f"{spent} so far"]
        ends = ["  ".join([after, *times]), "  ".join([after, *times[:-1]]), after]
        title = Text(self._run.name, "bold")
        title.truncate(max(width // 3, 8), overflow="ellipsis" if not ascii_only else "crop")
        end = next((end for end in ends if title.cell_len + 1 + 10 + len(end) <= width), after)
        cells = max(min(width - title.cell_len - 1 - len(end), _BAR_CELLS), 0)
        done = round(cells * min(max(share, 0.0), 1.0))
        full, empty = ("#", ".") if ascii_only else ("━", "─")
        return title.append(" ", "not bold").append(full * done, "not bold green").append(
            empty * (cells - done), "not bold dim").append(end, "not bold")

    def _standing(self) -> Text:
        """The last evaluation's main value beside the best one's."""
        from rich.text import Text

        assert self._evaluated is not None
        score = self._evaluated.score
        name = "validation/loss" if score is None else score.main
        if name not in self._evaluated.values:
            return Text()
        text = Text(f"{name.removeprefix('task/')} {_number(self._evaluated.values[name])} at {self._evaluated.step:,}")
        if self._best is self._evaluated:
            text.append("  the best so far", "green")
        elif self._best is not None and name in self._best.values:
            text.append(f"  best {_number(self._best.values[name])} at {self._best.step:,}", "green")
        loss = self._evaluated.values.get("validation/loss")
        if loss is not None and name != "validation/loss":
            text.append(f"  validation loss {_number(loss)}", "dim")
        return text


def _number(value: float) -> str:
    """A number in four digits, however large."""
    if value != value:
        return "nan"
    if value and abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"
