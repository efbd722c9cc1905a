"""What a command reads from stdin: text in whatever Unicode form it comes, or one clear error.

Windows' shells pipe UTF-16, many editors begin files with a byte order mark; neither is part of what was said.
"""

from __future__ import annotations

import codecs
import sys
from typing import Any

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
