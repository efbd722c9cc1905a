"""JSON values: their types, equality as JSON Schema means it, and the one way in which they are written here.

Knows nothing of schemas, languages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

KINDS = ("object", "array", "string", "number", "boolean", "null")
COMMA, COLON = ", ", ": "


def dumps(value: Any) -> str:
    """A value in the one way in which it is written here."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(COMMA, COLON))


def kind_of(value: Any) -> str:
    """The JSON type of a value, integers being numbers; TypeError for what is none."""
    if value is None:
        return "null"
    for kind, types in (("boolean", bool), ("number", (int, float)), ("string", str), ("array", list),
                        ("object", Mapping)):
        if isinstance(value, types):
            return kind
    raise TypeError(f"{value!r} is no JSON value")


def identity(value: Any) -> Any:
    """Something hashable that is equal for two values exactly when JSON says so: 1 is 1.0 and is not true."""
    kind = kind_of(value)
    if kind == "number":
        return kind, exact(value)
    if kind == "array":
        return kind, tuple(identity(item) for item in value)
    if kind == "object":
        return kind, frozenset((name, identity(item)) for name, item in value.items())
    return kind, value


def exact(value: float) -> Decimal:
    """A number as it is written, not as a double holds it."""
    return Decimal(repr(value)) if isinstance(value, float) else Decimal(value)
