"""Anthropic's Messages API: POST /v1/messages and /v1/messages/count_tokens.

Works on: `deltas`, rendered by `messages_stream`. Knows nothing of: the engine, other formats.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Literal

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from pydantic import BaseModel
from starlette.responses import Response

from dgemma.diffusion.row import Request
from dgemma.engine.service import Service
from dgemma.serve.anthropic.body import CountBody, MessagesBody, conversation
from dgemma.serve.anthropic.stream import Event, MessageRendering
from dgemma.serve.bodies import adapter_of, engine_request, prompt_tokens
from dgemma.serve.deltas import Delta, answering
from dgemma.serve.errors import RESPONSES, ApiError, JsonResponse
from dgemma.serve.fields import check_fields
from dgemma.serve.settings import Settings
from dgemma.serve.streams import EVENT_CONTENT, EventStream, Merged, event, whole


class MessagesErrorDetail(BaseModel):
    """What went wrong; the message names the field at fault."""

    type: str
    message: str


class MessagesErrorBody(BaseModel):
    """The body of every answer that is an error."""

    type: Literal["error"]
    error: MessagesErrorDetail


class ThinkingTokens(BaseModel):
    thinking_tokens: int


class MessageUsage(BaseModel):
    """``input_tokens`` are those that were not read from the cache."""

    input_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int
    output_tokens: int
    output_tokens_details: ThinkingTokens


class MessageObject(BaseModel):
    """An answer: blocks of type text, thinking and tool_use."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(BaseModel):
    input_tokens: int


_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": MessagesErrorBody, "description": documented["description"]}
    for status, documented in RESPONSES.items()}
_ANSWER: dict[int | str, dict[str, Any]] = {200: {
    "model": MessageObject, "description": "The answer; with `stream: true` its events.",
    "content": EVENT_CONTENT}}


def router(service: Service, settings: Settings) -> APIRouter:
    """The routes of this format."""
    routes = APIRouter(tags=["Anthropic"])

    @routes.post("/v1/messages", responses=_ANSWER | _ERRORS)
    async def create_message(body: MessagesBody, http: HttpRequest) -> Response:
        request = await _request(service, settings, body, http)
        rendering = MessageRendering(body.model, len(request.prompt_ids), _most(body),
                                     thoughts=getattr(body.thinking, "display", None) != "omitted")
        answer = answering(service, request, one_call=body.one_call())
        if not body.stream:
            return await whole(http, settings, _whole(answer, rendering))
        source = Merged([answer])
        return EventStream(source, _events(source, rendering), settings,
                           ping=event({"type": "ping"}, "ping"))

    @routes.post("/v1/messages/count_tokens", response_model=TokenCount, responses=_ERRORS)
    async def count_tokens(body: CountBody) -> Response:
        adapter_of(body.model, service, settings)
        prompt_ids = await prompt_tokens(service, settings, conversation(body), param="messages", bounded=False,
                                         **body.prompt_options())
        return JsonResponse({"input_tokens": len(prompt_ids)})

    return routes


async def _request(service: Service, settings: Settings, body: MessagesBody, http: HttpRequest) -> Request:
    adapter = adapter_of(body.model, service, settings)
    body.check()
    check_fields(body, http, settings)
    return await engine_request(service, settings, conversation(body), adapter=adapter, **body.asks(http))


def _most(body: MessagesBody) -> int:
    """The most tokens that were asked for: an answer that ends before has filled the context."""
    most = body.length_limit()[0]
    return 2**63 if most is None else most


async def _whole(answer: AsyncGenerator[Delta, None], rendering: MessageRendering) -> Response:
    async with aclosing(answer):
        async for delta in answer:
            for made in rendering.feed(delta):
                _raise_error(made)
    return JsonResponse(rendering.message)


def _raise_error(made: Event) -> None:
    if made["type"] == "error":
        raise ApiError(503 if made["error"]["type"] == "overloaded_error" else 500, made["error"]["message"])


async def _events(answer: Merged[Delta], rendering: MessageRendering) -> AsyncGenerator[bytes, None]:
    yield event(rendering.start(), "message_start")
    async for _, delta in answer:
        for made in rendering.feed(delta):
            yield event(made, made["type"])
