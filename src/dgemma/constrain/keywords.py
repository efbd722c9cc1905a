"""What each keyword of a JSON schema that speaks of types demands, as forms; or what its denial demands.

Every reader has the schema, its place, the keyword's value, and whether the schema holds. Knows nothing of how demands
are put together (`shapes`), of languages but patterns.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from math import inf
from typing import TYPE_CHECKING, Any

from dgemma.constrain.automaton import compile_part
from dgemma.constrain.language import parse_regex
from dgemma.constrain.references import Place
from dgemma.constrain.scalars import KINDS, dumps, exact, identity, kind_of
from dgemma.constrain.shape import (
    FREE,
    MEANT,
    NAMED,
    NOT_EMPTY,
    OPEN,
    Demand,
    Demands,
    Forms,
    Seen,
    Shape,
    having,
    only,
    shortest_text,
    value_of,
)
from dgemma.errors import DgemmaError

if TYPE_CHECKING:
    from dgemma.constrain.shapes import Shapes

TYPES = (*KINDS, "integer")


def read_values(shapes: Shapes, schema: Mapping, place: Place, holds: bool) -> Iterator[Forms]:
    """type, enum, const"""
    if "type" in schema:
        names = [*schema["type"]] if isinstance(schema["type"], list) else [schema["type"]]
        for name in names:
            if name not in TYPES:
                raise DgemmaError(f"{place.where}.type is {name!r}; there are {', '.join(TYPES)}")
        if schema.get("nullable") is True:  # OpenAPI
            names.append("null")
        forms: Forms = {}
        for kind, free in FREE.items():
            if (kind in names) == holds:
                forms[kind] = [replace(shape, level=NAMED if holds else OPEN) for shape in free]
        if "integer" in names and "number" not in names:
            forms["number"] = [Shape("number", NAMED if holds else OPEN, whole=holds)]
        yield forms
    for key in ("enum", "const"):
        if key not in schema:
            continue
        values = schema[key] if key == "enum" else [schema[key]]
        by_kind: dict[str, dict[Any, Any]] = {}
        for value in values:
            by_kind.setdefault(kind_of(value), {}).setdefault(identity(value), value)
        if holds:
            yield {kind: [Shape(kind, NAMED, tuple(map(dumps, found.values())))] for kind, found in by_kind.items()}
        else:
            yield {kind: others for kind in KINDS
                   if (others := _other_than(shapes, kind, list(by_kind.get(kind, {}).values()), place))}


def _other_than(shapes: Shapes, kind: str, values: list, place: Place) -> list[Shape]:
    """The shapes of a type's values but these."""
    if not values:
        return FREE[kind]
    if kind in ("boolean", "null"):
        fixed = tuple(text for text in FREE[kind][0].fixed or () if value_of(text) not in values)
        return [Shape(kind, fixed=fixed)] if fixed else []
    if kind == "string":
        return [Shape(kind, excluded=tuple(values))]
    if kind == "number":
        bounds = [None, *sorted(map(exact, values)), None]
        return [Shape(kind, low=low, high=high, above=low is not None, below=high is not None)
                for low, high in pairwise(bounds)]
    forms: Forms = {kind: FREE[kind]}
    for value in values:
        forms = shapes.both(forms, {kind: list(_unlike(shapes, kind, value, place))})
    return forms.get(kind, [])


def _unlike(shapes: Shapes, kind: str, value: Any, place: Place) -> Iterator[Shape]:
    """The shapes of arrays or objects other than one."""
    def differs(inner: Any) -> Demands:
        return (Demand(shapes.made({"const": inner}, place, place.where), False),)

    if value:
        yield Shape(kind, most=len(value) - 1)
    if kind == "array":
        for index, item in enumerate(value):
            yield having(index, differs(item), OPEN)
    else:
        for name, item in value.items():
            yield having(name, differs(item), OPEN)
            if shapes.wide:
                yield shapes.lacking(name, place)
    yield Shape(kind, least=len(value) + 1)


