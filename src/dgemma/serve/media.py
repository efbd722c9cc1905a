"""Where the pictures and films of a request come from: out of the request itself, or from a domain that is allowed.

Works on: addresses, bytes. Knows nothing of: what pictures are.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote_to_bytes

from dgemma.fetch import FetchError, FetchRules, Resolve, addresses_of, fetch
from dgemma.serve.errors import ApiError


def media_in(prompt: Any) -> Iterator[Mapping[str, Any]]:
    """The parts of a conversation that are to be seen (`dgemma.serve.bodies.media`)."""
    for message in prompt if isinstance(prompt, list) else ():
        content = message.get("content") if isinstance(message, Mapping) else None
        yield from (part for part in (content if isinstance(content, list) else ()) if _is_media(part))


def with_media(prompt: Any, rules: FetchRules, resolve: Resolve = addresses_of) -> Any:
    """A conversation with the bytes of its pictures and films in place of their URLs; other prompts as they are.

    A part that has its bytes already keeps them.

    Raises `ApiError`, naming the field that a part came in.
    """
    if next(media_in(prompt), None) is None:
        return prompt

    def fetched(part: Any) -> Any:
        if not _is_media(part) or part.get(part["type"]) is not None:
            return part
        kept = {name: value for name, value in part.items() if name != "url"}
        return kept | {part["type"]: media_bytes(part["url"], rules, part["name"], resolve)}

    return [{**message, "content": [fetched(part) for part in message["content"]]}
            if isinstance(message.get("content"), list) else message for message in prompt]


def _is_media(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in ("image", "video")


def media_bytes(url: str, rules: FetchRules, where: str, resolve: Resolve = addresses_of) -> bytes:
    """What a data URL holds, or what an address that ``rules`` allow answers with.

    ``where`` names the field in errors. Raises `ApiError`.
    """
    if url[:5].lower() == "data:":
        return _data(url[5:], where)
    scheme = url.partition(":")[0].lower()
    if scheme not in ("http", "https"):
        raise ApiError(400, f"{where}: a picture comes as a data: URL (data:image/png;base64,…), not as "
                       f"{scheme[:20] + ':' if ':' in url[:21] else 'text'}", where)
    if not rules.domains:
        raise ApiError(400, f"{where}: this server fetches nothing: send the picture itself, as a data: URL "
                       "(data:image/png;base64,…)", where)
    try:
        return fetch(url, rules, resolve).data
    except FetchError as error:
        raise ApiError(400, f"{where}: {error}", where) from error


def _data(rest: str, where: str) -> bytes:
    """What stands behind the "data:" of such a URL (RFC 2397)."""
    head, comma, data = rest.partition(",")
    if not comma:
        raise ApiError(400, f"{where}: a data: URL is data:image/png;base64,…: the comma is missing", where)
    plain = unquote_to_bytes(data)
    if not head.lower().endswith(";base64"):
        return plain
    try:
        return base64.b64decode(b"".join(plain.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, f"{where}: not base64: {error}", where) from error
