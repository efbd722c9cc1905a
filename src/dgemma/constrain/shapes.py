"""What a JSON schema demands of a value, worked out: for each JSON type, the shapes that a value may have.

A schema is a logical formula over values. It is taken apart here into alternatives (`Shape`), each of one type and
free of "and", "or" and "not": what it demands of the values inside an object or array stays a set of demands, taken
apart when it is asked for. "Not" is pushed inwards until only single `keywords` are denied. Where a denial, or a
keyword that validators read differently, cannot be said exactly, the alternatives are fewer, never more; to
prove that no value satisfies two schemas there is a second, wide reading, whose alternatives are never fewer. Knows
nothing of languages of text but patterns, nor of how a value is written.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import combinations
from typing import Any

from dgemma.constrain.automaton import ADVICE, Automaton, Effort, TooLarge, compile_part
from dgemma.constrain.keywords import KEYWORDS, read_values
from dgemma.constrain.language import parse_regex
from dgemma.constrain.references import Place, Places
from dgemma.constrain.scalars import JSON, Notation, identity, kind_of, string
from dgemma.constrain.shape import (
    ASIDE,
    FREE,
    MEANT,
    OPEN,
    Demand,
    Demands,
    Either,
    Forms,
    Inside,
    Seen,
    Shape,
    having,
    in_range,
    union,
    value_of,
    whole_bounds,
)
from dgemma.errors import DgemmaError

MAX_DEPTH = 40
_EFFORT = 1000  # of one part of a schema
_MOST_SHAPES = 2000  # alternatives of one type
_MOST_LEFT = 64  # alternatives that are kept where not all need to be
_LISTED = ("patterns", "forms", "excluded", "of", "not_of", "spans", "contains", "matching", "extras", "keys",
           "required")  # what shapes say that both hold for what is in both
_DEEP = 6  # levels on which a contradiction is looked for

_LISTS = ("enum", "required", "allOf", "anyOf", "oneOf", "prefixItems")
_OBJECTS = ("properties", "patternProperties", "dependentRequired", "dependentSchemas", "dependencies")
_UNEVALUATED = (("unevaluatedProperties", "object"), ("unevaluatedItems", "array"))


class Finder:
    """Finds a document's patterns in texts."""

    def __init__(self, effort: Effort):
        self.effort = effort
        self._known: dict[tuple[str, bool], Automaton] = {}

    def automaton(self, pattern: str, wide: bool) -> Automaton:
        """That of all texts that a pattern is surely found in; ``wide``: that it may be found in."""
        if (pattern, wide) not in self._known:
            self._known[pattern, wide] = compile_part(parse_regex(pattern, search=True, wide=wide), self.effort)
        return self._known[pattern, wide]

    def finds(self, pattern: str, text: str, wide: bool = False) -> bool:
        automaton, state = self.automaton(pattern, wide), 0
        for byte in text.encode(errors="surrogatepass"):
            state = automaton.next_byte(state, byte)
            if state < 0:
                return False
        return bool(automaton.accepts[state])


