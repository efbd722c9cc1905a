"""Fetching from addresses that somebody else chose: allowed domains, public addresses, so many bytes, so long.

Works on: addresses, bytes. Knows nothing of: what is fetched, who asks.
"""

from __future__ import annotations

import ipaddress
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urljoin, urlsplit

from dgemma.errors import DgemmaError

_HOPS = 3  # redirects that are followed, each checked as the first address was

# The addresses of a host and port, as text. Raises OSError where it has none.
Resolve = Callable[[str, int], Sequence[str]]


class FetchError(DgemmaError):
    """Something that may not or cannot be fetched."""


@dataclass(frozen=True)
class FetchRules:
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


@dataclass(frozen=True)
class Fetched:
    """An answer: its bytes, the address that gave it after redirects, and its Content-Type."""

    data: bytes
    url: str
    type: str


def addresses_of(host: str, port: int) -> list[str]:
    """What a name stands for, asked once."""
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


def fetch(url: str, rules: FetchRules, resolve: Resolve = addresses_of,
          headers: Mapping[str, str] | None = None) -> Fetched:
    """What an http or https address answers, after at most a few redirects. Raises `FetchError`."""
    import httpx2

    deadline = time.monotonic() + rules.seconds
    with httpx2.Client(trust_env=False, timeout=rules.seconds) as client:
        for _ in range(_HOPS + 1):
            try:
                target, host = _checked(url, rules, resolve)
                sent = {**(headers or {}), "Host": host, "Accept-Encoding": "identity"}
                with client.stream("GET", target, headers=sent,
                                   extensions={"sni_hostname": host.rsplit(":", 1)[0]}) as response:
                    if response.is_redirect:
                        url = urljoin(url, response.headers.get("location", ""))
                        continue
                    if response.status_code != 200:
                        raise FetchError(f"{host} answers {response.status_code}")
                    if response.headers.get("content-encoding", "identity").lower() not in ("", "identity"):
                        raise FetchError(f"{host} answers compressed, which it was not asked to")
                    return Fetched(_body(response.iter_raw(1 << 16), rules, deadline), url,
                                   response.headers.get("content-type", ""))
            except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:
                raise FetchError(f"cannot be fetched: {str(error) or type(error).__name__}") from error
    raise FetchError(f"redirected more than {_HOPS} times")


def _checked(url: str, rules: FetchRules, resolve: Resolve) -> tuple[str, str]:
    """An address by number instead of by name, and what goes into Host. Raises `FetchError` for one not allowed.

    The name is resolved here and never again: what was checked is what is connected to.
    """
    parts = urlsplit(url)
    host = (parts.hostname or "").rstrip(".").lower()
    if parts.scheme not in ("http", "https") or not host or not rules.allows(host):
        raise FetchError(f"dgemma does not fetch from {host or parts.scheme or 'there'}")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    found = resolve(host, port)
    if not found or not all(map(rules.is_public, found)):
        raise FetchError(f"{host} is not an address of the public internet")
    number = f"[{found[0]}]" if ":" in found[0] else found[0]
    named = host if parts.port is None else f"{host}:{port}"
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return f"{parts.scheme}://{number}:{port}{path}", named


def _body(chunks: Iterable[bytes], rules: FetchRules, deadline: float) -> bytes:
    """All of an answer, unless it is too long or too slow. Raises `FetchError`."""
    parts, size = [], 0
    for chunk in chunks:
        size += len(chunk)
        if size > rules.max_bytes:
            raise FetchError(f"more than {rules.max_bytes >> 20} MB")
        if time.monotonic() > deadline:
            raise FetchError(f"not there after {rules.seconds:g} seconds")
        parts.append(chunk)
    return b"".join(parts)
