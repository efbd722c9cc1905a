"""What differs from one system to another: signals, the memory that a process has held, the processors it may use.

Nothing here is imported that some system lacks. Knows nothing of models; `memory` says what there is for them.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any


@contextmanager
def signals_handled(handler: Callable[[int, FrameType | None], Any], *numbers: int) -> Iterator[None]:
    """While this lasts ``handler`` gets these signals; afterwards whoever got them before.

    Only the main thread can decide that. In another one this does nothing: signals go where they went.
    """
    before: dict[int, Any] = {}
    try:
        with suppress(ValueError):  # not the main thread
            for number in numbers:
                before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, previous in before.items():
            # A handler that is not Python's (an embedding program's) cannot be put back: it is told as None.
            signal.signal(number, signal.SIG_DFL if previous is None else previous)


def peak_memory(platform: str = sys.platform) -> int:
    """The most bytes of memory that this process has held so far; 0 where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if platform == "darwin" else most * 1024  # bytes there, KiB elsewhere


def resident_memory(statm: Path = Path("/proc/self/statm")) -> int | None:
    """The bytes of memory that this process holds now, files that are mapped into it included; None but on Linux."""
    try:
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return None


def usable_cores() -> int:
    """How many processors this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