def _bounds(shapes: Shapes, schema: Mapping, place: Place, inner: Any, holds: bool, key: str) -> Iterator[Forms]:
    if isinstance(inner, bool) and key.startswith("exclusive"):
        return  # draft 4's way, told where the bound is
    if isinstance(inner, bool) or not isinstance(inner, (int, float)) or not abs(inner) < inf:
        raise DgemmaError(f"{place.where}.{key} is {inner!r}: it must be a number")
    strict = key.startswith("exclusive") or schema.get("exclusive" + key[0].upper() + key[1:]) is True
    lower = key.lower().endswith("minimum") == holds
    strict = strict == holds
    bound = exact(inner)
    shape = Shape("number", MEANT, low=bound, above=strict) if lower else \
        Shape("number", MEANT, high=bound, below=strict)
    yield only("number", [shape], holds)


def _multiple(shapes: Shapes, schema: Mapping, place: Place, inner: Any, holds: bool) -> Iterator[Forms]:
    if isinstance(inner, bool) or not isinstance(inner, (int, float)) or not 0 < inner < inf:
        raise DgemmaError(f"{place.where}.multipleOf is {inner!r}: it must be a number above 0")
    yield only("number", [Shape("number", MEANT, of=(inner,)) if holds else
                          Shape("number", MEANT, not_of=(inner,))], holds)


def _size(shapes: Shapes, schema: Mapping, place: Place, inner: Any, holds: bool, key: str,
          kind: str) -> Iterator[Forms]:
    count = _count(inner, place, key)
    if key.startswith("min") == holds:
        yield only(kind, [Shape(kind, MEANT, least=count if holds else count + 1)], holds)
    elif holds or count:
        yield only(kind, [Shape(kind, MEANT, most=count if holds else count - 1)], holds)


def _pattern(shapes: Shapes, schema: Mapping, place: Place, inner: Any, holds: bool) -> Iterator[Forms]:
    _check_pattern(inner, place, "pattern")
    yield only("string", [Shape("string", MEANT, patterns=((inner, holds),))], holds)


def _format(shapes: Shapes, schema: Mapping, place: Place, inner: Any, holds: bool) -> Iterator[Forms]:
    if holds and isinstance(inner, str):  # an annotation: it never fails
        numeric = inner in ("int32", "int64", "float", "double", "decimal")
        kind = "number" if numeric else "string"
        yield only(kind, [Shape(kind, MEANT, forms=(inner,))])


def _content(shapes: Shapes, schema: Mapping, place: Place, inner: Any, holds: bool, key: str) -> Iterator[Forms]:
    """contentEncoding, contentMediaType: annotations, too."""
    encoded = schema.get("contentEncoding") in ("base64", "base64url")
    is_json = schema.get("contentMediaType") == "application/json"
    if encoded and is_json:
        raise DgemmaError(f"{place.where} uses 'contentMediaType' beside 'contentEncoding': this is not supported")
    form = inner if encoded else "json-string" if is_json else None
    if holds and form is not None and (key == "contentEncoding") == encoded:
        yield only("string", [Shape("string", MEANT, forms=(form,))])


def _items(shapes: Shapes, schema: Mapping, place: Place, inner: Any, holds: bool, key: str) -> Iterator[Forms]:
    """prefixItems, items, additionalItems"""
    start, key_of_prefix = 0, "prefixItems"
    if key == "prefixItems" or isinstance(inner, list):
        for index, item in enumerate(inner):
            demand = shapes.part(place, item, f"{key}[{index}]", holds)
            if holds:
                span = (index, index + 1, (demand,))
                yield only("array", [Shape("array", MEANT, spans=(span,), seen=Seen(items=index + 1))])
            elif (key == "items") == shapes.places.old or shapes.wide:
                yield {"array": [having(index, (demand,))]}
        return
    if key == "additionalItems":
        if not isinstance(schema.get("items"), list):
            return
        if not (holds or shapes.places.old or shapes.wide):
            return
        key_of_prefix = "items"
    if isinstance(schema.get(key_of_prefix), list):
        start = len(schema[key_of_prefix])
    demands = (shapes.part(place, inner, key, holds),)
    if holds:
        yield only("array", [Shape("array", MEANT, spans=((start, None, demands),), seen=Seen(all_items=True))])
    elif shapes.wide and start:
        yield {"array": [Shape("array", MEANT, least=start + 1)]}
    elif start == 0:
        yield {"array": [Shape("array", MEANT, contains=((demands, 1, None),))]}
    else:
        yield {"array": [having(index, demands) for index in (start, start + 1)]}


