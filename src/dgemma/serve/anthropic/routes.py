"""Anthropic's Messages API: POST /v1/messages and /v1/messages/count_tokens.

Works on: bodies, rendered by `stream`. Knows nothing of: the engine, other formats.
"""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from pydantic import BaseModel
from starlette.responses import Response

from dgemma.serve.anthropic.body import CountBody, MessagesBody
from dgemma.serve.anthropic.stream import MessageRendering
from dgemma.serve.ask import engine_request, prompt_tokens
from dgemma.serve.backend import Current
from dgemma.serve.errors import JsonResponse, error_docs
from dgemma.serve.respond import answer_docs, respond


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


_ERRORS = error_docs(MessagesErrorBody)


def router(current: Current) -> APIRouter:
    """The routes of this format."""
    routes = APIRouter(tags=["Anthropic"])

    @routes.post("/v1/messages", responses=answer_docs(MessageObject) | _ERRORS)
    async def create_message(body: MessagesBody, http: HttpRequest) -> Response:
        serving = current()
        adapter = serving.adapter(body.model)
        body.check(http, serving.settings)
        request = await engine_request(serving, body.ask(http, body.prompt_messages(), adapter))
        most = body.length_limit()[0] or 2**63  # an answer that ends before has filled the context
        rendering = MessageRendering(body.model, len(request.prompt_ids), most,
                                     thoughts=getattr(body.thinking, "display", None) != "omitted")
        return await respond(serving, http, rendering, [request], stream=bool(body.stream), one_call=body.one_call())

    @routes.post("/v1/messages/count_tokens", response_model=TokenCount, responses=_ERRORS)
    async def count_tokens(body: CountBody) -> Response:
        serving = current()
        serving.adapter(body.model)
        prompt_ids = await prompt_tokens(serving, body.prompt_messages(), param="messages", bounded=False,
                                         **body.prompt_options())
        return JsonResponse({"input_tokens": len(prompt_ids)})

    return routes
