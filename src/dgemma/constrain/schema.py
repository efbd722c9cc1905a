"""A JSON schema as a language of JSON texts, every one of which the schema accepts.

Not every text that it accepts: the language has one way to write a value. Properties come in the schema's order, ", "
and ": " separate, and there is no other white space; what a schema does not mention is left out, and where an author
names keywords of one type only, values are of that type. What a schema means `shapes` works out. A keyword that
restricts and cannot be kept is an error, never ignored. Values may be written in another `Notation` than JSON's.
Knows nothing of automata, tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from itertools import product
from typing import Any

from dgemma.constrain.automaton import Effort, Numbers, TooLarge, compile_part
from dgemma.constrain.language import (
    EMPTY,
    Alt,
    Both,
    Call,
    Net,
    Node,
    Repeat,
    literal,
    optional,
    parse_regex,
    seq,
)
from dgemma.constrain.partition import FIRST, Partition
from dgemma.constrain.references import Places
from dgemma.constrain.scalars import (
    FORMATS,
    INT32,
    JSON,
    KINDS,
    Notation,
    finite,
    fraction,
    integer,
    multiples,
    number,
    string,
)
from dgemma.constrain.shape import OPEN, Demand, Demands, Either, Seen, Shape, value_of, whole_bounds
from dgemma.constrain.shapes import MAX_DEPTH, Shapes
from dgemma.errors import DgemmaError

ANY = "any value"  # the rule of everything
_EFFORT = 1000  # of one part of a schema
_SUBSETS = 6  # different values of which every order is kept
_CELLS = 3000  # copies of what is in an object or array, where its parts are counted
_TOO_MANY = "the schema counts what is in an object or array in too many ways at once"
_SAYS_NOTHING = frozenset({"$schema", "$id", "$anchor", "$dynamicAnchor", "$comment", "$defs", "definitions", "title",
                           "description", "default", "examples", "deprecated", "readOnly", "writeOnly"})


def schema_language(schema: Any, longest: int | None = None,
                    effort: Effort | None = None, notation: Notation = JSON) -> tuple[Node, dict[str, Node]]:
    """The language of a schema and the rules that it calls; raises DgemmaError naming what is not supported.

    With ``longest``, strings whose length has a limit are no longer than that, unless they must be: an automaton counts
    with its states.
    """
    compiler = _Compiler(schema, longest, effort or Effort(), notation)
    return compiler.node((Demand(0),), "the schema"), compiler.rules


def _net(start: Any, ways: Callable[[Any], Iterator[tuple[Node, Any]]], over: Callable[[Any], bool]) -> Node:
    """The Net of all states that ``ways`` lead to, whatever they stand for."""
    states = Numbers(start, 4 * _CELLS, _TOO_MANY)
    found: list[tuple[int, Node, int]] = []
    for state in states:
        found += [(states[state], part, states[target]) for part, target in ways(state)]
        if len(found) > 4 * _CELLS:
            raise TooLarge(_TOO_MANY)
    return Net(tuple(found), frozenset(states[state] for state in states if over(state)))


class _Compiler:
    """One schema's way to a language; demands that are met again inside themselves become a call of a rule."""

    def __init__(self, root: Any, longest: int | None, effort: Effort, notation: Notation):
        self.longest, self.effort, self.notation = longest, effort, notation
        self.places = Places(root)
        self.shapes = Shapes(self.places, effort)
        self.partition = Partition(self.shapes, longest)
        self.rules: dict[str, Node] = {}
        self._known: dict[Demands, Node] = {}
        self._plain: dict[Shape, Node] = {}  # of strings and numbers: one node each, however often it is met
        self._open: dict[Demands, str] = {}  # what is being read, and its rule's name
        self._recursive: set[str] = set()
        self._depth = 0

    def node(self, demands: Demands, where: str) -> Node:
        """The language of the values that satisfy all demands."""
        demands = tuple(demand for demand in demands
                        if not (demand.holds and self.places[demand.place].schema is True))
        if not demands:
            self.rules.setdefault(ANY, self._any_value())
            return Call(ANY)
        if demands in self._known:
            return self._known[demands]
        if demands in self._open:
            self._recursive.add(self._open[demands])
            return Call(self._open[demands])
        name = self.places[demands[0].place].where if len(demands) == 1 else where
        while name in self._open.values() or name in self.rules:
            name += "'"
        self.effort.spend(_EFFORT)
        if self._depth > MAX_DEPTH:
            raise DgemmaError(f"{where} lies deeper than {MAX_DEPTH} levels")
        self._depth += 1
        self._open[demands] = name
        try:
            node = self._parts(demands, where)
        except (TypeError, AttributeError, KeyError, ValueError, OverflowError) as error:
            raise DgemmaError(f"{where} is not a valid JSON schema: {error}") from error
        finally:
            self._depth -= 1
            del self._open[demands]
        if name in self._recursive:
            self.rules[name] = node
            node = Call(name)
        self._known[demands] = node
        return node

    def _any_value(self) -> Node:
        value, text = Call(ANY), string(notation=self.notation)
        pair = self._property(text, value)
        return Alt((seq(literal("{"), self._list([], pair, 0, None), literal("}")),
                    seq(literal("["), self._list([], value, 0, None), literal("]")),
                    self.notation.string(text), number(), literal("true"), literal("false"), literal("null")))

    def _list(self, first: Sequence[Node], item: Node | None, least: int, most: int | None) -> Node:
        """``least`` to ``most`` items with commas: the ``first`` ones, then ``item`` again and again; None: no more."""
        comma = self.notation.comma
        if item is None:
            most = len(first) if most is None else min(most, len(first))
        if most is not None and most < least:
            return Alt(())
        first = first if most is None else first[:most]
        tail: Node = EMPTY
        if item is not None and (most is None or most > len(first)):
            more = seq(*([comma] if first else []), item)
            rest_least, rest_most = max(0, least - len(first)), None if most is None else most - len(first)
            if first:
                tail = Repeat(more, rest_least, rest_most)
            else:
                again = Repeat(seq(comma, item), max(0, rest_least - 1), None if rest_most is None else rest_most - 1)
                tail = seq(more, again) if rest_least else optional(seq(more, again))
        for index in range(len(first) - 1, -1, -1):
            tail = seq(*([comma] if index else []), first[index], tail)
            tail = tail if index < least else optional(tail)
        return tail

    def _parts(self, demands: Demands, where: str) -> Node:
        """Schemas that do nothing but refer to others or list them keep that form; all others are taken apart."""
        place = self.places[demands[0].place]
        if len(demands) == 1 and demands[0].holds and isinstance(place.schema, Mapping):
            said = [key for key in place.schema if key not in _SAYS_NOTHING]
            inner = place.schema.get(said[0]) if len(said) == 1 else None
            if said == ["$ref"]:
                return self.node((Demand(self.places.refer(place, inner)),), where)
            if said in (["allOf"], ["anyOf"], ["oneOf"]) and isinstance(inner, list) and inner:
                key = said[0]
                parts = [(Demand(self.places.part(place, part, f"{key}[{index}]")),)
                         for index, part in enumerate(inner)]
                if len(parts) == 1 or key == "anyOf" or (key == "oneOf" and self.partition.apart(parts)):
                    return Alt(tuple(self.node(part, f"{where}.{key}[{index}]") for index, part in enumerate(parts)))
        forms = self.shapes.of(demands)
        shapes = [shape for kind in KINDS for shape in forms.get(kind, ()) if not self.shapes.nothing(shape)]
        meant = [shape for shape in shapes if shape.level >= OPEN]
        if len(meant) < len(shapes):  # the other types are there for where none of these can be written
            meant = [shape for shape in meant if shape.kind != "string" or self.shapes.writable(shape)]
        return Alt(tuple(self._shape(shape, where) for shape in dict.fromkeys(meant or shapes)))

    def _shape(self, shape: Shape, where: str) -> Node:
        if shape.fixed is not None:
            return finite(self.notation.write(value_of(text)) for text in shape.fixed)
        if shape.kind in ("object", "array"):
            return (self._object if shape.kind == "object" else self._array)(shape, where)
        plain = replace(shape, level=OPEN, seen=Seen())
        if plain not in self._plain:
            self._plain[plain] = (self._string if shape.kind == "string" else self._number)(plain, where)
        return self._plain[plain]

    def _string(self, shape: Shape, where: str) -> Node:
        return self.notation.string(self._text(shape, where))

    def _text(self, shape: Shape, where: str) -> Node:
        """What stands in a string."""
        try:
            forms = tuple(form for form in shape.forms if form in FORMATS)
            if forms and (shape.patterns or shape.least or shape.most is not None or len(forms) > 1):
                # A format is an annotation: where what else is said leaves none of the texts we write it as, it goes.
                try:
                    automaton = compile_part(self.shapes.text(shape, self.longest, self.notation), self.effort)
                    forms = forms if automaton.accepts.any() else ()
                except TooLarge:
                    forms = ()
            return self.shapes.text(replace(shape, forms=forms), self.longest, self.notation)
        except TooLarge:
            raise
        except DgemmaError as error:
            raise DgemmaError(f"{where}: {error}") from error

    def _number(self, shape: Shape, where: str) -> Node:
        if "int32" in shape.forms and shape.whole:
            narrow = self.shapes.merge(shape, Shape("number", low=Decimal(INT32[0]), high=Decimal(INT32[1])))
            shape = narrow or shape
        if shape.of or shape.not_of:
            if shape.whole is False:
                raise DgemmaError(f"{where} uses 'multipleOf' beside numbers that are not whole: this is not supported")
            return multiples(shape.of, shape.not_of, shape.whole is True, shape.low, shape.high, shape.above,
                             shape.below)
        if shape.whole:
            return integer(*whole_bounds(shape))
        make = number if shape.whole is None else fraction
        return make(shape.low, shape.high, shape.above, shape.below)

    # Arrays

    def _array(self, shape: Shape, where: str) -> Node:
        singles = max((start + 1 for start, stop, _ in shape.spans if stop is not None), default=0)
        length = max([singles, *(start for start, stop, _ in shape.spans if stop is None)])
        tail = self.shapes.item_demands(shape, length)
        least, most = shape.least, shape.most
        for index in range(length):
            if self.shapes.impossible(self.shapes.item_demands(shape, index)):
                length, most = index, index if most is None else min(most, index)
                break
        else:
            spoken_of = any(stop is None for _, stop, _ in shape.spans) or not length
            wanted = least > length or any(count for _, count, _ in shape.contains)
            if not (spoken_of or wanted) or self.shapes.impossible(tail):
                most = length if most is None else min(most, length)
        if most is not None and most < least:
            return Alt(())
        first = [self.shapes.item_demands(shape, index) for index in range(length)]
        shape = replace(shape, most=most)
        if shape.unique and (most is None or most > 1):
            return self._unique(shape, first, tail, where)
        if shape.contains:
            return self._counted_items(shape, first, tail, where, None)
        nodes = [self.node(demands, f"{where}[{index}]") for index, demands in enumerate(first)]
        more = self.node(tail, f"{where}.items") if most is None or most > length else None
        return seq(literal("["), self._list(nodes, more, least, most), literal("]"))

    def _counted_items(self, shape: Shape, first: list[Demands], tail: Demands, where: str,
                       classes: Sequence[Demands] | None, any_order: bool = False) -> Node:
        """An array whose items are counted by what they satisfy, or each of another class than all before it.

        A state: items read, as far as it matters; counts; the classes that are used up, as a set or as a number.
        """
        bound = max(len(first), shape.least, shape.most or 0, 1)
        counters = shape.contains
        sets = any_order and classes is not None

        def counts(so_far: tuple[int, ...], demands: Demands) -> Iterator[tuple[Demands, tuple[int, ...]]]:
            for choice in product((True, False), repeat=len(counters)):
                more, reached = list(demands), list(so_far)
                for index, (takes, (wanted, least, most)) in enumerate(zip(choice, counters, strict=True)):
                    if takes:
                        reached[index] += 1
                        if reached[index] > (least if most is None else most):
                            break
                        more += wanted
                    elif most is not None:
                        more += self.shapes.denied(wanted)
                else:
                    yield tuple(dict.fromkeys(more)), tuple(reached)

        def ways(state: tuple[int, tuple[int, ...], int]) -> Iterator[tuple[Node, Any]]:
            place, so_far, used = state
            if shape.most is not None and place >= shape.most:
                return
            if classes is not None and not sets:
                if used + 1 < len(classes):
                    yield EMPTY, (place, so_far, used + 1)
                kinds = [(used, used + 1)] if used < len(classes) else []
            elif classes is not None:
                kinds = [(index, used | 1 << index) for index in range(len(classes)) if not used >> index & 1]
            else:
                kinds = [(None, 0)]
            demands = first[place] if place < len(first) else tail
            for kind, after in kinds:
                extra = demands if kind is None else (*demands, *classes[kind])  # type: ignore[index]
                for wanted, reached in counts(so_far, extra):
                    if not self.shapes.impossible(wanted):
                        node = self.node(wanted, f"{where}.items")
                        yield seq(self.notation.comma, node) if place else node, (min(place + 1, bound), reached, after)

        def over(state: tuple[int, tuple[int, ...], int]) -> bool:
            place, so_far, _ = state
            return place >= shape.least and all(count >= least for count, (_, least, _) in
                                                zip(so_far, counters, strict=True))

        net = _net((0, (0,) * len(counters), 0), ways, over)
        return seq(literal("["), net, literal("]"))

    def _unique(self, shape: Shape, first: list[Demands], tail: Demands, where: str) -> Node:
        """No two items alike: each is of another class than those before it.

        Where there are many values, classes come in one order, and two of a class do not come together.
        """
        if not first:
            values = self.partition.listed(tail)
            if values is not None:
                classes = [self.partition.demand({"const": value}, where) for value in values]
                return self._counted_items(shape, first, tail, where, classes, len(values) <= _SUBSETS)
            return self._counted_items(shape, first, tail, where, self.partition.classes(tail, where))
        size = len(first) if shape.least <= len(first) else shape.least
        each = [first[index] if index < len(first) else tail for index in range(size)]
        if self.partition.apart(each):
            return self._array(replace(shape, unique=False, most=min(size, shape.most or size)), where)
        listed = [self.partition.listed(demands) for demands in each]
        count = 1
        for values in listed:
            count *= len(values) if values is not None else 10**6
        if count <= 1000:
            found = []
            for length in range(shape.least, min(size, size if shape.most is None else shape.most) + 1):
                found += [self.notation.write(list(values))
                          for values in product(*(one or [] for one in listed[:length]))
                          if self.shapes.has(replace(shape, level=OPEN), list(values))]
            return finite(found)
        # Each place takes its own share of the classes.
        classes = self.partition.classes(self.partition.demand(Either(tuple(each)), where), where)
        shared = []
        for index, demands in enumerate(each):
            ways = tuple(merged for one in classes[index % len(classes)::size]
                         if not self.shapes.impossible(merged := (*demands, *one)))
            shared.append((index, index + 1, self.partition.demand(Either(ways), where)))
        return self._array(replace(shape, unique=False, spans=tuple(shared), most=min(size, shape.most or size)), where)

    # Objects

    def _object(self, shape: Shape, where: str) -> Node:
        names = dict.fromkeys(name for name, _ in shape.named)
        names |= dict.fromkeys(shape.required)
        keys = self.shapes.of(shape.keys).get("string", []) if shape.keys else None
        listed = keys is not None and all(one.fixed is not None for one in keys)
        if listed:
            names |= dict.fromkeys(value_of(text) for one in keys or () for text in one.fixed or ())
        declared: dict[str, Demands] = {}
        for name in names:
            demands = self.shapes.value_demands(shape, name)
            if self.shapes.impossible(demands) or (shape.keys and not self.shapes.holds(shape.keys, name)):
                if name in shape.required:
                    return Alt(())
                continue
            declared[name] = demands
        parts = [(self._property(self._literal(name), self.node(demands, f"{where}.{name}")), name in shape.required)
                 for name, demands in declared.items()]
        least, most = shape.least, shape.most
        missing = max(0, least - len(declared))
        others: list[tuple[Node, Demands]] = []
        if not listed and (most is None or most > len(set(shape.required))):
            free = shape.loose or missing > 0 or not (declared or shape.matching)
            others = self._regions(shape, names, keys, free, where)
        values = [(key, self.node(demands, f"{where}.additionalProperties")) for key, demands in others]
        if missing > 1 and values:
            parts += self._distinct(values)
            values, missing = [], 0
        pairs = [self._property(key, value) for key, value in values]
        extra = pairs[0] if len(pairs) == 1 else Alt(tuple(pairs)) if pairs else None
        if least > len(parts) + (extra is not None):
            return Alt(())
        if not parts:
            return seq(literal("{"), self._list([], extra, least, most), literal("}"))
        needed = sum(need for _, need in parts)
        if most is not None and needed > most:
            return Alt(())
        if least > needed or (most is not None and (extra is not None or most < len(parts))):
            return seq(literal("{"), self._counted_properties(parts, extra, least, most), literal("}"))
        if extra is not None:
            parts.append((seq(extra, Repeat(seq(self.notation.comma, extra), 0, None)), False))
        return seq(literal("{"), self._joined(parts), literal("}"))

    def _property(self, name: Node, value: Node) -> Node:
        return seq(self.notation.key(name), self.notation.colon, value)

    def _literal(self, text: str) -> Node:
        """Exactly this text, as it stands in a string."""
        return literal(self.notation.escape(text))

    def _joined(self, parts: Sequence[tuple[Node, bool]]) -> Node:
        """Parts in this order with a comma between those that are there; and whether one must."""
        ways: list[tuple[int, Node, int]] = []
        bare, behind = [0], []  # where nothing stands yet, and where something does
        for index, (part, needed) in enumerate(parts):
            begin, end = 2 * index + 1, 2 * index + 2
            ways += [(begin, part, end), *((state, EMPTY, begin) for state in bare),
                     *((state, self.notation.comma, begin) for state in behind)]
            if needed:
                bare = []
            else:
                ways += [(state, EMPTY, end) for state in behind]
            behind = [end]
        return Net(tuple(ways), frozenset(bare + behind))

    def _counted_properties(self, parts: Sequence[tuple[Node, bool]], extra: Node | None, least: int,
                            most: int | None) -> Node:
        """So many of these, in their order; of the extra ones, which may come twice, only one is sure to count."""
        bound = least if most is None else most
        if len(parts) * bound > _CELLS:
            raise TooLarge("the schema has too many properties beside 'minProperties' or 'maxProperties'")

        def ways(state: tuple[int, int, int]) -> Iterator[tuple[Node, Any]]:
            index, count, more = state
            if most is not None and count + more >= most:
                if all(not need for _, need in parts[index:]) and index < len(parts):
                    yield EMPTY, (len(parts), count, more)
                return
            comma = [self.notation.comma] if count + more else []
            if index < len(parts):
                part, need = parts[index]
                yield seq(*comma, part), (index + 1, count + 1 if most is not None else min(count + 1, max(bound, 1)),
                                          more)
                if not need:
                    yield EMPTY, (index + 1, count, more)
            elif extra is not None:
                yield seq(*comma, extra), (index, count, more + 1 if most is not None else 1)

        def over(state: tuple[int, int, int]) -> bool:
            index, count, more = state
            return index == len(parts) and count + min(more, 1) >= least

        return _net((0, 0, 0), ways, over)

    def _distinct(self, values: Sequence[tuple[Node, Node]]) -> list[tuple[Node, bool]]:
        """Properties of which no two have the same name: their first letters ascend."""
        parts: list[tuple[Node, bool]] = []
        for beginning in FIRST:
            begins = parse_regex(beginning, self.notation.chars, search=True)
            pairs = []
            for key, value in values:
                narrow = Both(key, begins)
                if compile_part(narrow, self.effort).accepts.any():
                    pairs.append(self._property(narrow, value))
            if pairs:
                parts.append((Alt(tuple(pairs)), False))
        return parts

    def _regions(self, shape: Shape, names: Mapping[str, None], keys: Sequence[Shape] | None, free: bool,
                 where: str) -> list[tuple[Node, Demands]]:
        """The names that are not declared, by the patterns that match them, and what is demanded of their values.

        ``free``: those that none does are among them.
        """
        base = string(notation=self.notation) if keys is None else Alt(tuple(
            self._text(one, f"{where}.propertyNames") for one in keys if one.fixed is None))
        if names:
            base = Both(base, Alt(tuple(map(self._literal, names))), negated=True)
        patterns = list(dict.fromkeys([*(pattern for pattern, _ in shape.matching),
                                       *(pattern for _, some, _ in shape.extras for pattern in some)]))
        found: list[tuple[Node, Demands]] = []

        def divide(key: Node, left: Sequence[str], matching: tuple[str, ...]) -> None:
            if (patterns or keys is not None) and not compile_part(key, self.effort).accepts.any():
                return
            if left:
                for sure in (True, False):
                    named = parse_regex(left[0], self.notation.chars, search=True, wide=not sure)
                    divide(Both(key, named, negated=not sure), left[1:], (*matching, left[0]) if sure else matching)
                return
            demands = [demand for pattern, more in shape.matching if pattern in matching for demand in more]
            for _, some, more in shape.extras:
                if not any(pattern in matching for pattern in some):
                    demands += more
            every = tuple(dict.fromkeys(demands))
            if (free or any(pattern in matching for pattern, _ in shape.matching)) and \
                    not self.shapes.impossible(every):
                found.append((key, every))

        divide(base, patterns, ())
        return found

