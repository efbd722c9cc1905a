"""Reading what comes from outside: text, JSON, and the fields in it; every mistake is an error naming file and field.

Works on paths, bytes and plain data. Knows nothing of what the fields mean. Whoever reads a file that others wrote
reads it here: it may be missing, cut off, no text, nested a million deep, or have anything in the place of anything.
"""

from __future__ import annotations

import codecs
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard, overload

from dgemma.errors import CheckpointError, DgemmaError

_NESTING = 64  # no file that we read needs a tenth of it
_LARGEST_FILE = 1 << 30  # a tokenizer.json of 262144 tokens takes 32 MB
_MOST = (1 << 31) - 1
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")

Failure = type[DgemmaError]


def is_there(path: str | Path) -> bool:
    """Whether there is anything of this name, a folder or a link to nothing included: reading it says what is wrong."""
    return os.path.lexists(path)


def read_bytes(path: Path, failure: Failure = CheckpointError) -> bytes:
    """A file's bytes; raises ``failure`` naming it when it cannot be read, is no file, or is absurdly large."""
    try:
        if path.is_dir():
            raise failure(f"{path}: this is a folder, where a file is expected")
        if path.stat().st_size > _LARGEST_FILE:
            raise failure(f"{path}: {path.stat().st_size:,} bytes are more than any such file takes")
        return path.read_bytes()
    except FileNotFoundError as error:
        what = "a link to a file that is not there" if path.is_symlink() else "no such file"
        raise failure(f"{path}: cannot be read ({what})") from error
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL in it
        raise failure(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def read_text(path: Path, failure: Failure = CheckpointError) -> str:
    """A UTF-8 file's text, without a byte order mark; raises ``failure`` naming it and the place of a mistake."""
    return decoded(read_bytes(path, failure), str(path), failure)


def decoded(data: bytes, where: str, failure: Failure = CheckpointError) -> str:
    """UTF-8 as text, without a byte order mark; ``where`` names the file in errors."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise failure(f"{where}: {_no_text(data, error)}") from error


def _no_text(data: bytes, error: UnicodeDecodeError) -> str:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "not UTF-8 text but UTF-16: save it as UTF-8"
    return f"not UTF-8 text (byte {error.start:,}: {error.reason})"


def read_json(path: Path, failure: Failure = CheckpointError) -> dict[str, Any]:
    """The JSON object in a file; raises ``failure`` naming the file and the place of a mistake in it."""
    return parse_json(read_bytes(path, failure), str(path), failure)


def parse_json(data: bytes | str, where: str, failure: Failure = CheckpointError, *,
               halves: bool = False) -> dict[str, Any]:
    """The JSON object in a text; ``where`` names the file in errors, ``halves`` as in `parse_json_value`."""
    value = parse_json_value(data, where, failure, halves=halves)
    if not isinstance(value, dict):
        raise failure(f"{where}: expected a JSON object, found {kind_of(value)}")
    return value


def parse_json_value(data: bytes | str, where: str, failure: Failure = CheckpointError, *, halves: bool = False) -> Any:
    """Any JSON value. Nesting without end, and a name that stands twice for different things, are refused, too.

    So is text with half a character in it (a lone surrogate), which has no UTF-8 form, unless ``halves`` are allowed.
    """
    text = ""
    try:
        text = data.decode("utf-8-sig") if isinstance(data, bytes) else data
        value = json.loads(text, object_pairs_hook=_object)
        deep = is_deep(value, _NESTING)
        if not halves and not deep and _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise failure(f"{where}: not valid JSON (half a character, {shown(error.object[error.start])})") from error
    except UnicodeDecodeError as error:
        assert isinstance(data, bytes)
        raise failure(f"{where}: not valid JSON ({_no_text(data, error)})") from error
    except RecursionError:
        deep = True
        value = None
    except ValueError as error:  # of JSON, of a number of thousands of digits, of `_object`
        what = "it is empty" if not text.strip() else str(error)
        raise failure(f"{where}: not valid JSON ({what})") from error
    if deep:
        raise failure(f"{where}: not valid JSON (nested more than {_NESTING} deep)")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: dict[str, Any] = {}
        for name, value in pairs:
            if name in seen and repr(seen[name]) != repr(value):
                raise ValueError(f"{shown(name)} is there twice")
            seen[name] = value
    return found


def is_deep(value: Any, levels: int) -> bool:
    """Whether objects and lists are nested deeper than that; however deep they are, this is not."""
    level = [value] if isinstance(value, (dict, list, tuple)) else []
    for _ in range(levels):
        if not level:
            return False
        level = [item for outer in level for item in (outer.values() if isinstance(outer, dict) else outer)
                 if isinstance(item, (dict, list, tuple))]
    return bool(level)


def shown(value: Any, most: int = 60) -> str:
    """A value for a message: on one line, harmless, and short."""
    if isinstance(value, (dict, list)) and len(value) > 20:
        return f"{kind_of(value)} of {len(value):,}"
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # ValueError: a number of thousands of digits
        text = kind_of(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def kind_of(value: Any) -> str:
    """What JSON calls a value's type."""
    for kinds, name in (((bool,), "true or false"), ((int, float), "number"), ((str,), "text"), ((list,), "list"),
                        ((dict,), "object")):
        if isinstance(value, kinds):
            return name
    return "null" if value is None else type(value).__name__


def is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


@dataclass(frozen=True)
class Fields:
    """The fields of one object of a file, each read as what it has to be.

    ``source`` names the file in errors, ``prefix`` the object ("text_config."). A field that is null is absent. Every
    method raises ``failure`` naming file and field for a value of another type or size, and for an absent one that has
    no default.
    """

    data: Mapping[str, Any]
    source: str
    prefix: str = ""
    failure: Failure = CheckpointError

    def wrong(self, name: str, rule: str) -> DgemmaError:
        """The error for a field that breaks a rule, such as "must be a list"."""
        return self.failure(f"{self.source}: {self.prefix}{name} {rule}, got {shown(self.data.get(name))}")

    def missing(self, name: str) -> DgemmaError:
        return self.failure(f"{self.source}: {self.prefix}{name} is missing")

    def whole(self, name: str, default: int | None = None, least: int = 1, most: int = _MOST) -> int:
        """A whole number of ``least`` to ``most``."""
        value = self.data.get(name)
        if value is None:
            if default is None:
                raise self.missing(name)
            return default
        if not is_whole(value) or value < least:
            raise self.wrong(name, f"must be a whole number of at least {least}")
        if value > most:
            raise self.wrong(name, f"must be a whole number of at most {most:,}")
        return value

    def positive(self, name: str, default: float, most: float = 3e38) -> float:
        """A number above 0, and at most ``most``: by itself what float32 holds."""
        value = self.data.get(name)
        if value is None:
            return default
        if not is_number(value) or value <= 0:
            raise self.wrong(name, "must be a number above 0")
        if value > most:
            raise self.wrong(name, f"must be at most {most:g}")
        return float(value)

    def flag(self, name: str) -> bool | None:
        """True, false, or None where it is absent."""
        value = self.data.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, "must be true or false")
        return value

    @overload
    def text(self, name: str) -> str | None: ...
    @overload
    def text(self, name: str, default: str) -> str: ...
    def text(self, name: str, default: str | None = None) -> str | None:
        value = self.data.get(name)
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, "must be text")
        return default if value is None else value

    def texts(self, name: str) -> list[str] | None:
        """A list of texts, or None where it is absent."""
        value = self.data.get(name)
        if value is not None and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            raise self.wrong(name, "must be a list of names")
        return value

    def within(self, name: str) -> Fields | None:
        """The fields of an object in this one, or None where it is absent."""
        value = self.data.get(name)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.wrong(name, "must be an object")
        return Fields(value, self.source, f"{self.prefix}{name}.", self.failure)
