"""What goes wrong, as clients get to read it: in OpenAI's form, under /v1/messages in Anthropic's, /api in Ollama's.

Knows nothing of: what the routes do.
"""

from __future__ import annotations

import difflib
import json
import logging
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import Response

from dgemma.engine.service import Overloaded
from dgemma.errors import ContextLengthError, DgemmaError
from dgemma.serve.deltas import BrokenAnswerError, CutAnswerError
from dgemma.serve.usage import note_error

log = logging.getLogger("dgemma.serve")

OLLAMA = "/api/"  # what the paths of Ollama's API begin with

# type and code by status, and what the documentation says of it.
_KINDS = {
    400: ("invalid_request_error", "invalid_value", "The request cannot be honoured; `param` names the field."),
    401: ("authentication_error", "invalid_api_key", "The API key is missing or wrong."),
    403: ("permission_error", "origin_not_allowed",
          "This server does not allow it: web pages of another origin, or adapters to be loaded."),
    404: ("not_found_error", "not_found", "There is no such model."),
    405: ("invalid_request_error", "method_not_allowed", "The method is not for this path."),
    408: ("timeout_error", "request_timeout", "The request took too long to arrive."),
    413: ("invalid_request_error", "request_too_large", "The request is too large."),
    429: ("rate_limit_error", "rate_limit_exceeded", "Too many requests: try again after `Retry-After` seconds."),
    500: ("server_error", "internal_error", "The engine failed."),
    503: ("server_error", "unavailable", "The server is stopping: try again after `Retry-After` seconds."),
    504: ("timeout_error", "timeout", "The answer took longer than a request may."),
}
_ANTHROPIC_TYPES = {413: "request_too_large", 500: "api_error", 503: "overloaded_error"}  # where they are others
_LONGEST = 1000  # characters of a message, and of a field's name: both may repeat what the client sent


class ApiError(Exception):
    """An answer that is an error. ``param`` names the field at fault, such as ``messages[0].content``.

    ``anthropic_message`` and ``details`` are what Anthropic's clients read, where that is something else.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None,
                 headers: Mapping[str, str] | None = None, *, anthropic_message: str | None = None,
                 details: Mapping[str, Any] | None = None):
        message = message if len(message) <= _LONGEST else f"{message[:_LONGEST]}…"
        self.anthropic_message, self.details = anthropic_message, details
        super().__init__(message)
        param = param and param[:_LONGEST]
        self.status, self.message, self.param, self.headers = status, message, param, dict(headers or {})
        self.type, usual, _ = _KINDS[status]
        self.code, self.anthropic_type = code or usual, _ANTHROPIC_TYPES.get(status, self.type)


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """The body of every answer that is an error."""

    error: ErrorDetail


def error_docs(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """What the documentation says of every error, whose body has this form."""
    return {status: {"model": model, "description": text} for status, (_, _, text) in _KINDS.items()}


RESPONSES = error_docs(ErrorBody)


def to_json(value: Any) -> bytes:
    """Compact JSON. A lone surrogate, which has no UTF-8 form, is written as JSON's escape for it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


class JsonResponse(Response):
    """A JSON body, written by `to_json`."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content)


# Where Anthropic's clients ask, whatever stands in the base URL before it.
_ANTHROPIC = re.compile(r"/(v1/)*messages(/|$)")


def error_body(error: ApiError, path: str = "") -> dict[str, Any]:
    """The body in the form that clients of ``path`` know."""
    if path.startswith(OLLAMA):
        return {"error": error.message}
    if _ANTHROPIC.match(path):
        details = {} if error.details is None else {"details": dict(error.details)}
        message = error.anthropic_message or _naming(error)
        return {"type": "error", "error": {"type": error.anthropic_type, "message": message, **details}}
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def _naming(error: ApiError) -> str:
    """The message with the field at fault in it: Anthropic's errors have no other place for that."""
    field = re.split(r"[.\[]", error.param or "")[0]
    return error.message if field in error.message else f"{error.param}: {error.message}"


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
    if isinstance(error, CutAnswerError):
        return ApiError(503, str(error), code="cancelled", headers={"Retry-After": "1"})
    if isinstance(error, ContextLengthError):
        return _context_error(error)
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
        if isinstance(error, HTTPException) and error.status_code in (404, 405):
            error = _no_such_path(request, error)
        return error_response(as_api_error(error), request.url.path)

    for kind in (ApiError, Overloaded, BrokenAnswerError, CutAnswerError, DgemmaError, RequestValidationError,
                 HTTPException, TimeoutError):
        app.add_exception_handler(kind, handle)


