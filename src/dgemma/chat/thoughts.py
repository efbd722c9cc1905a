"""What a model thought, told apart from what it said.

Works on: a model's raw output, decoded with its special tokens. Knows nothing of: tokens, templates.

Gemma 4 writes `<|channel>thought\\n…\\n<channel|>` before its answer, sometimes with nothing inside. One parser,
fed in chunks of any size, does the streaming and the one-shot case, so both always agree.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from dgemma.tokenizer_files import STOPS

OPEN, CLOSE = "<|channel>", "<channel|>"
HEADER = "thought\n"  # the name of the channel, on its own line


def split_thoughts(raw: str, inside: bool = False) -> tuple[str | None, str]:
    """The reasoning (None if there is none) and the text of a raw output; nothing after a stop token counts.

    `inside` says that the prompt itself left a thought open (some templates do).
    """
    parser = ThoughtParser(inside)
    pieces = [*parser.feed(raw), *parser.finish()]
    reasoning = "".join(piece.text for piece in pieces if piece.kind == "reasoning")
    text = "".join(piece.text for piece in pieces if piece.kind == "text")
    return reasoning or None, text


@dataclass(frozen=True)
class Stretch:
    """A stretch of output of one kind; never empty."""

    kind: Literal["reasoning", "text"]
    text: str


class ThoughtParser:
    """Splits a raw output as it arrives: `feed` each chunk, then `finish`.

    The pieces of a kind, concatenated, do not depend on how the output was cut into chunks. Text is passed on
    as it is, but for line breaks at its very beginning. A thought loses its channel's name and the
    white space around it; several thoughts are set apart by an empty line. A thought that is never closed is a
    thought to the end; a closing mark without an opening one is dropped.
    """

    def __init__(self, inside: bool = False, stops: Iterable[str] = STOPS) -> None:
        """`inside`: the prompt left a thought open. `stops`: what ends the output, as spelt when decoded."""
        self.stopped = False  # a stop token was met: nothing after it counts
        self._marks = (OPEN, CLOSE, *stops)
        self._any_mark = re.compile("|".join(map(re.escape, self._marks)))
        self._unread = ""  # the tail that may be the beginning of a mark
        self._channel = Channel(inside)
        self._texted = False

    def feed(self, chunk: str) -> list[Stretch]:
        """The pieces that `chunk` settles; the rest waits for the next one."""
        pieces: list[Stretch] = []
        if self.stopped:
            return pieces
        unread = self._unread + chunk
        start = 0
        for mark in self._any_mark.finditer(unread):
            self._pass_on(unread[start : mark.start()], pieces)
            start = mark.end()
            if mark.group() == OPEN:
                self._channel.enter()
            elif mark.group() == CLOSE:
                self._channel.leave()
            else:
                self.stopped = True
                return pieces
        keep = len(unread) - possible_beginning(unread, self._marks, start)
        self._pass_on(unread[start:keep], pieces)
        self._unread = unread[keep:]
        return pieces

    def finish(self) -> list[Stretch]:
        """What was held back, now that nothing follows."""
        pieces: list[Stretch] = []
        if not self.stopped:
            self._pass_on(self._unread, pieces)
            self._unread = ""
        return pieces

    def _pass_on(self, text: str, pieces: list[Stretch]) -> None:
        thinking = self._channel.open
        if thinking:
            text = self._channel.thought(text)
        elif not self._texted:
            text = text.lstrip("\n")
        if not text:
            return
        if not thinking:
            self._texted = True
        pieces.append(Stretch("reasoning" if thinking else "text", text))


class Channel:
    """The channel that a model thinks in: opened and closed by marks, perhaps several times."""

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


def possible_beginning(text: str, marks: Sequence[str], start: int = 0) -> int:
    """How many characters at the end of `text[start:]` may be the beginning of a mark."""
    longest = min(len(text) - start, max(map(len, marks)) - 1)
    for length in range(longest, 0, -1):
        tail = text[len(text) - length :]
        if any(mark.startswith(tail) for mark in marks):
            return length
    return 0
