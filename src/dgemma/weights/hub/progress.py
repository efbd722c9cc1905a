"""A download as lines on stderr: one now and then, whoever reads them and wherever they go.

Works on what a `Listener` is told; knows nothing of the network. The command line draws a bar where it can.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from dgemma.formats import size_text
from dgemma.weights.hub.transfer import Listener

_LINE_PERCENT = 10  # between two lines
_LINE_AT_LEAST = 2.0  # seconds between two lines, however much has been done
_LINE_EVERY = 30.0  # seconds after which there is a line, however little has been done
_WORTH_SHOWING = 100_000  # bytes


class ProgressLines(Listener):
    """Tells of a transfer for as long as the ``with`` lasts; on Ctrl-C it says that nothing is lost."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        from huggingface_hub import constants

        self._silent = bool(constants.HF_HUB_DISABLE_PROGRESS_BARS)
        self._clock = clock
        self._what = ""
        self._began_at = self._told_at = 0.0
        self._first = self._total = self._percent = 0
        self._shown = False

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self.note("Stopped. What has arrived is kept: the same command goes on from here.")

    def begin(self, what: str, done: int, total: int) -> None:
        self._what, self._first, self._total = what, done, total
        self._began_at = self._told_at = self._clock()
        self._percent = _percent(done, total)
        self._shown = not self._silent and total >= _WORTH_SHOWING
        if self._shown:
            self.show(done, begins=True)

    def advance(self, done: int) -> None:
        if self._shown:
            self.show(done)

    def show(self, done: int, begins: bool = False) -> None:
        """Show how far it is that is worth showing, or that it begins."""
        if begins:
            here = f", {size_text(done)} already here" if done else ""
            self.note(f"{self._what} ({size_text(self._total)}{here})")
            return
        now, percent = self._clock(), _percent(done, self._total)
        waited = now - self._told_at
        if waited < _LINE_EVERY and (percent < self._percent + _LINE_PERCENT or waited < _LINE_AT_LEAST):
            return
        self._told_at, self._percent = now, percent - percent % _LINE_PERCENT
        speed = (done - self._first) / max(now - self._began_at, 1e-9)
        self.note(f"{self._what}: {percent} % ({size_text(done)} of {size_text(self._total)}, "
                  f"{size_text(round(speed))}/s)")

    def note(self, text: str) -> None:
        # A file's name comes from the hub: it steers no terminal.
        print("".join(char if char.isprintable() else "\ufffd" for char in text), file=sys.stderr, flush=True)


def _percent(done: int, total: int) -> int:
    return 100 * done // total if total else 100
