"""One answer as a stream of pieces that no wire format has shaped yet; each format is a rendering of it.

Works on: the engine's events. Knows nothing of: HTTP, JSON bodies.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal

from dgemma.chat.reply import Called, Piece, Thought
from dgemma.chat.tokenizer import Tokenizer
from dgemma.diffusion.constraint import said_tokens
from dgemma.diffusion.events import CanvasCommitted, CanvasStarted, Denoised, Event, Failed, Finished, TokenLogprob
from dgemma.diffusion.request import Request
from dgemma.engine.service import RequestEvents
from dgemma.serve.usage import request_usage

log = logging.getLogger("dgemma.serve")

_IN_THE_LOG = "the server's log says why"
LEAST_LOGPROB = -9999.0  # what OpenAI writes for a token that cannot be: JSON has no -inf


@dataclass(frozen=True)
class Text:
    """A stretch of what the model says."""

    text: str
    logprobs: list[dict[str, Any]] | None = None  # OpenAI's entries: token, logprob, bytes, top_logprobs


@dataclass(frozen=True)
class ToolCall:
    """A whole call of a tool."""

    index: int  # from 0, in this answer
    id: str
    name: str
    arguments: str  # JSON text


@dataclass(frozen=True)
class Draft:
    """What the open canvas looks like after a step. All lists have one entry per canvas position.

    What a trace's `Denoised` tells has the same names here.
    """

    canvas: int  # from 0, in this answer
    step: int  # from 1
    max_steps: int
    token_ids: list[int]  # the most probable
    tokens: list[str]
    canvas_ids: list[int]  # what the next step starts from
    entropies: list[float]  # nats
    mean_entropy: float
    accepted: list[bool]
    changed: list[bool]  # since the step before
    pinned: list[bool]
    temperature: float
    seconds: float  # since the request began
    text: str  # up to the stop token or the length limit, special tokens left out
    candidates: list[list[tuple[int, str, float]]] | None = None  # token ids, tokens, probabilities, if asked for


@dataclass(frozen=True)
class AnswerUsage:
    """Counts of one answer.

    ``completion_tokens`` are the tokens that count against max_tokens: thoughts and tool calls are among them, the
    stop token is not. ``reasoning_tokens`` are those of thoughts, their marks included.
    """

    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    cached_tokens: int
    denoising_steps: int


@dataclass(frozen=True)
class Done:
    """The answer is complete: always the last piece."""

    finish_reason: Literal["stop", "length", "tool_calls"]
    usage: AnswerUsage
    stop_sequence: str | None  # the stop string that ended it, if one did
    seed: int


Delta = Thought | Text | ToolCall | Draft | Done


@dataclass
class WholeAnswer:
    """An answer's pieces put together."""

    done: Done
    reasoning: str = ""
    text: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[dict[str, Any]] | None = None


class BrokenAnswerError(Exception):
    """The engine could not finish this answer."""

    def __init__(self, told: str | None = None) -> None:
        super().__init__(f"the engine could not finish this answer: {told or _IN_THE_LOG}")


class CutAnswerError(Exception):
    """The engine has stopped before the end of this answer."""

    def __init__(self) -> None:
        super().__init__("the server is stopping and has cut off this answer")


def put_together(pieces: Iterable[Delta]) -> WholeAnswer:
    """The whole answer; the pieces are all there are."""
    *pieces, done = pieces
    assert isinstance(done, Done)
    answer = WholeAnswer(done)
    for piece in pieces:
        if isinstance(piece, Thought):
            answer.reasoning += piece.text
        elif isinstance(piece, Text):
            answer.text += piece.text
            if piece.logprobs is not None:
                answer.logprobs = (answer.logprobs or []) + piece.logprobs
        elif isinstance(piece, ToolCall):
            answer.tool_calls.append(piece)
    return answer


