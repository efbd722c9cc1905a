"""What is known of a request when it is over: counted, written in a line of the log, and in whole where that is wanted.

Plain ASGI, so that a stream passes through untouched. Knows nothing of: what the routes do.
"""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dgemma.errors import DgemmaError
from dgemma.serve.errors import as_api_error, error_response
from dgemma.serve.metrics import Metrics
from dgemma.serve.settings import Settings
from dgemma.serve.usage import RequestUsage, request_usage

log = logging.getLogger("dgemma.serve")


class AccessLog:
    """Counts requests, writes a line about each, and answers what nobody caught."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics, request_log: RequestLog | None = None):
        self.app, self.settings, self.metrics, self.request_log = app, settings, metrics, request_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        used = RequestUsage(answers=None if self.request_log is None else [])
        token = request_usage.set(used)
        status = 0

        async def noting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noting_send)
        except Exception as error:
            if status:
                raise  # it is too late to say anything
            await error_response(as_api_error(error), scope["path"])(scope, receive, noting_send)
        finally:
            request_usage.reset(token)
            if scope.get("dgemma.gone") or not status:
                status = 499  # the client hung up before the end
            self._note(scope, status, time.perf_counter() - began, used)

    def _note(self, scope: Scope, status: int, seconds: float, used: RequestUsage) -> None:
        route = getattr(scope.get("route"), "path", "other")
        method = scope["method"] if scope["method"] in ("GET", "HEAD", "POST", "OPTIONS") else "other"
        self.metrics.calls.labels("false").inc(used.calls - used.repaired_calls)
        self.metrics.calls.labels("true").inc(used.repaired_calls)
        self.metrics.http.labels(method, route, str(status)).inc()
        path = scope.get("raw_path", b"").decode("ascii", "backslashreplace")  # percent-encoded: no line breaks
        if self.settings.access_log:
            log.info("%s %s %d %.0f ms%s", method, path[:200], status, seconds * 1000, account(used))
        if self.request_log is not None and scope["method"] == "POST":
            self.request_log.write(scope["method"], path, status, seconds, used)


def account(used: RequestUsage) -> str:
    """What a request's line in the log says of the work it was, and of what went wrong."""
    said = ""
    if used.prompt_tokens:
        said = f" {used.prompt_tokens}+{used.answer_tokens} tokens"
        if used.cached_tokens:
            said += f", {100 * used.cached_tokens / used.prompt_tokens:.0f} % cached"
        if used.spoke is not None:
            said += f", first canvas {1000 * used.spoke:.0f} ms"
        if used.steps:
            said += f", {used.steps} steps"
        if used.seconds:
            said += f", {used.answer_tokens / used.seconds:.0f} tokens/s"
    if used.error is not None:  # it may repeat what the client sent: no line breaks, no control codes
        said += f" {used.error[:300]!r}"
    return said


class RequestLog:
    """A file of JSON lines: every request as it came, the prompts it was rendered to, and what came of it.

    For its owner's eyes only, since it holds whatever clients say. Raises DgemmaError when it cannot be written.
    """

    def __init__(self, path: Path):
        self._path = path
        try:
            self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab")
        except OSError as error:
            raise DgemmaError(f"--debug-requests {path}: {error.strerror}; name a file that can be written") from error

    def write(self, method: str, path: str, status: int, seconds: float, used: RequestUsage) -> None:
        try:
            body: Any = json.loads(used.body)
        except (ValueError, RecursionError):
            body = used.body.decode("utf-8", "replace")
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "method": method, "path": path, "status": status,
                "seconds": round(seconds, 3), "error": used.error, "body": body, "answers": used.answers}
        try:
            text = json.dumps(line, ensure_ascii=False, default=str)
        except RecursionError:  # a body nested deeper than json writes
            text = json.dumps({**line, "body": used.body.decode("utf-8", "replace")}, ensure_ascii=False, default=str)
        try:
            self._file.write(text.encode("utf-8", "backslashreplace") + b"\n")
            self._file.flush()
        except OSError as error:
            log.warning("--debug-requests %s: this request could not be written: %s", self._path, error)
