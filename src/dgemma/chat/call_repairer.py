"""The reader of calls that are nearly right, whose strings end at the first sign of the kind that opened them.

Works on text. Each method takes a position, as those of `Notation` do, and raises ValueError where nothing stands
there. `call_strings` has the readers of strings that end elsewhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from dgemma.chat.tools import CLOSE, MAX_DEPTH, NUMBER, QUOTE, Notation, Tool, Tools, is_of, names_at

BARE_KEY = re.compile(r"[^\s{}\[\](),:;=<>\"'`\ue000-\uf8fe]+")
_PREFIX = re.compile(r"call\s*:\s*")
# What Gemma's family writes around a call in Python, and what other makers' models put before a tool's name.
_PRINT = re.compile(r"print\s*\(\s*")
_NAMESPACE = re.compile(r"(?:default_api|functions|tools)[.:]")
_NAME_QUOTES = (QUOTE, '"', "'", "`")
_SIGNS = (QUOTE, '"""', "'''", '"', "'")  # what opens a string, the longest first
_SPACE = re.compile(r"(?:\s|<channel\|>)*")  # that mark closes a thought; where none is open it means nothing
_LEFT_OVER = re.compile(rf"(?:[\s}}\]),;]|{re.escape(CLOSE)}|<channel\|>)*")
_BARE_END = re.compile(re.escape(QUOTE) + r"|[,}\]]")
_BARE_END_IN_PARENS = re.compile(re.escape(QUOTE) + r"|[,}\])]")
_LOST_COMMA = re.compile(r"\s[^\s:]+\s*:(?!//)")  # a key within what should be one value
_LIKE_A_NUMBER = re.compile(r"[-+]?(?:0[xob][\da-f_]*|[\d._]*\d[\d._]*(?:e[-+]?\d*)?|nan|inf(?:inity)?)", re.IGNORECASE)
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|x[0-9a-fA-F]{2}|\r\n|[\s\S])")
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "/": "/", "\\": "\\", '"': '"', "'": "'",
            "\n": "", "\r\n": ""}


class NoCallError(ValueError):
    """It can be read, and is no call."""


class OpenError(ValueError):
    """A string without an end: more text could bring it."""


