"""Ollama's API, for the desktop apps that speak it: chat, generate, and what models there are.

Works on: `deltas`, rendered as lines of JSON. Knows nothing of: the engine, other formats.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from pydantic import BaseModel
from starlette.responses import PlainTextResponse, Response

from dgemma import __version__
from dgemma.config import SAMPLER_SETTINGS
from dgemma.engine.service import Service
from dgemma.inspect import count_parameters
from dgemma.model import Prompt
from dgemma.nn.activation import MountedAdapter
from dgemma.nn.packed import weight_bytes
from dgemma.serve.bodies import (
    adapter_of,
    context_limit,
    engine_request,
    prompt_tokens,
)
from dgemma.serve.deltas import (
    Answer,
    Broken,
    BrokenAnswerError,
    Delta,
    Done,
    Reasoning,
    Text,
    ToolCall,
    answering,
    collect,
)
from dgemma.serve.errors import RESPONSES, ApiError, JsonResponse
from dgemma.serve.fields import check_fields
from dgemma.serve.ollama.body import ChatBody, GenerateBody, OllamaBody, ShowBody
from dgemma.serve.settings import Settings
from dgemma.serve.streams import LineStream, Merged, line, whole
from dgemma.serve.usage import tally
from dgemma.weights.load import network_shapes

# The version of Ollama whose API this is: its clients compare it with what they need.
API_VERSION = "0.40.0"
_FAMILY = "diffusion-gemma"
_LATEST = ":latest"  # what Ollama's clients put behind a name without a tag
_FOREVER = "9999-12-31T23:59:59Z"


class OllamaError(BaseModel):
    """The body of every answer that is an error."""

    error: str


class Version(BaseModel):
    version: str
    dgemma: str


class Details(BaseModel):
    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class Tag(BaseModel):
    """A name that requests may ask for."""

    name: str
    model: str
    modified_at: str
    size: int
    digest: str
    details: Details


class Tags(BaseModel):
    models: list[Tag]


class Running(Tag):
    expires_at: str
    size_vram: int
    context_length: int


class RunningModels(BaseModel):
    models: list[Running]


class Shown(BaseModel):
    modelfile: str
    parameters: str
    template: str
    details: Details
    model_info: dict[str, Any]
    capabilities: list[str]
    modified_at: str


class Counts(BaseModel):
    """Tokens, and times in nanoseconds; of the last line, or of the only one."""

    total_duration: int | None = None
    load_duration: int | None = None
    prompt_eval_count: int | None = None
    prompt_eval_duration: int | None = None
    eval_count: int | None = None
    eval_duration: int | None = None


class ChatAnswer(Counts):
    """An answer of POST /api/chat, or a line of its stream."""

    model: str
    created_at: str
    message: dict[str, Any]
    done: bool
    done_reason: str | None = None


class GenerateAnswer(Counts):
    """An answer of POST /api/generate, or a line of its stream."""

    model: str
    created_at: str
    response: str
    thinking: str | None = None
    done: bool
    done_reason: str | None = None


_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": OllamaError, "description": documented["description"]}
    for status, documented in RESPONSES.items()}


def _answers(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """What the documentation says of a route that answers in a stream unless it is told not to."""
    return {200: {"model": model, "description": "The answer in lines of JSON; with `stream: false` in one.",
                  "content": {"application/x-ndjson": {"schema": {"type": "object"}}}}}


def router(service: Service, settings: Settings) -> APIRouter:
    """The routes, for the application to include."""
    routes = APIRouter(tags=["Ollama"])
    cards = Cards(service, settings)

    @routes.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def here() -> Response:
        """Whether a server is here: clients look for these words."""
        return PlainTextResponse("Ollama is running (dgemma)")

    @routes.get("/api/version", response_model=Version, responses=_ERRORS)
    async def version() -> Response:
        """The version of the API, and of this server."""
        return JsonResponse({"version": API_VERSION, "dgemma": __version__})

    @routes.get("/api/tags", response_model=Tags, responses=_ERRORS)
    async def tags() -> Response:
        """The names under which the model is served, and those of its adapters."""
        return JsonResponse({"models": [cards.tag(name) for name in cards.names()]})

    @routes.get("/api/ps", response_model=RunningModels, responses=_ERRORS)
    async def running() -> Response:
        """The models in memory: those of /api/tags."""
        return JsonResponse({"models": [cards.running(name) for name in cards.names()]})

    @routes.post("/api/show", response_model=Shown, responses=_ERRORS)
    async def show(body: ShowBody) -> Response:
        """What is known of a model."""
        name = body.model or body.name
        if not name:
            raise ApiError(400, "model: which one? /api/tags has the names", "model")
        named_adapter(name, service, settings)
        return JsonResponse(cards.show(name))

    @routes.post("/api/chat", responses=_answers(ChatAnswer) | _ERRORS)
    async def chat(body: ChatBody, http: HttpRequest) -> Response:
        """Answer a conversation."""
        adapter = named_adapter(body.model, service, settings)
        check_fields(body, http, settings)
        if not body.messages:
            return JsonResponse(Lines(body).nothing("unload" if body.unloads else "load"))
        request = await engine_request(service, settings, body.conversation(), adapter=adapter,
                                       logprobs=body.wanted_logprobs(), **body.asks(http))
        return await _respond(http, settings, body, answering(service, request, one_call=body.one_call()), Lines(body))

    @routes.post("/api/generate", responses=_answers(GenerateAnswer) | _ERRORS)
    async def generate(body: GenerateBody, http: HttpRequest) -> Response:
        """Answer a prompt, or with `raw` go on with it."""
        adapter = named_adapter(body.model, service, settings)
        check_fields(body, http, settings)
        body.check()
        if not body.prompt:
            return JsonResponse(Lines(body).nothing("unload" if body.unloads else "load"))
        prompt: Prompt = body.conversation()
        if body.raw:
            prompt = await prompt_tokens(service, settings, body.prompt)
        request = await engine_request(service, settings, prompt, adapter=adapter, param="prompt",
                                       logprobs=body.wanted_logprobs(), **body.asks(http))
        return await _respond(http, settings, body, answering(service, request), Lines(body))

    return routes


def named_adapter(name: str, service: Service, settings: Settings) -> MountedAdapter | None:
    """`adapter_of`, for a name that may end in ":latest"."""
    short = name.removesuffix(_LATEST)
    return adapter_of(name if name in settings.served_names else short, service, settings)


async def _respond(http: HttpRequest, settings: Settings, body: OllamaBody, answer: AsyncGenerator[Delta, None],
                   lines: Lines) -> Response:
    if body.stream is not False:
        source = Merged([answer])
        return LineStream(source, _streamed(source, lines), settings)
    return await whole(http, settings, _whole(answer, lines))


async def _streamed(answer: Merged[Delta], lines: Lines) -> AsyncGenerator[bytes, None]:
    async for _, delta in answer:
        yield line(lines.of(delta))


async def _whole(answer: AsyncGenerator[Delta, None], lines: Lines) -> Response:
    async with aclosing(answer):
        return JsonResponse(lines.whole(await collect(answer)))


class Lines:
    """An answer as the lines of a stream, each a piece of it, or as one line that is all of it."""

    def __init__(self, body: OllamaBody):
        self._model, self._chat, self._began = body.model, isinstance(body, ChatBody), time.perf_counter()

    def of(self, delta: Delta) -> dict[str, Any]:
        """The line of a piece. Raises `ApiError` or `BrokenAnswerError` for an answer that was cut off."""
        if isinstance(delta, Broken):
            raise BrokenAnswerError(delta.told)
        if isinstance(delta, Done):
            return self._line() | self._end(delta)
        if isinstance(delta, Text):
            return self._line(delta.text, logprobs=delta.logprobs)
        if isinstance(delta, Reasoning):
            return self._line(thinking=delta.text)
        assert isinstance(delta, ToolCall), "nobody asks for drafts here"
        return self._line(calls=[delta])

    def whole(self, answer: Answer) -> dict[str, Any]:
        """All of an answer; raises as `of` does."""
        assert answer.done is not None, "`collect` sees to that"
        return self._line(answer.text, answer.reasoning, answer.tool_calls, answer.logprobs) | self._end(answer.done)

    def nothing(self, reason: str) -> dict[str, Any]:
        """The answer to no prompt."""
        return self._line() | {"done": True, "done_reason": reason}

    def _line(self, text: str = "", thinking: str = "", calls: Sequence[ToolCall] = (),
              logprobs: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        thought = {"thinking": thinking} if thinking else {}
        if self._chat:
            said: dict[str, Any] = {"message": {"role": "assistant", "content": text, **thought}}
            if calls:
                said["message"]["tool_calls"] = [{"id": call.id, "function": {
                    "index": call.index, "name": call.name, "arguments": json.loads(call.arguments)}} for call in calls]
        else:
            said = {"response": text, **thought}
        return {"model": self._model, "created_at": _now(), **said, "done": False,
                **({} if logprobs is None else {"logprobs": logprobs})}

    def _end(self, done: Done) -> dict[str, Any]:
        if done.finish_reason == "cancelled":
            raise ApiError(503, "the server is stopping and has cut off this answer", headers={"Retry-After": "1"})
        total, used = time.perf_counter() - self._began, tally.get()
        read = total if used is None or used.opened is None else min(used.opened, total)
        return {"done": True, "done_reason": "length" if done.finish_reason == "length" else "stop",
                "total_duration": _nanoseconds(total), "load_duration": 0,
                "prompt_eval_count": done.usage.prompt_tokens, "prompt_eval_duration": _nanoseconds(read),
                "eval_count": done.usage.completion_tokens, "eval_duration": _nanoseconds(total - read)}


class Cards:
    """What Ollama's clients are told of the model's names."""

    def __init__(self, service: Service, settings: Settings):
        self._service, self._settings = service, settings
        kinds = weight_bytes(service.model.network)
        self._size, self._kind = kinds.total(), kinds.most_common(1)[0][0]
        self._parameters = sum(count_parameters(network_shapes(service.model.config)).values())
        self._since = _now()

    def names(self) -> list[str]:
        return [*self._settings.served_names, *self._service.adapters.paths()]

    def tag(self, name: str) -> dict[str, Any]:
        """An entry of /api/tags."""
        model = self._service.model
        identity = repr((model.name, model.config, self._service.adapters.paths().get(name)))
        return {"name": name, "model": name, "modified_at": self._since, "size": self._size,
                "digest": hashlib.sha256(identity.encode()).hexdigest(), "details": self._details(name)}

    def running(self, name: str) -> dict[str, Any]:
        """An entry of /api/ps."""
        on_gpu = self._service.model.network.device.type == "cuda"
        return self.tag(name) | {"expires_at": _FOREVER, "size_vram": self._size if on_gpu else 0,
                                 "context_length": context_limit(self._service, self._settings)}

    def show(self, name: str) -> dict[str, Any]:
        """The body of /api/show."""
        config, settings = self._service.model.config, self._service.model.generation_config
        sampler = {name: getattr(settings, name) for name in SAMPLER_SETTINGS}
        templates = self._service.model.tokenizer.chat_templates
        capabilities = ["completion", *(["tools", "thinking"] if templates else [])]
        return {
            "modelfile": f"# served by dgemma {__version__}\nFROM {self._service.model.name}\n",
            "parameters": "\n".join(f"{name} {value}" for name, value in sampler.items()),
            "template": templates.get("default", ""), "details": self._details(name),
            "model_info": {"general.architecture": _FAMILY, "general.parameter_count": self._parameters,
                           f"{_FAMILY}.context_length": context_limit(self._service, self._settings),
                           f"{_FAMILY}.embedding_length": config.hidden_size,
                           f"{_FAMILY}.block_count": config.num_hidden_layers,
                           f"{_FAMILY}.attention.head_count": config.num_attention_heads,
                           f"{_FAMILY}.expert_count": config.num_experts,
                           f"{_FAMILY}.expert_used_count": config.top_k_experts,
                           "diffusion.canvas_length": config.canvas_length},
            "capabilities": capabilities, "modified_at": self._since}

    def _details(self, name: str) -> dict[str, Any]:
        adapter = name not in self._settings.served_names
        return {"parent_model": self._settings.served_names[0] if adapter else "",
                "format": "gguf" if self._kind not in ("F32", "F16", "BF16") else "safetensors", "family": _FAMILY,
                "families": [_FAMILY], "parameter_size": _short(self._parameters), "quantization_level": self._kind}


def _short(count: int) -> str:
    """25.8B, 1.7M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat().replace("+00:00", "Z")


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
