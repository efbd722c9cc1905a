"""One request, or one websocket, to an ASGI application, with no server between."""

import asyncio
from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Response:
    status: int
    headers: dict[str, str]  # of those that are there twice the last
    body: bytes

    @property
    def text(self):
        return self.body.decode()


def _scope(kind, path, headers, client):
    parts = urlsplit(path)
    sent = {"host": "127.0.0.1:8888", **headers}
    return {"type": kind, "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http", "path": parts.path,
            "raw_path": parts.path.encode(), "query_string": parts.query.encode(), "root_path": "",
            "headers": [(name.lower().encode(), value.encode()) for name, value in sent.items() if value is not None],
            "client": (client, 50_000), "server": ("127.0.0.1", 8888)}


def request(app, path="/", method="GET", *, body=b"", client="127.0.0.1", **headers):
    """The response; underscores in the names of ``headers`` are dashes, None leaves one out."""
    scope = _scope("http", path, {name.replace("_", "-"): value for name, value in headers.items()}, client)
    scope["method"] = method
    sent = []

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    start, *rest = sent
    return Response(start["status"], {name.decode(): value.decode() for name, value in start["headers"]},
                    b"".join(message.get("body", b"") for message in rest))


def websocket(app, path="/", received=(), **headers):
    """What an application sends to a websocket that sends ``received``; they may be functions, called in their turn."""
    scope = _scope("websocket", path, {name.replace("_", "-"): value for name, value in headers.items()}, "127.0.0.1")
    coming = iter([{"type": "websocket.connect"}, *received, {"type": "websocket.disconnect", "code": 1001}])
    sent = []

    async def receive():
        message = next(coming)
        return message() if callable(message) else message

    async def send(message):
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    return sent