async def deltas(events: RequestEvents, request: Request, tokenizer: Tokenizer, *,
                 heard: Callable[[Event], None] = lambda event: None,
                 drafts_per_second: float = 0) -> AsyncGenerator[Delta, None]:
    """The request's answer piece by piece; the last one is Done.

    At most so many Drafts come in a second (0: none). ``heard`` is told of every event. Raises `BrokenAnswerError` for
    an answer that the engine could not finish, `CutAnswerError` for one that it gave up.
    """
    logprobs: list[TokenLogprob] = []
    calls = 0
    clock = asyncio.get_running_loop().time
    next_draft = clock() if drafts_per_second else float("inf")
    pinned: list[bool] = []
    async for event in events:
        heard(event)
        pieces: Sequence[Piece] = ()
        if isinstance(event, CanvasStarted):
            pinned = event.pinned
        elif isinstance(event, Denoised) and clock() >= next_draft:
            next_draft = clock() + 1 / drafts_per_second
            yield draft_of(event, pinned, request, tokenizer)
        elif isinstance(event, CanvasCommitted):
            logprobs += event.logprobs or []
            pieces = event.pieces
        elif isinstance(event, Finished):
            pieces = event.answer.rest
        elif isinstance(event, Failed):
            log.error("an answer could not be finished: %s", event.error)  # an exception's words: not for clients
            raise BrokenAnswerError(event.told)
        for piece in pieces:
            if isinstance(piece, Called):
                arguments = json.dumps(piece.arguments, ensure_ascii=False)
                yield ToolCall(calls, f"call_{secrets.token_hex(12)}", piece.name, arguments)
                calls += 1
                if (used := request_usage.get()) is not None:
                    used.calls += 1
                    used.repaired_calls += piece.repaired
            elif isinstance(piece, Thought):
                yield piece
            else:
                entries = None if request.logprobs is None else [
                    logprob_entry(tokenizer, entry) for entry in logprobs[piece.tokens[0]:piece.tokens[1]]]
                yield Text(piece.text, entries)
        if isinstance(event, Finished):
            yield _done(event, calls > 0)


async def first_call_only(stream: AsyncGenerator[Delta, None]) -> AsyncGenerator[Delta, None]:
    """The stream without further tool calls, and what is said between them."""
    called = False
    async with aclosing(stream):
        async for delta in stream:
            if not called or not isinstance(delta, (ToolCall, Text)):
                yield delta
            called = called or isinstance(delta, ToolCall)


def draft_of(event: Denoised, pinned: list[bool], request: Request, tokenizer: Tokenizer) -> Draft:
    """The canvas as it stands after a step."""
    def spelt(token: int) -> str:
        return tokenizer.token_bytes(token).decode("utf-8", "replace")  # U+FFFD: a part of a character

    ids = event.token_ids
    stops, room = request.settings.eos_token_id, request.settings.max_tokens if event.canvas == 0 else len(ids)
    said = said_tokens(ids, pinned, stops, room)
    end = next((i for i in range(said, len(ids)) if ids[i] in stops), len(ids))
    likely = None if event.candidates is None else [
        [(token, spelt(token), round(probability, 4)) for token, probability in place] for place in event.candidates]
    return Draft(event.canvas, event.step, request.settings.max_denoising_steps, ids, [spelt(token) for token in ids],
                 event.canvas_ids, [round(value, 4) for value in event.entropies], round(event.mean_entropy, 4),
                 event.accepted, event.changed, pinned, event.temperature, round(event.seconds, 4),
                 tokenizer.decode(ids[: min(end, room)], skip_special_tokens=True), likely)


def logprob_entry(tokenizer: Tokenizer, entry: TokenLogprob) -> dict[str, Any]:
    """OpenAI's form of a token's log-probability and of the alternatives at its place."""
    return {**_logprob(tokenizer, entry.token_id, entry.logprob),
            "top_logprobs": [_logprob(tokenizer, token, logprob) for token, logprob in entry.top]}


def _logprob(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, Any]:
    spelt = tokenizer.token_bytes(token_id)
    return {"token": spelt.decode("utf-8", "replace"), "logprob": max(logprob, LEAST_LOGPROB), "bytes": list(spelt)}


def _done(event: Finished, called: bool) -> Done:
    generation, read = event.generation, event.answer
    reason = "stop" if read.stopped is not None else generation.finish_reason
    if reason == "cancelled":
        raise CutAnswerError
    if reason == "stop" and called:
        reason = "tool_calls"
    usage = AnswerUsage(generation.prompt_tokens, len(generation.token_ids), read.thought_tokens,
                        generation.cached_tokens, sum(generation.steps) + generation.redrawn_steps)
    return Done(reason, usage, read.stopped, generation.seed)
