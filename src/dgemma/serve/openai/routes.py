"""OpenAI's API: chat completions, text completions, responses and models, with vLLM's /tokenize and /detokenize.

Nothing is stored: a conversation is sent whole every time.

Works on: bodies, rendered by `stream` and `responses_stream`. Knows nothing of: the engine, other formats.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from fastapi import Request as HttpRequest
from pydantic import BaseModel
from starlette.responses import Response

from dgemma.diffusion.request import Request
from dgemma.serve.ask import between, choice_seeds, engine_request, prompt_tokens
from dgemma.serve.backend import Current, Serving
from dgemma.serve.bodies import Listed, RequestBody
from dgemma.serve.errors import RESPONSES, ApiError, JsonResponse
from dgemma.serve.forms import answer_form
from dgemma.serve.openai.body import MIDDLE, ChatBody, CompletionBody, TokenId, TokenizeBody
from dgemma.serve.openai.responses_body import ResponsesBody, response_format
from dgemma.serve.openai.responses_stream import ResponseRendering
from dgemma.serve.openai.stream import ChatCompletion, ChatRendering, TextCompletion, TextRendering
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


class ModelCard(BaseModel):
    """A name that requests may ask for; ``root`` is what was loaded, ``parent`` the model that an adapter is for.

    OpenAI's fields and Anthropic's: each API's clients find theirs.
    """

    id: str
    object: Literal["model"] = "model"
    type: Literal["model"] = "model"
    display_name: str
    created: int
    created_at: str
    lifecycle: Literal["active"] = "active"
    max_input_tokens: int
    max_tokens: int
    owned_by: str = "dgemma"
    root: str
    parent: str | None = None
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]
    has_more: bool
    first_id: str | None
    last_id: str | None


class Tokens(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeBody(RequestBody):
    model: str | None = None
    tokens: Listed[TokenId]


class DetokenizedText(BaseModel):
    prompt: str


def router(current: Current) -> APIRouter:
    """The routes, for the application to include."""
    routes = APIRouter(responses=RESPONSES)
    started = int(time.time())

    @routes.post("/v1/chat/completions", tags=["OpenAI"], response_model=ChatCompletion,
                 responses=answer_docs(ChatCompletion, "chunks"))
    async def chat_completions(body: ChatBody, http: HttpRequest) -> Response:
        """Answer a conversation."""
        serving = current()
        adapter = serving.adapter(body.model)
        body.check(http, serving.settings)
        seeds = choice_seeds(body.seed, body.n or 1)
        request = await engine_request(serving, body.ask(http, body.prompt_messages(), adapter))
        rendering = ChatRendering(body.model or serving.settings.served_names[0], seeds, usage=body.with_usage,
                                  logprobs=request.logprobs is not None)
        return await respond(serving, http, rendering, [dataclasses.replace(request, seed=seed) for seed in seeds],
                             stream=bool(body.stream), one_call=body.one_call(),
                             drafts_per_second=body.drafts_per_second)

    @routes.post("/v1/completions", tags=["OpenAI"], response_model=TextCompletion,
                 responses=answer_docs(TextCompletion, "chunks"))
    async def completions(body: CompletionBody, http: HttpRequest) -> Response:
        """Go on with a text, or with ``suffix`` fill in what is before it."""
        serving = current()
        adapter = serving.adapter(body.model)
        body.check(http, serving.settings)
        seeds = choice_seeds(body.seed, body.n or 1)
        requests: list[Request] = []
        for prompt in body.prompts():
            ids = await prompt_tokens(serving, prompt, body.add_special_tokens)
            ask = body.ask(http, ids, adapter)
            if body.suffix:
                ask = await between(serving, ask, body.suffix, ask.max_tokens or MIDDLE)
            request = await engine_request(serving, ask)
            requests += [dataclasses.replace(request, seed=seed) for seed in seeds]
        echo = []
        if body.echo:
            decode = serving.model.tokenizer.decode
            echo = [prompt if isinstance(prompt, str) else decode(prompt, skip_special_tokens=True)
                    for prompt in body.prompts() for _ in seeds]
        rendering = TextRendering(body.model or serving.settings.served_names[0],
                                  [request.seed for request in requests],
                                  prompts=[index // len(seeds) for index in range(len(requests))],
                                  usage=body.with_usage, echo=echo, logprobs=body.logprobs is not None)
        return await respond(serving, http, rendering, requests, stream=bool(body.stream),
                             drafts_per_second=body.drafts_per_second)

    @routes.post("/v1/responses", tags=["OpenAI"], responses=answer_docs(ResponseObject))
    async def create_response(body: ResponsesBody, http: HttpRequest) -> Response:
        serving = current()
        adapter = serving.adapter(body.model)
        body.check(http, serving.settings)
        request = await engine_request(serving, body.ask(http, body.prompt_messages(), adapter))
        rendering = ResponseRendering(_echo(body, request))
        return await respond(serving, http, rendering, [request], stream=bool(body.stream), one_call=body.one_call())

    def card(serving: Serving, name: str) -> ModelCard:
        settings = serving.settings
        path = None if name in settings.served_names else serving.backend.adapters.paths()[name]
        limit = serving.context_limit
        created_at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started))  # as Anthropic's API writes it
        return ModelCard(id=name, display_name=name, created=started, created_at=created_at,
                         max_input_tokens=serving.longest_prompt, max_tokens=limit - 1,
                         root=path or serving.model.name, parent=path and settings.served_names[0], max_model_len=limit)

    @routes.get("/v1/models", tags=["OpenAI"], response_model=ModelList)
    async def models(limit: Annotated[int | None, Query(ge=1, le=1000)] = None, after_id: str | None = None,
                     before_id: str | None = None) -> Response:
        """The names under which the model is served, and those of its adapters; all of them, or a page."""
        serving = current()
        names = serving.names()
        for name, param in ((after_id, "after_id"), (before_id, "before_id")):
            if name is not None and name not in names:
                raise serving.unknown_model(name, param)
        if after_id is not None:
            names = names[names.index(after_id) + 1:]
        if before_id is not None:
            names = names[:names.index(before_id)] if before_id in names else []
        page = names if limit is None else names[-limit:] if before_id is not None else names[:limit]
        return JsonResponse(ModelList(
            data=[card(serving, name) for name in page], has_more=len(page) < len(names),
            first_id=page[0] if page else None, last_id=page[-1] if page else None).model_dump())

    @routes.get("/v1/models/{model:path}", tags=["OpenAI"], response_model=ModelCard)
    async def one_model(model: str) -> Response:
        """One of the names."""
        serving = current()
        serving.adapter(model)
        return JsonResponse(card(serving, model).model_dump())

    @routes.post("/tokenize", tags=["Tokens"], response_model=Tokens)
    async def tokenize(body: TokenizeBody, http: HttpRequest) -> Response:
        """The token ids of a text, or of a conversation as the model would read it."""
        serving = current()
        serving.adapter(body.model)
        body.check(http, serving.settings)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give either prompt or messages", "prompt" if body.messages else "messages")
        if body.prompt is not None:
            ids = await prompt_tokens(serving, body.prompt, body.add_special_tokens)
        else:
            ids = await prompt_tokens(serving, body.prompt_messages(), param="messages", **body.prompt_options())
        spell = serving.model.tokenizer.id_to_token
        strings = [spell(token) or "" for token in ids] if body.return_token_strs else None
        return JsonResponse({"count": len(ids), "max_model_len": serving.context_limit, "tokens": ids,
                             "token_strs": strings})

    @routes.post("/detokenize", tags=["Tokens"], response_model=DetokenizedText)
    async def detokenize(body: DetokenizeBody) -> Response:
        """The text of token ids, special tokens included."""
        serving = current()
        tokenizer = serving.model.tokenizer
        serving.adapter(body.model)
        unknown = next((token for token in body.tokens if tokenizer.id_to_token(token) is None), None)
        if unknown is not None:
            raise ApiError(400, f"the vocabulary has no token {unknown}", "tokens")
        return JsonResponse({"prompt": await asyncio.to_thread(tokenizer.decode, body.tokens)})

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
