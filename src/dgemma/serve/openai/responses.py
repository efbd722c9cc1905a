"""OpenAI's Responses API: POST /v1/responses. Nothing is stored: a conversation is sent whole every time.

Works on: bodies, rendered by `responses_stream`. Knows nothing of: the engine, other formats.
"""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from pydantic import BaseModel
from starlette.responses import Response

from dgemma.diffusion.request import Request
from dgemma.serve.ask import engine_request
from dgemma.serve.backend import Serving
from dgemma.serve.errors import RESPONSES
from dgemma.serve.forms import answer_form
from dgemma.serve.openai.responses_body import ResponsesBody, response_format
from dgemma.serve.openai.responses_stream import ResponseRendering
from dgemma.serve.respond import answer_docs, respond


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


def router(serving: Serving) -> APIRouter:
    """The routes of this format."""
    routes = APIRouter(tags=["OpenAI"])

    @routes.post("/v1/responses", responses=answer_docs(ResponseObject) | RESPONSES)
    async def create_response(body: ResponsesBody, http: HttpRequest) -> Response:
        adapter = serving.adapter(body.model)
        body.check(http, serving.settings)
        request = await engine_request(serving, body.ask(http, body.prompt_messages(), adapter))
        rendering = ResponseRendering(_echo(body, request))
        return await respond(serving, http, rendering, [request], stream=bool(body.stream), one_call=body.one_call())

    return routes


def _echo(body: ResponsesBody, request: Request) -> dict[str, Any]:
    """What a response repeats of its request, and what stood where it said nothing."""
    asked = body.model_dump(mode="json", by_alias=True)
    said = {name: asked[name] for name in ("model", "instructions", "reasoning", "top_logprobs", "user",
                                           "safety_identifier", "prompt_cache_key")}
    said["max_output_tokens"] = body.length_limit()[0]
    return {
        **said, "metadata": body.metadata or {},
        "text": {**(asked["text"] or {}), "format": response_format(answer_form(body)[0])},
        "tools": asked["tools"] or [], "tool_choice": asked["tool_choice"] or "auto",
        "parallel_tool_calls": not body.one_call(),
        "temperature": request.sampling.temperature, "top_p": request.sampling.top_p, "seed": request.seed,
        "truncation": "disabled", "previous_response_id": None, "background": False, "store": False}
