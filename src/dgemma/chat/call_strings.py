"""Readers of calls that are nearly right, and whose strings do not end at the first sign that could end them.

Each is tried where what comes before it finds nothing (by `repair`): first `Repairer`, then `Weigher`: a string may
hold such signs, and commas may be missing; every way to read it all is tried, and one only must be left. Last
`Guesser`: a string's end is missing or of the wrong kind. Work on text, as `Repairer` does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from dgemma.chat.call_repairer import BARE_KEY, OpenError, Repairer, unescaped
from dgemma.chat.tools import QUOTE

_ANY_LEFT_OVER = re.compile(Repairer.left_over.pattern + rf"(?:{re.escape(QUOTE)}|[\"'])?\s*")
_QUOTES = re.compile(re.escape(QUOTE) + r"""|["']""")
_TO_NEXT = re.compile(r",\s*(?:[^\s{}\[\],:<>]+\s*:\s*)?")  # what stands between a value and the next one
_TO_NEXT_ARGUMENT = re.compile(r"[\s}\])]*,\s*")
_PLAIN_ARGUMENT = re.compile(BARE_KEY.pattern + rf"""["']?\s*:\s*(?:{re.escape(QUOTE)}|["'{{\[\d]|null|true|false)""")


class Weigher(Repairer):
    """Reads strings that hold signs like the one that ends them, and values with no comma between.

    Where a string could end in several places ``way`` says which of them it does, choice by choice; past its end the
    first is taken. ``paired``: signs within a string open and close something there. ``declared``: a comma is missing
    before a parameter that is declared only.
    """

    def __init__(self, text: str, closed: bool, way: Sequence[int], paired: bool, declared: bool):
        super().__init__(text, closed)
        self._way, self._paired, self._declared = way, paired, declared
        self._taken: list[int] = []
        self._quoted_at = -1  # the position behind the last string or bracket, where a comma may be missing

    def next_way(self) -> list[int] | None:
        """The way to try after this one; None when there is no other."""
        return [*self._taken[:-1], self._taken[-1] + 1] if self._taken else None

    def string(self, at: int) -> tuple[str, int]:
        start, sign = self._opening(at)
        choice = self._way[len(self._taken)] if len(self._taken) < len(self._way) else 0
        end = next(islice(self._possible_ends(start, sign), choice, None), None)
        if end is None:
            if choice == 0:
                raise OpenError("a string without end")
            raise ValueError("no other end")  # nothing was taken: the choice before this one is the next to change
        self._taken.append(choice)
        self._quoted_at = self.skip(end + len(sign))
        return self._content(start, end, sign), self._quoted_at

    def _possible_ends(self, start: int, sign: str) -> Iterator[int]:
        inside, balanced = False, True
        for at in self._signs(start, sign):
            after = self.skip(at + len(sign))
            doubled = sign == QUOTE and self.text.startswith(QUOTE, start) and self.text.endswith(QUOTE, start, at)
            before = self.text[at - 1] if at > start else ""
            behind = self.text[at + len(sign) : at + len(sign) + 1]
            apostrophe = sign == "'" and before.isalnum() and behind.isalnum()
            whole = (balanced and not inside) or not (self._paired or sign == QUOTE)
            if whole and not doubled and (self._ends(after) or (
                    self._declared_next(after) if apostrophe else self._lost_comma(after))):
                yield at
            further = _TO_NEXT_ARGUMENT.match(self.text, after)
            if further and self._declared_next(further.end()):
                return  # what would be within the string is another argument
            if apostrophe:
                continue
            opens, closes = not (before.isalnum() or behind.isspace()), not (before.isspace() or behind.isalnum())
            balanced = balanced and (closes if inside else opens)
            inside = not inside
            if not balanced and (self._paired or sign == QUOTE):
                return

    def _bare(self, at: int) -> tuple[Any, int]:
        value, end = super()._bare(at)
        if self.text.endswith(QUOTE, at, end):
            raise ValueError("a stray quote beside other damage")
        return value, end

    def _content(self, start: int, end: int, sign: str) -> str:
        """A mark within a string is how the model spells a quotation mark there."""
        content = self.text[start:end].replace(QUOTE, '"')
        return content if sign == QUOTE else unescaped(content)

    def _within(self, read: Callable[[int, int], tuple[Any, int]], at: int, depth: int,
                listing: bool) -> tuple[Any, int]:
        found, self._quoted_at = super()._within(read, at, depth, listing)
        return found, self._quoted_at

    def comma(self, at: int, depth: int) -> int:
        return at if at == self._quoted_at and self._lost_comma(at) else super().comma(at, depth)

    def _lost_comma(self, at: int) -> bool:
        """Whether what stands there can only be the next key, or in a list the next value."""
        if self._listing:
            return self.text.startswith((QUOTE, '"', "'", "{", "["), at)
        if self._declared and self._level == 1 and self._tool is not None and self._tool.parameters:
            return self._declared_next(at)
        if self.opens_string(at):
            start, sign = self._opening(at)
            end = next(self._signs(start, sign), None)
            return end is not None and self.text.startswith(self.colons, self.skip(end + len(sign)))
        return self._names_next(at)

    def _declared_next(self, at: int) -> bool:
        """Whether a declared parameter stands there, or another key with a colon and what can only be its value."""
        start, sign = self._opening(at) if self.opens_string(at) else (at, "")
        for name in self.parameters:
            if self.text.startswith(name + sign, start) and self.text.startswith(
                    self.colons, self.skip(start + len(name + sign))):
                return True
        return _PLAIN_ARGUMENT.match(self.text, start) is not None