class Repairer(Notation):
    """Reads Gemma's notation, JSON and Python's calls, with commas and braces missing, doubled or of the wrong kind.

    ``closed``: the writer ended the text on purpose. Otherwise a value at its very end may be cut short, and is
    refused unless its own end is there. ``incomplete``: a bracket was left open at the end.
    """

    words = {**Notation.words, "None": None, "True": True, "False": False}  # noqa: RUF012
    colons = (":", "=")
    left_over = _LEFT_OVER

    def __init__(self, text: str, closed: bool):
        super().__init__(text)
        self.closed = closed
        self.begin_again()

    def begin_again(self) -> None:
        """Forget what was read, to read from another position."""
        self.incomplete = False
        self.parameters = ()
        self._listing = False  # the innermost bracket is a list's
        self._parens = False  # the call's arguments stand in parentheses
        self._level = 0  # brackets around what is read
        self._tool: Tool | None = None
        self._named = ""  # the parameter whose value is read

    def leave_open(self) -> None:
        """Know of a bracket that is open to the end."""
        self.incomplete = True

    def call(self, at: int, tools: Tools, marked: bool = True) -> tuple[str, dict[str, Any], int]:
        """A call that stands at a position: its name, its arguments, and the position behind it."""
        wrapped = _PRINT.match(self.text, at) if "print" not in tools else None
        at = wrapped.end() if wrapped else at
        prefix = _PREFIX.match(self.text, at)
        at = prefix.end() if prefix else at
        if not tools and not prefix:
            raise ValueError("no name")
        name, at = self._name(at, tools)
        self.begin_again()
        self._tool = tools.get(name)
        self.parameters = (self._tool.parameters or ()) if self._tool else ()
        if self.text.startswith(":", at) and self.text.startswith(("{", "("), self.skip(at + 1)):
            at = self.skip(at + 1)
        if self.text.startswith("{", at):
            arguments, at = self._braced(at)
        elif self.text.startswith("(", at):
            arguments, at = self._in_parens(at)
        elif marked and (self.text.startswith(";", at) or (at == len(self.text) and self.closed)):
            arguments = {}  # not even braces
        else:
            raise ValueError("no arguments")
        if wrapped:
            if (end := self.closing(at, ")")) is None:
                raise ValueError("print is not closed")
            at = end
        return name, arguments, at

    def _name(self, at: int, tools: Tools) -> tuple[str, int]:
        starts = [at]
        if namespace := _NAMESPACE.match(self.text, at):
            starts.append(namespace.end())
        for start in starts:
            quote = next((sign for sign in _NAME_QUOTES if self.text.startswith(sign, start)), "")
            for name, end in names_at(self.text, start + len(quote), tools):
                if not self.text.startswith(quote, end):
                    continue
                after = self.skip(end + len(quote))
                if after == len(self.text) or self.text[after] in "{(;:":
                    return name, after
        raise ValueError("no name")

    def _braced(self, at: int) -> tuple[dict[str, Any], int]:
        """Arguments in braces, perhaps in two pairs of them."""
        inner = self.skip(at + 1)
        if not self.text.startswith("{", inner):
            return self.mapping(at, MAX_DEPTH)
        self._level = 0
        arguments, end = self.mapping(inner, MAX_DEPTH)
        closed = self.closing(end, "}")
        if closed is None:
            raise ValueError("a second pair of braces that is not closed")
        return arguments, closed

    def _in_parens(self, at: int) -> tuple[dict[str, Any], int]:
        """Arguments as in Python: by name, or by place where that can mean one parameter only."""
        self._parens, self._level = True, 1
        at = self.sign(at, "(", MAX_DEPTH)
        values: list[Any] = []
        named: dict[str, Any] = {}
        while (end := self.closing(at, ")")) is None:
            if values or named:
                at = self.comma(at, MAX_DEPTH)
            key = self._key_before_sign(at)
            if key is not None:
                self._named = key[0]
                if key[0] in named:
                    raise ValueError("a key twice")
                named[key[0]], at = self.value(self.colon(key[1], MAX_DEPTH), MAX_DEPTH)
            elif named and self.opens_string(at):
                raise NoCallError("a value without a name behind one with a name")
            elif named or not (self.opens_string(at) or self.text.startswith(("{", "["), at)
                               or NUMBER.match(self.text, at) or _word(self.text, at) in self.words):
                raise ValueError("no value")
            else:
                self._named = ""
                value, at = self.value(at, MAX_DEPTH)
                values.append(value)
        return _bound(values, named, self._tool), end

    def _key_before_sign(self, at: int) -> tuple[str, int] | None:
        if (declared := self.declared_key(at)) is not None:
            return declared
        try:
            key, end = self.key(at)
        except ValueError:
            return None
        return (key, end) if self.text.startswith(self.colons, end) else None

    def mapping(self, at: int, depth: int) -> tuple[dict[str, Any], int]:
        return self._within(super().mapping, at, depth, listing=False)

    def items(self, at: int, depth: int) -> tuple[list[Any], int]:
        return self._within(super().items, at, depth, listing=True)

    def _within(self, read: Callable[[int, int], tuple[Any, int]], at: int, depth: int,
                listing: bool) -> tuple[Any, int]:
        outer, self._listing = self._listing, listing
        self._level += 1
        found = read(at, depth)
        self._level -= 1
        self._listing = outer
        return found

    def opens_string(self, at: int) -> bool:
        return self.text.startswith((QUOTE, '"', "'"), at)

    def key(self, at: int) -> tuple[str, int]:
        key, end = self._any_key(at)
        if self._level == 1:
            self._named = key
        return key, end

    def _any_key(self, at: int) -> tuple[str, int]:
        if self._level == 1 and (declared := self.declared_key(at)) is not None:
            return declared
        if self.opens_string(at):
            start, sign = self._opening(at)
            end = next(self._signs(start, sign), None)
            if end is None:
                raise OpenError("a key without end")
            return self._content(start, end, sign), self.skip(end + len(sign))
        if bare := BARE_KEY.match(self.text, at):
            return bare.group(), self.skip(bare.end())
        raise ValueError("no key")

    def colon(self, at: int, depth: int) -> int:
        return self.sign(at, "=" if self.text.startswith("=", at) else ":", depth)

    def string(self, at: int) -> tuple[str, int]:
        """Up to the first sign of the kind that opened it."""
        start, sign = self._opening(at)
        end = next(self._signs(start, sign), None)
        if end is None:
            raise OpenError("a string without end")
        after = self.skip(end + len(sign))
        if not self._ends(after):
            raise ValueError("something follows a string")
        return self._content(start, end, sign), after

    def _opening(self, at: int) -> tuple[int, str]:
        """Where a string's text begins, and its sign."""
        sign = next(sign for sign in _SIGNS if self.text.startswith(sign, at))
        return at + len(sign), sign

    def _signs(self, start: int, sign: str) -> Iterator[int]:
        """Where a sign stands from a position on, without those behind a backslash."""
        at = self.text.find(sign, start)
        while at >= 0:
            behind = at
            while behind > start and self.text[behind - 1] == "\\":
                behind -= 1
            if sign == QUOTE or (at - behind) % 2 == 0:
                yield at
                at = self.text.find(sign, at + len(sign))
            else:
                at = self.text.find(sign, at + 1)

    def _content(self, start: int, end: int, sign: str) -> str:
        content = self.text[start:end]
        if QUOTE in content:
            raise ValueError("a quote within a string")
        return content if sign == QUOTE else unescaped(content)

    def scalar(self, at: int) -> tuple[Any, int]:
        word = _word(self.text, at)
        if word in self.words:
            value, end = self.words[word], self.skip(at + len(word))
        else:
            try:
                value, end = super().scalar(at)
            except ValueError:
                return self._bare(at)
        if not self._ends(end):
            return self._bare(at)
        if not isinstance(value, bool | None):
            self._refuse_cut(end)
        return value, end

    def closing(self, at: int, sign: str) -> int | None:
        """The sign, perhaps behind a comma too many; or the end of the text."""
        bare = self.skip(at + 1) if self.text.startswith(",", at) else at
        if self.text.startswith(sign, bare):
            return self.skip(bare + 1)
        if at < len(self.text):
            return None
        if not self.closed and self.text.rstrip().endswith(("{", "[", "(", ",")):
            raise ValueError("cut short before the next value")
        self.incomplete = True
        return at

    def _bare(self, at: int) -> tuple[Any, int]:
        """A value without its opening quote, perhaps without any."""
        for end in (_BARE_END_IN_PARENS if self._parens else _BARE_END).finditer(self.text, at):
            if end.group() == QUOTE:
                if self._ends(after := self.skip(end.end())):
                    return self._unquoted(self.text[at : end.start()]), after
                raise ValueError("no value")
            if end.group() != "," or self._listing or self._next_key(end.end()):
                return self._unquoted(self.text[at : end.start()]), end.start()
        self._refuse_cut(len(self.text))
        return self._unquoted(self.text[at:]), len(self.text)

    def _unquoted(self, content: str) -> Any:
        """What a bare value is: a word or a number (with a stray quote behind it), or a string."""
        content = content.strip()
        if not content or '"' in content or content[0] in "{[:(='" or _LOST_COMMA.search(content):
            raise ValueError("no value")
        if self._parens and "(" in content:
            raise ValueError("an expression")
        if content in self.words:
            return self.words[content]
        if NUMBER.fullmatch(content):
            return Notation(content).scalar(0)[0]
        if _LIKE_A_NUMBER.fullmatch(content) and not (self._level == 1 and self._tool is not None and
                                                      self._tool.types.get(self._named) == {"string"}):
            raise ValueError("no number")
        return content

    def _next_key(self, at: int) -> bool:
        """Whether a key and a colon stand there."""
        at = self.skip(at)
        return self.opens_string(at) or self._names_next(at)

    def _names_next(self, at: int) -> bool:
        """Whether a key without quotes and its colon stand there."""
        key = BARE_KEY.match(self.text, at)
        return bool(key) and self.text.startswith(self.colons, self.skip(key.end()))

    def _ends(self, at: int) -> bool:
        """Whether a value may end before this position."""
        return at == len(self.text) or self.text[at] in (",}])" if self._parens else ",}]")

    def _refuse_cut(self, end: int) -> None:
        """A value without an end of its own, at the end of the text: more of it may have been to come."""
        if not self.closed and end == len(self.text):
            raise ValueError("a value cut short")

    def skip(self, at: int) -> int:
        return _SPACE.match(self.text, at).end()  # type: ignore[union-attr]


