"""Converting a checkpoint in a process of its own, so that the page answers meanwhile.

Works on: `dgemma.weights.quantize.convert`. Knows nothing of: pages.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from dgemma.errors import DgemmaError
from dgemma.studio.jobs import StoppedError
from dgemma.weights.quantize import Summary, convert

_TELL_EVERY = 0.2  # seconds
_GRACE = 20.0  # seconds that the process has to clear up when it is to stop
_NICENESS = 10  # answers come first


def convert_apart(source: Path, out: Path, mixture: str, tower: str | None, *, tell: Callable[[str, int, int], None],
                  stopping: Callable[[], bool]) -> Summary:
    """`convert` elsewhere: ``tell`` hears its progress, and ``stopping`` is asked whether it shall stop.

    Raises DgemmaError as `convert` does and when the process dies, `StoppedError` when it was stopped; nothing
    unfinished is left behind then.
    """
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    ours, theirs = context.Pipe()
    process = context.Process(target=_convert, args=(theirs, source, out, mixture, tower), daemon=True)
    process.start()
    theirs.close()
    try:
        told = False
        while True:
            if stopping() and not told:
                ours.send("stop")
                told, deadline = True, time.monotonic() + _GRACE
            if told and time.monotonic() > deadline:
                process.terminate()
            if not ours.poll(_TELL_EVERY):
                continue
            kind, *what = ours.recv()
            if kind == "done":
                return what[0]
            if kind == "stopped":
                raise StoppedError(f"{out}: stopped")
            if kind == "failed":
                raise DgemmaError(what[0])
            tell(*what)
    except (EOFError, ConnectionError) as error:
        if stopping():
            raise StoppedError(f"{out}: stopped") from error
        process.join(_GRACE)
        raise DgemmaError(f"{out}: the process that wrote it ended by itself (exit code {process.exitcode}); was there "
                          "enough memory?") from error
    finally:
        ours.close()
        process.join(_GRACE)
        process.close() if process.exitcode is not None else process.kill()


def _convert(pipe: Connection, source: Path, out: Path, mixture: str, tower: str | None) -> None:
    """What the process does: anything that comes over the pipe, its end as well, stops it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in the terminal is for the studio, which stops us then
    if hasattr(os, "nice"):
        os.nice(_NICENESS)
    last = 0.0

    def progress(name: str, done: int, total: int) -> None:
        nonlocal last
        if pipe.poll():
            raise StoppedError(f"{out}: stopped")
        if time.monotonic() - last >= _TELL_EVERY or done == total:
            last = time.monotonic()
            pipe.send(("progress", name, done, total))

    try:
        pipe.send(("done", convert(source, out, mixture, tower=tower, progress=progress)))
    except StoppedError:
        pipe.send(("stopped",))
    except DgemmaError as error:
        pipe.send(("failed", str(error)))
    except (BrokenPipeError, ConnectionError):
        return  # the studio has gone: nobody waits for this
