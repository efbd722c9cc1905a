"""Tool calls, read out of what stands between their marks.

Works on: the text between `<|tool_call>` and `<tool_call|>`, in which `<|"|>` is always the mark (whoever reads the
tokens sees to that). Knows nothing of: tokens, what the tools do.

Gemma 4 writes a call as `call:NAME{key:<|"|>text<|"|>,n:3}`: strings between `<|"|>`, with any character in them and no
escapes; bare keys; null, true, false, JSON numbers; `{}` and `[]` nest. White space between the parts is allowed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

OPEN, CLOSE, QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
MAX_DEPTH = 64  # deeper nesting is no call anyone made on purpose

NAME = re.compile(r"\s*call:\s*([^\s{}\[\],:<>]+)\s*")
KEY = re.compile(r"(?![\"'])[^\s{}\[\],:<>]+")
NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?(?![^\s,}\]])")
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class Called:
    """A whole tool call. ``healed``: it was not well formed."""

    name: str
    arguments: dict[str, Any]
    healed: bool = False


def read_calls(source: str, closed: bool = True, tools: Collection[str] = ()) -> list[Called]:
    """The call that ``source`` is, or the calls that it was surely meant to be; none when it is not sure.

    ``closed``: the closing mark follows. ``tools`` are the names of the declared tools.
    """
    try:
        return [_well_formed(source, closed)]
    except ValueError:
        from dgemma.chat.healing import heal_calls

        return heal_calls(source, closed, tools)


def _well_formed(source: str, closed: bool, repeats: bool = False) -> Called:
    name = NAME.match(source)
    if not name or not closed:
        raise ValueError("no name or no end")
    notation = Notation(source)
    notation.repeats = repeats
    arguments, at = notation.mapping(name.end(), MAX_DEPTH)
    if at != len(source):
        raise ValueError("more than a call")
    return Called(name.group(1), arguments)


def held_call(source: str) -> list[Called]:
    """The call that was made under a constraint: well formed, but a key that is not declared may come twice.

    Then the later value counts, as in JSON: no constraint knows all keys before.
    """
    try:
        return [_well_formed(source, True, repeats=True)]
    except ValueError:
        return []


class Notation:
    """Reads values from a text.

    Each method takes a position and returns what stands there and the position after it and the white space behind
    it; ValueError: it does not stand there.
    """

    words: dict[str, Any] = {"null": None, "true": True, "false": False}  # noqa: RUF012  (never changed)
    repeats = False  # a key may come twice

    def __init__(self, text: str):
        self.text = text

    def value(self, at: int, depth: int) -> tuple[Any, int]:
        """A value of any kind, ``depth`` levels deep at most."""
        if self.text.startswith("{", at):
            return self.mapping(at, depth - 1)
        if self.text.startswith("[", at):
            return self.items(at, depth - 1)
        if self.opens_string(at):
            return self.string(at)
        return self.scalar(at)

    def mapping(self, at: int, depth: int) -> tuple[dict[str, Any], int]:
        at = self.sign(at, "{", depth)
        found: dict[str, Any] = {}
        while (end := self.closing(at, "}")) is None:
            if found:
                at = self.sign(at, ",", depth)
            key, at = self.key(at)
            if key in found and not self.repeats:
                raise ValueError("a key twice")
            found[key], at = self.value(self.sign(at, ":", depth), depth)
        return found, end

    def items(self, at: int, depth: int) -> tuple[list[Any], int]:
        at = self.sign(at, "[", depth)
        found: list[Any] = []
        while (end := self.closing(at, "]")) is None:
            if found:
                at = self.sign(at, ",", depth)
            item, at = self.value(at, depth)
            found.append(item)
        return found, end

    def key(self, at: int) -> tuple[str, int]:
        if self.opens_string(at):
            return self.string(at)
        if bare := KEY.match(self.text, at):
            return bare.group(), self.skip(bare.end())
        raise ValueError("no key")

    def opens_string(self, at: int) -> bool:
        return self.text.startswith(QUOTE, at)

    def string(self, at: int) -> tuple[str, int]:
        start = at + len(QUOTE)
        end = self.text.index(QUOTE, start)  # ValueError when it is never closed
        return self.text[start:end], self.skip(end + len(QUOTE))

    def scalar(self, at: int) -> tuple[Any, int]:
        """A word such as null, or a number."""
        if (word := KEY.match(self.text, at)) and word.group() in self.words:
            return self.words[word.group()], self.skip(word.end())
        if number := NUMBER.match(self.text, at):
            # json tells integers from floats; a float too large for Python becomes inf there, which is no JSON.
            value = json.loads(number.group())
            if value in (float("inf"), float("-inf")):
                raise ValueError("number out of range")
            return value, self.skip(number.end())
        raise ValueError("no value")

    def closing(self, at: int, sign: str) -> int | None:
        """The position after a closing sign; None when there is none."""
        return self.skip(at + 1) if self.text.startswith(sign, at) else None

    def sign(self, at: int, sign: str, depth: int) -> int:
        if depth < 0 or not self.text.startswith(sign, at):
            raise ValueError(f"no {sign}")
        return self.skip(at + 1)

    def skip(self, at: int) -> int:
        """The position behind white space."""
        return _SPACE.match(self.text, at).end()  # type: ignore[union-attr]  # matches the empty string too
