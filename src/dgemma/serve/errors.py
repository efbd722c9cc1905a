"""What goes wrong, as clients get to read it: in OpenAI's form, under /v1/messages in Anthropic's, /api in Ollama's.

Knows nothing of: what the routes do.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from dgemma.engine.service import Overloaded
from dgemma.errors import DgemmaError
from dgemma.serve.deltas import BrokenAnswerError
from dgemma.serve.tally import note_error

log = logging.getLogger("dgemma.serve")

OLLAMA = "/api/"  # what the paths of Ollama's API begin with

# type and code by status; Anthropic's name of the same.
_KINDS = {
    400: ("invalid_request_error", "invalid_value", "invalid_request_error"),
    401: ("authentication_error", "invalid_api_key", "authentication_error"),
    403: ("permission_error", "origin_not_allowed", "permission_error"),
    404: ("not_found_error", "not_found", "not_found_error"),
    405: ("invalid_request_error", "method_not_allowed", "invalid_request_error"),
    408: ("timeout_error", "request_timeout", "timeout_error"),
    413: ("invalid_request_error", "request_too_large", "request_too_large"),
    429: ("rate_limit_error", "rate_limit_exceeded", "rate_limit_error"),
    500: ("server_error", "internal_error", "api_error"),
    503: ("server_error", "unavailable", "overloaded_error"),
    504: ("timeout_error", "timeout", "timeout_error"),
}


_LONGEST = 1000  # characters of a message, and of a field's name: both may repeat what the client sent


class ApiError(Exception):
    """An answer that is an error. ``param`` names the field at fault, such as ``messages[0].content``."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None,
                 headers: Mapping[str, str] | None = None):
        message = message if len(message) <= _LONGEST else f"{message[:_LONGEST]}…"
        super().__init__(message)
        param = param and param[:_LONGEST]
        self.status, self.message, self.param, self.headers = status, message, param, dict(headers or {})
        self.type, usual, self.anthropic_type = _KINDS[status]
        self.code = code or usual


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorDetail


_DESCRIPTIONS = {
    400: "The request cannot be honoured; `param` names the field.",
    401: "The API key is missing or wrong.",
    403: "This server does not allow it: web pages of another origin, or adapters to be loaded.",
    404: "There is no such model.",
    405: "The method is not for this path.",
    408: "The request took too long to arrive.",
    413: "The request is too large.",
    429: "Too many requests: try again after `Retry-After` seconds.",
    500: "The engine failed.",
    503: "The server is stopping: try again after `Retry-After` seconds.",
    504: "The answer took longer than a request may.",
}
RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text} for status, text in _DESCRIPTIONS.items()}


def to_json(value: Any) -> bytes:
    """Compact JSON. A lone surrogate, which has no UTF-8 form, is written as JSON's escape for it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


class JsonResponse(Response):
    """A JSON body, written by `to_json`."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content)


def error_body(error: ApiError, path: str = "") -> dict[str, Any]:
    """The body in the form that clients of ``path`` know."""
    if path.startswith(OLLAMA):
        return {"error": error.message}
    if path.startswith("/v1/messages"):
        return {"type": "error", "error": {"type": error.anthropic_type, "message": error.message}}
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def error_response(error: ApiError, path: str = "") -> Response:
    note_error(error.message)
    return JsonResponse(error_body(error, path), error.status, error.headers)


def as_api_error(error: Exception) -> ApiError:
    """Any exception as what a client shall read; what is not foreseen is logged, and says nothing of our insides."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, Overloaded):
        headers = {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
        return ApiError(503 if error.stopping else 429, str(error), headers=headers,
                        code=None if error.stopping else "overloaded")
    if isinstance(error, BrokenAnswerError):
        return ApiError(500, str(error))
    if isinstance(error, DgemmaError):
        return ApiError(400, str(error), _param_of(str(error)))
    if isinstance(error, RequestValidationError):
        return _validation_error(error)
    if isinstance(error, HTTPException):
        status = error.status_code if error.status_code in _KINDS else 400
        return ApiError(status, str(error.detail), headers=error.headers)
    if isinstance(error, TimeoutError):
        return ApiError(504, "the answer took longer than a request to this server may")
    log.error("a request failed in a way that nobody foresaw", exc_info=error)
    return ApiError(500, "the server failed at this request; its log says more")


def install(app: FastAPI) -> None:
    """Let `app` answer every exception in the form of `error_body`."""

    async def handle(request: Request, error: Exception) -> Response:
        return error_response(as_api_error(error), request.url.path)

    for kind in (ApiError, Overloaded, BrokenAnswerError, DgemmaError, RequestValidationError, HTTPException,
                 TimeoutError):
        app.add_exception_handler(kind, handle)


_MESSAGE = re.compile(r"message (\d+)\b")
_TOOL = re.compile(r"tool (\d+)\b")
_FIELD = re.compile(r"([a-z][a-z_]*) (?:must|has|needs|is) ")


def _param_of(message: str) -> str | None:
    """The field that the library's message is about: it begins with the field's name."""
    if found := _MESSAGE.match(message):
        return f"messages[{found[1]}]"
    if found := _TOOL.match(message):
        return f"tools[{found[1]}]"
    found = _FIELD.match(message)
    return found[1] if found else None


def _validation_error(error: RequestValidationError) -> ApiError:
    """The mistake that pydantic found deepest in the body, its place written as one would in Python."""
    mistakes = error.errors()
    if mistakes[0]["type"] == "json_invalid":
        first = mistakes[0]
        return ApiError(400, f"the body is not valid JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    # Where a union fails there is a mistake for every branch: the branch that was meant is the one that got furthest.
    place, mistake = max(((_place(mistake, error.body), mistake) for mistake in mistakes), key=lambda at: len(at[0]))
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    if not place and mistake["type"] != "value_error":
        return ApiError(400, "the body must be a JSON object, sent as Content-Type: application/json")
    # What the client sent is not repeated: it may be long, or secret.
    return ApiError(400, f"{param or 'the body'}: {mistake['msg']}", param or None)


def _place(mistake: Mapping[str, Any], body: Any) -> list[str | int]:
    """Keys and indices that lead to a mistake: pydantic's path, without the names of unions' branches in it."""
    path = mistake["loc"][1:]
    place: list[str | int] = []
    for step, part in enumerate(path):
        inside = part in body if isinstance(body, dict) else isinstance(body, list) and isinstance(part, int)
        if inside:
            body = body[part]
        if inside or (mistake["type"] == "missing" and step == len(path) - 1):
            place.append(part)
    return place