def _contains(shapes: Shapes, schema: Mapping, place: Place, inner: Any, holds: bool) -> Iterator[Forms]:
    least = _count(schema.get("minContains", 1), place, "minContains")
    most = _count(schema["maxContains"], place, "maxContains") if "maxContains" in schema else None
    if shapes.places.old:  # knows neither of the two
        least, most = 1 if shapes.wide else max(least, 1), most if holds and not shapes.wide else None
    demands = (shapes.part(place, inner, "contains"),)
    if holds:
        seen = Seen(found=() if shapes.places.draft2019 else (demands,))
        yield only("array", [Shape("array", MEANT, contains=((demands, least, most),), seen=seen)])
        return
    ways = []
    if least == 1:
        ways.append(Shape("array", MEANT, spans=((0, None, shapes.denied(demands)),)))
    elif least:
        ways.append(Shape("array", MEANT, contains=((demands, 0, least - 1),)))
    if most is not None:
        ways.append(Shape("array", MEANT, contains=((demands, most + 1, None),)))
    yield {"array": ways}


def _unique(shapes: Shapes, schema: Mapping, place: Place, inner: Any, holds: bool) -> Iterator[Forms]:
    if inner and holds:
        yield only("array", [Shape("array", MEANT, unique=True)])
    elif inner and shapes.wide:
        yield {"array": [Shape("array", MEANT, least=2)]}
    elif inner:  # two that are equal, of the simplest
        simple = (None, True, 0, 1, "", "a")
        twice = [(Demand(shapes.made({"const": value}, place, place.where)),) for value in simple]
        yield {"array": [Shape("array", MEANT, least=2, spans=((0, 2, demands),)) for demands in twice]}


def _properties(shapes: Shapes, schema: Mapping, place: Place, inner: Any, holds: bool) -> Iterator[Forms]:
    named = [(name, (shapes.part(place, value, name, holds),)) for name, value in inner.items()]
    if holds:
        yield only("object", [Shape("object", MEANT, named=tuple(named), seen=Seen(names=frozenset(inner)))])
    else:
        yield {"object": [having(name, demands) for name, demands in named]}


def _pattern_properties(shapes: Shapes, schema: Mapping, place: Place, inner: Any, holds: bool) -> Iterator[Forms]:
    for pattern, value in inner.items():
        _check_pattern(pattern, place, "patternProperties")
        demands = (shapes.part(place, value, f"patternProperties.{pattern}", holds),)
        if holds:
            yield only("object", [Shape("object", MEANT, matching=((pattern, demands),),
                                        seen=Seen(patterns=(pattern,)))])
        elif shapes.wide:
            yield {"object": [NOT_EMPTY]}
        else:
            name = shortest_text(shapes.finder.automaton(pattern, False))
            if name is not None:
                yield {"object": [having(name, demands)]}


def _additional(shapes: Shapes, schema: Mapping, place: Place, inner: Any, holds: bool) -> Iterator[Forms]:
    names = frozenset(schema.get("properties", {}))
    patterns = tuple(schema.get("patternProperties", {}))
    demands = (shapes.part(place, inner, "additionalProperties", holds),)
    if holds:
        yield only("object", [Shape("object", MEANT, extras=((names, patterns, demands),),
                                    loose=inner is not False, seen=Seen(all_names=True))])
    elif shapes.wide:
        yield {"object": [NOT_EMPTY]}
    else:
        new = next((name for name in ("other", "extra", "more", "x", "y", "Other", "0", "_", "-", "42", "ABC", "/")
                    if name not in names and not any(shapes.finder.finds(pattern, name, wide=True)
                                                     for pattern in patterns)), None)
        yield {"object": [] if new is None else [having(new, demands)]}  # if one is found at once


