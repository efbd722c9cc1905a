"""The places in a JSON schema, and what its references point at: JSON pointers, `$id`, anchors, dynamic anchors.

Only what the document itself holds can be found. Knows nothing of what schemas mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin

from dgemma.errors import DgemmaError

_ONE = ("additionalItems", "additionalProperties", "contains", "contentSchema", "else", "if", "items", "not",
        "propertyNames", "then", "unevaluatedItems", "unevaluatedProperties")
_SEVERAL = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_NAMED = ("$defs", "definitions", "dependencies", "dependentSchemas", "patternProperties", "properties")
_OLD = ("draft-03", "draft-04", "draft-06", "draft-07")  # beside a $ref, these look at nothing else


@dataclass(frozen=True)
class Place:
    """A schema in its surroundings."""

    schema: Any
    base: str  # the address that its references are relative to
    entered: tuple[str, ...]  # resources on the way here, the outermost first; empty where nothing asks for them
    where: str  # for people


class Places:
    """Every schema that was met, by number; the root is 0."""

    def __init__(self, root: Any):
        self.root = root
        self._places: list[Place] = []
        self._numbers: dict[tuple[int, str, tuple[str, ...]], int] = {}
        self._resources: dict[str, Any] = {"": root}
        self._anchors: dict[tuple[str, str], tuple[Any, str]] = {}
        self._moving: set[tuple[str, str]] = set()  # dynamic anchors
        self._bases: dict[int, str] = {}
        self._dynamic = False
        said = root.get("$schema") if isinstance(root, Mapping) else None
        self.old = isinstance(said, str) and any(name in said for name in _OLD)
        self._undated = said is None
        self.draft2019 = isinstance(said, str) and "2019-09" in said
        self._index(root)
        self.add(root, "", ("",) if self._dynamic else (), "the schema")

    def __getitem__(self, number: int) -> Place:
        return self._places[number]

    def add(self, schema: Any, base: str, entered: tuple[str, ...], where: str) -> int:
        """The number of a schema at a place."""
        name = _identifier(schema, self.old)
        if name is not None:
            base = _absolute(base, name)
            if self._dynamic and base not in entered:
                entered = (*entered, base)
        key = (id(schema), base, entered)
        if key not in self._numbers:
            self._numbers[key] = len(self._places)
            self._places.append(Place(schema, base, entered, where))  # which keeps the schema, so that its id stays
        return self._numbers[key]

    def part(self, place: Place, schema: Any, where: str) -> int:
        """The number of a schema inside another; ``where``: from there."""
        return self.add(schema, place.base, place.entered, f"{place.where}.{where}")

    def refer(self, place: Place, reference: Any, dynamic: bool = False) -> int:
        """The number of what a reference points at; raises DgemmaError when it is not in the document."""
        if not isinstance(reference, str):
            raise DgemmaError(f"{place.where} has the $ref {reference!r}: it must be text")
        if self._undated and place.schema is not self.root and _identifier(place.schema, False) is not None:
            raise DgemmaError(f"{place.where} has '$id' beside '$ref', which drafts of JSON Schema read differently: "
                              "say which it is with $schema")
        url, fragment = urldefrag(_absolute(place.base, reference))
        if url not in self._resources:
            raise DgemmaError(f"{place.where} has the $ref {reference!r}: only those within the schema are supported")
        entered = place.entered
        if dynamic and (url, fragment) in self._moving:
            url = next((outer for outer in entered if (outer, fragment) in self._moving), url)
        if fragment and not fragment.startswith("/"):
            if (url, unquote(fragment)) not in self._anchors:
                raise DgemmaError(f"{place.where} has the $ref {reference!r}, but there is nothing")
            target, base = self._anchors[url, unquote(fragment)]
            return self._enter(target, base, entered, reference)
        target, base = self._resources[url], url
        for part in fragment.split("/")[1:]:
            name = unquote(part).replace("~1", "/").replace("~0", "~")
            base = self._bases.get(id(target), base)
            try:
                target = target[int(name)] if isinstance(target, list) else target[name]
            except (KeyError, IndexError, ValueError, TypeError) as error:
                raise DgemmaError(f"{place.where} has the $ref {reference!r}, but there is nothing") from error
        return self._enter(target, base, entered, reference)

    def _enter(self, target: Any, base: str, entered: tuple[str, ...], where: str) -> int:
        """The number of what was found; only the resource that it lies in is entered, none on the way to it."""
        if self._dynamic and base not in entered and _identifier(target, self.old) is None:
            entered = (*entered, base)
        return self.add(target, base, entered, where)

    def recur(self, place: Place) -> int:
        """The number of what `$recursiveRef` points at: this resource, or the outermost that asks to be meant."""
        def asks(url: str) -> bool:
            resource = self._resources.get(url)
            return isinstance(resource, Mapping) and resource.get("$recursiveAnchor") is True

        url = urldefrag(place.base)[0]
        if asks(url):
            url = next((outer for outer in place.entered if asks(outer)), url)
        return self.add(self._resources[url], url, place.entered, "#")

    def _index(self, root: Any) -> None:
        todo = [(root, "")]
        while todo:
            schema, base = todo.pop()
            if not isinstance(schema, Mapping):
                continue
            name = _identifier(schema, self.old)
            if name is not None:
                base = urldefrag(_absolute(base, name))[0]
                self._resources.setdefault(base, schema)
            self._bases[id(schema)] = base
            self._dynamic |= "$dynamicRef" in schema or "$recursiveRef" in schema
            own = schema.get("$id")
            for anchor in (schema.get("$anchor"), schema.get("$dynamicAnchor"),
                           own[1:] if isinstance(own, str) and own.startswith("#") else None):
                if isinstance(anchor, str):
                    self._anchors.setdefault((base, anchor), (schema, base))
            if isinstance(schema.get("$dynamicAnchor"), str):
                self._moving.add((base, schema["$dynamicAnchor"]))
            todo += [(part, base) for part in _parts(schema)]


def _identifier(schema: Any, old: bool) -> str | None:
    """What a schema calls itself, if it begins a resource of its own."""
    name = schema.get("$id") if isinstance(schema, Mapping) else None
    if not isinstance(name, str) or name.startswith("#") or (old and "$ref" in schema):
        return None
    return name


def _absolute(base: str, reference: str) -> str:
    if reference.startswith("#") or not reference:
        return urldefrag(base)[0] + reference
    return urljoin(base, reference)


def _parts(schema: Mapping) -> Iterator[Any]:
    for key in _ONE:
        if isinstance(schema.get(key), Mapping):
            yield schema[key]
    for key in _SEVERAL:
        if isinstance(schema.get(key), list):
            yield from schema[key]
    for key in _NAMED:
        if isinstance(schema.get(key), Mapping):
            yield from schema[key].values()
