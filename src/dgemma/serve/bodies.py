"""What the formats' request bodies have in common, and how a body becomes a request to the engine.

What becomes of fields that a route does not honour is `fields`' to say.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import dataclasses
import functools
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from fastapi import Request as HttpRequest
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from dgemma.chat import Tokenizer
from dgemma.config import SAMPLER_SETTINGS
from dgemma.constrain.choice import ToolsError, calls_of, read_tool_choice
from dgemma.diffusion.row import Request, longest_prompt
from dgemma.engine.registry import UnknownAdapterError
from dgemma.engine.service import Service, in_form_thread
from dgemma.errors import ContextLengthError, DgemmaError
from dgemma.model import Prompt
from dgemma.nn.activation import MountedAdapter
from dgemma.serve.errors import ApiError, as_api_error
from dgemma.serve.settings import Settings
from dgemma.serve.usage import tally, time_left

T = TypeVar("T")


def _whole(value: Any) -> Any:
    """A whole number written as a float is one: JSON knows no difference, and some languages write no other."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Whole = Annotated[int, BeforeValidator(_whole)]
Positive = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
Length = Annotated[Annotated[int, Field(ge=1)] | Literal[-1], BeforeValidator(_whole), Field(
    description="Tokens; -1: to the end of the context. More than fits is what fits.")]
Temperature = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False,
                                     description="Scales the temperature that tokens are drawn at; 0 is greedy.")]
TopP = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, description="0 is greedy.")]
TopK = Annotated[Whole, Field(ge=-1, le=2**31 - 1, description="0 or -1: all tokens.")]
Seed = Annotated[Whole, Field(ge=-(2**63), lt=2**63, description="Fixes all randomness; drawn and reported when left "
                                                                 "out or -1.")]
CacheSalt = Annotated[str, Field(min_length=1, max_length=1000, description="What this request reads is found again "
                                 "in the prefix cache by requests of the same salt (and key) only.")]
# The first mistake in a list ends its reading: a list of a million mistakes would take a minute, and gigabytes.
Listed = Annotated[list[T], Field(fail_fast=True)]
StopString = Annotated[str, Field(max_length=1000)]
Stop = StopString | Annotated[Listed[StopString | None], Field(max_length=16)]
LogitBias = dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]]

MAX_DEPTH = 64  # levels of objects and lists in a body
MAX_PARTS = 100_000  # objects and lists in a body, and the objects' members; checking them takes about a second
_USER_LENGTH = 200  # characters of a user's name that tell him from others; the queue keeps them

# Below this the schedule's temperatures would leave float32; the draw is greedy there anyway.
_GREEDY = 1e-3


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
    max_denoising_steps: Annotated[Whole, Field(ge=1, le=10_000)] | None = None
    entropy_bound: Positive | None = None
    t_min: Positive | None = None
    t_max: Positive | None = None
    stability_threshold: Annotated[Whole, Field(ge=0, le=10_000)] | None = None
    confidence_threshold: Positive | None = None
    redraw_empty: Annotated[bool | None, Field(
        description="Draw an answer that comes out empty at its first canvas once more.")] = None

    def sampler(self) -> dict[str, Any]:
        """The settings that were given, for `Model.request`."""
        given = {name: getattr(self, name) for name in (*SAMPLER_SETTINGS, "redraw_empty")}
        return {name: value for name, value in given.items() if value is not None}


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


def seed_of(given: int | None) -> int | None:
    """The seed that a client's number stands for; None, as -1 says in many programs, is any."""
    return None if given is None or given == -1 else given % 2**63


def choice_seeds(seed: int | None, count: int) -> list[int]:
    """A seed for each of several answers to one prompt: seed, seed + 1, …"""
    seed = seed_of(seed)
    first = secrets.randbits(32) if seed is None else seed
    return [(first + index) % 2**63 for index in range(count)]


def context_limit(service: Service, settings: Settings) -> int:
    """Tokens that a prompt and its answer may have together."""
    network = service.model.config.max_position_embeddings
    return network if settings.max_model_len is None else min(settings.max_model_len, network)


