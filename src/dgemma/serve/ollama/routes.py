"""Ollama's API, for the desktop apps that speak it: chat, generate, and what models there are.

Works on: bodies, rendered by `stream`. Knows nothing of: the engine, other formats.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from pydantic import BaseModel
from starlette.responses import PlainTextResponse, Response

from dgemma import __version__
from dgemma.config import ARCHITECTURE, SAMPLER_SETTINGS
from dgemma.serve.ask import engine_request, prompt_tokens
from dgemma.serve.backend import Current, Serving
from dgemma.serve.errors import ApiError, JsonResponse, error_docs
from dgemma.serve.ollama.body import ChatBody, GenerateBody, ShowBody
from dgemma.serve.ollama.stream import Lines, timestamp
from dgemma.serve.respond import respond

if TYPE_CHECKING:
    from dgemma.model import Prompt
    from dgemma.nn.loaded import LoadedAdapter

# The version of Ollama whose API this is: its clients compare it with what they need.
API_VERSION = "0.40.0"
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


_ERRORS = error_docs(OllamaError)


def _answers(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """What the documentation says of a route that answers in a stream unless it is told not to."""
    return {200: {"model": model, "description": "The answer in lines of JSON; with `stream: false` in one.",
                  "content": {"application/x-ndjson": {"schema": {"type": "object"}}}}}


def router(current: Current) -> APIRouter:
    """The routes, for the application to include."""
    routes = APIRouter(tags=["Ollama"])
    since = timestamp()

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
        cards = Cards(serving := current(), since)
        return JsonResponse({"models": [cards.tag(name) for name in serving.names()]})

    @routes.get("/api/ps", response_model=RunningModels, responses=_ERRORS)
    async def running() -> Response:
        """The models in memory: those of /api/tags."""
        cards = Cards(serving := current(), since)
        return JsonResponse({"models": [cards.running(name) for name in serving.names()]})

    @routes.post("/api/show", response_model=Shown, responses=_ERRORS)
    async def show(body: ShowBody) -> Response:
        """What is known of a model."""
        name = body.model or body.name
        if not name:
            raise ApiError(400, "model: which one? /api/tags has the names", "model")
        serving = current()
        named_adapter(name, serving)
        return JsonResponse(Cards(serving, since).show(name))

    @routes.post("/api/chat", responses=_answers(ChatAnswer) | _ERRORS)
    async def chat(body: ChatBody, http: HttpRequest) -> Response:
        """Answer a conversation."""
        serving = current()
        adapter = named_adapter(body.model, serving)
        body.check(http, serving.settings)
        if not body.messages:
            return JsonResponse(Lines(body.model, chat=True).nothing("unload" if body.unloads else "load"))
        request = await engine_request(serving, body.ask(http, body.prompt_messages(), adapter))
        return await respond(serving, http, Lines(body.model, chat=True), [request],
                             stream=body.stream is not False, one_call=body.one_call())

    @routes.post("/api/generate", responses=_answers(GenerateAnswer) | _ERRORS)
    async def generate(body: GenerateBody, http: HttpRequest) -> Response:
        """Answer a prompt, or with `raw` go on with it."""
        serving = current()
        adapter = named_adapter(body.model, serving)
        body.check(http, serving.settings)
        if not body.prompt:
            return JsonResponse(Lines(body.model, chat=False).nothing("unload" if body.unloads else "load"))
        prompt: Prompt = body.prompt_messages()
        if body.raw:
            prompt = await prompt_tokens(serving, body.prompt)
        request = await engine_request(serving, body.ask(http, prompt, adapter))
        return await respond(serving, http, Lines(body.model, chat=False), [request],
                             stream=body.stream is not False)

    return routes


def named_adapter(name: str, serving: Serving) -> LoadedAdapter | None:
    """The adapter that a name asks for, which may end in ":latest"."""
    return serving.adapter(name if name in serving.settings.served_names else name.removesuffix(_LATEST))


class Cards:
    """What Ollama's clients are told of the model's names."""

    def __init__(self, serving: Serving, since: str):
        """``since``: when they were loaded, as far as clients shall know."""
        self._serving, self._weights, self._since = serving, serving.backend.weights(), since

    def tag(self, name: str) -> dict[str, Any]:
        """An entry of /api/tags."""
        model = self._serving.model
        identity = repr((model.name, model.config, self._serving.backend.adapters.paths().get(name)))
        return {"name": name, "model": name, "modified_at": self._since, "size": self._weights.nbytes,
                "digest": hashlib.sha256(identity.encode()).hexdigest(), "details": self._details(name)}

    def running(self, name: str) -> dict[str, Any]:
        """An entry of /api/ps."""
        weights = self._weights
        return self.tag(name) | {"expires_at": _FOREVER, "size_vram": weights.nbytes if weights.on_gpu else 0,
                                 "context_length": self._serving.context_limit}

    def show(self, name: str) -> dict[str, Any]:
        """The body of /api/show."""
        model = self._serving.model
        config, settings = model.config, model.generation_config
        sampler = {name: getattr(settings, name) for name in SAMPLER_SETTINGS}
        templates = model.tokenizer.chat_templates
        capabilities = ["completion", *(["tools", "thinking"] if templates else []),
                        *(["vision"] if model.pictures is not None else [])]
        return {
            "modelfile": f"# served by dgemma {__version__}\nFROM {model.name}\n",
            "parameters": "\n".join(f"{name} {value}" for name, value in sampler.items()),
            "template": templates.get("default", ""), "details": self._details(name),
            "model_info": {"general.architecture": ARCHITECTURE, "general.parameter_count": self._weights.parameters,
                           f"{ARCHITECTURE}.context_length": self._serving.context_limit,
                           f"{ARCHITECTURE}.embedding_length": config.hidden_size,
                           f"{ARCHITECTURE}.block_count": config.num_hidden_layers,
                           f"{ARCHITECTURE}.attention.head_count": config.num_attention_heads,
                           f"{ARCHITECTURE}.expert_count": config.num_experts,
                           f"{ARCHITECTURE}.expert_used_count": config.top_k_experts,
                           "diffusion.canvas_length": config.canvas_length},
            "capabilities": capabilities, "modified_at": self._since}

    def _details(self, name: str) -> dict[str, Any]:
        served, kind = self._serving.settings.served_names, self._weights.type
        return {"parent_model": "" if name in served else served[0],
                "format": "gguf" if kind not in ("F32", "F16", "BF16") else "safetensors", "family": ARCHITECTURE,
                "families": [ARCHITECTURE], "parameter_size": _short(self._weights.parameters),
                "quantization_level": kind}


def _short(count: int) -> str:
    """25.8B, 1.7M."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.1f}{unit}"
    return str(count)
