"""An answer read canvas by canvas: what the model thinks, says and calls, as soon as it is sure.

Works on token ids, where a control token and the same characters typed as text are different things. Knows nothing of:
the engine, wire formats.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dgemma.chat import thoughts, tools
from dgemma.chat.speech import Said, Speech, Spelt
from dgemma.chat.thoughts import Channel
from dgemma.chat.tokenizer import Tokenizer
from dgemma.chat.tools import Called, held_call, read_calls

__all__ = ["Called", "Piece", "ReplyReader", "Said", "Thought", "declared_tools", "find_stop"]

_MARKS = (thoughts.OPEN, thoughts.CLOSE, tools.OPEN, tools.CLOSE, tools.QUOTE)
_PRIVATE = range(0xE000, 0xF8FF)
_DECLARED = re.compile(r"\s*declaration:\s*([^\s{]+)\s*\{")
_NAME_TOKENS = 200  # tokens in which a declaration's name is sure to stand


@dataclass(frozen=True)
class Thought:
    """A stretch of what the model thought; never empty."""

    text: str


Piece = Thought | Said | Called


def find_stop(tokenizer: Tokenizer, prompt_ids: list[int], token_ids: list[int], stop: Sequence[str]) -> int | None:
    """How many of an answer's tokens it takes to complete the first stop string; None when none is met.

    Stop strings count in what is said, not in thoughts and calls. Who reads the kept tokens with the same ``stop`` gets
    the text before it.
    """
    reader = ReplyReader(tokenizer, prompt_ids, stop=stop)
    reader.feed(token_ids)
    return reader.stop_place


def declared_tools(tokenizer: Tokenizer, prompt_ids: list[int]) -> list[str]:
    """The names of the tools that a prompt declares."""
    opening = tokenizer.token_to_id("<|tool>")
    places = [place for place, token in enumerate(prompt_ids) if token == opening]
    texts = [tokenizer.decode(prompt_ids[place + 1 : place + 1 + _NAME_TOKENS]) for place in places]
    return [name.group(1) for name in map(_DECLARED.match, texts) if name]


class ReplyReader:
    """Reads an answer's tokens as they are committed: `feed` each canvas, then `finish`.

    The pieces of an answer, those of a kind put together, do not depend on how it was cut into canvases. A call is
    given when it is closed; a character when its last byte is there. A call that cannot be read is text, marks and
    all; one within a thought is thought.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int], tools: Sequence[str] | None = None,
                 stop: Sequence[str] = (), held: bool = False):
        """The prompt tells whether a thought was already open, and which tools there are unless ``tools`` names them.

        ``stop``: nothing from any of these strings on is said. ``held``: a constraint made the calls.
        """
        self._tokenizer, self._held = tokenizer, held
        self._marks = {tokenizer.token_to_id(mark): mark for mark in _MARKS}
        self._tools = frozenset(declared_tools(tokenizer, prompt_ids) if tools is None else tools)
        self._channel = Channel(inside_thought(tokenizer, prompt_ids))
        self._speech = Speech(self._tools, stop)
        self._call: list[tuple[Spelt, bool]] | None = None  # an open call: its text, and what of it are marks
        self._run: list[Spelt] = []  # text since the last mark that was not passed on yet
        self._bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self._half: tuple[int, int] | None = None  # the tokens of a character that is not complete
        self._count = 0  # tokens read
        self._pieces: list[Piece] = []

    @property
    def stopped(self) -> str | None:
        """The stop string that was met: nothing comes after it."""
        return self._speech.stopped

    @property
    def stop_place(self) -> int | None:
        """How many of the tokens it took to complete that stop string."""
        return self._speech.stop_place

    def feed(self, token_ids: Sequence[int]) -> list[Piece]:
        """What is sure after a committed canvas; its stop token does not belong to it."""
        for token in token_ids:
            if self.stopped is not None:
                break
            mark, place = self._marks.get(token), self._count
            self._count += 1
            if mark is not None:
                self._pass_run(final=True)
                self._mark(Spelt(mark, [(place, place + 1)] * len(mark)))
            elif not self._tokenizer.is_special(token):  # fill and the like mean nothing here
                self._spell(self._tokenizer.token_bytes(token), place)
        self._pass_run(final=False)
        return self._taken()

    def finish(self) -> list[Piece]:
        """What was held back, now that nothing follows."""
        self._pass_run(final=True)
        self._end_call(closed=False)
        self._pieces += self._speech.pause()
        return self._taken()

    def _spell(self, data: bytes, place: int) -> None:
        text = self._bytes.decode(data)
        start = self._half[0] if self._half else place
        if text:
            self._run.append(Spelt(text, [(start, place + 1), *[(place, place + 1)] * (len(text) - 1)]))
            start = place
        self._half = (start, place + 1) if self._bytes.getstate()[0] else None

    def _pass_run(self, final: bool) -> None:
        """Pass text on; ``final``: no more bytes of its last character can come."""
        if final and self._half:
            broken = self._bytes.decode(b"", True)
            self._run.append(Spelt(broken, [self._half] * len(broken)))
            self._half = None
        run, self._run = self._run, []
        if run:
            self._text(Spelt.joined(run))

    def _text(self, text: Spelt, mark: bool = False) -> None:
        if self._channel.open:
            if thought := self._channel.thought(text.text):
                self._pieces.append(Thought(thought))
        elif self._call is not None:
            self._call.append((text, mark))
        else:
            self._pieces += self._speech.add(text)

    def _mark(self, mark: Spelt) -> None:
        if mark.text == thoughts.OPEN:
            self._end_call(closed=False)
            self._pieces += self._speech.pause()
            self._channel.enter()
        elif mark.text == thoughts.CLOSE:
            self._channel.leave()
        elif mark.text == tools.OPEN and not self._channel.open:
            self._end_call(closed=False)
            self._pieces += self._speech.pause()
            self._call = [(mark, True)]
        else:
            self._text(mark, mark=True)
            if mark.text == tools.CLOSE:
                self._end_call(closed=True)

    def _end_call(self, closed: bool) -> None:
        if self._call is None:
            return
        parts, self._call = self._call, None
        calls = self._calls(parts[1:-1] if closed else parts[1:], closed)
        self._pieces += calls
        if not calls:
            self._pieces += self._speech.add(Spelt.joined([text for text, _ in parts]))

    def _calls(self, parts: list[tuple[Spelt, bool]], closed: bool) -> list[Called]:
        plain = "".join(text.text for text, mark in parts if not mark)
        # Every mark begins with "<". A private character behind each "<" of ordinary text keeps it from reading as one.
        guard = next(chr(code) for code in _PRIVATE if chr(code) not in plain)
        source = "".join(text.text if mark else text.text.replace("<", f"<{guard}") for text, mark in parts)
        calls = (held_call(source) if self._held and closed else []) or read_calls(source, closed, self._tools)
        return [replace(call, name=call.name.replace(guard, ""), arguments=_without(call.arguments, guard))
                for call in calls]

    def _taken(self) -> list[Piece]:
        """The pieces so far, neighbours of a kind joined."""
        pieces, self._pieces = self._pieces, []
        joined: list[Piece] = []
        for piece in pieces:
            last = joined[-1] if joined else None
            if isinstance(piece, Said) and isinstance(last, Said):
                joined[-1] = Said(last.text + piece.text, (last.tokens[0], piece.tokens[1]))
            elif isinstance(piece, Thought) and isinstance(last, Thought):
                joined[-1] = Thought(last.text + piece.text)
            else:
                joined.append(piece)
        return joined


def inside_thought(tokenizer: Tokenizer, prompt_ids: list[int]) -> bool:
    """Whether the prompt leaves a thought open for the model to go on with (some templates do)."""
    opened, closed = tokenizer.token_to_id(thoughts.OPEN), tokenizer.token_to_id(thoughts.CLOSE)
    last = next((token for token in reversed(prompt_ids) if token in (opened, closed)), None)
    return last is not None and last == opened


def _without(value: Any, guard: str) -> Any:
    if isinstance(value, str):
        return value.replace(guard, "")
    if isinstance(value, list):
        return [_without(item, guard) for item in value]
    if isinstance(value, dict):
        return {key.replace(guard, ""): _without(item, guard) for key, item in value.items()}
    return value
