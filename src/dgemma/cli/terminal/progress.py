"""How far something is, as a bar on stderr where that is a terminal: loading, converting, evaluating, downloading.

Works on numbers that whoever does the work calls back with; nobody who works knows of bars.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Self

from dgemma.cli.terminal.console import SafeConsole
from dgemma.weights.hub.transfer import ProgressLines

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

_EVERY = 0.1  # seconds between two looks of a bar


class ProgressBar:
    """One bar, gone when the ``with`` ends; nothing where stderr is no terminal."""

    def __init__(self, what: str = "", *, of_bytes: bool = True, patience: float = 0.0, stays: bool = False,
                 console: Console | None = None) -> None:
        """``patience``: seconds that the work may take before there is a bar; ``stays``: it is left when it ends."""
        self.console = console or SafeConsole(stderr=True, highlight=False)
        self._what, self._of_bytes, self._patience, self._stays = what, of_bytes, patience, stays
        self._began = self._shown_at = time.monotonic()
        self._total = -1
        self._progress: Progress | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def update(self, done: int, total: int) -> None:
        """Show how much is done; once that is all, the bar is gone until something else begins."""
        if done == 0:
            self._began = time.monotonic()  # what came before it (importing torch) is not part of it
        self.step(self._what, done, total)
        if done >= total:
            self.stop()

    def step(self, what: str, done: int, total: int) -> None:
        """Show how much is done, and at what."""
        now = time.monotonic()
        if not self.console.is_terminal or now - self._began < self._patience:
            return
        if self._progress is None:
            self._progress = self._bar()
            self._progress.add_task(what, total=total)
            self._progress.start()
        elif now - self._shown_at < _EVERY and done < total and total == self._total:
            return
        if total != self._total:  # something else: its speed is its own
            self._progress.reset(self._progress.task_ids[0], total=total, completed=done)
        self._shown_at, self._total = now, total
        self._progress.update(self._progress.task_ids[0], description=what, completed=done)

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
            self._total = -1

    def _bar(self) -> Progress:
        from rich import progress
        from rich.table import Column

        name = progress.TextColumn("{task.description}", markup=False,
                                   table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis", min_width=12))
        amount = (progress.DownloadColumn(), progress.TransferSpeedColumn()) if self._of_bytes else (
            progress.MofNCompleteColumn(),)
        return progress.Progress(name, progress.BarColumn(16), *amount, progress.TimeRemainingColumn(),
                                 console=self.console, expand=True, transient=not self._stays)


class DownloadBar(ProgressLines):
    """A download as a bar that stays on a terminal, as lines elsewhere."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__()
        self._bar = ProgressBar(stays=True, console=console)

    def __exit__(self, *raised: type[BaseException] | None) -> None:
        self._bar.stop()
        super().__exit__(*raised)

    def show(self, done: int, begins: bool = False) -> None:
        if self._bar.console.is_terminal:
            self._bar.step(self._what, done, self._total)
        else:
            super().show(done, begins)

    def note(self, text: str) -> None:
        self._bar.console.print(text, markup=False, soft_wrap=True)
