"""What the formats' request bodies have in common, and how a body becomes a request to the engine.

Fields that nobody here knows are ignored, as in other servers, unless they would have changed the answer: those of
`UNSUPPORTED` are refused by name.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

from fastapi import Request as HttpRequest
from pydantic import BaseModel, ConfigDict, Field, model_validator

from dgemma.api import Prompt
from dgemma.chat import Tokenizer
from dgemma.config import SAMPLER_SETTINGS
from dgemma.constrain.choice import ToolsError
from dgemma.diffusion.row import Request
from dgemma.engine.adapters import UnknownAdapterError
from dgemma.engine.service import Service
from dgemma.errors import DgemmaError
from dgemma.nn.mounts import MountedAdapter
from dgemma.serve.errors import ApiError, as_api_error
from dgemma.serve.settings import Settings

T = TypeVar("T")

Positive = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Temperature = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False,
                                     description="Scales the temperature that tokens are drawn at; 0 is greedy.")]
TopP = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
TopK = Annotated[int, Field(ge=-1, le=2**31 - 1, description="0 or -1: all tokens.")]
Seed = Annotated[int, Field(ge=0, lt=2**63, description="Fixes all randomness; drawn and reported when left out.")]
CacheSalt = Annotated[str, Field(min_length=1, max_length=1000, description="What this request reads is found again "
                                 "in the prefix cache by requests of the same salt (and key) only.")]
# The first mistake in a list ends its reading: a list of a million mistakes would take a minute, and gigabytes.
Listed = Annotated[list[T], Field(fail_fast=True)]
StopString = Annotated[str, Field(min_length=1, max_length=1000)]
Stop = StopString | Annotated[Listed[StopString], Field(max_length=16)]
LogitBias = dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]]

MAX_DEPTH = 64  # levels of objects and lists in a body
MAX_PARTS = 100_000  # objects and lists in a body, and the objects' members; checking them takes about a second
_USER_LENGTH = 200  # characters of a user's name that tell him from others; the queue keeps them

# Below this the schedule's temperatures would leave float32; the draw is greedy there anyway.
_GREEDY = 1e-3

# Fields of OpenAI, vLLM and llama.cpp that change the answer and cannot be honoured, with the values that ask for
# nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,), "frequency_penalty": (0,), "repetition_penalty": (1,), "repeat_penalty": (1,),
    "length_penalty": (1,), "dry_multiplier": (0,), "xtc_probability": (0,), "min_p": (0,), "typical_p": (1,),
    "top_n_sigma": (-1,), "mirostat": (0,), "min_tokens": (0,), "ignore_eos": (False,), "stop_token_ids": ([],),
    "include_stop_str_in_output": (False,), "skip_special_tokens": (True,), "use_beam_search": (False,),
    "best_of": (1,), "bad_words": ([],), "allowed_token_ids": (), "prompt_logprobs": (), "functions": ([],),
    "function_call": ("none", "auto"), "audio": (), "modalities": (["text"],), "web_search_options": (),
    "suffix": ("",), "grammar": ("",), "guided_grammar": (), "structural_tag": (), "chat_template": (),
    "documents": ([],), "add_generation_prompt": (True,), "continue_final_message": (False,),
    "logits_processors": ([],), "prompt_embeds": (), "lora": ([],), "mcp_servers": ([],),
}


class Body(BaseModel):
    """A JSON object. Types are those that the schema names: the string "1" is no number."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class RequestBody(Body):
    """The body of a request.

    It is neither nested so deeply that reading, rendering or repeating it would break off, nor of so many parts that
    checking them would keep everybody else waiting.
    """

    @model_validator(mode="before")
    @classmethod
    def _small_enough(cls, body: Any) -> Any:
        level = [body] if isinstance(body, dict) else []
        parts = 0
        for _ in range(MAX_DEPTH):
            parts += sum(1 + (len(outer) if isinstance(outer, dict) else 0) for outer in level)
            if parts > MAX_PARTS:
                raise ValueError(f"more than {MAX_PARTS} objects, lists and members")
            level = [item for outer in level for item in (outer.values() if isinstance(outer, dict) else outer)
                     if isinstance(item, (dict, list))]
            if not level:
                return body
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels")


