r"""Regular expressions as trees of what is written in them; the syntax is Python's and what ECMA 262 has beside it.

That is `\p{…}`, `\u{…}`, `\cA`, `(?<name>…)`, `[^]`, and a hyphen behind a class. Knows nothing of languages, of what
an item means to anybody.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from dataclasses import dataclass

from dgemma.constrain.ecma import LAST, Ranges, property_of
from dgemma.errors import DgemmaError


@dataclass(frozen=True)
class Set:
    """One character: of these ranges, or of a class such as "d", "S" or "." itself; ``negated``: none of them."""

    ranges: Ranges
    classes: tuple[str, ...] = ()
    negated: bool = False


@dataclass(frozen=True)
class At:
    r"""A place: "^", "$", "A" and "Z" for \A and \Z, "b" and "B" for \b and \B."""

    where: str


@dataclass(frozen=True)
class Branch:
    """Any one of these."""

    branches: tuple[Items, ...]


@dataclass(frozen=True)
class Group:
    """Items in brackets, with flags of their own."""

    items: Items
    added: int = 0
    removed: int = 0
    captures: bool = True


@dataclass(frozen=True)
class Times:
    """Items ``least`` to ``most`` times; None: no limit."""

    items: Items
    least: int
    most: int | None


@dataclass(frozen=True)
class Around:
    """What must stand there, or (``negated``) must not."""

    items: Items
    negated: bool
    behind: bool


Item = Set | At | Branch | Group | Times | Around
Items = tuple[Item, ...]

_FLAGS = {"i": re.IGNORECASE, "m": re.MULTILINE, "s": re.DOTALL, "x": re.VERBOSE, "a": re.ASCII, "u": re.UNICODE}
_MOST = 2**32 - 1  # a count that is as good as none
_CONTROLS = {"a": 7, "b": 8, "f": 12, "n": 10, "r": 13, "t": 9, "v": 11}
_CODE = re.compile(r"x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|u\{([0-9a-fA-F]+)\}")
_CONTROL = re.compile(r"c([a-zA-Z])")
_NAMED = re.compile(r"N\{([^{}]*)\}")
_PROPERTY = re.compile(r"[pP](?:\{\^?([^{}]*)\}|([LMNPSZC]))")
_OCTAL = re.compile(r"[0-7]{1,3}")
_REFERENCE = re.compile(r"(?![0-7]{3})[1-9][0-9]?")
_ASIDE = re.compile(r"[ \t\n\r\v\f]|#[^\n]*\n?")  # what means nothing in a verbose pattern
_COUNT = re.compile(r"\{([0-9]*)(?:(,)([0-9]*))?\}")
_SWITCHES = re.compile(r"\(\?([a-zA-Z]*)(?:-([a-zA-Z]*))?([:)])")
_NAME = re.compile(r"\(\?P?<([^>]*)>")


def parse(pattern: str, wide: bool = False) -> tuple[Items, int]:
    """The items of a pattern, and the flags (those of `re`) that hold for all of it.

    ``wide``: a property of characters has all that may be meant, not only those surely meant. Raises ValueError for
    what is not well formed, DgemmaError for a property that is not known and for what no automaton knows.
    """
    parser = _Parser(pattern, wide)
    try:
        items = parser.alternatives()
        if parser.place < len(pattern):
            raise ValueError("unbalanced parenthesis")
    except ValueError as error:
        raise ValueError(f"{error} at position {parser.place}") from error
    if parser.unsupported is not None:
        raise DgemmaError(f"the regular expression {pattern!r} uses {parser.unsupported}: this is not supported")
    return items, parser.flags


class _Parser:
    """Reads a pattern from its beginning to its end."""

    def __init__(self, pattern: str, wide: bool):
        self.pattern, self.wide = pattern, wide
        self.place = 0
        self.flags = 0  # of the whole pattern
        self.verbose = False
        self.groups = 0
        self.unsupported: str | None = None  # what is well formed and known to no automaton, the first of it

    def take(self, text: str) -> bool:
        """Whether this text comes next, which is read then."""
        there = self.pattern.startswith(text, self.place)
        self.place += len(text) * there
        return there

    def match(self, form: re.Pattern[str]) -> re.Match[str] | None:
        """What comes next, if it has a form, which is read then."""
        found = form.match(self.pattern, self.place)
        if found:
            self.place = found.end()
        return found

    def beyond(self, what: str) -> Item:
        """What stands for something that is not supported."""
        self.unsupported = self.unsupported or what
        return Branch(())

    def alternatives(self) -> Items:
        branches = [self.sequence(beginning=self.place == 0)]
        while self.take("|"):
            branches.append(self.sequence())
        return branches[0] if len(branches) == 1 else (Branch(tuple(branches)),)

    def sequence(self, beginning: bool = False) -> Items:
        """Items up to the end, a bar or a closing bracket; ``beginning``: of the whole pattern."""
        items: list[Item] = []
        while self.place < len(self.pattern) and self.pattern[self.place] not in "|)":
            if self.verbose and self.match(_ASIDE):
                continue
            if self.pattern[self.place] in "*+?{" and (counts := self.counts()) is not None:
                items[-1:] = [self.repeated(items[-1] if items else None, *counts)]
            elif self.pattern[self.place] == "(":
                if (group := self.group(beginning and not items)) is not None:
                    items.append(group)
            else:
                items.append(self.simple())
        return tuple(inner for item in items for inner in (
            item.items if isinstance(item, Group) and not (item.captures or item.added or item.removed) else (item,)))

    def simple(self) -> Item:
        """One character, or one place."""
        character = self.pattern[self.place]
        self.place += 1
        if character == "\\":
            return self.escape()
        if character == "[":
            return self.members()
        if character in "^$":
            return At(character)
        return Set((), (".",)) if character == "." else _one(ord(character))

    def counts(self) -> tuple[int, int | None] | None:
        """How often what stands before is repeated; None where a brace is only a brace."""
        for sign, counts in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self.take(sign):
                return counts
        found = _COUNT.match(self.pattern, self.place)
        if found is None or found[0] == "{}":
            return None
        self.place = found.end()
        least = int(found[1] or 0)
        most = (int(found[3]) if found[3] else None) if found[2] else least
        if max(least, most or 0) >= _MOST:
            raise ValueError("the repetition number is too large")
        if most is not None and most < least:
            raise ValueError("min repeat greater than max repeat")
        return least, most

    def repeated(self, item: Item | None, least: int, most: int | None) -> Item:
        if item is None or isinstance(item, At):
            raise ValueError("nothing to repeat")
        if isinstance(item, Times):
            raise ValueError("multiple repeat")
        if self.take("+"):
            return self.beyond("possessive repeat")
        self.take("?")  # how eagerly it is repeated makes no difference to which texts match
        return Times((item,), least, most)

    def group(self, beginning: bool) -> Item | None:
        """What a bracket opens; None where that is nothing. Where the pattern begins, flags of all of it may stand."""
        if self.take("(?#"):
            self.skip_to(")", "a comment has no end")
            return None
        for sign, negated, behind in (("(?=", False, False), ("(?!", True, False), ("(?<=", False, True),
                                      ("(?<!", True, True)):
            if self.take(sign):
                items = self.inner()
                return Branch(()) if negated and not items else Around(items, negated, behind)
        if self.take("(?>"):
            self.inner()
            return self.beyond("atomic group")
        for sign in ("(?P=", "(?("):
            if self.take(sign):
                self.skip_to(")", "a group's name has no end")
                if sign == "(?(":
                    self.inner()
                return self.beyond("a back reference")
        if found := self.match(_NAME):
            if found[0].startswith("(?P") and not found[1].isidentifier():
                raise ValueError(f"bad character in group name {found[1]!r}")
        elif not self.pattern.startswith("(?", self.place):
            self.place += 1
        elif self.pattern.startswith(("(?<", "(?P<"), self.place):
            raise ValueError("a group's name has no end")
        else:
            return self.switched(beginning)
        self.groups += 1
        return Group(self.inner())

    def switched(self, beginning: bool) -> Item | None:
        """(?:…), (?i:…), (?i-s:…); (?i) at the pattern's beginning, which is for all of it."""
        found = self.match(_SWITCHES)
        if found is None:
            raise ValueError(f"unknown extension {self.pattern[self.place : self.place + 3]}")
        on, off = {*found[1]}, {*(found[2] or "")}
        if not on | off <= _FLAGS.keys() or on & off or {*"au"} & off or {*"au"} <= on or found[2] == "":
            raise ValueError(f"unknown or contradictory flags {found[0]}")
        added, removed = (sum(_FLAGS[letter] for letter in letters) for letters in (on, off))
        if found[3] == ":":
            outside = self.verbose
            self.verbose = bool((outside or added & re.VERBOSE) and not removed & re.VERBOSE)
            items = self.inner()
            self.verbose = outside
            return Group(items, added, removed, captures=False)
        if found[2] is not None or not found[1]:
            raise ValueError(f"unknown extension {found[0]}")
        if not beginning:
            raise ValueError("global flags not at the start of the expression")
        self.flags |= added
        self.verbose = bool(self.flags & re.VERBOSE)
        return None

    def inner(self) -> Items:
        """What stands up to the closing bracket."""
        items = self.alternatives()
        if not self.take(")"):
            raise ValueError("missing ), unterminated subpattern")
        return items

    def skip_to(self, sign: str, otherwise: str) -> None:
        end = self.pattern.find(sign, self.place)
        if end < 0:
            raise ValueError(otherwise)
        self.place = end + len(sign)

    def escape(self) -> Item:
        r"""What a backslash outside [...] says."""
        following = self.pattern[self.place : self.place + 1]
        if following in tuple("AZbB"):
            self.place += 1
            return At(following)
        if found := self.match(_REFERENCE):
            if int(found[0]) > self.groups:
                raise ValueError(f"invalid group reference {found[0]}")
            return self.beyond("a back reference")
        found = self.escaped(self.wide)
        if isinstance(found, Set) and not found.ranges and not found.classes:
            return Branch(())
        return found

    def escaped(self, wide: bool) -> Set:
        r"""What a backslash says inside and outside [...]; ``wide`` is about properties of characters."""
        following = self.pattern[self.place : self.place + 1]
        if following in tuple("dDsSwW"):
            self.place += 1
            return Set((), (following,))
        if found := self.match(_PROPERTY):
            name, absent = found[1] if found[1] is not None else found[2], found[0][0] == "P"
            return Set(property_of(name, absent != found[0][1:].startswith("{^"), wide))
        if found := self.match(_CODE):
            if (code := int(next(filter(None, found.groups())), 16)) > LAST:
                raise ValueError(f"there is no character {code:#x}")
            return _one(code)
        if found := self.match(_OCTAL):
            if (code := int(found[0], 8)) > 0o377:
                raise ValueError(f"octal escape value \\{found[0]} outside of range 0-0o377")
            return _one(code)
        if found := self.match(_NAMED):
            try:
                return _one(ord(unicodedata.lookup(found[1])))
            except (KeyError, TypeError) as error:
                raise ValueError(f"there is no character called {found[1]!r}") from error
        if found := self.match(_CONTROL):
            return _one(ord(found[1]) % 32)
        if not following:
            raise ValueError("bad escape (end of pattern)")
        self.place += 1
        if following in _CONTROLS:
            return _one(_CONTROLS[following])
        if following.isascii() and following.isalnum():
            raise ValueError(f"bad escape \\{following}")
        return _one(ord(following))

    def members(self) -> Item:
        """[...], its opening bracket read."""
        if self.take("^]"):
            return Set(((0, LAST),))
        negated = self.take("^")
        member = functools.partial(self.member, self.wide != negated)
        ranges: list[tuple[int, int]] = []
        classes: list[str] = []
        first = True
        while first or not self.take("]"):
            first = False
            low = member()
            classes += low.classes
            ranges += low.ranges
            if not self.pattern.startswith("-", self.place) or self.pattern.startswith("-]", self.place):
                continue
            self.place += 1
            if low.classes or len(low.ranges) != 1 or low.ranges[0][0] != low.ranges[0][1]:
                ranges.append((45, 45))  # no range: a hyphen
                continue
            high = member()
            start, end = low.ranges[0][0], high.ranges[0][1] if high.ranges else -1
            if high.classes or len(high.ranges) != 1 or high.ranges[0][0] != end or end < start:
                raise ValueError("bad character range")
            ranges[-1:] = [(start, end)]
        return Set(tuple(ranges), tuple(classes), negated)

    def member(self, wide: bool) -> Set:
        if self.place >= len(self.pattern):
            raise ValueError("unterminated character set")
        self.place += 1
        if self.pattern[self.place - 1] == "\\":
            return self.escaped(wide)
        return _one(ord(self.pattern[self.place - 1]))


def _one(code: int) -> Set:
    return Set(((code, code),))
