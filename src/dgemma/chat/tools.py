"""Tool calls in Gemma's notation, read out of what stands between their marks; `repair` reads what is nearly that.

Works on: the text between `<|tool_call>` and `<tool_call|>`, in which `<|"|>` is always the mark (whoever reads the
tokens sees to that), and the declared tools. Knows nothing of: tokens, what the tools do.

Gemma 4 writes a call as `call:NAME{key:<|"|>text<|"|>,n:3}`: strings between `<|"|>`, with any character in them and no
escapes; bare keys; null, true, false, JSON numbers; `{}` and `[]` nest. White space between the parts is allowed.

Where tools are declared, a call is of one of them or no call: no name is made up, and none is guessed at.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

OPEN, CLOSE, QUOTE = "<|tool_call>", "<tool_call|>", '<|"|>'
MAX_DEPTH = 64  # deeper nesting is no call anyone made on purpose
# Whoever reads tokens stands one of these in for "<" in ordinary text, so that it spells no mark there.
PRIVATE = range(0xE000, 0xF8FF)

_NO_KEY = r"\s{}\[\],:<>\ue000-\uf8fe"
_PREFIX = re.compile(r"\s*call:\s*")
NAME = re.compile(rf"[^{_NO_KEY}();=\"'`]+")
KEY = re.compile(rf"(?![\"'])[^{_NO_KEY}]+")
NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?(?![^\s,}\])])")
_SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class Called:
    """A whole tool call. ``repaired``: it was not well formed."""

    name: str
    arguments: dict[str, Any]
    repaired: bool = False


@dataclass(frozen=True)
class Reading:
    """What a text was read as. ``open``: it has no end of its own, so more text could make another reading of it."""

    calls: list[Called]
    open: bool = False

    @property
    def unsettled(self) -> bool:
        """Nothing was read, and more text could change that."""
        return self.open and not self.calls


@dataclass(frozen=True)
class Tool:
    """What reading a call needs of a declared tool.

    ``parameters`` are the names of its parameters in the order of their declaration, None where nothing is declared.
    ``types`` are the JSON types that each may have, where the schema says so.
    """

    name: str
    parameters: tuple[str, ...] | None = None
    required: frozenset[str] = frozenset()
    types: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def spelt(self, sign: str, guard: str) -> Tool:
        """This tool as a text spells it in which ``guard`` stands for ``sign``."""
        def put(text: str) -> str:
            return text.replace(sign, guard)

        return Tool(put(self.name), None if self.parameters is None else tuple(map(put, self.parameters)),
                    frozenset(map(put, self.required)), {put(name): types for name, types in self.types.items()})


Tools = Mapping[str, Tool]


def tools_of(declared: Iterable[str | Tool | Mapping[str, Any]]) -> dict[str, Tool]:
    """Tools by name: given as names, or as declarations in OpenAI's form (``{"function": {"name": …}}``)."""
    if isinstance(declared, Mapping):
        declared = declared.values()
    tools = [tool if isinstance(tool, Tool) else Tool(tool) if isinstance(tool, str) else _tool(tool)
             for tool in declared]
    return {tool.name: tool for tool in tools}


def _tool(declaration: Mapping[str, Any]) -> Tool:
    function = declaration.get("function", declaration)
    schema = function.get("parameters")
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    if not isinstance(schema, Mapping) or not isinstance(properties, Mapping):
        return Tool(function["name"])
    required = schema.get("required")
    names = {name for name in required if isinstance(name, str)} if isinstance(required, list | tuple) else set()
    types = {name: _types(value) for name, value in properties.items() if isinstance(value, Mapping)}
    return Tool(function["name"], tuple(map(str, properties)), frozenset(names),
                {name: found for name, found in types.items() if found})


def _types(schema: Mapping[str, Any]) -> frozenset[str]:
    """The JSON types that a schema names; none if it says nothing plain about them."""
    named = schema.get("type")
    named = [named] if isinstance(named, str) else named
    if not isinstance(named, list | tuple) or not all(isinstance(name, str) for name in named):
        return frozenset()
    return frozenset(name.lower() for name in named)