class SamplerFields(RequestBody):
    """The checkpoint's sampler settings under their own names, and the seed."""

    seed: Seed | None = None
    max_denoising_steps: Annotated[int, Field(ge=1, le=10_000)] | None = None
    entropy_bound: Positive | None = None
    t_min: Positive | None = None
    t_max: Positive | None = None
    stability_threshold: Annotated[int, Field(ge=0, le=10_000)] | None = None
    confidence_threshold: Positive | None = None
    cache_salt: CacheSalt | None = None
    redraw_empty: Annotated[bool | None, Field(
        description="Draw an answer that comes out empty at its first canvas once more.")] = None
    reasoning_budget_tokens: Annotated[Any, Field(
        description="Most tokens to think, marks included; 0: no thinking, -1: no limit.")] = None
    reasoning_budget: Annotated[Any, Field(description="Like reasoning_budget_tokens.")] = None
    thinking_budget: Annotated[Any, Field(description="Like reasoning_budget_tokens.")] = None
    thinking_budget_tokens: Annotated[Any, Field(description="Like reasoning_budget_tokens.")] = None
    thinking_token_budget: Annotated[Any, Field(description="Like reasoning_budget_tokens.")] = None

    def sampler(self) -> dict[str, Any]:
        """The settings that were given, for `Model.request`."""
        given = {name: getattr(self, name) for name in (*SAMPLER_SETTINGS, "redraw_empty")}
        return {name: value for name, value in given.items() if value is not None}


def refuse_unsupported(body: Body) -> None:
    """Raises `ApiError` naming the first field that was sent, would change the answer, and cannot be honoured."""
    for name, value in (body.model_extra or {}).items():
        if name in UNSUPPORTED and value is not None and value not in UNSUPPORTED[name]:
            raise ApiError(400, f"{name} is not supported here: leave it out", name, "unsupported_parameter")


def adapter_of(name: str | None, service: Service, settings: Settings) -> MountedAdapter | None:
    """The adapter that a model's name asks for, None for the model alone; raises `ApiError` (404) for unknown names."""
    if name is None or name in settings.served_names:
        return None
    try:
        return service.adapters.get(name)
    except UnknownAdapterError as error:
        raise unknown_model(name, service, settings) from error


def unknown_model(name: str, service: Service, settings: Settings, param: str = "model") -> ApiError:
    """The error that says which names there are."""
    known = ", ".join(map(repr, [*settings.served_names, *service.adapters.paths()]))
    return ApiError(404, f"the model {name!r} does not exist here: this server has {known}", param, "model_not_found")


@dataclasses.dataclass(frozen=True)
class Caller:
    """Whose request this is: for the engine's fair order, and for what it may find of what was read before."""

    client: str  # an API key's number; the address where no keys are needed
    user: str  # whom the client names: his turn is a part of the client's, whatever the name
    tenant: str  # the key, and the salt that the request names; without keys all clients are one tenant


def client_of(http: HttpRequest, user: str | None = None, salt: str | None = None) -> Caller:
    """Who asks; ``user`` and ``salt`` are what the body says of it."""
    key = http.scope.get("dgemma.key")
    own = "" if key is None else f"key {key}"
    return Caller(own or http.scope.get("dgemma.client", ""), (user or "")[:_USER_LENGTH], f"{own}/{salt or ''}")


def choice_seeds(seed: int | None, count: int) -> list[int]:
    """A seed for each of several answers to one prompt: seed, seed + 1, …"""
    first = secrets.randbits(32) if seed is None else seed
    return [(first + index) % 2**63 for index in range(count)]


def context_limit(service: Service, settings: Settings) -> int:
    """Tokens that a prompt and its answer may have together."""
    network = service.model.config.max_position_embeddings
    return network if settings.max_model_len is None else min(settings.max_model_len, network)