# Kinds of parts that hold no text, by any API's name.
MEDIA = frozenset(("image", "image_url", "input_image", "input_audio", "audio", "audio_url", "video", "video_url",
                   "input_video", "container_upload", "computer_screenshot", "browser_state"))
_TEXTS = ("text/", "application/json", "application/xml", "application/yaml", "application/x-yaml")


def text_only(kind: str, where: str) -> ApiError:
    """The error for a part that is no text."""
    return ApiError(400, f"{where}: this server reads text only: {kind} parts are not supported yet", where)


def file_text(data: str, media_type: str | None, where: str) -> str:
    """The text of a file that came as base64, or as a data URL of it. Raises `ApiError` for what is no text."""
    if data.startswith("data:"):
        head, _, data = data.partition(",")
        media_type = head.removeprefix("data:").split(";")[0]
    if not (media_type or "").startswith(_TEXTS):
        raise ApiError(400, f"{where}: this server reads text only: a file must be text/plain, not "
                       f"{media_type or 'of an unknown type'}", where)
    try:
        return base64.b64decode(data, validate=True).decode("utf-8-sig")
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, f"{where}: the file is not base64 of text in UTF-8: {error}", where) from error


def titled(title: str | None, text: str) -> str:
    """A document as a prompt shows it."""
    return f"{title}\n\n{text}" if title else text


async def engine_request(service: Service, settings: Settings, prompt: Prompt, *,
                         adapter: MountedAdapter | None, param: str = "messages",
                         max_tokens: int | None = None, max_tokens_param: str = "max_tokens",
                         format_param: str = "response_format", seed: int | None = None,
                         temperature: float | None = None, top_k: int | None = None, top_p: float | None = None,
                         logit_bias: Mapping[str, float] | None = None, client: Caller | None = None,
                         **options: Any) -> Request:
    """The checked request, its prompt rendered and tokenised in another thread; a form has threads of its own.

    The answer may have ``max_tokens``, or what is left of the context if that is less. ``param``,
    ``max_tokens_param`` and ``format_param`` are what this API calls prompt, length limit and form of the answer, for
    errors; ``options`` are those of `Model.request`. Raises `ApiError`, and TimeoutError when this takes longer than a
    request may: what it takes is a part of the request's time.
    """
    limit = context_limit(service, settings)
    bias = None if logit_bias is None else {int(token): value for token, value in logit_bias.items()}
    vocabulary = service.model.config.vocab_size
    wrong = [token for token in bias or () if token >= vocabulary]
    if wrong:
        raise ApiError(400, f"logit_bias names token {wrong[0]}; the vocabulary has {vocabulary}", "logit_bias")
    _check_length(service, settings, prompt, param)
    options.setdefault("redraw_empty", settings.redraw_empty)
    scale = 1.0 if temperature is None else temperature
    if top_p == 0:  # the narrowest there is: the most probable token
        scale, top_p = 0.0, None

    def make() -> Request:
        request = service.model.request(
            prompt, max_tokens=None if max_tokens is None else min(max_tokens, limit), seed=seed_of(seed),
            temperature=scale if scale >= _GREEDY else 0.0, top_k=max(top_k or 0, 0),
            top_p=1.0 if top_p is None else top_p, logit_bias=bias, **options)
        room = limit - len(request.prompt_ids)
        if room < 1:
            raise too_long(len(request.prompt_ids), service, settings, param)
        if request.settings.max_tokens <= room:
            return request
        request = dataclasses.replace(request, settings=request.settings.replace(max_tokens=room))
        try:
            request.check(service.model.config)  # its form may need more than this server's limit leaves
        except ValueError as error:
            raise DgemmaError(str(error)) from error
        return request

    began = time.perf_counter()
    try:
        preparing = _in_thread(make, run=in_form_thread if _has_form(options) else asyncio.to_thread)
        request = await asyncio.wait_for(preparing, time_left(settings.timeout) or None)
    except ApiError as error:
        cause = error.__cause__
        if isinstance(cause, ContextLengthError) and cause.prompt_tokens is not None:
            raise too_long(cause.prompt_tokens, service, settings, param) from cause
        if isinstance(cause, ToolsError):
            error.param = cause.field
        elif error.param == "response_format":
            error.message, error.param = error.message.replace("response_format", format_param, 1), format_param
        elif error.param is None:
            about_form = options.get("response_format") and "prompt" not in error.message
            error.param = format_param if about_form else param
        elif error.param == "max_tokens":
            error.param = max_tokens_param
        raise
    finally:
        if (used := tally.get()) is not None:
            used.preparing += time.perf_counter() - began
    shared = system_tokens(service.model.tokenizer, request.prompt_ids) if settings.share_system_prompts else 0
    return dataclasses.replace(request, adapter=adapter, shared=shared,
                               **({} if client is None else dataclasses.asdict(client)))