def _bound(values: list[Any], named: dict[str, Any], tool: Tool | None) -> dict[str, Any]:
    """Arguments by name, where those given by place can be meant for one parameter each; raises ValueError."""
    if not values:
        return named
    known = None if tool is None else tool.parameters
    ways: list[dict[str, Any]] = []
    if len(values) == 1 and isinstance(values[0], dict) and not named and (known is None or set(values[0]) <= {*known}):
        only = known[0] if known else ""
        if tool is None or (tool.required <= {*values[0]} and "object" not in tool.types.get(only, ())):
            return values[0]
        ways.append(values[0])
    if tool is not None and known is not None:
        # The model is shown the parameters as declared, or by name: the templates sort them.
        orders = {known, tuple(sorted(known))}
        if len(values) == 1 and len(tool.required) == 1:
            orders = {tuple(tool.required)}
        fitting = [order for order in orders if len(values) <= len(order) and not {*order[: len(values)]} & {*named}
                   and (len(orders) == 1 or all(is_of(value, tool.types.get(name)) for name, value
                                                in zip(order, values, strict=False)))]
        bound = [{**dict(zip(order, values, strict=False)), **named} for order in fitting]
        ways += [way for way in bound if tool.required <= {*way}]
    if len({json.dumps(way, sort_keys=True) for way in ways}) != 1:
        raise NoCallError("values without names")
    return ways[0]


def _word(text: str, at: int) -> str:
    word = BARE_KEY.match(text, at)
    return word.group() if word else ""


def unescaped(content: str) -> str:
    """The text of a string as JSON or Python write it; a backslash that escapes nothing stays, half a surrogate pair
    does not."""
    if "\\" in content:
        content = _ESCAPE.sub(_unescape, content)
    if any("\ud800" <= char <= "\udfff" for char in content):
        content = content.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return content


def _unescape(escape: re.Match[str]) -> str:
    spelt = escape[1]
    if len(spelt) > 2:
        code = int(spelt[1:], 16)
        return chr(code) if code <= 0x10FFFF else escape[0]
    return _ESCAPED.get(spelt, escape[0])
