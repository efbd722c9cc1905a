"""Where the pictures and films of a request come from: out of the request itself, or from a domain that is allowed.

Works on: addresses, bytes. Knows nothing of: what pictures are.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_to_bytes, urljoin, urlsplit

from dgemma.serve.errors import ApiError

_HOPS = 3  # redirects that are followed, each checked as the first address was

# The addresses of a host and port, as text. Raises OSError where it has none.
Resolve = Callable[[str, int], Sequence[str]]


@dataclass(frozen=True)
class MediaRules:
    """What may be fetched: from these ``domains`` and what is below them ("*": from any), so many bytes, so long.

    Whatever the domain, an address that is not the public internet's is never asked: a name that somebody else owns
    may point into this network.
    """

    domains: tuple[str, ...] = ()
    max_bytes: int = 64 << 20
    seconds: float = 15.0
    is_public: Callable[[str], bool] = lambda address: ipaddress.ip_address(address).is_global

    def allows(self, host: str) -> bool:
        return any(domain == "*" or host == domain or host.endswith("." + domain) for domain in self.domains)


def addresses_of(host: str, port: int) -> list[str]:
    """What a name stands for, asked once."""
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def media_in(prompt: Any) -> Iterator[Mapping[str, Any]]:
    """The parts of a conversation that are to be seen (`dgemma.serve.bodies.media`)."""
    for message in prompt if isinstance(prompt, list) else ():
        content = message.get("content") if isinstance(message, Mapping) else None
        yield from (part for part in (content if isinstance(content, list) else ()) if _is_media(part))


def with_media(prompt: Any, rules: MediaRules, resolve: Resolve = addresses_of) -> Any:
    """A conversation with the bytes of its pictures and films in place of their URLs; other prompts as they are.

    Raises `ApiError`, naming the field that a part came in.
    """
    if next(media_in(prompt), None) is None:
        return prompt

    def fetched(part: Any) -> Any:
        if not _is_media(part):
            return part
        kept = {name: value for name, value in part.items() if name != "url"}
        return kept | {part["type"]: media_bytes(part["url"], rules, part["name"], resolve)}

    return [{**message, "content": [fetched(part) for part in message["content"]]}
            if isinstance(message.get("content"), list) else message for message in prompt]


def _is_media(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in ("image", "video")


def media_bytes(url: str, rules: MediaRules, where: str, resolve: Resolve = addresses_of) -> bytes:
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
    return _fetched(url, rules, where, resolve)


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


def _fetched(url: str, rules: MediaRules, where: str, resolve: Resolve) -> bytes:
    """What an address answers, after at most a few redirects."""
    import httpx2

    deadline = time.monotonic() + rules.seconds
    with httpx2.Client(trust_env=False, timeout=rules.seconds) as client:
        for _ in range(_HOPS + 1):
            try:
                target, host = _checked(url, rules, where, resolve)
                with client.stream("GET", target, headers={"Host": host, "Accept-Encoding": "identity"},
                                   extensions={"sni_hostname": host.rsplit(":", 1)[0]}) as response:
                    if response.is_redirect:
                        url = urljoin(url, response.headers.get("location", ""))
                        continue
                    if response.status_code != 200:
                        raise ApiError(400, f"{where}: {host} answers {response.status_code}", where)
                    return _body(response.iter_raw(1 << 16), rules, deadline, where)
            except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:
                raise ApiError(400, f"{where}: cannot be fetched: {str(error) or type(error).__name__}",
                               where) from error
    raise ApiError(400, f"{where}: redirected more than {_HOPS} times", where)


def _checked(url: str, rules: MediaRules, where: str, resolve: Resolve) -> tuple[str, str]:
    """An address by number instead of by name, and what goes into Host. Raises `ApiError` for one that is not allowed.

    The name is resolved here and never again: what was checked is what is connected to.
    """
    parts = urlsplit(url)
    host = (parts.hostname or "").rstrip(".").lower()
    if parts.scheme not in ("http", "https") or not host or not rules.allows(host):
        raise ApiError(400, f"{where}: this server does not fetch from {host or parts.scheme or 'there'}", where)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    found = resolve(host, port)
    if not found or not all(map(rules.is_public, found)):
        raise ApiError(400, f"{where}: {host} is not an address of the public internet", where)
    number = f"[{found[0]}]" if ":" in found[0] else found[0]
    named = host if parts.port is None else f"{host}:{port}"
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return f"{parts.scheme}://{number}:{port}{path}", named


def _body(chunks: Iterable[bytes], rules: MediaRules, deadline: float, where: str) -> bytes:
    """All of an answer, unless it is too long or too slow. Raises `ApiError`."""
    parts, size = [], 0
    for chunk in chunks:
        size += len(chunk)
        if size > rules.max_bytes:
            raise ApiError(400, f"{where}: more than {rules.max_bytes >> 20} MB", where)
        if time.monotonic() > deadline:
            raise ApiError(400, f"{where}: not there after {rules.seconds:g} seconds", where)
        parts.append(chunk)
    return b"".join(parts)
