"""What is done to every answer on its way out: a HEAD has no body, and fields that had no effect are named.

Plain ASGI, so that a stream passes through untouched. Knows nothing of: what the routes do.
"""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dgemma.serve.fields import IGNORED_HEADER


class Outgoing:
    """Answers HEAD as GET without its body, and puts the fields that had no effect into a header."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        head = scope["method"] == "HEAD"

        async def outgoing(message: Message) -> None:
            if message["type"] == "http.response.start" and (ignored := scope.get("dgemma.ignored")):
                MutableHeaders(raw=message["headers"])[IGNORED_HEADER] = ignored
            if head and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        if head:
            scope["method"] = "GET"
        try:
            await self.app(scope, receive, outgoing)
        finally:
            if head:
                scope["method"] = "HEAD"  # what the log shall say
