"""Files from outside, broken in every way: fields of another type, texts cut, names twice, folders in files' places."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# What may stand where anything else should.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 1 << 31, 1 << 63, 10**30, 10**400, 1.5, -0.0, 1e-320, 1e308, float("nan"),
    float("inf"), "", "x", "5", "05", "\0", "../x", "\x1b[31m", "\ud800", "🙂" * 10, "a" * 3000, "(", [], [0], ["x"],
    [None], [[]], [1, 2, 3], list(range(40)), {}, {"a": 1}, {"content": 5}, {"type": "Sequence"}, {"0": {}},
)


def places(data: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path to every value in JSON data, of long lists and objects those of the first few."""
    yield path
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for count, (key, value) in enumerate(items):
        if count == 40:
            break
        yield from places(value, (*path, key))


def set_at(data: Any, path: tuple, value: Any) -> Any:
    """A copy with another value at a path."""
    if not path:
        return value
    data = copy.deepcopy(data)
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return data


def field_mutations(data: Any) -> list[tuple[str, Any]]:
    """What is changed, and the data so: every value by every one of `VALUES`, every field left out, renamed, added."""
    found = []
    for path in places(data):
        name = ".".join(map(str, path)) or "everything"
        found += [(f"{name} = {value!r:.40}", (path, value)) for value in VALUES]
        if path and isinstance(path[-1], str):
            found += [(f"{name} left out", (path, "left out")), (f"{name} renamed", (path, "renamed"))]
    return found


def apply(data: Any, mutation: tuple) -> Any:
    path, value = mutation
    if path and value in ("left out", "renamed") and isinstance(path[-1], str):
        data = copy.deepcopy(data)
        inner = data
        for key in path[:-1]:
            inner = inner[key]
        taken = inner.pop(path[-1])
        if value == "renamed":
            inner["-1" if path[-1].isdigit() else f"{path[-1]}x"] = taken
        return data
    return set_at(data, path, value)


def as_json(data: Any) -> bytes:
    return json.dumps(data, ensure_ascii=True).encode()


def byte_mutations(data: bytes, rng: random.Random, count: int) -> Iterator[tuple[str, bytes]]:
    """Of a file as bytes: cut, empty, other encodings, nested without end, bytes changed, put in and taken out."""
    yield "empty", b""
    yield "blank", b" \n\t"
    yield "byte order mark", b"\xef\xbb\xbf" + data
    yield "utf-16", data.decode("utf-8", "replace").encode("utf-16")
    yield "latin-1", data.replace(b'"', b'"\xe9', 1)
    yield "NUL", data + b"\0"
    yield "twice", data + data
    for opening in (b"[", b'{"a":', b'[{"a":'):
        yield f"deep {opening!r}", opening * 100_000
        yield f"deep and closed {opening!r}", opening * 500 + b"1" + (b"]" if opening == b"[" else b"}") * 500
    yield "deep within", data.replace(b"{", b'{"deep": ' + b"[" * 50_000 + b"]" * 50_000 + b", ", 1)
    yield "less deep within", data.replace(b"{", b'{"deep": ' + b"[" * 200 + b"]" * 200 + b", ", 1)
    yield "digits", data.replace(b"1", b"1" * 6000, 1)
    yield "html", b"<!DOCTYPE html><html></html>"
    yield "lfs", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    for _ in range(count):
        broken = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            kind, at = rng.randrange(4), rng.randrange(max(len(broken), 1))
            if kind == 0 and broken:
                broken[at] = rng.randrange(256)
            elif kind == 1:
                del broken[at : at + rng.randint(1, 30)]
            elif kind == 2:
                broken[at:at] = rng.choice([b"{", b"}", b"[", b"]", b'"', b",", b":", b"\xff", b"null", b"NaN", b"-",
                                            b"\\"])
            else:
                del broken[at:]
        yield f"bytes {at} {kind}", bytes(broken)


def in_place_of_a_file(path: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Things that are no file, each made where a file was (that is gone when it is called)."""
    yield "a folder", path.mkdir
    yield "a link to nothing", lambda: path.symlink_to(path.parent / "nowhere")
    yield "a link to itself", lambda: path.symlink_to(path)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