class Guesser(Repairer):
    """Reads strings whose end is missing, doubled, or of another kind than their beginning."""

    left_over = _ANY_LEFT_OVER

    def _any_key(self, at: int) -> tuple[str, int]:
        if self.opens_string(at):
            return self.string(at)
        key, at = super()._any_key(at)
        return key, self.skip(at + len(QUOTE)) if self.text.startswith(QUOTE, at) else at

    def string(self, at: int) -> tuple[str, int]:
        if self.text.startswith(QUOTE, at):
            content, end = self._marked(at + len(QUOTE))
        else:
            start, sign = self._opening(at)
            content, end = self._quoted(start, sign)
        if QUOTE in content:
            raise ValueError("a quote within a string")
        return content, self.skip(end)

    def _marked(self, start: int) -> tuple[str, int]:
        """A string that a mark opened: up to the next mark, to the next value's, or to a quote of another kind."""
        text = self.text
        for mark in self._quotes(start, (QUOTE,)):
            if self._ends(self.skip(mark.end())):
                return text[start : mark.start()].removeprefix(QUOTE).removesuffix(QUOTE), mark.end()
            comma = text.rfind(",", start, mark.start())
            if comma >= 0 and _TO_NEXT.fullmatch(text, comma, mark.start()):
                content = text[start:comma].rstrip()
                # An even quote belongs to one within the string; an odd one was to end it.
                return content.removesuffix('"') if content.count('"') % 2 else content, comma
        for quote in self._quotes(start, ('"',)):
            if self._ends(self.skip(quote.end())):
                return text[start : quote.start()], quote.end()
        if not self.closed:
            raise ValueError("a string cut short")
        end = len(text.rstrip("}] \n\t" + (")" if self._parens else "")))
        if end <= start or "{" in text[start:] or "[" in text[start:] or (self._parens and "(" in text[start:]):
            raise ValueError("a string without end")
        return text[start:end], end

    def _quoted(self, start: int, sign: str) -> tuple[str, int]:
        """A string between quotes, as in JSON or Python; a mark may close it too."""
        for quote in self._quotes(start, (QUOTE, sign)):
            if self._ends(self.skip(quote.end())):
                return unescaped(self.text[start : quote.start()]), quote.end()
        raise ValueError("a string without end")

    def _quotes(self, start: int, kinds: tuple[str, ...]) -> Iterator[re.Match[str]]:
        """The quotes of these kinds from a position on, without those behind a backslash."""
        for quote in _QUOTES.finditer(self.text, start):
            at = quote.start()
            while at > start and self.text[at - 1] == "\\":
                at -= 1
            if quote.group() in kinds and (quote.group() == QUOTE or (quote.start() - at) % 2 == 0):
                yield quote

    def _ends(self, at: int) -> bool:
        return super()._ends(at) or self.text.startswith(":", at)
