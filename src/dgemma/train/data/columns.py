"""The pictures and films of a row: in the parts of its messages, as the API has them, or in columns beside these.

Works on plain dictionaries. Knows nothing of tokens, and opens no file: paths become those seen from where the program
runs, Arrow's pictures ({"bytes", "path"}, as the `datasets` library stores them) their bytes.
"""

from __future__ import annotations

import mimetypes
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dgemma.errors import DgemmaError

# What the parts of messages and the columns of rows with pictures and films are called.
_KINDS = {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}
_COLUMNS = {"images": "image", "image": "image", "videos": "video", "video": "video"}
# Where a row has none of these: beside them it says where they come from.
_PATHS = {"image_path": "image", "video_path": "video"}
_MARK = re.compile(r"\s*<(image|video)>\s*")
_SOURCES = ("image", "video", "path", "url", "image_url", "video_url")


def with_media(messages: Sequence[dict[str, Any]], row: Mapping[str, Any], folder: Path | None,
               image_tokens: int | None = None) -> list[dict[str, Any]]:
    """A row's messages with its pictures and films in them, those of its columns, too.

    What stands in columns fills parts without a source, in order, or marks for them in texts ("<image>", as LLaVA's
    data have it); without any it stands before the words of the first user message, since all answers of the row are
    about it. ``image_tokens`` is for pictures that do not say "tokens" themselves. Raises DgemmaError where there are
    not as many as there are places.
    """
    columns = _in_columns(row)
    if columns:
        messages = [_unmarked(message) for message in messages]
    empty = [part for part in _media_parts(messages) if not any(part.get(key) is not None for key in _SOURCES)]
    if empty and [_KINDS[part["type"]] for part in empty] != [part["type"] for part in columns]:
        raise DgemmaError(f"{len(empty)} parts of the messages are pictures or films without a source, and the columns "
                          f"{', '.join(_COLUMNS)} hold {len(columns)}, or in another order")
    left = iter(columns)

    def ready(part: Any) -> Any:
        if not _is_medium(part):
            return part
        found = _sourced({**part, **next(left)} if any(part is one for one in empty) else part, folder)
        says_nothing = image_tokens is None or "tokens" in found or _KINDS[found["type"]] != "image"
        return found if says_nothing else {**found, "tokens": image_tokens}

    if columns and not empty:
        messages = _put_first(messages, columns)
    return [{**message, "content": [ready(part) for part in message["content"]]}
            if isinstance(message.get("content"), list) else message for message in messages]


def has_media(row: Mapping[str, Any]) -> bool:
    """Whether there are pictures or films in a row's columns."""
    return bool(_in_columns(row))


def of_image_folder(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a folder's metadata file as the `datasets` library's imagefolder has it: what ``file_name`` names is its
    picture or film; ``X_file_name`` and ``X_file_names`` are its column X."""
    found = {}
    for name, value in row.items():
        column = re.fullmatch(r"(?:(.+)_)?file_names?", name)
        if column is None:
            found[name] = value
        elif column[1]:
            found[column[1]] = value
        else:
            first = next(iter(_several(value, name)), "")
            film = str(mimetypes.guess_type(str(first))[0]).startswith("video/")
            found["video" if film else "image"] = value
    return found


def _in_columns(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The pictures and films in a row's columns as parts; DgemmaError for those of a column of another name."""
    others = [name for name, value in row.items() if name not in _COLUMNS and _is_stored(value)]
    if others:
        raise DgemmaError(f"column {others[0]!r} holds a picture or film, which are taken from columns called "
                          f"{', '.join(_COLUMNS)}: rename it, or drop it")
    return next(filter(None, ([{"type": kind, kind: source} for name, kind in names.items()
                               for source in _several(row.get(name), name)] for names in (_COLUMNS, _PATHS))), [])


def _is_stored(value: Any) -> bool:
    """Whether this is a file as Arrow holds it, or a list of such."""
    if isinstance(value, list):
        return bool(value) and all(map(_is_stored, value))
    return isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes) and value.keys() <= {"bytes", "path"}


def _unmarked(message: dict[str, Any]) -> dict[str, Any]:
    """A message with parts for the marks in its text."""
    text = message.get("content")
    if not isinstance(text, str) or not (pieces := _MARK.split(text))[1:]:
        return message
    parts = [{"type": piece} if place % 2 else {"type": "text", "text": piece} for place, piece in enumerate(pieces)]
    return {**message, "content": [part for part in parts if part["type"] != "text" or part["text"]]}


def _put_first(messages: Sequence[dict[str, Any]], parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    place = next((index for index, message in enumerate(messages) if message.get("role") == "user"), None)
    if place is None:
        raise DgemmaError("the pictures in this row's columns belong to a message of the user, and there is none")
    words = messages[place].get("content")
    said = words if isinstance(words, list) else [{"type": "text", "text": words}]
    return [*messages[:place], {**messages[place], "content": [*parts, *said]}, *messages[place + 1 :]]


def _media_parts(messages: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for message in messages:
        content = message.get("content")
        yield from filter(_is_medium, content if isinstance(content, list) else ())


def _is_medium(part: Any) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("type"), str) and part["type"] in _KINDS


def _several(value: Any, name: str) -> list[Any]:
    """What a column holds: one, a list, or nothing."""
    if value is None:
        return []
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return list(value)
    if name in ("images", "videos"):
        raise DgemmaError(f"column {name!r} must be a list, not {type(value).__name__}")
    return [value]


def _sourced(part: Mapping[str, Any], folder: Path | None) -> dict[str, Any]:
    """A part with its path as seen from here, and the bytes of what Arrow holds."""
    keys = ("image", "video", "path")
    found = {key: value for key, value in part.items() if key not in keys}
    for key in keys:
        value = part.get(key)
        if isinstance(value, Mapping):
            value = value.get("bytes", value.get("path", value.get("url")))
            if value is None:
                raise DgemmaError(f"a part's {key} is an object, but has no bytes, path or url")
        if isinstance(value, str) and (value.startswith("data:") or "://" in value):
            found["url"] = value
        elif isinstance(value, (str, Path)):
            found["path"] = str((folder or Path()) / Path(value).expanduser())
        elif value is not None:
            found[key] = value
    return found
