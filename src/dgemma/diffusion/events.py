"""What happens while text is denoised: the only way the rest of the program sees it.

Plain values (no tensors), so that an event can be written to a trace, sent over a wire and shown anywhere. What was
read of the tokens goes with them, as their reader (`dgemma.diffusion.reading`) gave it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True)
class CanvasStarted:
    """A canvas opens: full of noise, or seeded by the caller.

    The first one opens twice when the answer came out empty: what was drawn before counts no more.
    """

    request: int
    canvas: int  # index of the canvas in this answer, from 0
    token_ids: list[int]  # the starting canvas, [C]
    pinned: list[bool]  # positions that will not change, [C]
    context_tokens: int  # tokens in the cache: the prompt and every committed canvas
    max_steps: int
    steps_before: int = 0  # that the caller's canvas has behind it: the next one is counted from there


@dataclass(frozen=True)
class Denoised:
    """One denoising step is done. All lists have one entry per canvas position.

    ``candidates`` are tokens and their probabilities, best first, at the step's temperature and as the network gives
    them: before pins, forms, ``top_k`` and ``top_p``, after ``logit_bias``.
    """

    request: int
    canvas: int
    step: int  # from 1
    token_ids: list[int]  # the draft: the most probable token at every position
    canvas_ids: list[int]  # the canvas that the next step starts from: accepted samples and fresh noise
    entropies: list[float]  # nats, at the step's temperature
    accepted: list[bool]  # positions that the sampler believed in this step
    changed: list[bool]  # positions whose draft token differs from the step before (all, at the first step)
    temperature: float
    seconds: float  # since the request began
    candidates: list[list[tuple[int, float]]] | None = None  # at each place the most probable tokens, if asked for

    @property
    def mean_entropy(self) -> float:
        return sum(self.entropies) / len(self.entropies)


@dataclass(frozen=True)
class TokenLogprob:
    """How probable an answer's token was at its place, in nats, untempered, when its canvas was committed."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]  # the most probable tokens at that place, best first


@dataclass(frozen=True)
class CanvasCommitted:
    """A canvas is done: these tokens are part of the answer for good."""

    request: int
    canvas: int
    token_ids: list[int]  # up to the first stop token or the length limit; the stop token is not included
    steps: int
    seconds: float  # since the request began
    logprobs: list[TokenLogprob] | None = None  # one for each of token_ids, if they were asked for
    pieces: Sequence[Any] = ()  # what is sure of the answer's text now, and was not before


@dataclass(frozen=True)
class Generation:
    """A finished answer."""

    text: str
    reasoning: str | None
    tool_calls: list[dict[str, Any]]
    token_ids: list[int]  # the answer's tokens, thoughts included, the stop token not
    finish_reason: FinishReason
    steps: list[int]  # denoising steps of each canvas
    tokens_per_forward: float  # answer tokens per denoising step
    prompt_tokens: int
    seconds: float
    seed: int = 0  # makes the same answer again
    stop_token_id: int | None = None  # the stop token that ended it, if one did
    cached_tokens: int = 0  # tokens of the prompt that were read before, and not again
    logprobs: list[TokenLogprob] | None = None  # one for each of token_ids, if they were asked for
    redrawn_steps: int = 0  # denoising steps of a first canvas that came out empty, and was drawn again


@dataclass(frozen=True)
class Finished:
    """The request is over; ``generation`` is what `generate` would have returned."""

    request: int
    generation: Generation
    answer: Any = None  # what the reader of its tokens ended with


@dataclass(frozen=True)
class Failed:
    """The request is over: something went wrong with it (and with it alone)."""

    request: int
    error: str
    told: str | None = None  # what whoever asked may read of it; ``error`` may tell of our insides


Event = CanvasStarted | Denoised | CanvasCommitted | Finished | Failed