def is_of(value: Any, types: frozenset[str] | None) -> bool:
    """Whether a value is of one of these JSON types (None: of any)."""
    if types is None:
        return True
    own = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    kind = own.get(type(value), "null")
    return kind in types or (kind == "integer" and "number" in types)


def well_formed(source: str, closed: bool, tools: Tools, repeats: bool) -> Called:
    """The call that ``source`` is; ValueError unless it is one to the letter. ``repeats``: a key may come twice."""
    prefix = _PREFIX.match(source)
    if not prefix or not closed:
        raise ValueError("no name or no end")
    for name, at in names_at(source, prefix.end(), tools):
        notation = Notation(source, tools[name].parameters or () if tools else (), repeats)
        if source.startswith("{", at := notation.skip(at)):
            arguments, at = notation.mapping(at, MAX_DEPTH)
            if at != len(source):
                raise ValueError("more than a call")
            return Called(name, arguments)
    raise ValueError("no name")


def names_at(source: str, at: int, tools: Tools) -> Iterator[tuple[str, int]]:
    """The names that stand at a position, the longest first, each with the position behind it.

    Those of declared tools, whatever characters they are of; where none is declared, any.
    """
    if tools:
        yield from ((name, at + len(name)) for name in sorted(tools, key=len, reverse=True)
                    if source.startswith(name, at))
    elif name := NAME.match(source, at):
        yield name.group(), name.end()


class Notation:
    """Reads values from a text.

    Each method takes a position and returns what stands there and the position after it and the white space behind
    it; ValueError: it does not stand there. ``parameters`` are keys that may stand bare whatever they are made of;
    ``repeats``: a key may come twice.
    """

    words: dict[str, Any] = {"null": None, "true": True, "false": False}  # noqa: RUF012  (never changed)
    colons: tuple[str, ...] = (":",)  # what may stand between a key and its value

    def __init__(self, text: str, parameters: tuple[str, ...] = (), repeats: bool = False):
        self.text, self.parameters, self.repeats = text, parameters, repeats

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
                at = self.comma(at, depth)
            key, at = self.key(at)
            if key in found and not self.repeats:
                raise ValueError("a key twice")
            found[key], at = self.value(self.colon(at, depth), depth)
        return found, end

    def items(self, at: int, depth: int) -> tuple[list[Any], int]:
        at = self.sign(at, "[", depth)
        found: list[Any] = []
        while (end := self.closing(at, "]")) is None:
            if found:
                at = self.comma(at, depth)
            item, at = self.value(at, depth)
            found.append(item)
        return found, end

    def key(self, at: int) -> tuple[str, int]:
        if (declared := self.declared_key(at)) is not None:
            return declared
        if self.opens_string(at):
            return self.string(at)
        if (bare := KEY.match(self.text, at)) and "=" not in bare.group():
            return bare.group(), self.skip(bare.end())
        raise ValueError("no key")

    def declared_key(self, at: int) -> tuple[str, int] | None:
        """A declared parameter's name that stands there before a colon: it may hold blanks and signs."""
        for name in self.parameters:
            if name and self.text.startswith(name, at) and self.text.startswith(
                    self.colons, end := self.skip(at + len(name))):
                return name, end
        return None

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

    def comma(self, at: int, depth: int) -> int:
        return self.sign(at, ",", depth)

    def colon(self, at: int, depth: int) -> int:
        return self.sign(at, ":", depth)

    def sign(self, at: int, sign: str, depth: int) -> int:
        if depth < 0 or not self.text.startswith(sign, at):
            raise ValueError(f"no {sign}")
        return self.skip(at + 1)

    def skip(self, at: int) -> int:
        """The position behind white space."""
        return _SPACE.match(self.text, at).end()  # type: ignore[union-attr]  # matches the empty string too
