"""Work that takes minutes and belongs to no page: downloads, conversions. It goes on whoever looks, and can be stopped.

Works on: functions, each run in a thread of its own. Knows nothing of: pages, what is done.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from dgemma.errors import DgemmaError
from dgemma.weights.hub.transfer import Listener

log = logging.getLogger("dgemma.studio")

State = Literal["running", "done", "failed", "stopped"]
KEPT = 20  # jobs that are over and still shown


class StoppedError(DgemmaError):
    """The user has stopped this."""


@dataclass(frozen=True)
class Progress:
    """How far something is: ``done`` of ``total`` bytes of ``what``, so many a second; ``note`` is news of it."""

    what: str = ""
    done: int = 0
    total: int = 0
    per_second: float = 0.0
    note: str = ""

    @property
    def share(self) -> float:
        """Between 0 and 1."""
        return self.done / self.total if self.total else 0.0

    @property
    def seconds_left(self) -> float | None:
        return (self.total - self.done) / self.per_second if self.per_second else None


class Job(Listener):
    """One piece of work. Its thread tells it of progress, and hears there by `StoppedError` that it is to stop."""

    def __init__(self, title: str, work: Callable[[Job], str], clock: Callable[[], float] = time.monotonic):
        """``work`` does it, and returns what there is to say then."""
        self.title = title
        self.state: State = "running"
        self.progress = Progress()
        self.result = ""  # what became of it, or went wrong
        self._work, self._clock = work, clock
        self._began, self._first = 0.0, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"dgemma-studio {title}")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ask it to stop; it does so at its next piece."""
        self._stop.set()

    def join(self, seconds: float) -> None:
        """Wait for its end, so long at most."""
        self._thread.join(seconds)

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    def check(self) -> None:
        """Raises `StoppedError` if it is to stop."""
        if self.stopping:
            raise StoppedError(f"{self.title}: stopped")

    # ---- a listener of transfers (`dgemma.weights.hub.transfer`), and of anything that counts bytes ----

    def begin(self, what: str, done: int, total: int) -> None:
        self._began, self._first = self._clock(), done
        self.progress = Progress(what, done, total)
        self.check()

    def advance(self, done: int) -> None:
        seconds = self._clock() - self._began
        self.progress = replace(self.progress, done=done,
                                per_second=(done - self._first) / seconds if seconds > 0 else 0.0)
        self.check()

    def note(self, text: str) -> None:
        self.progress = replace(self.progress, note=text)
        self.check()

    def _run(self) -> None:
        try:
            self.result, self.state = self._work(self), "done"
        except StoppedError:
            self.state = "stopped"
        except DgemmaError as error:
            self.result, self.state = str(error), "failed"
        except Exception as error:  # nobody else would hear of it
            log.exception("%s failed", self.title)
            self.result, self.state = f"{type(error).__name__}: {error}", "failed"


class Jobs:
    """All of them."""

    def __init__(self) -> None:
        self._jobs: list[Job] = []
        self._changing = threading.Lock()

    def all(self) -> list[Job]:
        """Those that run, and the last ones that did; the youngest first."""
        with self._changing:
            return self._jobs[::-1]

    def start(self, title: str, work: Callable[[Job], str]) -> Job:
        """Begin something; what runs under the same title already is not begun twice."""
        with self._changing:
            for job in self._jobs:
                if job.title == title and job.state == "running":
                    return job
            job = Job(title, work)
            over = [one for one in self._jobs if one.state != "running"]
            gone = {id(one) for one in over[: max(len(over) - KEPT, 0)]}
            self._jobs = [one for one in self._jobs if id(one) not in gone and one.title != title] + [job]
        job.start()
        return job

    def runs(self, title: str) -> bool:
        """Whether there is one under this title that is not over."""
        return any(job.title == title and job.state == "running" for job in self.all())

    def forget(self, job: Job) -> None:
        """Show one that is over no more."""
        with self._changing:
            self._jobs = [one for one in self._jobs if one is not job or one.state == "running"]

    def close(self, seconds: float = 5.0) -> None:
        """Stop everything, and wait for that a little."""
        running = [job for job in self.all() if job.state == "running"]
        for job in running:
            job.stop()
        end = time.monotonic() + seconds
        for job in running:
            job.join(max(end - time.monotonic(), 0))
