"""Regular languages of text, as small trees; a regular expression becomes one here.

The leaves are sets of characters and ready bytes. Knows nothing of automata, JSON, tokens.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from dgemma.constrain.ecma import LAST, SURROGATES, Ranges, complement, union
from dgemma.constrain.regex import Around, At, Branch, Group, Item, Items, Set, Times, parse
from dgemma.errors import DgemmaError


@dataclass(frozen=True)
class Literal:
    """Exactly these bytes."""

    data: bytes


@dataclass(frozen=True)
class Chars:
    """One character out of a set."""

    ranges: Ranges


@dataclass(frozen=True)
class Seq:
    """One part after the other."""

    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Alt:
    """Any one of the parts; without parts, nothing at all."""

    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Repeat:
    """A part ``least`` to ``most`` times; None: no limit."""

    part: Node
    least: int
    most: int | None


@dataclass(frozen=True)
class Both:
    """What is in ``left`` and in ``right`` (with ``negated``: and not in it); neither may hold a Call."""

    left: Node
    right: Node
    negated: bool = False


@dataclass(frozen=True)
class Call:
    """Whatever the rule of that name allows; this is what makes a language recursive."""

    rule: str


@dataclass(frozen=True)
class Net:
    """Numbered states with parts on the ways between them, each (state, part, state); from 0 to one of the ends."""

    ways: tuple[tuple[int, Node, int], ...]
    ends: frozenset[int]


@dataclass(frozen=True)
class Look:
    """Nothing, where all the text that follows (``behind``: that came before) is in a language, or is not.

    How far that text reaches says the Watched around it.
    """

    part: Node
    negated: bool = False
    behind: bool = False


@dataclass(frozen=True)
class Watched:
    """A part that holds Looks; neither it nor they may hold a Call."""

    part: Node


Node = Literal | Chars | Seq | Alt | Repeat | Both | Call | Net | Look | Watched
EMPTY = Seq(())


def literal(text: str) -> Literal:
    """Exactly this text; raises DgemmaError for a lone surrogate, which has no bytes."""
    try:
        return Literal(text.encode())
    except UnicodeEncodeError as error:
        raise DgemmaError(f"{text!r} is no text: it holds half of a surrogate pair") from error


def seq(*parts: Node) -> Node:
    return parts[0] if len(parts) == 1 else Seq(parts)


def optional(part: Node) -> Node:
    return Repeat(part, 0, 1)


ANY_CHAR = complement(())


def parse_regex(pattern: str, chars: Callable[[Ranges], Node] = Chars, search: bool = False,
                wide: bool = False, longest: int | None = None) -> Node:
    r"""A regular expression in Python's or ECMA 262's syntax; the whole text must match, or with ``search`` some part.

    ``chars`` makes the leaf of a set of characters. The two disagree on what ``\d \w \s . $`` match beyond ASCII and at
    a last line break, and on letters that differ only in case: what is in this language is a match to both, and with
    ``wide`` all that is a match to either. With ``longest``, what may be repeated more often than that is repeated no
    more often, unless it must be. Raises DgemmaError for a syntax error and for what no automaton knows: back
    references, atomic groups, looking back within a look ahead.
    """
    try:
        items, flags = parse(pattern, wide)
    except RecursionError as error:
        raise DgemmaError(f"the regular expression {pattern!r} is nested too deeply to be read") from error
    except ValueError as error:
        raise DgemmaError(f"the regular expression {pattern!r} cannot be read: {error}") from error
    gap = Repeat(chars(ANY_CHAR), 0, None) if search else EMPTY
    reader = _Reader(pattern, chars, gap, wide, flags, longest)
    node = reader.sequence(items, True, True)
    return Watched(node) if reader.looked else node


_BEGINNINGS = (At("^"), At("A"))
_ENDS = (At("$"), At("Z"))
_BREAK = ((10, 10),)


class _Reader:
    """The items of one pattern -> a tree."""

    def __init__(self, pattern: str, chars: Callable[[Ranges], Node], gap: Node, wide: bool, flags: int,
                 longest: int | None, looking: str = ""):
        self.pattern, self.chars, self.wide, self.flags = pattern, chars, wide, flags
        self.longest = longest
        self.gap = gap  # what may stand before and after the pattern where it is not anchored
        self.looking = looking  # "ahead" or "behind": this is what is looked for there
        self.looked = False  # whether the tree holds a Look

    def sequence(self, items: Items, first: bool, last: bool) -> Node:
        """Items in a row; ``first`` and ``last``: at the very beginning and end of the pattern."""
        if first and items and items[0] in _BEGINNINGS and not self.flags & re.MULTILINE:
            return self.sequence_after(items[1:], last, begins=True)
        if first and not (items and isinstance(items[0], (Branch, Group))):
            return seq(self.gap, self.sequence_after(items, last, begins=self.gap == EMPTY))
        return self.sequence_after(items, last, first)

    def sequence_after(self, items: Items, last: bool, first: bool = False, begins: bool = False) -> Node:
        """`sequence` with its beginning settled, but for a group or branch there when ``first``.

        ``begins``: nothing stands before it.
        """
        parts = []
        end = len(items) - 1
        for index, item in enumerate(items):
            if last and index == end and item in _ENDS and not self.flags & re.MULTILINE:
                return seq(*parts, optional(self.set(_BREAK))) if self.wide else seq(*parts)
            if begins and isinstance(item, Around) and item.items and item.items[0] in _BEGINNINGS:
                item = replace(item, items=item.items[1:])
            begins &= isinstance(item, Around)
            parts.append(self.item(item, first and index == 0, last and index == end))
        if last and not (items and isinstance(items[end], (Branch, Group))):
            parts.append(self.gap)
        return seq(*parts)

    def item(self, item: Item, first: bool, last: bool) -> Node:
        match item:
            case Set():
                return self.set(self.members(item))
            case Branch(branches):
                return Alt(tuple(self.sequence(branch, first, last) for branch in branches))
            case Group(inner, added, removed):
                before, self.flags = self.flags, (self.flags | added) & ~removed
                node = self.sequence(inner, first, last)
                self.flags = before
                return node
            case Times(inner, least, most):
                if self.longest is not None and not self.wide and most is not None:
                    most = min(most, max(least, self.longest))
                return Repeat(self.sequence(inner, False, False), least, most)
            case Around(inner, negated, behind):
                return self.assertion(inner, negated, behind)
            case At(where):
                return self.anchor(where)

    def assertion(self, items: Items, negated: bool, behind: bool) -> Node:
        """(?=…), (?!…), (?<=…), (?<!…)"""
        anything = Repeat(self.chars(ANY_CHAR), 0, None)
        inner = _Reader(self.pattern, self.chars, anything, self.wide != negated, self.flags,
                        self.longest, "behind" if behind else "ahead")
        part = inner.sequence(items, behind, not behind)
        return self.look(Watched(part) if inner.looked else part, negated, behind)

    def look(self, part: Node, negated: bool, behind: bool) -> Node:
        if self.looking and (behind or self.looking == "behind"):
            raise DgemmaError(f"the regular expression {self.pattern!r} uses an anchor, a word boundary or look-around "
                              "inside look-around: this is not supported")
        self.looked = True
        return Look(part, negated, behind)

    def anchor(self, where: str) -> Node:
        r"""^, $, \b and \B amid a pattern."""
        anything = Repeat(self.chars(ANY_CHAR), 0, None)
        if where in "^A":
            lines = where == "^" and self.flags & re.MULTILINE
            return self.look(Alt((EMPTY, seq(anything, self.set(_BREAK)))) if lines else EMPTY, False, True)
        if where in "$Z":
            lines = where == "$" and self.flags & re.MULTILINE
            line_break = optional(self.set(_BREAK)) if self.wide else EMPTY
            return self.look(Alt((EMPTY, seq(self.set(_BREAK), anything))) if lines else line_break, False, False)

        def word(wide: bool, behind: bool) -> tuple[Node, bool]:
            """A word character there, surely or perhaps."""
            letter = self.set(_unicode("w") if wide else _ASCII["w"])
            return (seq(anything, letter) if behind else seq(letter, anything)), behind

        def sides(before: bool, after: bool) -> Node:
            """Whether a word character stands before and behind this place."""
            return seq(*(self.look(part, not there, behind) for there, (part, behind) in
                         ((before, word(before == self.wide, True)), (after, word(after == self.wide, False)))))

        inside = where == "B"
        return Alt((sides(True, inside), sides(False, not inside)))

    def members(self, given: Set) -> Ranges:
        """The characters of a set."""
        wide = self.wide != given.negated
        ranges = [*given.ranges, *(pair for name in given.classes for pair in self.named(name, wide))]
        folded = self.folded(ranges, wide)
        return complement(folded) if given.negated else folded

    def named(self, name: str, wide: bool) -> Ranges:
        r"""The characters of ., \d, \S and so on; ``wide``: all that anybody counts, else those that everybody does."""
        if name == ".":
            breaks = () if self.flags & re.DOTALL else _BREAK
            return complement(breaks if wide else [*_BREAK, (13, 13), (0x2028, 0x2029)])
        if name.islower():
            return _unicode(name) if wide else _ASCII[name]
        return complement(_ASCII[name.lower()] if wide else _unicode(name.lower()))

    def folded(self, ranges: Iterable[tuple[int, int]], wide: bool) -> Ranges:
        """Where case does not matter: these and the same letters in the other case."""
        ranges = union(ranges)
        if not self.flags & re.IGNORECASE:
            return ranges
        more = [(max(low, start) + shift, min(high, end) + shift) for low, high in ranges
                for start, end, shift in ((65, 90, 32), (97, 122, -32)) if max(low, start) <= min(high, end)]
        if wide and sum(high - low + 1 for low, high in ranges) > _FOLDED:
            more.append((128, LAST))  # any of them may be meant
        elif wide:
            more += [(ord(one), ord(one)) for low, high in (*ranges, *more) for code in range(low, high + 1)
                     for one in _cases(code)]
        return union([*ranges, *more])

    def set(self, ranges: Ranges) -> Node:
        low, high = SURROGATES
        if any(start <= high and end >= low for start, end in ranges):
            ranges = complement(complement(ranges))
        return self.chars(ranges)


_FOLDED = 300  # characters whose other case is looked up one by one


def _cases(code: int) -> Iterable[str]:
    """What a character is in another case, to somebody."""
    text = chr(code)
    special = {"s": "\u017f", "k": "\u212a", "\u00e5": "\u212b"}
    forms = (text.lower(), text.upper(), text.title(), text.casefold(), text.swapcase(), text.lower().upper(),
             text.upper().lower(), special.get(text.lower(), text))
    return [form for form in forms if len(form) == 1]


_ASCII: dict[str, Ranges] = {"d": ((48, 57),), "s": ((9, 13), (32, 32)), "w": ((48, 57), (65, 90), (95, 95), (97, 122))}


@functools.cache
def _unicode(kind: str) -> Ranges:
    """The digits, spaces or word characters of Unicode."""
    text = {"d": str.isdecimal, "s": str.isspace, "w": str.isalnum}[kind]
    extra = {"d": [], "s": [(0xFEFF, 0xFEFF)], "w": [(95, 95)]}[kind]
    return union([*((code, code) for code in range(LAST + 1) if text(chr(code))), *extra])
