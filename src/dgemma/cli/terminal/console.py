"""What reaches a terminal, made harmless at the one place where it leaves: text of models, files, servers, datasets.

Works on text. Knows nothing of where it comes from: everything that is shown goes through here, so no caller has to
think of it. What a pipe gets of an answer is what the model wrote (`dgemma.cli.streams`).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

_KEPT_FORMAT = {"\u200c", "\u200d"}  # joiners: Persian and emoji need them


def printable(text: str) -> str:
    """``text`` without anything that could steer a terminal, tabs and line breaks kept."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(char if char in "\n\t" else harmless(char) for char in text.replace("\r\n", "\n"))


def harmless(char: str) -> str:
    """A character that a terminal only shows; control characters get their pictures."""
    code = ord(char)
    if 0x20 <= code < 0x7F:
        return char
    if code < 0x20:
        return "" if char == "\r" else chr(0x2400 + code)
    category = unicodedata.category(char)
    if category == "Cc":
        return "␡" if code == 0x7F else "�"
    if category in ("Cs", "Zl", "Zp") or (category == "Cn" and not 0x1F000 <= code <= 0x1FAFF):
        return "�"  # unassigned, unless it is an emoji newer than Python's tables
    if category == "Cf" and char not in _KEPT_FORMAT and not 0xE0020 <= code <= 0xE007F:
        return ""  # direction marks would turn the rest of the screen round
    return char


class SafeConsole(Console):
    """rich's console, with nothing steering the terminal but the styles and cursor movements of rich and of ours."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Called for all that is printed, and for each part of it."""
        for segment in super().render(renderable, options):
            if segment.control or not segment.text:
                yield segment
            else:
                yield Segment(printable(segment.text), segment.style)


def say(text: object = "", *, err: bool = False, nl: bool = True, fg: str | None = None,
        dim: bool | None = None) -> None:
    """Print a line of the program's own on stdout, or on stderr, with what it quotes made harmless."""
    typer.secho(printable(str(text)), err=err, nl=nl, fg=fg, dim=dim, reset=bool(fg or dim))


def say_error(error: object) -> None:
    """The line that a mistake of the user's ends in."""
    say(f"Error: {error}", err=True, fg="red")


def say_warning(message: object) -> None:
    """Something to mind, on stderr."""
    say(f"Note: {message}", err=True, fg="yellow")
