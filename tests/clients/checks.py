"""What every client's script begins with: the servers' addresses, and a check that prints its own result.

Runs in the client's environment, so it knows nothing of this package. ``REAL`` is the bundled model, which writes
nonsense in whatever form it is held to; ``ACTED`` answers from a script: a call of the first tool, and when that has
answered "It rains in Paris."; without tools "Hello there."
"""

import os
import sys
import traceback
from collections.abc import Callable

REAL, ACTED = os.environ.get("REAL", ""), os.environ.get("ACTED", "")
MODEL = "sudoku"
MOST = 300  # tokens of an answer of REAL's: held to a form, it goes on for as long as there is room
_checks: list[tuple[str, Callable[[], object]]] = []


def check(name: str) -> Callable[[Callable[[], object]], Callable[[], object]]:
    """Registers a function as a check; what it raises is its failure."""

    def register(function: Callable[[], object]) -> Callable[[], object]:
        _checks.append((name, function))
        return function

    return register


def refused(kind: type[Exception], work: Callable[[], object]) -> Exception:
    """The exception of that kind that some work ends with."""
    try:
        work()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def run() -> None:
    """Run all checks, a line of "ok" or "FAIL" each; the exit code is the number of failures."""
    failures = 0
    for name, function in _checks:
        try:
            function()
            print(f"ok\t{name}", flush=True)
        except Exception as error:
            failures += 1
            told = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            print(f"FAIL\t{name}\t{told}", flush=True)
            if os.environ.get("VERBOSE"):
                traceback.print_exc(file=sys.stderr)
    sys.exit(failures)
