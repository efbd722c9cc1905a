"""What stands between the network and the routes: hosts, keys, origins, rates, sizes.

Plain ASGI, so that a stream passes through untouched. Knows nothing of: what the routes do.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import math
import time
from collections import OrderedDict
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dgemma.serve.errors import OLLAMA, ApiError, error_response
from dgemma.serve.settings import Settings
from dgemma.serve.usage import request_usage

LOCAL_NAMES = ("localhost", "host.docker.internal")  # this machine, as it and its containers call it
OPEN_PATHS = ("/health", "/docs", "/openapi.json")  # no key is needed to read these


class AuthMiddleware:
    """Lets a request in, its body whole and read, or answers it with an error."""

    def __init__(self, app: ASGIApp, settings: Settings):
        self.app, self.settings = app, settings
        self.keys = [_digest(key) for key in settings.api_keys]
        self.rates = RateLimit(settings.rate_limit)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._admit(scope)
            body = await self._body(scope, receive)
        except ApiError as error:
            await error_response(error, scope["path"])(scope, receive, send)
            return
        if body is None:
            return  # the client left while it sent
        if scope["path"].startswith(OLLAMA):  # whose clients need not say that they send JSON
            scope["headers"] = [*((name, value) for name, value in scope["headers"] if name != b"content-type"),
                                (b"content-type", b"application/json")]
        if (used := request_usage.get()) is not None and used.answers is not None:
            used.body = body

        async def replay() -> Message:
            nonlocal body
            if body is None:
                return await receive()
            message: Message = {"type": "http.request", "body": body, "more_body": False}
            body = None
            return message

        await self.app(scope, replay, send)

    def _admit(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        self._check_host(headers)
        self._check_origin(headers)
        if scope["path"] in OPEN_PATHS:
            return
        address = scope["client"][0] if scope.get("client") else ""
        client = address
        if self.keys:
            number = self._key(headers)
            if number is None:
                raise ApiError(401, "the API key is missing or wrong: send it as `Authorization: Bearer KEY`",
                               headers={"WWW-Authenticate": "Bearer"})
            client = f"{number}@{address}"
            scope["dgemma.key"] = number
        scope["dgemma.client"] = client
        wait = self.rates.wait(client)
        if wait > 0:
            raise ApiError(429, f"this server takes {self.settings.rate_limit:g} requests a minute of one client",
                           headers={"Retry-After": str(math.ceil(wait))})

    def _key(self, headers: Headers) -> int | None:
        """Which of the keys the client has. Every comparison takes the same time, whatever was sent."""
        kind, _, given = headers.get("authorization", "").partition(" ")
        given = given.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "")
        digest = _digest(given)
        matches = [hmac.compare_digest(digest, key) for key in self.keys]
        return matches.index(True) if any(matches) else None

    def _check_host(self, headers: Headers) -> None:
        """Where no key is needed, only names whose meaning no stranger can change reach this server.

        A web page may make its own name point to this machine (DNS rebinding): to the browser this server is then
        part of that page's site, which may read everything. Who has a key is no such page.
        """
        given, allowed = headers.get("host", ""), self.settings.allowed_hosts
        if self.keys or "*" in allowed or not given or is_address(given):
            return
        if host_name(given) in map(host_name, allowed):
            return
        name = host_name(given)
        raise ApiError(403, f"this server does not answer to the name {name!r}: start it with --allowed-hosts {name}, "
                       "or with an API key", code="host_not_allowed")

    def _check_origin(self, headers: Headers) -> None:
        """Web pages of other origins may not call, not even with requests that browsers send without asking first.

        A page of this server itself may, under an address; under another name it might be a stranger's page whose
        name was made to point here.
        """
        origin, allowed = headers.get("origin"), self.settings.allowed_origins
        if origin is None or origin in allowed or "*" in allowed:
            return
        try:
            own = urlsplit(origin).netloc
        except ValueError:
            own = ""
        if own and own == headers.get("host") and is_address(own):
            return
        raise ApiError(403, f"web pages of {origin!r} may not use this server: start it with --allowed-origins")

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        limit = self.settings.max_body_bytes
        too_large = ApiError(413, f"the request's body is larger than {limit} bytes")
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdecimal() and int(announced[:20]) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self.settings.body_timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > limit:
                        raise too_large
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError as error:
            raise ApiError(408, f"the request did not arrive within {self.settings.body_timeout:g} seconds",
                           headers={"Connection": "close"}) from error


class RateLimit:
    """A bucket of tokens for each client: ``per_minute`` at most, refilled evenly; 0 is no limit."""

    def __init__(self, per_minute: float, clients: int = 10_000):
        self.per_minute, self.clients = per_minute, clients
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client -> requests left, since when

    def wait(self, client: str, now: float | None = None) -> float:
        """Takes a token: seconds to wait for one, 0 if there was one. ``now``: a clock's seconds."""
        if not self.per_minute:
            return 0.0
        now = time.monotonic() if now is None else now
        full = max(self.per_minute, 1.0)
        left, since = self._buckets.pop(client, (full, now))
        left = min(full, left + (now - since) * self.per_minute / 60)
        wait = 0.0 if left >= 1 else (1 - left) * 60 / self.per_minute
        self._buckets[client] = (left - (wait == 0), now)
        if len(self._buckets) > self.clients:
            self._buckets.popitem(last=False)  # whoever has been quiet for longest
        return wait


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def host_name(netloc: str) -> str:
    """The host of "host:port", in lower case; what is no host as it is."""
    try:
        host = urlsplit(f"//{netloc}").hostname
    except ValueError:
        host = None
    return (host or netloc).lower().removesuffix(".")


def is_address(netloc: str) -> bool:
    """Whether a host is an IP address or this very machine, whose meaning no name server can change."""
    host = host_name(netloc)
    if host in LOCAL_NAMES:
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
