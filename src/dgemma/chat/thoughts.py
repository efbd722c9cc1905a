"""What a model thought, told apart from what it said.

Works on: a model's raw output, decoded with its special tokens. Knows nothing of: tokens, templates.

Gemma 4 writes `<|channel>thought\\n…\\n<channel|>` before its answer, sometimes with nothing inside.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from dgemma.tokenizer_files import STOPS

OPEN, CLOSE = "<|channel>", "<channel|>"
HEADER = "thought\n"  # the name of the channel, on its own line
_MARKS = re.compile(f"({'|'.join(map(re.escape, (OPEN, CLOSE, *STOPS)))})")


def split_thoughts(raw: str, inside: bool = False) -> tuple[str | None, str]:
    """The reasoning (None if there is none) and the text of a raw output; nothing after a stop token counts.

    `inside` says that the prompt itself left a thought open (some templates do). Text is passed on as it is, but for
    line breaks at its very beginning. A thought that is never closed is a thought to the end; a closing mark without an
    opening one is dropped.
    """
    channel = Channel(inside)
    reasoning = text = ""
    for part in _MARKS.split(raw):
        if part == OPEN:
            channel.enter()
        elif part == CLOSE:
            channel.leave()
        elif part in STOPS:
            break
        elif channel.open:
            reasoning += channel.thought(part)
        else:
            text += part
    return reasoning or None, text.lstrip("\n")


class Channel:
    """The channel that a model thinks in: opened and closed by marks, perhaps several times.

    A thought loses its channel's name and the white space around it; several thoughts are set apart by an empty line.
    What comes out, put together, does not depend on how the text was cut.
    """

    def __init__(self, inside: bool = False) -> None:
        """`inside`: the prompt left a thought open."""
        self.open = inside
        self._header: str | None = "" if inside else None  # what may be the channel's name; None: name is past
        self._body = False  # this channel has said something
        self._space = ""  # white space that belongs to the thought only if more of it follows
        self._reasoned = False  # an earlier channel has said something

    def enter(self) -> None:
        """The opening mark."""
        self.open = True
        self._reasoned = self._reasoned or self._body
        self._header, self._body, self._space = "", False, ""

    def leave(self) -> None:
        """The closing mark."""
        self.open = False

    def thought(self, text: str) -> str:
        """The part of the next `text` that is surely thought, set apart from an earlier channel's."""
        if self._header is not None:
            text = self._header + text
            if HEADER.startswith(text) and text != HEADER:
                self._header = text
                return ""
            text = text.removeprefix(HEADER)
            self._header = None
        text = self._space + text if self._body else text.lstrip()
        solid = text.rstrip()
        self._space = text[len(solid) :]
        if not solid:
            return ""
        parted = self._reasoned and not self._body
        self._body = True
        return "\n\n" + solid if parted else solid


def possible_beginning(text: str, marks: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of a mark."""
    longest = min(len(text), max(map(len, marks)) - 1)
    for length in range(longest, 0, -1):
        tail = text[len(text) - length :]
        if any(mark.startswith(tail) for mark in marks):
            return length
    return 0
