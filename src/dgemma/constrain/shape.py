"""What a schema demands of a value of one type, as plain data: shapes, and the demands in them.

Knows nothing of schemas, languages.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from math import ceil, floor
from typing import Any, NamedTuple

from dgemma.constrain.automaton import Automaton
from dgemma.constrain.scalars import exact

# How surely a type of value is what the schema's author had in mind.
ASIDE, OPEN, MEANT, NAMED = -1, 0, 1, 2  # keywords only for other types; none at all; some for this type; "type"


class Demand(NamedTuple):
    """That a value satisfies the schema at a place, or that it does not."""

    place: int
    holds: bool = True


Demands = tuple[Demand, ...]  # all of them


@dataclass(frozen=True)
class Either:
    """A schema made here: one of these sets of demands."""

    ways: tuple[Demands, ...]


@dataclass(frozen=True)
class Inside:
    """A schema made here: an object that has this property, or an array this item, satisfying demands."""

    key: str | int
    demands: Demands


@dataclass(frozen=True)
class Seen:
    """What parts of a schema have looked at, which its unevaluated… keywords then leave alone."""

    names: frozenset[str] = frozenset()
    patterns: tuple[str, ...] = ()
    items: int = 0  # the first ones
    found: tuple[Demands, ...] = ()  # items that satisfy one of these
    all_names: bool = False
    all_items: bool = False


@dataclass(frozen=True)
class Shape:
    """Values of one type; what is not said is free."""

    kind: str
    level: int = OPEN
    fixed: tuple[str, ...] | None = None  # these values only, as JSON; nothing else is said then
    least: int = 0  # characters, items or properties
    most: int | None = None
    # Strings. A pattern is found somewhere, or nowhere.
    patterns: tuple[tuple[str, bool], ...] = ()
    forms: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    # Numbers
    whole: bool | None = None
    low: Decimal | None = None
    high: Decimal | None = None
    above: bool = False  # not `low` itself
    below: bool = False
    of: tuple[float, ...] = ()  # a multiple of all these
    not_of: tuple[float, ...] = ()
    # Arrays
    spans: tuple[tuple[int, int | None, Demands], ...] = ()  # items from … to before …
    contains: tuple[tuple[Demands, int, int | None], ...] = ()  # so many items that satisfy this
    unique: bool = False
    # Objects
    named: tuple[tuple[str, Demands], ...] = ()
    matching: tuple[tuple[str, Demands], ...] = ()  # properties whose names match
    extras: tuple[tuple[frozenset[str], tuple[str, ...], Demands], ...] = ()  # neither named so nor matching
    keys: Demands = ()  # of every name
    required: tuple[str, ...] = ()
    loose: bool = False  # other properties are spoken of
    seen: Seen = Seen()


Forms = dict[str, list[Shape]]  # by type

FREE: Forms = {"object": [Shape("object")], "array": [Shape("array")], "string": [Shape("string")],
                "number": [Shape("number")], "boolean": [Shape("boolean", fixed=("true", "false"))],
                "null": [Shape("null", fixed=("null",))]}


NOT_EMPTY = Shape("object", MEANT, least=1)


def having(key: str | int, demands: Demands, level: int = MEANT) -> Shape:
    """Objects that have this property, or arrays this item, satisfying demands."""
    if isinstance(key, str):
        return Shape("object", level, named=((key, demands),), required=(key,))
    return Shape("array", level, least=key + 1, spans=((key, key + 1, demands),))


def only(kind: str, shapes: Sequence[Shape], holds: bool = True) -> Forms:
    """A keyword for one type: it leaves all others alone; where it does not hold, the value is of that type."""
    forms: Forms = {kind: list(shapes)}
    if holds:
        forms |= {other: [replace(shape, level=ASIDE) for shape in free] for other, free in FREE.items()
                  if other != kind}
    return forms


def union(parts: Iterable[Forms]) -> Forms:
    """One of these."""
    forms: dict[str, dict[Shape, None]] = {}
    for part in parts:
        for kind, shapes in part.items():
            forms.setdefault(kind, {}).update(dict.fromkeys(shapes))
    return {kind: list(shapes) for kind, shapes in forms.items()}


@functools.lru_cache(maxsize=4096)
def _value_of_short(text: str) -> Any:
    return json.loads(text)


def value_of(text: str) -> Any:
    """The value that a text of JSON says; short ones are remembered."""
    return _value_of_short(text) if len(text) <= 200 else json.loads(text)


def shortest_text(automaton: Automaton) -> str | None:
    """One of the shortest texts of an automaton that calls nothing."""
    before: dict[int, tuple[int, int]] = {0: (-1, 0)}
    queue = [0]
    for state in queue:
        if automaton.accepts[state]:
            data = bytearray()
            while before[state][0] >= 0:
                state, byte = before[state]
                data.append(byte)
            return bytes(reversed(data)).decode()
        for byte in (*range(97, 123), *range(256)):
            following = automaton.next_byte(state, byte)
            if following >= 0 and following not in before:
                before[following] = (state, byte)
                queue.append(following)
    return None


def whole_bounds(shape: Shape) -> tuple[int | None, int | None]:
    """The least and the greatest whole number of a number's shape."""
    low, high = shape.low, shape.high
    return (None if low is None else floor(low) + 1 if shape.above else ceil(low),
            None if high is None else ceil(high) - 1 if shape.below else floor(high))


def in_range(shape: Shape, value: float, wide: bool) -> bool:
    """Whether a number surely has a shape, or (``wide``) may have it: validators divide doubles or decimals."""
    number = exact(value)
    if shape.low is not None and (number < shape.low or (shape.above and number == shape.low)):
        return False
    if shape.high is not None and (number > shape.high or (shape.below and number == shape.high)):
        return False
    is_whole = number == number.to_integral_value()
    if shape.whole is not None and is_whole != shape.whole:
        return False
    ratio = Fraction(number)
    for units, wanted in ((shape.of, True), (shape.not_of, False)):
        for unit in units:
            exactly = ((ratio / Fraction(exact(unit))).denominator == 1) == wanted
            nearly = (value / unit).is_integer() == wanted if isinstance(unit, float) else exactly
            if not (exactly or nearly if wide else exactly and nearly):
                return False
    return True
