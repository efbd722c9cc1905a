"""Values told apart: the few that satisfy demands one by one, many of them by classes of which no two share a value.

For arrays whose items all differ, and objects whose keys do. Works on schemas and their shapes; knows nothing of
languages and automata but whether a text exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from typing import Any

from dgemma.constrain.automaton import compile_part
from dgemma.constrain.scalars import KINDS, identity
from dgemma.constrain.shape import OPEN, Demand, Demands, Inside, Shape, value_of, whole_bounds
from dgemma.constrain.shapes import Shapes

_LISTED = 64  # values of a type that are told apart one by one
_LETTERS = [f"[{chr(code)}{chr(code - 32)}]" for code in range(97, 123)]
# How a text begins: no two hold for one.
FIRST = ["^$", "^[^a-zA-Z0-9]", *(f"^{digit}" for digit in range(10)), *(f"^{letter}" for letter in _LETTERS)]
_SECOND = ["($|[^a-zA-Z])", "[a-dA-D]", "[e-hE-H]", "[i-lI-L]", "[m-qM-Q]", "[r-zR-Z]"]
_BEGINNINGS = [*FIRST[:12], *(f"^{letter}{second}" for letter in _LETTERS for second in _SECOND)]


@dataclass(frozen=True)
class Partition:
    """Tells the values of one schema's demands apart; with ``longest`` (of strings) into few classes."""

    shapes: Shapes
    longest: int | None

    def apart(self, parts: Sequence[Demands]) -> bool:
        """Whether no value satisfies two of these."""
        return len(parts) <= _LISTED and all(self.shapes.apart(one, other) for one, other in combinations(parts, 2))

    def demand(self, schema: Any, where: str) -> Demands:
        return (Demand(self.shapes.made(schema, self.shapes.places[0], where)),)

    def listed(self, demands: Demands) -> list | None:
        """All values that satisfy demands, if they are few."""
        values: dict[Any, Any] = {}
        for shapes in self.shapes.of(demands).values():
            for shape in shapes:
                if shape.fixed is not None:
                    found = [value_of(text) for text in shape.fixed]
                elif self.shapes.nothing(shape):
                    continue
                elif shape.kind == "number" and shape.whole and None not in (bounds := whole_bounds(shape)) and \
                        bounds[1] - bounds[0] <= 2 * _LISTED:  # type: ignore[operator]
                    found = [value for value in range(bounds[0], bounds[1] + 1)  # type: ignore[operator, arg-type]
                             if self.shapes.has(shape, value)]
                else:
                    return None
                values |= {identity(value): value for value in found}
        return list(values.values())

    def classes(self, demands: Demands, where: str, deep: int = 2) -> list[Demands]:
        """Parts of the values that satisfy demands; none has two of them. The values of no class are left out."""
        forms, classes = self.shapes.of(demands), []
        shapes = [shape for kind in KINDS for shape in forms.get(kind, ())]
        meant = [shape for shape in shapes if shape.level >= OPEN] or shapes
        kinds = dict.fromkeys(shape.kind for shape in meant)
        fine = self.longest is None and len(kinds) < 3  # else there are many enough
        deep = deep if fine else 0
        for kind in kinds:
            if kind in ("boolean", "null"):
                classes += [{"const": value} for value in ((True, False) if kind == "boolean" else (None,))]
            elif kind == "number":
                whole = all(shape.whole for shape in meant if shape.kind == kind) and fine
                tens = [step * size for size in (10, 100, 1000) for step in (range(1, 10) if whole else (1,))]
                bounds = [*range(1, 10), *tens, *(10**power for power in range(4, 16 if whole else 6))]
                edges = [*(-bound for bound in reversed(bounds)), 0, *bounds]
                classes += [{"type": "number", "minimum": low, "exclusiveMaximum": high}
                            for low, high in pairwise(edges)]
            elif kind == "string":
                strings = [shape for shape in meant if shape.kind == kind]
                plain = fine and not any(shape.forms or shape.patterns for shape in strings)
                classes += [{"type": "string", "pattern": pattern}
                            for pattern in (_BEGINNINGS if plain else FIRST)
                            if plain or any(self._begins(shape, pattern) for shape in strings)]
            elif kind == "array":
                inner = self.classes(self.shapes.item_demands(
                    next(shape for shape in meant if shape.kind == kind), 0), where, deep - 1) if deep else [()]
                classes += [{"const": []}, *(Inside(0, one) for one in inner)]
            elif kind == "object":
                classes += self._object_classes([shape for shape in meant if shape.kind == kind], where, deep)
        found = [self.demand(part, where) for part in classes]
        return [one for one in found if not self.shapes.impossible((*demands, *one))]

    def _begins(self, shape: Shape, pattern: str) -> bool:
        """Whether a string's shape, its format included, has texts with a beginning."""
        text = self.shapes.text(replace(shape, patterns=(*shape.patterns, (pattern, True))), self.longest)
        return bool(compile_part(text, self.shapes.effort).accepts.any())

    def _object_classes(self, shapes: Sequence[Shape], where: str, deep: int) -> list[Any]:
        """Objects are told apart by one property, or by how many they have."""
        names = [name for shape in shapes for name in (*shape.required, *(name for name, _ in shape.named))]
        if not names or not deep:
            return [{"type": "object", "minProperties": size, "maxProperties": size} for size in range(2)]
        name = names[0]
        inner: dict[Demands, None] = {}
        for shape in shapes:
            inner |= dict.fromkeys(self.classes(self.shapes.value_demands(shape, name), where, deep - 1))
        lacking = {"type": "object", "properties": {name: False}}
        return [*(Inside(name, one) for one in inner), lacking]
