"""Tool calls, read out of a model's text.

Works on: text decoded with its special tokens. Knows nothing of: which tools were declared, what they do.

Gemma 4 writes a call as `<|tool_call>call:NAME{key:<|"|>text<|"|>,n:3}<tool_call|>`: strings between `<|"|>`, with
any character in them and no escapes; bare keys; null, true, false, JSON numbers; `{}` and `[]` nest. White space
between the parts is allowed.
"""

from __future__ import annotations

import json
import re
from typing import Any

OPEN, CLOSE, QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
MAX_DEPTH = 64  # deeper nesting is no call anyone made on purpose

_SPACE = re.compile(r"\s*")
_NAME = re.compile(r"\s*call:\s*([^\s{}\[\],:<>]+)\s*")
_KEY = re.compile(r"[^\s{}\[\],:<>]+")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?(?![^\s,}\]])")
_WORDS = {"null": None, "true": True, "false": False}
_WORD = re.compile(r"(null|true|false)(?![^\s,}\]])")


def parse_tool_calls(text: str) -> tuple[str, list[dict[str, Any]]]:
    """The text without its tool calls, and the calls in order: `{"name": str, "arguments": dict}` each.

    A call that is not well formed (cut short, a key twice, a string never closed…) stays in the text as it is.
    """
    kept: list[str] = []
    calls: list[dict[str, Any]] = []
    done, start = 0, text.find(OPEN)
    while start >= 0:
        try:
            call, end = _call(text, start)
        except ValueError:
            end = start + len(OPEN)
        else:
            kept.append(text[done:start])
            calls.append(call)
            done = end
        start = text.find(OPEN, end)
    return "".join(kept) + text[done:], calls


# Each reader takes a position and returns what stands there and the position after it; ValueError: it does not.


def _call(text: str, at: int) -> tuple[dict[str, Any], int]:
    name = _NAME.match(text, at + len(OPEN))
    if not name:
        raise ValueError("no name")
    arguments, at = _mapping(text, name.end(), MAX_DEPTH)
    at = _skip(text, at)
    if not text.startswith(CLOSE, at):
        raise ValueError("no end")
    return {"name": name.group(1), "arguments": arguments}, at + len(CLOSE)


def _value(text: str, at: int, depth: int) -> tuple[Any, int]:
    if text.startswith(QUOTE, at):
        return _string(text, at)
    if text.startswith("{", at):
        return _mapping(text, at, depth - 1)
    if text.startswith("[", at):
        return _list(text, at, depth - 1)
    if word := _WORD.match(text, at):
        return _WORDS[word.group(1)], word.end()
    if number := _NUMBER.match(text, at):
        # json tells integers from floats; a float too large for Python becomes inf there, which is no JSON.
        value = json.loads(number.group())
        if value in (float("inf"), float("-inf")):
            raise ValueError("number out of range")
        return value, number.end()
    raise ValueError("no value")


def _string(text: str, at: int) -> tuple[str, int]:
    start = at + len(QUOTE)
    end = text.index(QUOTE, start)  # ValueError when it is never closed
    return text[start:end], end + len(QUOTE)


def _mapping(text: str, at: int, depth: int) -> tuple[dict[str, Any], int]:
    at = _skip(text, _expect(text, at, "{", depth))
    found: dict[str, Any] = {}
    while not text.startswith("}", at):
        if found:
            at = _skip(text, _expect(text, at, ",", depth))
        if text.startswith(QUOTE, at):
            key, at = _string(text, at)
        elif bare := _KEY.match(text, at):
            key, at = bare.group(), bare.end()
        else:
            raise ValueError("no key")
        if key in found:
            raise ValueError("a key twice")
        at = _skip(text, _expect(text, _skip(text, at), ":", depth))
        found[key], at = _value(text, at, depth)
        at = _skip(text, at)
    return found, at + 1


def _list(text: str, at: int, depth: int) -> tuple[list[Any], int]:
    at = _skip(text, _expect(text, at, "[", depth))
    found: list[Any] = []
    while not text.startswith("]", at):
        if found:
            at = _skip(text, _expect(text, at, ",", depth))
        item, at = _value(text, at, depth)
        found.append(item)
        at = _skip(text, at)
    return found, at + 1


def _skip(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]  # matches the empty string too


def _expect(text: str, at: int, sign: str, depth: int) -> int:
    if depth < 0 or not text.startswith(sign, at):
        raise ValueError(f"no {sign}")
    return at + 1