async def engine_request(service: Service, settings: Settings, prompt: Prompt, *,
                         adapter: MountedAdapter | None, param: str = "messages",
                         max_tokens: int | None = None, max_tokens_param: str = "max_tokens",
                         format_param: str = "response_format",
                         temperature: float | None = None, top_k: int | None = None, top_p: float | None = None,
                         logit_bias: Mapping[str, float] | None = None, client: Caller | None = None,
                         **options: Any) -> Request:
    """The checked request, its prompt rendered and tokenised in another thread.

    ``param``, ``max_tokens_param`` and ``format_param`` are what this API calls prompt, length limit and form of the
    answer, for errors; ``options`` are those of `Model.request`. Raises `ApiError`.
    """
    limit = context_limit(service, settings)
    bias = None if logit_bias is None else {int(token): value for token, value in logit_bias.items()}
    vocabulary = service.model.config.vocab_size
    wrong = [token for token in bias or () if token >= vocabulary]
    if wrong:
        raise ApiError(400, f"logit_bias names token {wrong[0]}; the vocabulary has {vocabulary}", "logit_bias")
    _check_length(service, prompt, limit, param)
    options.setdefault("redraw_empty", settings.redraw_empty)
    scale = 1.0 if temperature is None else temperature
    try:
        request = await _in_thread(
            service.model.request, prompt, max_tokens=max_tokens, temperature=scale if scale >= _GREEDY else 0.0,
            top_k=max(top_k or 0, 0), top_p=1.0 if top_p is None else top_p, logit_bias=bias, **options)
    except ApiError as error:
        if isinstance(error.__cause__, ToolsError):
            error.param = error.__cause__.field
        elif error.param is None:
            about_form = options.get("response_format") and "prompt" not in error.message
            error.param = format_param if about_form else param
        raise
    room = limit - len(request.prompt_ids)
    if room < 1 or (max_tokens is not None and max_tokens > room):
        raise ApiError(400, f"this server takes {limit} tokens of prompt and answer; this is a prompt of "
                       f"{len(request.prompt_ids)} and an answer of {max_tokens or 'at least 1'}",
                       param if room < 1 else max_tokens_param, "context_length_exceeded")
    if request.settings.max_tokens > room:  # the checkpoint's own default asks for more than there is
        request = dataclasses.replace(request, settings=request.settings.replace(max_tokens=room))
    shared = system_tokens(service.model.tokenizer, request.prompt_ids) if settings.share_system_prompts else 0
    return dataclasses.replace(request, adapter=adapter, shared=shared,
                               **({} if client is None else dataclasses.asdict(client)))


def system_tokens(tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> int:
    """How many tokens the beginning of a prompt with its system turn has; 0 without one."""
    begin, end = tokenizer.token_to_id("<|turn>"), tokenizer.token_to_id("<turn|>")
    first = next((place for place, token in enumerate(prompt_ids[:2]) if token == begin), None)  # behind <bos>
    if first is None or not tokenizer.decode(prompt_ids[first + 1 : first + 9]).startswith("system"):
        return 0
    return next((place + 1 for place, token in enumerate(prompt_ids) if token == end), 0)


async def prompt_tokens(service: Service, settings: Settings, prompt: Prompt, bos: bool = True, *,
                        param: str = "prompt", thinking: bool = False,
                        tools: list[dict[str, Any]] | None = None) -> list[int]:
    """The token ids of a prompt: text as it is, behind <bos> unless it begins so, or a conversation rendered.

    Raises `ApiError`.
    """
    _check_length(service, prompt, context_limit(service, settings), param)
    if not isinstance(prompt, str):
        return await _in_thread(service.model.prompt_ids, prompt, thinking=thinking, tools=tools)
    tokenizer = service.model.tokenizer
    ids = await _in_thread(tokenizer.encode, prompt)
    first = tokenizer.bos_id
    return [first, *ids] if bos and first is not None and ids[:1] != [first] else ids


async def _in_thread(function: Callable[..., T], *args: Any, **options: Any) -> T:
    """What the library's function returns; its errors become `ApiError`."""
    try:
        return await asyncio.to_thread(function, *args, **options)
    except DgemmaError as error:
        raise as_api_error(error) from error
    except RecursionError as error:
        raise ApiError(400, "something in this request is nested too deeply to be read") from error


def _check_length(service: Service, prompt: Prompt, limit: int, param: str) -> None:
    """Refuse what is certainly too long before any work is done on it."""
    if _length(prompt) > limit * longest_token(service.model.tokenizer):
        raise ApiError(400, f"the prompt cannot fit: this server takes {limit} tokens of prompt and answer", param,
                       "context_length_exceeded")


def _length(prompt: Any) -> int:
    """Characters of text in a prompt, or token ids; of messages only what they say."""
    if isinstance(prompt, str):
        return len(prompt)
    if isinstance(prompt, Mapping):
        return sum(_length(prompt[key]) for key in ("content", "text") if key in prompt)
    if isinstance(prompt, Sequence):
        return len(prompt) if prompt and isinstance(prompt[0], int) else sum(map(_length, prompt))
    return 0


@functools.lru_cache(maxsize=4)
def longest_token(tokenizer: Tokenizer) -> int:
    """Characters of the longest token: no text becomes fewer tokens than its length by this."""
    return max(map(len, tokenizer.backend.get_vocab()))
