"""A stand-in for an OpenAI-compatible server, on loopback: it says what a test tells it to.

A test sets `OpenAIStandIn`'s fields; `bodies` and `keys` list what was asked.
"""

from __future__ import annotations

import json
import select
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WAIT = object()  # in `chunks`: say nothing more until the client hangs up
BREAK = object()  # break the connection


def text_chunks(*texts: str, reason: str | None = "stop", **extra: Any) -> list[Any]:
    """What an ordinary server streams: role, texts, the end, the counts."""
    chunks = [{"delta": {"role": "assistant", "content": ""}}, *({"delta": {"content": text}} for text in texts),
              {"delta": {}, "finish_reason": reason}]
    usage = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12}
    return [*({"object": "chat.completion.chunk", "choices": [{"index": 0, **chunk}]} for chunk in chunks),
            {"choices": [], "usage": usage, **extra}]


def call_chunks(name: str, arguments: dict[str, Any], text: str = "") -> list[Any]:
    """What a server streams that calls a tool."""
    call = {"index": 0, "id": "call_1", "type": "function",
            "function": {"name": name, "arguments": json.dumps(arguments)}}
    said = text_chunks(*([text] if text else []), reason="tool_calls")
    said.insert(-2, {"choices": [{"index": 0, "delta": {"tool_calls": [call]}}]})
    return said


def draft_chunk(text: str, *, canvas: int = 0, step: int = 1, length: int = 16, sure: int = 0) -> dict[str, Any]:
    """A draft of ours: a byte a token, `<turn|>` and fill after the text, the first `sure` positions settled."""
    tokens = [*text, "<turn|>", *["<eos>"] * length][:length]
    ids = [ord(token) if len(token) == 1 else 1 if token == "<eos>" else 106 for token in tokens]
    return {"choices": [], "dgemma": {"draft": {
        "index": 0, "canvas": canvas, "step": step, "max_steps": 48, "token_ids": ids, "tokens": tokens, "text": text,
        "entropies": [0.001 if i < sure else 3.0 for i in range(length)],
        "accepted": [i < sure for i in range(length)]}}}


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone away is no news, least of all on the stderr that a test reads."""


@dataclass
class OpenAIStandIn:
    models: Any = field(default_factory=lambda: [{"id": "first", "owned_by": "them"}, {"id": "second"}])
    chunks: list[Any] = field(default_factory=lambda: text_chunks("Hello", " there"))
    before: list[list[Any]] = field(default_factory=list)  # chunks of the first requests, one after another
    done: bool = True  # [DONE] at the end
    key: str | None = None  # must be sent
    status: int = 200  # of a chat completion
    models_status: int = 200
    answer: Any = None  # a chat completion's body instead of a stream
    headers: dict[str, str] = field(default_factory=dict)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    waiting: threading.Event = field(default_factory=threading.Event)  # the chunks before WAIT are sent
    hung_up: threading.Event = field(default_factory=threading.Event)  # the client went away during WAIT

    def __enter__(self) -> OpenAIStandIn:
        stand_in = self

        class Handler(_Handler):
            server_stand_in = stand_in

        self._server = _Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server_stand_in: OpenAIStandIn

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server_stand_in
        server.keys.append(self.headers.get("Authorization"))
        if self.path != "/v1/models":
            self._send(404, {"detail": "Not Found"})
        elif self._allowed():
            body = server.models if isinstance(server.models, bytes) else {"object": "list", "data": server.models}
            self._send(server.models_status, body)

    def do_POST(self) -> None:
        server = self.server_stand_in
        server.keys.append(self.headers.get("Authorization"))
        server.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        if self.path != "/v1/chat/completions":
            self._send(404, b"")
        elif self._allowed() and (server.answer is not None or server.status != 200):
            self._send(server.status, server.answer if server.answer is not None else b"")
        elif self._allowed():
            self._stream()

    def _allowed(self) -> bool:
        key = self.server_stand_in.key
        allowed = key is None or self.headers.get("Authorization") == f"Bearer {key}"
        if not allowed:
            self._send(401, {"error": {"message": "Incorrect API key provided.", "type": "authentication_error"}})
        return allowed

    def _stream(self) -> None:
        server = self.server_stand_in
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for chunk in server.before.pop(0) if server.before else server.chunks:
            if chunk is WAIT:
                server.waiting.set()
                select.select([self.connection], [], [], 60)  # readable: the client has closed it
                server.hung_up.set()
                return
            if chunk is BREAK:
                return
            self._say(chunk if isinstance(chunk, str) else json.dumps(chunk, ensure_ascii=False))
        if server.done:
            self._say("[DONE]")
        self.wfile.write(b"0\r\n\r\n")

    def _say(self, data: str) -> None:
        line = f"data: {data}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
        self.wfile.flush()

    def _send(self, status: int, body: Any) -> None:
        html = isinstance(body, bytes)
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if html else "application/json")
        for name, value in self.server_stand_in.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
