"""OpenAI's Responses API: POST /v1/responses. Nothing is stored: a conversation is sent whole every time.

Works on: `deltas`, rendered by `responses_stream`. Knows nothing of: the engine, other formats.
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
from dgemma.serve.bodies import adapter_of, engine_request
from dgemma.serve.deltas import Delta, answering
from dgemma.serve.errors import RESPONSES, ApiError, JsonResponse
from dgemma.serve.fields import check_fields
from dgemma.serve.openai.responses_body import ResponsesBody, conversation, refuse_what_cannot_be, response_format
from dgemma.serve.openai.responses_stream import ResponseRendering
from dgemma.serve.settings import Settings
from dgemma.serve.streams import EVENT_CONTENT, EventStream, Merged, event, whole


class CachedTokens(BaseModel):
    cached_tokens: int
    cache_write_tokens: int


class ReasoningTokens(BaseModel):
    reasoning_tokens: int


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class ResponseObject(BaseModel):
    """An answer: items of type reasoning, message and function_call; the other fields repeat what was asked for."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None = None
    status: Literal["completed", "incomplete"]
    incomplete_details: dict[str, str] | None
    error: None
    model: str
    output: list[dict[str, Any]]
    usage: ResponseUsage
    seed: int
    store: Literal[False]


_ANSWER: dict[int | str, dict[str, Any]] = {200: {
    "model": ResponseObject, "description": "The answer; with `stream: true` its events.",
    "content": EVENT_CONTENT}}


def router(service: Service, settings: Settings) -> APIRouter:
    """The routes of this format."""
    routes = APIRouter(tags=["OpenAI"])

    @routes.post("/v1/responses", responses=_ANSWER | RESPONSES)
    async def create_response(body: ResponsesBody, http: HttpRequest) -> Response:
        request = await _request(service, settings, body, http)
        rendering = ResponseRendering(_echo(body, request))
        answer = answering(service, request, one_call=body.one_call())
        if not body.stream:
            return await whole(http, settings, _whole(answer, rendering))
        source = Merged([answer])
        return EventStream(source, _events(source, rendering), settings)

    return routes


async def _request(service: Service, settings: Settings, body: ResponsesBody, http: HttpRequest) -> Request:
    adapter = adapter_of(body.model, service, settings)
    check_fields(body, http, settings)
    refuse_what_cannot_be(body)
    try:
        return await engine_request(service, settings, conversation(body), adapter=adapter, param="input",
                                    logprobs=body.wanted_logprobs(), **body.asks(http))
    except ApiError as error:
        if error.param and error.param.startswith("messages"):  # what the library calls them
            error.param = "input"
        raise


def _echo(body: ResponsesBody, request: Request) -> dict[str, Any]:
    """What a response repeats of its request, and what stood where it said nothing."""
    asked = body.model_dump(mode="json", by_alias=True)
    said = {name: asked[name] for name in ("model", "instructions", "reasoning", "top_logprobs", "user",
                                           "safety_identifier", "prompt_cache_key")}
    said["max_output_tokens"] = body.length_limit()[0]
    return {
        **said, "metadata": body.metadata or {},
        "text": {**(asked["text"] or {}), "format": response_format(body.answer_form()[0])},
        "tools": asked["tools"] or [], "tool_choice": asked["tool_choice"] or "auto",
        "parallel_tool_calls": not body.one_call(),
        "temperature": request.choices.temperature, "top_p": request.choices.top_p, "seed": request.seed,
        "truncation": "disabled", "previous_response_id": None, "background": False, "store": False}


async def _whole(answer: AsyncGenerator[Delta, None], rendering: ResponseRendering) -> Response:
    async with aclosing(answer):
        async for delta in answer:
            for _ in rendering.feed(delta):
                pass
    error = rendering.response["error"]
    if error is not None:
        raise ApiError(503 if rendering.cut else 500, error["message"])
    return JsonResponse(rendering.response)


async def _events(answer: Merged[Delta], rendering: ResponseRendering) -> AsyncGenerator[bytes, None]:
    for made in rendering.start():
        yield event(made, made["type"])
    async for _, delta in answer:
        for made in rendering.feed(delta):
            yield event(made, made["type"])