def _keys(shapes: Shapes, schema: Mapping, place: Place, inner: Any, holds: bool) -> Iterator[Forms]:
    demands = (shapes.part(place, inner, "propertyNames", holds),)
    if holds:
        yield only("object", [Shape("object", MEANT, keys=demands)])
        return
    if shapes.wide:
        yield {"object": [NOT_EMPTY]}
        return
    for shape in shapes.of(demands).get("string", ()):
        name = value_of(shape.fixed[0]) if shape.fixed else None
        if name is None:
            text = shortest_text(compile_part(shapes.text(replace(shape, forms=())), shapes.effort))
            name = None if text is None else json.loads(f'"{text}"')
        if name is not None:
            yield {"object": [Shape("object", MEANT, required=(name,))]}


def _required(shapes: Shapes, schema: Mapping, place: Place, inner: Any, holds: bool) -> Iterator[Forms]:
    if not all(isinstance(name, str) for name in inner):
        raise DgemmaError(f"{place.where}.required must list names")
    if holds:
        yield only("object", [Shape("object", MEANT if inner else OPEN, required=tuple(dict.fromkeys(inner)))])
    else:
        yield {"object": [shapes.lacking(name, place) for name in dict.fromkeys(inner)]}


def _dependent(shapes: Shapes, schema: Mapping, place: Place, inner: Any, holds: bool, key: str) -> Iterator[Forms]:
    """dependentRequired, dependentSchemas, dependencies: where a property is, more is demanded."""
    if not holds and not shapes.wide and (key == "dependencies") != shapes.places.old:
        return  # of another draft: it may mean nothing
    for name, value in inner.items():
        present = Shape("object", MEANT, required=(name,))
        if isinstance(value, list):
            if not all(isinstance(one, str) for one in value):
                raise DgemmaError(f"{place.where}.{key} must list names")
            needed = Shape("object", MEANT, required=tuple(dict.fromkeys((name, *value))))
            if holds:
                yield only("object", [shapes.lacking(name, place), needed])
            else:
                yield shapes.both({"object": [present]},
                                {"object": [shapes.lacking(one, place) for one in dict.fromkeys(value)]})
            continue
        forms = shapes.one(shapes.part(place, value, f"{key}.{name}", holds))
        there = shapes.both({"object": [present]}, {"object": forms.get("object", [])})
        yield only("object", [shapes.lacking(name, place), *there.get("object", [])]) if holds else there


_Keyword = Callable[["Shapes", Mapping, Place, Any, bool], Iterator[Forms]]


def _named(method: Callable[..., Iterator[Forms]], *names: Any) -> _Keyword:
    return lambda shapes, schema, place, inner, holds: method(shapes, schema, place, inner, holds, *names)


# Reading a keyword of one type; "prefixItems", "items" and so on say by themselves where they begin.
KEYWORDS: dict[str, _Keyword] = {
    **{key: _named(_bounds, key) for key in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")},
    "multipleOf": _multiple,
    "minLength": _named(_size, "minLength", "string"), "maxLength": _named(_size, "maxLength", "string"),
    **{key: _named(_content, key) for key in ("contentEncoding", "contentMediaType")},
    "pattern": _pattern, "format": _format,
    "minItems": _named(_size, "minItems", "array"), "maxItems": _named(_size, "maxItems", "array"),
    **{key: _named(_items, key) for key in ("prefixItems", "items", "additionalItems")},
    "contains": _contains, "uniqueItems": _unique,
    "minProperties": _named(_size, "minProperties", "object"),
    "maxProperties": _named(_size, "maxProperties", "object"),
    "properties": _properties, "patternProperties": _pattern_properties,
    "additionalProperties": _additional, "propertyNames": _keys, "required": _required,
    **{key: _named(_dependent, key) for key in ("dependentRequired", "dependentSchemas", "dependencies")},
}


def _count(value: Any, place: Place, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < inf or value != int(value):
        raise DgemmaError(f"{place.where}.{key} must be a whole number, at least 0, got {value!r}")
    return int(value)


def _check_pattern(pattern: Any, place: Place, key: str) -> None:
    if not isinstance(pattern, str):
        raise DgemmaError(f"{place.where}.{key} must be a regular expression as text, got {pattern!r}")
    try:
        parse_regex(pattern, search=True)
    except DgemmaError as error:
        raise DgemmaError(f"{place.where}.{key}: {error}") from error
