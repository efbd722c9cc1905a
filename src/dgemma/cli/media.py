"""Pictures and films that a command is given: files, stdin, paths dropped on a terminal; as parts of a message.

Works on paths and bytes. Knows nothing of: what is in a picture, what sees it.
"""

from __future__ import annotations

import base64
import mimetypes
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from dgemma.cli.streams import stdin_bytes
from dgemma.errors import DgemmaError

STDIN = Path("-")
_PICTURES = frozenset(".png .jpg .jpeg .jfif .webp .gif .bmp .tif .tiff .avif .heic .heif .jp2 .ppm .qoi .ico".split())
_FILMS = frozenset(".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .ogv .3gp".split())
_BEGINNINGS = {b"\x89PNG": "image/png", b"\xff\xd8": "image/jpeg", b"GIF8": "image/gif", b"RIFF": "image/webp",
               b"BM": "image/bmp"}


def media_part(kind: str, path: Path, **how: Any) -> dict[str, Any]:
    """A part of a message that shows a file.

    ``how``: "tokens" or "fps", None for what the model takes by itself. Raises DgemmaError for a file that cannot be
    read.
    """
    try:
        with path.open("rb"):
            return {"type": kind, "path": str(path.absolute()), **_given(how)}
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL in it
        raise DgemmaError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error


def stdin_part(**how: Any) -> dict[str, Any]:
    """`media_part` of a picture on stdin."""
    return {"type": "image", "image": stdin_bytes(), "name": "the picture on stdin", **_given(how)}


def _given(how: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in how.items() if value is not None}


def dropped(message: str) -> tuple[str, Path] | None:
    """What a message shows that is nothing but the path of a picture or film that is there, as terminals write one
    that is dropped on them: in quotes, with backslashes before blanks, or as a file: URL."""
    text = message.strip()
    try:
        words = shlex.split(text)
    except ValueError:  # a quote without an end
        words = []
    for name in (text, *words) if len(words) == 1 else (text,):
        if name.lower().startswith("file://"):
            name = unquote(urlsplit(name).path)
        suffix = Path(name).suffix.lower()
        kind = "image" if suffix in _PICTURES else "video" if suffix in _FILMS else None
        try:
            if kind is not None and (path := Path(name).expanduser()).is_file():
                return kind, path
        except (OSError, ValueError, RuntimeError):  # no name of a file, or ~someone who does not exist
            continue
    return None


def sent(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages as OpenAI's API has them: what they show goes along, as data: URLs. Raises DgemmaError."""
    return [{**message, "content": [_sent(part) for part in message["content"]]}
            if isinstance(message.get("content"), list) else dict(message) for message in messages]


def _sent(part: Mapping[str, Any]) -> Mapping[str, Any]:
    kind = part.get("type")
    if kind not in ("image", "video"):
        return part
    for name, option in (("tokens", "--image-tokens"), ("fps", "--fps")):
        if name in part:
            raise DgemmaError(f"{option} is for a model on this machine: the server decides it for itself")
    if isinstance(url := part.get("url"), str):
        return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}
    path = str(part.get("path", ""))
    try:
        data = part[kind] if isinstance(part.get(kind), bytes) else Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise DgemmaError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    named = mimetypes.guess_type(path)[0]
    known = next((found for begin, found in _BEGINNINGS.items() if kind == "image" and data.startswith(begin)), named)
    type = known or {"image": "image/png", "video": "video/mp4"}[kind]
    url = f"data:{type};base64,{base64.b64encode(data).decode()}"
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}


def said_of(parts: Sequence[Mapping[str, Any]], words: str) -> dict[str, Any]:
    """What the user says of what is shown: pictures before words, as the model wants them."""
    return {"role": "user", "content": [*parts, {"type": "text", "text": words}] if parts else words}


def waiting(messages: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], list[Mapping[str, Any]]]:
    """A conversation up to what is shown at its end and no word has been said of yet, and the parts that are."""
    last = messages[-1] if messages else {}
    content = last.get("content")
    shown = isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") in ("image", "video")
                                              for part in content)
    if last.get("role") != "user" or not isinstance(content, list) or not shown:
        return list(messages), []
    return list(messages[:-1]), content