class Shapes:
    """All that is known of one document's demands; ``wide``: of the values that may satisfy, else that surely do."""

    def __init__(self, places: Places, effort: Effort, wide: bool = False, finder: Finder | None = None):
        self.places, self.effort, self.wide = places, effort, wide
        self.finder = finder or Finder(effort)
        self._known: dict[Demands, Forms] = {}
        self._single: dict[Demand, Forms] = {}
        self._open: set[Demand] = set()
        self._never: dict[Demands, bool] = {}
        self._testing: set[Demands] = set()
        self._strings: dict[Shape, bool] = {}
        self._made: dict[Any, int] = {}  # schemas made here
        self._depth = 0

    @functools.cached_property
    def _may(self) -> Shapes:
        """The same document's wide reading."""
        assert not self.wide, "nothing is wider"
        return Shapes(self.places, self.effort, wide=True, finder=self.finder)

    def apart(self, one: Demands, other: Demands) -> bool:
        """Whether it is sure that no value satisfies both."""
        try:
            return self._may.impossible(tuple(dict.fromkeys((*one, *other))))
        except TooLarge:
            if self.effort.left < 0:
                raise
            return False

    def made(self, schema: Any, near: Place, where: str) -> int:
        """The place of a schema made here, which refers to nothing by name."""
        key = schema if isinstance(schema, (Either, Inside)) else identity(schema)
        if key not in self._made:
            self._made[key] = self.places.add(schema, near.base, near.entered, where)
        return self._made[key]

    def of(self, demands: Demands) -> Forms:
        """The shapes of the values that satisfy all demands."""
        if demands not in self._known:
            forms = FREE
            for demand in demands:
                forms = self.both(forms, self.one(demand))
            self._known[demands] = forms
        return self._known[demands]

    def both(self, one: Forms, other: Forms) -> Forms:
        """What is in both."""
        forms: Forms = {}
        for kind in one:
            shapes: dict[Shape, None] = {}
            for mine in one[kind]:
                for its in other.get(kind, ()):
                    self.effort.spend(50)
                    merged = self.merge(mine, its)
                    if merged is not None:
                        shapes[merged] = None
            if len(shapes) > _MOST_SHAPES:
                raise TooLarge(f"the schema has too many alternatives: {ADVICE}")
            if shapes:
                forms[kind] = list(shapes)
        return forms

    def merge(self, one: Shape, other: Shape) -> Shape | None:
        """The shape that is both; None where that is plainly nothing."""
        level = max(one.level, other.level) if max(one.level, other.level) > OPEN else min(one.level, other.level)
        seen = Seen(one.seen.names | other.seen.names, _joined(one.seen.patterns, other.seen.patterns),
                    max(one.seen.items, other.seen.items), _joined(one.seen.found, other.seen.found),
                    one.seen.all_names or other.seen.all_names, one.seen.all_items or other.seen.all_items)
        if one.fixed is not None or other.fixed is not None:
            first, rest = (one, other) if one.fixed is not None else (other, one)
            assert first.fixed is not None, "one of them is"
            fixed = tuple(text for text in first.fixed if self.has(rest, value_of(text)))
            return Shape(one.kind, level, fixed, seen=seen) if fixed else None
        low, above = max(((side.low, side.above) for side in (one, other) if side.low is not None),
                         default=(None, False))
        high, open_ = min(((side.high, not side.below) for side in (one, other) if side.high is not None),
                          default=(None, True))
        if one.whole is not None and other.whole is not None and one.whole != other.whole:
            return None
        most = min((side.most for side in (one, other) if side.most is not None), default=None)
        least = max(one.least, other.least)
        if (most is not None and most < least) or (low is not None and high is not None and low > high):
            return None
        mine, its = dict(one.named), dict(other.named)
        named = tuple((name, _joined(mine.get(name, ()), its.get(name, ()))) for name in {**mine, **its})
        return Shape(one.kind, level, least=least, most=most, whole=other.whole if one.whole is None else one.whole,
                     low=low, high=high, above=above, below=not open_, unique=one.unique or other.unique, named=named,
                     loose=one.loose or other.loose, seen=seen,
                     **{name: _joined(getattr(one, name), getattr(other, name)) for name in _LISTED})

    # What an object or array demands of what is in it.

    def value_demands(self, shape: Shape, name: str) -> Demands:
        """Of the property of a name; where it is not sure whether a pattern matches it, what holds in either case."""
        demands = list(dict(shape.named).get(name, ()))
        for pattern, more in shape.matching:
            if self.finder.finds(pattern, name, wide=not self.wide):
                demands += more
        for names, patterns, more in shape.extras:
            if name not in names and not any(self.finder.finds(pattern, name, wide=self.wide) for pattern in patterns):
                demands += more
        return tuple(dict.fromkeys(demands))

    def item_demands(self, shape: Shape, index: int) -> Demands:
        return tuple(dict.fromkeys(demand for start, stop, demands in shape.spans
                                   if start <= index and (stop is None or index < stop) for demand in demands))

    # Whether a value satisfies.

    def holds(self, demands: Demands, value: Any) -> bool:
        """Whether a value surely satisfies all demands."""
        return any(self.has(shape, value) for shape in self.of(demands).get(kind_of(value), ()))

    def has(self, shape: Shape, value: Any) -> bool:
        """Whether a value surely has a shape."""
        self.effort.spend(20)
        kind = kind_of(value)
        if kind != shape.kind:
            return False
        if shape.fixed is not None:
            return any(identity(value) == identity(value_of(text)) for text in shape.fixed)
        if kind in ("boolean", "null"):
            return True
        if kind == "number":
            return in_range(shape, value, self.wide)
        size = len(value)
        if size < shape.least or (shape.most is not None and size > shape.most):
            return False
        if kind == "string":
            return value not in shape.excluded and all(
                self.finder.finds(pattern, value, wide=found == self.wide) == found
                for pattern, found in shape.patterns)
        if kind == "array":
            if shape.unique and len({identity(item) for item in value}) < size:
                return False
            for demands, least, most in shape.contains:
                denied = self.denied(demands)
                if sum(self.holds(demands, item) for item in value) < least or (
                        most is not None and size - sum(self.holds(denied, item) for item in value) > most):
                    return False
            return all(self.holds(self.item_demands(shape, index), item) for index, item in enumerate(value))
        return all(name in value for name in shape.required) and all(
            self.holds(shape.keys, name) and self.holds(self.value_demands(shape, name), item)
            for name, item in value.items())

    def denied(self, demands: Demands) -> Demands:
        """That not all of these hold."""
        if len(demands) == 1:
            return (Demand(demands[0].place, not demands[0].holds),)
        return (Demand(self.made(Either(tuple((Demand(place, not holds),) for place, holds in demands)),
                                 self.places[0], "what is denied")),)

    # Whether there is nothing that satisfies.

    def impossible(self, demands: Demands) -> bool:
        """Whether surely no value satisfies; False where that is not clear."""
        if demands in self._never:
            return self._never[demands]
        if demands in self._testing or len(self._testing) > _DEEP:
            return False
        self._testing.add(demands)
        try:
            never = all(self.nothing(shape) for shapes in self.of(demands).values() for shape in shapes)
        finally:
            self._testing.remove(demands)
        if never or not self._testing:
            self._never[demands] = never
        return never

    def nothing(self, shape: Shape) -> bool:
        """Whether surely no value has a shape."""
        self.effort.spend(50)
        if shape.fixed is not None:
            return not shape.fixed
        if shape.most is not None and shape.most < shape.least:
            return True
        if shape.kind == "string":
            return len(shape.patterns) + bool(shape.excluded) > 1 and not self.writable(shape)
        if shape.kind == "number":
            if shape.low is None or shape.high is None:
                return False
            return shape.low > shape.high or (shape.low == shape.high and (shape.above or shape.below)) or (
                shape.whole is True and whole_bounds(shape)[0] > whole_bounds(shape)[1])  # type: ignore[operator]
        if shape.kind == "array":
            return any(self.impossible(demands) for start, _, demands in shape.spans if start < shape.least) or any(
                self.impossible(self.item_demands(shape, index)) for index in range(min(shape.least, _DEEP))) or any(
                least and (self.impossible(demands) or shape.most == 0) for demands, least, _ in shape.contains)
        if shape.most is not None and len(shape.required) > shape.most:
            return True
        return any(self.impossible(self.value_demands(shape, name)) or
                   (shape.keys and not self.holds(shape.keys, name)) for name in shape.required)

    def writable(self, shape: Shape) -> bool:
        """Whether some text has a string's shape, its formats being left aside."""
        plain = replace(shape, forms=(), level=OPEN, seen=Seen())
        if plain not in self._strings:
            try:
                automaton = compile_part(self.text(plain), self.effort)
            except TooLarge:
                return True
            self._strings[plain] = bool(automaton.accepts.any())
        return self._strings[plain]

    def text(self, shape: Shape, longest: int | None = None, notation: Notation = JSON) -> Any:
        """The language of the texts of a string's shape."""
        most = shape.most
        if most is not None and longest is not None:
            most = min(most, max(shape.least, longest))
        return string(shape.least, most, shape.patterns, shape.forms, shape.excluded, longest, self.wide,
                      notation)

    # Schemas

    def one(self, demand: Demand) -> Forms:
        if demand not in self._single:
            place = self.places[demand.place]
            if demand in self._open:
                raise DgemmaError(f"{place.where} refers to itself without end")
            self.effort.spend(_EFFORT)
            self._open.add(demand)
            self._depth += 1
            try:
                if self._depth > 3 * MAX_DEPTH:
                    raise DgemmaError(f"{place.where} lies deeper than {3 * MAX_DEPTH} levels")
                self._single[demand] = self._schema(place, demand.holds)
            except DgemmaError:
                raise
            except (TypeError, AttributeError, KeyError, ValueError, ArithmeticError) as error:
                raise DgemmaError(f"{place.where} is not a valid JSON schema: {error}") from error
            finally:
                self._depth -= 1
                self._open.remove(demand)
        return self._single[demand]

    def _schema(self, place: Place, holds: bool) -> Forms:
        schema = place.schema
        if isinstance(schema, Either):
            parts = [self.of(demands) if holds else self.of(self.denied(demands)) for demands in schema.ways]
            return union(parts) if holds else functools.reduce(self.both, parts, FREE)
        if isinstance(schema, Inside):
            assert holds, "only what is wanted is made"
            shape = having(schema.key, schema.demands)
            return {shape.kind: [shape]}
        if isinstance(schema, bool):
            return FREE if schema is holds else {}
        if not isinstance(schema, Mapping):
            raise DgemmaError(f"{place.where} must be an object, true or false, got {schema!r}")
        for keys, type_, what in ((_LISTS, list, "a list"), (_OBJECTS, Mapping, "an object")):
            for key in keys:
                if key in schema and not isinstance(schema[key], type_):
                    raise DgemmaError(f"{place.where} is not a valid JSON schema: {key} must be {what}")
        if not holds:
            parts = list(self._clauses(schema, place, False))
            parts += [{kind: FREE[kind]} for key, kind in _UNEVALUATED if key in schema and self.wide]
            forms = union(parts)
            return {kind: list(dict.fromkeys(replace(shape, seen=Seen()) for shape in shapes))
                    for kind, shapes in forms.items()}
        forms = functools.reduce(self.both, self._clauses(schema, place, True), FREE)
        return self._unevaluated(schema, place, forms)

    def _clauses(self, schema: Mapping, place: Place, holds: bool) -> Iterator[Forms]:
        """What each keyword demands; or, where they do not all hold, what the denial of each demands."""
        def part(key: str, inner: Any = None) -> Demand:
            return Demand(self.places.part(place, schema[key] if inner is None else inner, key), holds)

        for key in ("$ref", "$dynamicRef", "$recursiveRef"):
            if key in schema:
                number = self.places.recur(place) if key == "$recursiveRef" else \
                    self.places.refer(place, schema[key], dynamic=key == "$dynamicRef")
                yield self.one(Demand(number, holds))
                if self.places.old:
                    return
        yield from read_values(self, schema, place, holds)
        for key, inner in schema.items():
            if key in KEYWORDS:
                yield from KEYWORDS[key](self, schema, place, inner, holds)
        for key in ("allOf", "anyOf", "oneOf"):
            if key in schema:
                parts = [Demand(self.places.part(place, inner, f"{key}[{index}]"), holds)
                         for index, inner in enumerate(schema[key])]
                if key == "oneOf":
                    yield self._exactly_one(parts, holds, place)
                elif (key == "allOf") == holds:
                    yield functools.reduce(self.both, map(self.one, parts), FREE)
                else:
                    yield union(map(self.one, parts))
        if "not" in schema:
            inner = Demand(self.places.part(place, schema["not"], "not"), not holds)
            yield {kind: [replace(shape, seen=Seen()) for shape in shapes] for kind, shapes in self.one(inner).items()}
        if "if" in schema and ("then" in schema or "else" in schema or holds):
            when = self.places.part(place, schema["if"], "if")
            sides = []
            for key, truth in (("then", True), ("else", False)):
                forms = self.one(Demand(when, truth))
                if key in schema:
                    forms = self.both(forms, self.one(part(key)))
                elif not holds:
                    continue
                sides.append(forms)
            if "then" in schema or "else" in schema or self._looks_back:
                yield union(sides)

    @functools.cached_property
    def _looks_back(self) -> bool:
        """Whether it matters what parts of a schema have looked at."""
        return "unevaluated" in json.dumps(self.places.root, default=str)

    def _exactly_one(self, parts: list[Demand], holds: bool, place: Place) -> Forms:
        denied = [Demand(place, not holds) for place, holds in parts]
        if holds and self.wide:
            return union(map(self.one, parts))
        if not holds:  # none, or two at once
            affirmed = denied
            none = functools.reduce(self.both, map(self.one, parts), FREE)
            pairs = [self.both(self.one(one), self.one(other)) for one, other in combinations(affirmed, 2)]
            return union([none, *pairs])
        ways = []
        for index, one in enumerate(parts):
            forms = self.one(one)
            for other in range(len(parts)):
                if other != index:
                    forms = self._without(forms, parts[other], denied[other])
            ways.append(forms)
        found = union(ways)
        if not found and any(self.one(part) for part in parts):
            raise DgemmaError(f"{place.where}.oneOf: its branches allow the same values, and only one may")
        return found

    def _without(self, forms: Forms, other: Demand, denied: Demand) -> Forms:
        """The shapes of values that are not of another schema."""
        left: Forms = {}
        for kind, shapes in forms.items():
            kept: dict[Shape, None] = {}
            for shape in shapes:
                if self._may.lacks(shape, other):
                    kept[shape] = None
                    continue
                for one in self.both({kind: [shape]}, self.one(denied)).get(kind, []):
                    if not self.nothing(one):
                        kept[one] = None
            if kept:
                left[kind] = list(kept)[:_MOST_LEFT + len(shapes)]
        return left

    def lacks(self, shape: Shape, demand: Demand) -> bool:
        """Whether no value of a shape satisfies a demand."""
        common = self.both({shape.kind: [shape]}, self.one(demand)).get(shape.kind, [])
        return all(self.nothing(one) for one in common)

    def _unevaluated(self, schema: Mapping, place: Place, forms: Forms) -> Forms:
        for key, kind in _UNEVALUATED:
            if key not in schema or self.wide or (self.places.old and "$ref" in schema):
                continue
            demand = Demand(self.places.part(place, schema[key], key))
            self.one(demand)  # it must be a schema
            done = []
            for shape in forms.get(kind, ()):
                seen = shape.seen
                level = MEANT if shape.level in (OPEN, ASIDE) else shape.level
                if kind == "object":
                    more = Shape(kind, level, loose=schema[key] is not False,
                                 extras=() if seen.all_names else ((seen.names, seen.patterns, (demand,)),),
                                 seen=Seen(all_names=True))
                else:
                    demands: Demands = (demand,)
                    if seen.found:
                        demands = (Demand(self.made(Either((*seen.found, demands)), place, f"{place.where}.{key}")),)
                    more = Shape(kind, level, spans=() if seen.all_items else ((seen.items, None, demands),),
                                 seen=Seen(all_items=True))
                if (merged := self.merge(shape, more)) is not None:
                    done.append(merged)
            forms = {other: ([replace(shape, level=ASIDE if shape.level == OPEN else shape.level) for shape in shapes]
                             if other != kind else done) for other, shapes in forms.items() if other != kind or done}
        return forms

    def lacking(self, name: str, place: Place) -> Shape:
        """Objects without a property."""
        return Shape("object", MEANT, named=((name, (Demand(self.made(False, place, place.where)),)),))

    def part(self, place: Place, schema: Any, where: str, holds: bool = True) -> Demand:
        """The demand of a schema within another; says at once what is no schema at all."""
        demand = Demand(self.places.part(place, schema, where), holds)
        if not isinstance(schema, (bool, Mapping, Either, Inside)):
            raise DgemmaError(f"{self.places[demand.place].where} must be an object, true or false, got {schema!r}")
        return demand


def _joined(one: tuple, other: tuple) -> tuple:
    """One after the other, without what is there already."""
    if not other or one is other:
        return one
    return tuple(dict.fromkeys((*one, *other))) if one else other
