"""A download as a person sees it, on stderr: a moving bar on a terminal, a line now and then elsewhere.

Works on what a `Listener` is told; knows nothing of the network.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from dgemma.files import size_text
from dgemma.weights.hub.transfer import Listener

if TYPE_CHECKING:
    from rich.progress import Progress

_EVERY = 0.1  # seconds between two looks of the bar
_LINE_PERCENT = 10  # between two lines
_LINE_AT_LEAST = 2.0  # seconds between two lines, however much has been done
_LINE_EVERY = 30.0  # seconds after which there is a line, however little has been done
_WORTH_SHOWING = 100_000  # bytes


class ProgressDisplay(Listener):
    """Shows a transfer on stderr for as long as the ``with`` lasts; on Ctrl-C it says that nothing is lost."""

    def __init__(self) -> None:
        from huggingface_hub import constants

        from dgemma.cli.terminal.console import SafeConsole

        self._console = SafeConsole(stderr=True, highlight=False)
        self._silent = bool(constants.HF_HUB_DISABLE_PROGRESS_BARS)
        self._bar: Progress | None = None
        self._what = ""
        self._began_at = self._told_at = 0.0
        self._first = self._total = self._percent = 0
        self._shown = False

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self._print("Stopped. What has arrived is kept: the same command goes on from here.")

    def begin(self, what: str, done: int, total: int) -> None:
        self._what, self._first, self._total = what, done, total
        self._began_at = self._told_at = time.monotonic()
        self._percent = _percent(done, total)
        self._shown = not self._silent and total >= _WORTH_SHOWING
        if not self._shown:
            return
        if self._console.is_terminal:
            bar = self._bar or self._start()
            for task in bar.task_ids:
                bar.remove_task(task)
            bar.add_task(what, total=total, completed=done)
        else:
            self._print(f"{what} ({size_text(total)}{f', {size_text(done)} already here' if done else ''})")

    def advance(self, done: int) -> None:
        now = time.monotonic()
        if not self._shown or (now - self._told_at < _EVERY and done < self._total):
            return
        if self._bar is not None:
            self._told_at = now
            self._bar.update(self._bar.task_ids[-1], completed=done)
            return
        percent, waited = _percent(done, self._total), now - self._told_at
        if waited < _LINE_EVERY and (percent < self._percent + _LINE_PERCENT or waited < _LINE_AT_LEAST):
            return
        self._told_at, self._percent = now, percent - percent % _LINE_PERCENT
        speed = (done - self._first) / max(now - self._began_at, 1e-9)
        self._print(f"{self._what}: {percent} % ({size_text(done)} of {size_text(self._total)}, "
                    f"{size_text(round(speed))}/s)")

    def note(self, text: str) -> None:
        self._print(text)

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def _start(self) -> Progress:
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.table import Column

        self._bar = Progress(
            TextColumn("{task.description}", markup=False,
                       table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis", min_width=12)),
            BarColumn(16), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
            console=self._console, expand=True)
        self._bar.start()
        return self._bar


def _percent(done: int, total: int) -> int:
    return 100 * done // total if total else 100