def _context_error(error: ContextLengthError) -> ApiError:
    """In the words that clients look for before they shorten a conversation."""
    if error.most is None:  # not the context ends here but the memory
        message = f"{error}: shorten the prompt, or set max_tokens"
        return ApiError(400, message, code="context_length_exceeded",
                        anthropic_message=f"prompt is too long: {message}")
    return ApiError(400, f"This model's maximum context length is {error.most} tokens: {error}",
                    code="context_length_exceeded",
                    anthropic_message=f"prompt is too long: {error.prompt_tokens} tokens > {error.most} maximum")


_MESSAGE = re.compile(r"message (\d+)\b")
_TOOL = re.compile(r"tool (\d+)\b")
_FIELD = re.compile(r"([a-z][a-z_]*(?:\[\d+\])?) (?:must|has|needs|is|contradicts) ")


def _param_of(message: str) -> str | None:
    """The field that the library's message is about: it begins with the field's name."""
    if found := _MESSAGE.match(message):
        return f"messages[{found[1]}]"
    if found := _TOOL.match(message):
        return f"tools[{found[1]}]"
    found = _FIELD.match(message)
    return found[1] if found else None


def shown(value: Any) -> str:
    """What a client sent, to be repeated to it: short, and on one line."""
    if isinstance(value, str):
        return json.dumps(value if len(value) <= _SHOWN else f"{value[:_SHOWN]}…")
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, Sequence):
        return f"a list of {len(value)}"
    text = json.dumps(value, default=lambda other: type(other).__name__)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


_SHOWN = 40  # characters of a value that are repeated in an error
_MISTAKES = 3  # fields that one error tells of

# What pydantic calls mistakes, and what is accepted instead. The first group is about the type of a value: where it may
# be of several types, they are of no interest as soon as one of them fits.
_TYPES = {
    "string_type": "a string", "int_type": "a whole number", "int_from_float": "a whole number",
    "int_parsing": "a whole number", "int_parsing_size": "a smaller number", "float_type": "a number",
    "bool_type": "true or false",
    "dict_type": "an object", "model_type": "an object", "model_attributes_type": "an object", "list_type": "a list",
    "none_required": "null",
}
_RULES = {
    "literal_error": "{expected}", "greater_than_equal": "at least {ge}", "greater_than": "above {gt}",
    "less_than_equal": "at most {le}", "less_than": "below {lt}", "finite_number": "a finite number",
    "string_too_long": "a string of at most {max_length} characters",
    "string_too_short": "a string of at least {min_length} characters",
    "string_pattern_mismatch": "a token's number in digits", "string_unicode": "a string of valid Unicode",
    "too_long": "a list of at most {max_length} entries", "too_short": "a list of at least {min_length} entries",
}


def _validation_error(error: RequestValidationError) -> ApiError:
    """What is wrong with a body, a sentence for each of its fields, places written as one would in Python."""
    mistakes = error.errors()
    if mistakes[0]["type"] == "json_invalid":
        first = mistakes[0]
        return ApiError(400, f"the body is not valid JSON: {first.get('ctx', {}).get('error', 'it is cut off')}")
    fields: dict[Any, list[tuple[list[str | int], Mapping[str, Any]]]] = {}
    for mistake in _of_branches_that_were_meant(mistakes):
        place = _place(mistake, error.body)
        fields.setdefault(place[0] if place else None, []).append((place, mistake))
    said = [_sentence(found) for found in fields.values()]
    return ApiError(400, "; ".join(sentence for sentence, _ in said[:_MISTAKES]), said[0][1])


