"""What a command reads from stdin, and what it leaves on stdout.

In: text in whatever Unicode form it comes, or one clear error; Windows' shells pipe UTF-16, many editors begin files
with a byte order mark, and neither is part of what was said. Out: an answer's text, or one JSON object; not by
`typer.echo`, which takes escape sequences out of what is piped: a pipe shall get what the model wrote.
"""

from __future__ import annotations

import codecs
import json
import os
import sys
from contextlib import suppress
from typing import Any

from dgemma.cli.terminal.console import printable
from dgemma.errors import DgemmaError

# The longer ones first: UTF-32's little-endian mark begins with that of UTF-16.
_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
          (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))


def has_stdin() -> bool:
    """Whether there is a stdin at all: a program may be started without (``<&-``)."""
    return sys.stdin is not None and not sys.stdin.closed


def stdin_text() -> str:
    """All of stdin. Raises DgemmaError when there is none, it cannot be read, or it is no text."""
    if not has_stdin():
        raise DgemmaError('stdin is closed: give the prompt itself, as in dgemma run "…", or pipe one in')
    binary = getattr(sys.stdin, "buffer", None)
    try:
        if binary is None:  # put there by whoever runs the command inside a program
            return sys.stdin.read().removeprefix("\ufeff")
        data: bytes = binary.read()
        text = data.decode(unicode_form(data) or sys.stdin.encoding, sys.stdin.errors or "strict")
    except UnicodeDecodeError as error:
        raise DgemmaError(f"the prompt on stdin is not {error.encoding} text ({error.reason} at byte "
                          f"{error.start})") from error
    except OSError as error:
        raise DgemmaError(f"stdin cannot be read ({error.strerror or error})") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def stdin_bytes() -> bytes:
    """All of stdin as it comes. Raises DgemmaError when there is none or it cannot be read."""
    binary = getattr(sys.stdin, "buffer", None) if has_stdin() else None
    if binary is None:
        raise DgemmaError("stdin is closed: pipe a picture in, or name its file")
    try:
        return binary.read()
    except OSError as error:
        raise DgemmaError(f"stdin cannot be read ({error.strerror or error})") from error


def recognise_stdin() -> None:
    """Before anything is read line by line: let stdin be decoded as what its first bytes say it is."""
    stream: Any = sys.stdin
    if not hasattr(stream, "reconfigure"):  # put there by whoever runs the command inside a program
        return
    try:
        form = unicode_form(_beginning(stream.buffer))
    except OSError as error:
        raise DgemmaError(f"stdin cannot be read ({error.strerror or error})") from error
    if form is not None:
        stream.reconfigure(encoding=form)


def _beginning(stream: Any) -> bytes:
    """The first bytes of a stream, which stay in it; none where that cannot be."""
    if hasattr(stream, "peek"):
        return stream.peek(64)
    if not stream.seekable():
        return b""
    place, data = stream.tell(), stream.read(64)
    stream.seek(place)
    return data


def unicode_form(data: bytes) -> str | None:
    """The encoding that bytes say they have: by a byte order mark, or as UTF-16 of Latin text without one."""
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return encoding
    even, odd = data[0:256:2], data[1:256:2]
    if len(odd) >= 2 and b"\0" not in even and odd.count(0) * 2 > len(odd):
        return "utf-16-le"
    if len(odd) >= 2 and b"\0" not in odd and even.count(0) * 2 > len(even):
        return "utf-16-be"
    return None


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
