"""What a command leaves on stdout: an answer's text, or one JSON object.

Not `typer.echo`: that takes escape sequences out of what is piped, and a pipe shall get what the model wrote.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from typing import Any

from dgemma.cli.terminal.console import printable
from dgemma.errors import DgemmaError


def print_text(text: str) -> None:
    """Print an answer, exactly in a pipe or a file, harmlessly on a terminal; a line end is added if it has none."""
    need_stdout()
    if is_terminal():
        text = printable(text)
    sys.stdout.write(text if text.endswith("\n") else f"{text}\n")
    sys.stdout.flush()


def print_json(data: Any) -> None:
    """Print one JSON value on a line of its own."""
    need_stdout()
    # What stdout cannot spell it escapes as Python does, which is not JSON's way; nor is what makes text harmless.
    unicode = (sys.stdout.encoding or "utf-8").lower().startswith("utf")
    text = json.dumps(data, ensure_ascii=not unicode)
    print_text(text if not is_terminal() or printable(text) == text else json.dumps(data))


def is_terminal() -> bool:
    """Whether stdout is a terminal that a live canvas can be drawn on."""
    return has_stdout() and sys.stdout.isatty()


def has_stdout() -> bool:
    """Whether there is a stdout at all: a program may be started without (``>&-``)."""
    return sys.stdout is not None and not sys.stdout.closed


def need_stdout() -> None:
    """Raises DgemmaError where there is no stdout, for a command that would work for nothing then."""
    if not has_stdout():
        raise DgemmaError("stdout is closed: the answer would have nowhere to go; send it to a file or to /dev/null")


def occupy_descriptors() -> None:
    """Give the standard streams that this program was started without to /dev/null.

    Otherwise the next file that is opened, say a model's, takes a closed one's number, and whatever a library writes
    to stdout or stderr goes into that file. Python's own `sys.stdout` and `sys.stdin` stay None, so that it is known.
    """
    with suppress(OSError):
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(descriptor)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  (for as long as the program runs)


def give_up_stdout() -> None:
    """After a failed write: nothing more is tried, also not when the program ends and what is left is flushed."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