def _has_form(options: Mapping[str, Any]) -> bool:
    """Whether a request's answer, or the calls in it, will be held to a form."""
    if options.get("response_format") not in (None, {"type": "text"}):
        return True
    try:
        choice = read_tool_choice(options.get("tool_choice"))
        return calls_of(options.get("tools"), choice, parallel=True, formed=False) is not None
    except ToolsError:
        return False  # it will be refused


def system_tokens(tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> int:
    """How many tokens the beginning of a prompt with its system turn has; 0 without one."""
    begin, end = tokenizer.token_to_id("<|turn>"), tokenizer.token_to_id("<turn|>")
    first = next((place for place, token in enumerate(prompt_ids[:2]) if token == begin), None)  # behind <bos>
    if first is None or not tokenizer.decode(prompt_ids[first + 1 : first + 9]).startswith("system"):
        return 0
    return next((place + 1 for place, token in enumerate(prompt_ids) if token == end), 0)


def longest(service: Service, settings: Settings) -> int:
    """Tokens of the longest prompt that an answer can be made to."""
    return min(context_limit(service, settings) - 1, longest_prompt(service.model.config))


def too_long(tokens: int, service: Service, settings: Settings, param: str, counted: bool = True) -> ApiError:
    """The error for a prompt of so many tokens, or at least so many, in the words that each API's clients look for."""
    limit, most = context_limit(service, settings), longest(service, settings)
    kept = f" ({limit - most} of them are kept for the answer)" if limit - most > 1 else ""
    return ApiError(400, f"This model's maximum context length is {limit} tokens{kept}. However, your prompt has "
                    f"{'' if counted else 'at least '}{tokens} tokens: shorten it", param, "context_length_exceeded",
                    anthropic_message=f"prompt is too long: {tokens} tokens > {most} maximum")


async def prompt_tokens(service: Service, settings: Settings, prompt: Prompt, bos: bool = True, *,
                        param: str = "prompt", thinking: bool = False,
                        tools: list[dict[str, Any]] | None = None, bounded: bool = True) -> list[int]:
    """The token ids of a prompt: text as it is, behind <bos> unless it begins so, or a conversation rendered.

    Raises `ApiError`; for a prompt that is too long to answer only if it has to be ``bounded``.
    """
    if bounded:
        _check_length(service, settings, prompt, param)
    if not isinstance(prompt, str):
        return await _in_thread(functools.partial(service.model.prompt_ids, prompt, thinking=thinking, tools=tools))
    tokenizer = service.model.tokenizer
    ids = await _in_thread(functools.partial(tokenizer.encode, prompt))
    first = tokenizer.bos_id
    return [first, *ids] if bos and first is not None and ids[:1] != [first] else ids


async def _in_thread(function: Callable[[], T],
                     run: Callable[[Callable[[], T]], Awaitable[T]] = asyncio.to_thread) -> T:
    """What the library's function returns when it is run in some thread; its errors become `ApiError`."""
    try:
        return await run(function)
    except DgemmaError as error:
        raise as_api_error(error) from error
    except RecursionError as error:
        raise ApiError(400, "something in this request is nested too deeply to be read") from error


def _check_length(service: Service, settings: Settings, prompt: Prompt, param: str) -> None:
    """Refuse what is certainly too long before any work is done on it."""
    least = -(-_length(prompt) // longest_token(service.model.tokenizer))
    if least > context_limit(service, settings):
        raise too_long(least, service, settings, param, counted=False)


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
