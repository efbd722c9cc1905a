"""What a body asks for, whatever the format, and how that becomes a request to the engine.

Works on: `Ask`. Knows nothing of: bodies, the network.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Request as HttpRequest

from dgemma.chat.infill import middle_canvas
from dgemma.chat.tokenizer import Tokenizer
from dgemma.constrain.choice import ToolsError, calls_of, read_tool_choice
from dgemma.diffusion.request import Request
from dgemma.engine.service import in_form_thread
from dgemma.errors import ContextLengthError, DgemmaError
from dgemma.serve.backend import Serving
from dgemma.serve.errors import ApiError, as_api_error
from dgemma.serve.media import media_in, with_media
from dgemma.serve.usage import request_usage, time_left

if TYPE_CHECKING:
    from dgemma.model import Prompt
    from dgemma.nn.loaded import LoadedAdapter

T = TypeVar("T")

_USER_LENGTH = 200  # characters of a user's name that tell him from others; the queue keeps them

# Below this the schedule's temperatures would leave float32; the draw is greedy there anyway.
_GREEDY = 1e-3


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask:
    """A request to the model in the words of `Model.request`, as every format's body says it.

    ``options`` are more of these words. ``prompt_param``, ``max_tokens_param`` and ``format_param`` are what the API
    calls prompt, length limit and form of the answer, for errors.
    """

    prompt: Prompt
    client: Caller
    adapter: LoadedAdapter | None = None
    max_tokens: int | None = None  # None: to the end of the context
    seed: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    logit_bias: Mapping[str, float] | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prompt_param: str = "messages"
    max_tokens_param: str = "max_tokens"
    format_param: str = "response_format"


async def between(serving: Serving, ask: Ask, suffix: str, count: int) -> Ask:
    """The same with an answer of ``count`` tokens, or as many as a canvas has room for, between prompt and suffix."""
    model = serving.model
    count, canvas = await asyncio.to_thread(middle_canvas, suffix, count, model.tokenizer, model.config.canvas_length)
    return dataclasses.replace(ask, max_tokens=count, options={
        **ask.options, "canvas": canvas.token_ids, "pinned": canvas.pinned})


async def engine_request(serving: Serving, ask: Ask) -> Request:
    """The checked request, its prompt rendered and tokenised in another thread; a form has threads of its own.

    The answer may have ``max_tokens``, or what is left of the context if that is less. Raises `ApiError`, and
    TimeoutError when this takes longer than a request may: what it takes is a part of the request's time.
    """
    model, settings = serving.model, serving.settings
    options = {"redraw_empty": settings.redraw_empty, **ask.options}
    limit, vocabulary = serving.context_limit, model.config.vocab_size
    bias = None if ask.logit_bias is None else {int(token): value for token, value in ask.logit_bias.items()}
    wrong = [token for token in bias or () if token >= vocabulary]
    if wrong:
        raise ApiError(400, f"logit_bias names token {wrong[0]}; the vocabulary has {vocabulary}", "logit_bias")
    _check_length(serving, ask.prompt, ask.prompt_param)
    _check_media(serving, ask.prompt)
    scale, top_p = 1.0 if ask.temperature is None else ask.temperature, ask.top_p
    if top_p == 0:  # the narrowest there is: the most probable token
        scale, top_p = 0.0, None

    def make() -> Request:
        request = model.request(
            with_media(ask.prompt, settings.media),
            max_tokens=None if ask.max_tokens is None else min(ask.max_tokens, limit), seed=seed_of(ask.seed),
            temperature=scale if scale >= _GREEDY else 0.0, top_k=max(ask.top_k or 0, 0),
            top_p=1.0 if top_p is None else top_p, logit_bias=bias, **options)
        room = limit - len(request.prompt_ids)
        if room < 1:
            raise serving.too_long(len(request.prompt_ids), ask.prompt_param)
        if request.settings.max_tokens <= room:
            return request
        request = dataclasses.replace(request, settings=request.settings.replace(max_tokens=room))
        try:
            request.check(model.config)  # its form may need more than this server's limit leaves
        except ValueError as error:
            raise DgemmaError(str(error)) from error
        return request

    began = time.perf_counter()
    try:
        # Not `wait_for`: before Python 3.12 it swallows a cancellation that comes when the thread has just ended.
        async with asyncio.timeout(time_left(settings.timeout) or None):
            request = await _in_thread(make, run=in_form_thread if _has_form(options) else asyncio.to_thread)
    except ApiError as error:
        cause = error.__cause__
        if isinstance(cause, ContextLengthError) and cause.prompt_tokens is not None:
            raise serving.too_long(cause.prompt_tokens, ask.prompt_param) from cause
        _name_field(error, ask)
        raise
    finally:
        if (used := request_usage.get()) is not None:
            used.preparing += time.perf_counter() - began
    shared = system_tokens(model.tokenizer, request.prompt_ids) if settings.share_system_prompts else 0
    return dataclasses.replace(request, adapter=ask.adapter, shared=shared, **dataclasses.asdict(ask.client))


def _name_field(error: ApiError, ask: Ask) -> None:
    """Let an error of the library's name the field by which this API's client said what is wrong."""
    if isinstance(error.__cause__, ToolsError):
        error.param = error.__cause__.field
    elif error.param == "response_format":
        error.message = error.message.replace("response_format", ask.format_param, 1)
        error.param = ask.format_param
    elif error.param is None:
        about_form = ask.options.get("response_format") and "prompt" not in error.message
        error.param = ask.format_param if about_form else ask.prompt_param
    elif error.param == "max_tokens":
        error.param = ask.max_tokens_param
    elif error.param.startswith("messages") and ask.prompt_param != "messages":
        error.param = ask.prompt_param


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


async def prompt_tokens(serving: Serving, prompt: Prompt, bos: bool = True, *,
                        param: str = "prompt", thinking: bool = False,
                        tools: list[dict[str, Any]] | None = None, bounded: bool = True) -> list[int]:
    """The token ids of a prompt: text as it is, behind <bos> unless it begins so, or a conversation rendered.

    Raises `ApiError`; for a prompt that is too long to answer only if it has to be ``bounded``.
    """
    if bounded:
        _check_length(serving, prompt, param)
    if not isinstance(prompt, str):
        _check_media(serving, prompt)
        return await _in_thread(lambda: serving.model.prompt_ids(with_media(prompt, serving.settings.media),
                                                                 thinking=thinking, tools=tools))
    tokenizer = serving.model.tokenizer
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


def _check_media(serving: Serving, prompt: Prompt) -> None:
    """Refuse pictures that the model cannot see before any of them is fetched."""
    if serving.model.pictures is None and (part := next(media_in(prompt), None)) is not None:
        raise ApiError(400, f"{part['name']}: this model reads text only: it has no vision tower", part["name"])


def _check_length(serving: Serving, prompt: Prompt, param: str) -> None:
    """Refuse what is certainly too long before any work is done on it."""
    least = -(-_length(prompt) // longest_token(serving.model.tokenizer))
    if least > serving.context_limit:
        raise serving.too_long(least, param, counted=False)


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