def _of_branches_that_were_meant(mistakes: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Where a union fails there is a mistake for every branch: without those of branches that name another type.

    Where no branch was meant, all that is wrong is that name.
    """
    named = [mistake for mistake in mistakes if len(mistake["loc"]) > 2 and mistake["type"] == "literal_error"
             and mistake["loc"][-1] in ("type", "role")]
    others = {tuple(mistake["loc"][:-1]) for mistake in named}
    left = [mistake for mistake in mistakes if not any(_inside(mistake, other) for other in others)]
    # A branch for another kind of value, a string beside objects, was not meant either.
    told = [mistake for mistake in left if mistake["type"] not in _TYPES
            and not (mistake["type"] == "literal_error" and not isinstance(mistake.get("input"), str))]
    lost = [mistake for mistake in named
            if not any(_inside(other, tuple(mistake["loc"][:-2])) for other in told)]
    return lost or left or list(mistakes)


def _inside(mistake: Mapping[str, Any], place: tuple[str | int, ...]) -> bool:
    return tuple(mistake["loc"][:len(place)]) == place


def _sentence(found: Sequence[tuple[list[str | int], Mapping[str, Any]]]) -> tuple[str, str | None]:
    """What is wrong with a field, by the mistakes that lie deepest in it, and where that is."""
    place, first = max(found, key=lambda pair: len(pair[0]))
    here = [mistake for at, mistake in found if at == place]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    kind, context = first["type"], first.get("ctx") or {}
    if not place and kind != "value_error":
        return "the body must be a JSON object, sent as Content-Type: application/json", None
    if kind == "value_error":
        return f"{param or 'the body'}: {context.get('error', 'it is not valid')}", param or None
    if kind == "missing":
        return f"{param} is missing", param
    if kind == "union_tag_invalid":
        name = _discriminator(context)
        return f"{param}.{name}: must be {_one_of(str(context['expected_tags']).split(', '))}, not " \
               f"{shown(context['tag'])}", param
    if kind == "union_tag_not_found":
        return f"{param}.{_discriminator(context)} is missing, or no string", param
    rules = [mistake for mistake in here if mistake["type"] not in _TYPES]
    if rules and any(mistake["type"] != "literal_error" for mistake in rules):
        here = rules
    accepted = [_accepted(mistake) for mistake in here]
    return f"{param}: must be {_one_of(dict.fromkeys(accepted))}, not {shown(first.get('input'))}", param


def _accepted(mistake: Mapping[str, Any]) -> str:
    """What pydantic's mistake says would have been right."""
    kind = mistake["type"]
    if kind in _TYPES:
        return _TYPES[kind]
    context = {name: f"{value:g}" if isinstance(value, float) else value
               for name, value in (mistake.get("ctx") or {}).items()}
    return _RULES.get(kind, "something else").format_map(context)


def _discriminator(context: Mapping[str, Any]) -> str:
    name = str(context.get("discriminator", "type")).strip("'")
    return name if name.isidentifier() and not name.startswith("_") else "type"


def _one_of(things: Iterable[str]) -> str:
    *others, last = things
    return f"{', '.join(others)} or {last}" if others else last


# What other servers of these APIs make and this one does not, by what the path ends with.
_NOT_MADE = re.compile(r"/(embeddings?|embed|rerank|score|classify|pooling|moderations|audio/\w+|images/\w+|videos|"
                       r"files|uploads|batches|fine_tuning/\w+|fine-tunes|assistants|threads|vector_stores|realtime|complete)"
                       r"(/.*)?$")


def _no_such_path(request: Request, error: HTTPException) -> Exception:
    """The error for a path, or a method, that is not there: it says what is."""
    there = list(request.app.openapi()["paths"])
    path = re.sub(r"/{2,}", "/", request.url.path)
    if error.status_code == 405:
        allowed = Headers(error.headers).get("allow", "").replace(",", " ").split()
        right = _one_of(sorted(allowed) or ["another method"])
        return ApiError(405, f"{path[:100]} takes {right}, not {request.method}", headers=error.headers)
    if request.scope.get("route") is not None or error.detail != "Not Found":
        return error
    without = re.sub(r"^(/v1)+(?=/|$)", "", path) or "/"
    hint = f"there are {', '.join(sorted(known for known in there if known.startswith('/v1/') and '{' not in known))}"
    if (found := f"/v1{without.removeprefix('/api')}") in there and path != found:
        hint = f"the path is {found}: " + ("leave one /v1 out of the base URL" if path.startswith("/v1/v1")
                                           else "the base URL lacks its /v1")
    elif without in there and path != without:
        hint = f"the path is {without}: the base URL for it has no /v1"
    elif made := _NOT_MADE.search(path):
        hint = f"this server has no {made[1].split('/')[0]}, it answers in text; {hint}"
    elif close := difflib.get_close_matches(path, there, n=1, cutoff=0.75):
        hint = f"did you mean {close[0]}? {hint[0].upper()}{hint[1:]}"
    return ApiError(404, f"there is no {request.method} {path[:100]} here: {hint}")


def _place(mistake: Mapping[str, Any], body: Any) -> list[str | int]:
    """Keys and indices that lead to a mistake: pydantic's path, without the names of unions' branches in it."""
    path = mistake["loc"][1:]
    if mistake["loc"][0] != "body":  # a parameter in the address
        return list(path[:1])
    place: list[str | int] = []
    for step, part in enumerate(path):
        inside = part in body if isinstance(body, dict) else isinstance(body, list) and isinstance(part, int)
        if inside:
            body = body[part]
        if inside or (mistake["type"] == "missing" and step == len(path) - 1):
            place.append(part)
    return place
