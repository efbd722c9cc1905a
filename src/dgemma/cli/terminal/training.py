"""A long training run as a person sees it: a calm block that stays in place on a terminal, elsewhere a line at times.

Works on a run's events. Knows nothing of networks or of what the numbers mean, but that values called ``task/…`` are
what the user wants and ``validation/loss`` is the next best.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING

from dgemma.cli.terminal.console import SafeConsole
from dgemma.formats import long_duration_text, size_text
from dgemma.train.log.events import Ended, Evaluated, Event, Noted, Started, Stepped, Working

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.live import Live
    from rich.text import Text

HINT = "Ctrl-C saves and stops"
_LINE_STEPS, _LINE_SECONDS = 20, 30.0  # between two lines where there is no terminal: both must have passed
_REFRESHES = 4  # a second
_SMOOTH = 0.9  # how much of a smoothed value is kept from one step to the next
_SPARKS = "▁▂▃▄▅▆▇█"
_SPARK_CELLS = 16
_BAR_CELLS = 40
_COSTS = ("steps_per_canvas", "tokens_per_forward", "seconds_per_answer", "failed")  # of an answer, not its worth


def main_value(values: Mapping[str, float]) -> str | None:
    """The name of the value that says whether the model gets better, as far as names tell."""
    for name in values:
        if name.startswith("task/") and name.removeprefix("task/") not in _COSTS:
            return name
    return next((name for name in values if name.endswith("loss")), next(iter(values), None))


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
        self._title, self._step, self._last_step = run.name, run.step, run.max_steps
        self._values: Mapping[str, float] = {}
        self._seconds_per_step = self._tokens_per_second = 0.0
        self._memory = 0
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
                self._print(f"step {event.step}: {_spelled(event.values)}{'  (best so far)' if event.best else ''}")
            case Ended():
                what = "done" if event.complete else "stopped; run the same command again to go on"
                report = f"report in {event.report}" if event.report else f"no report: {event.problem}"
                self._print(f"{what} at step {event.step:,}; results in {event.folder}, {report}")
                self._end()

    def _show(self) -> None:
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            from rich.live import Live

            self._live = Live(_Block(self), console=self._console, refresh_per_second=_REFRESHES)
            self._live.start()
        else:
            steps = f"steps {self._step} to {self._last_step}" if self._step else f"{self._last_step} steps"
            self._print(f"{self._title}: {steps}. {HINT}.")

    def _end(self) -> None:
        """What stays on the screen has no hint."""
        if not self._open:
            return
        self._open, self._working = False, None
        if self._live is not None:
            self._live.stop()
            self._live = None
        elif self._told_step is not None and self._told_step != self._step:
            self._print(self._line())

    def _take(self, event: Stepped) -> None:
        self._step, self._values, self._working = event.step, event.values, None
        self._seconds_per_step, self._tokens_per_second = event.seconds_per_step, event.tokens_per_second
        self._memory = event.memory_bytes
        loss = event.values.get("loss")
        if loss is not None and abs(loss) < float("inf"):  # neither infinite nor NaN, which would stay for good
            self._loss = loss if self._loss is None else _SMOOTH * self._loss + (1 - _SMOOTH) * loss
            self._losses.append(self._loss)
        if self._live is None and self._line_is_due():
            self._told_step, self._told_at = event.step, self._clock()
            self._print(self._line())

    def _line_is_due(self) -> bool:
        if self._told_step is None or self._step >= self._last_step:
            return True
        return (self._step - self._told_step >= _LINE_STEPS
                and self._clock() - self._told_at >= _LINE_SECONDS)

    def _line(self) -> str:
        return "  ".join([f"step {self._step}/{self._last_step}", *self._figures(), *self._time_left()])

    def _figures(self) -> list[str]:
        """What the last step says, the most important first."""
        shown = []
        if self._loss is not None:
            shown.append(f"loss {_number(self._loss)}")
        if "learning_rate" in self._values:
            shown.append(f"learning rate {self._values['learning_rate']:.2g}")
        if self._tokens_per_second:
            shown.append(f"{self._tokens_per_second:,.0f} tokens/s")
        if self._seconds_per_step:
            shown.append(f"{self._seconds_per_step:.2f} s/step")
        if self._memory:
            shown.append(size_text(self._memory))
        return shown

    def _time_left(self) -> list[str]:
        left = (self._last_step - self._step) * self._seconds_per_step
        return [f"{long_duration_text(left)} left"] if left > 0 else []

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=self._live is None)

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

        share = self._step / self._last_step if self._last_step else 1.0
        after = f" {self._step:,}/{self._last_step:,}"
        spent = long_duration_text(self._clock() - self._began_at)
        times = [*self._time_left(), f"{spent} so far"]
        ends = ["  ".join([after, *times]), "  ".join([after, *times[:-1]]), after]
        title = Text(self._title, "bold")
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
        name = main_value(self._evaluated.values)
        if name is None:
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


class _Block:
    """What `Live` draws: the display as it is at that moment."""

    def __init__(self, display: TrainingDisplay) -> None:
        self._display = display

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self._display._rows(max(options.max_width - 1, 20), options.ascii_only)


def _spelled(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name.removeprefix('task/')} {_number(value)}" for name, value in values.items())


def _number(value: float) -> str:
    """A number in four digits, however large."""
    if value != value:
        return "nan"
    if value and abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"
