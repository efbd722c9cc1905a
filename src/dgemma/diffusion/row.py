"""One request's way through its canvases: the state of a row of the batch, and what a denoising step does to it."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dgemma import seeds
from dgemma.config import GenerationConfig, ModelConfig
from dgemma.diffusion.constraint import Constraint
from dgemma.diffusion.events import CanvasCommitted, CanvasStarted, Denoised, FinishReason
from dgemma.diffusion.prompt import Piece, SoftSpan, check_spans, piece_of, prompt_keys
from dgemma.diffusion.reading import TextReader, Unread
from dgemma.diffusion.sampler import temperature_at
from dgemma.errors import ContextLengthError
from dgemma.nn.activation import MountedAdapter
from dgemma.nn.head import vocab_tiles


@dataclass(frozen=True)
class Choices:
    """What narrows the draw of a token; the defaults change nothing.

    ``temperature`` scales the one that tokens are drawn at; 0 takes the most probable token instead of drawing one.
    What is believed, and what the next step is conditioned on, stays on the schedule (`GenerationConfig`): scaled
    down together with it, entropies would shrink, and everything would be believed too early.
    ``top_k`` (0: all) and ``top_p`` (1: all) keep the most probable tokens only; ``logit_bias`` adds to the logits of
    single tokens. Each position of the canvas is narrowed by itself.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        if not (_is_number(self.temperature) and (self.temperature == 0 or 1e-3 <= self.temperature <= 1e3)):
            raise ValueError(f"temperature must be 0 or a number from 0.001 to 1000, got {self.temperature!r}")
        if type(self.top_k) is not int or self.top_k < 0:
            raise ValueError(f"top_k must be a whole number of at least 0 (0: all tokens), got {self.top_k!r}")
        if not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p must be a number above 0 and at most 1, got {self.top_p!r}")
        for token, bias in self.logit_bias:
            if type(token) is not int or not (_is_number(bias) and abs(bias) <= 1e6):
                raise ValueError(f"logit_bias must be token ids with numbers up to a million, got {token!r}: {bias!r}")


NARROWER = 0.5  # the temperatures and the entropy bound of a canvas that is drawn again, against those of the first


def longest_prompt(config: ModelConfig) -> int:
    """Tokens of the longest prompt that leaves positions for a canvas."""
    return config.max_position_embeddings - config.canvas_length


def _canvas_room(config: ModelConfig, context: int) -> int:
    """The tokens of all the canvases that there are positions for behind a context."""
    return (config.max_position_embeddings - context) // config.canvas_length * config.canvas_length


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Thoughts:
    """How thoughts are told from the rest of an answer, and how many tokens they may have together.

    ``budget`` counts the marks as well. A thought that would have more is cut off, and the next canvas begins with its
    closing mark. None, or more than leaves a canvas for the answer (half the room where that is not two): that much.
    """

    opened: int  # the marks' token ids
    closed: int
    inside: bool = False  # the prompt left one open
    budget: int | None = None

    def limit(self, room: int, canvas: int) -> int:
        """The tokens of an answer of at most ``room`` tokens that may be thought."""
        most = max(room - canvas, room // 2)
        return most if self.budget is None else min(self.budget, most)


@dataclass(frozen=True)
class Request:
    """What is asked of the engine: token ids in, token ids out.

    ``spans`` are the prompt's soft tokens (pictures), in order.
    ``canvas`` seeds the first canvas: token ids from its start, None where noise shall stand; ``pinned`` (same length)
    marks those that must not change. ``seed`` fixes all of the request's randomness. ``logprobs`` asks for the
    log-probability of every answer token and of so many alternatives; ``constraint`` says what the answer may be;
    ``stop`` ends it before any of these strings; without ``drafts`` no Denoised events are made. Requests of one
    ``client`` wait for each other, not those of another for them; within a client the same goes for its ``user``s.
    What this request reads is read again by those of its ``tenant`` only, but for its first ``shared`` tokens.
    ``adapter`` is put on the network for this request.
    ``tools`` are the declarations of the tools that the answer may call (None: those that the prompt declares).
    ``held``: the constraint makes the calls. ``thoughts`` bounds them; with ``redraw_empty`` an answer that comes out
    empty at its first canvas is drawn again.
    """

    id: int
    prompt_ids: list[int]
    settings: GenerationConfig
    seed: int
    canvas: list[int | None] | None = None
    pinned: list[bool] | None = None
    choices: Choices = Choices()
    logprobs: int | None = None
    constraint: Constraint | None = None
    stop: tuple[str, ...] = ()
    drafts: bool = True
    client: str = ""
    user: str = ""
    tenant: str = ""
    shared: int = 0
    adapter: MountedAdapter | None = None
    tools: tuple[dict[str, Any], ...] | None = None
    held: bool = False
    thoughts: Thoughts | None = None
    redraw_empty: bool = False
    spans: tuple[SoftSpan, ...] = ()

    @property
    def reading(self) -> dict[str, Any]:
        """What reading the answer needs to know beside the prompt, as keywords of `dgemma.chat.AnswerReader`."""
        form = self.constraint is not None and not self.constraint.free
        return {"tools": self.tools, "stop": self.stop, "form": form, "held": self.held}

    def check(self, config: ModelConfig) -> None:
        """Raises ValueError, saying what is wrong, unless the network can run this request."""
        if not self.prompt_ids:
            raise ValueError("the prompt is empty: it needs at least one token")
        wrong = [token for token in self.prompt_ids if not 0 <= token < config.vocab_size]
        if wrong:
            raise ValueError(f"token id {wrong[0]} in the prompt is outside the vocabulary of {config.vocab_size}")
        room = longest_prompt(config)
        if len(self.prompt_ids) > room:
            raise ContextLengthError(
                f"the prompt has {len(self.prompt_ids)} tokens; this model takes at most {room} before a "
                f"canvas of {config.canvas_length}", len(self.prompt_ids), room)
        check_spans(self.spans, len(self.prompt_ids), config.hidden_size)
        if self.canvas is not None:
            if len(self.canvas) > config.canvas_length:
                raise ValueError(f"canvas has {len(self.canvas)} tokens, the model's canvas {config.canvas_length}")
            odd = [token for token in self.canvas if token is not None and type(token) is not int]
            if odd:
                raise ValueError(f"canvas holds token ids and None, not {odd[0]!r}")
            wrong = [token for token in self.canvas if token is not None and not 0 <= token < config.vocab_size]
            if wrong:
                raise ValueError(f"token id {wrong[0]} in canvas is outside the vocabulary of {config.vocab_size}")
        if self.logprobs is not None and (type(self.logprobs) is not int or self.logprobs < 0):
            raise ValueError(f"logprobs must be a whole number of at least 0, got {self.logprobs!r}")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop must be strings of at least one character, got {list(self.stop)!r}")
        if self.constraint is not None and self.pinned is not None and any(self.pinned):
            raise ValueError("pinned and response_format cannot be had together")
        odd = [token for token, _ in self.choices.logit_bias if not 0 <= token < config.vocab_size]
        if odd:
            raise ValueError(f"token id {odd[0]} in logit_bias is outside the vocabulary of {config.vocab_size}")
        if self.constraint is not None:
            most = _canvas_room(config, len(self.prompt_ids))
            try:
                self.constraint.guide(min(self.settings.max_tokens, most))
            except ValueError as error:  # nothing valid is so short
                if self.settings.max_tokens < most:
                    raise
                message = str(error).removesuffix(": raise max_tokens")
                raise ValueError(f"{message}, to the end of the model's context") from error
        if self.pinned is not None:
            if self.canvas is None or len(self.pinned) != len(self.canvas):
                raise ValueError("pinned must have one entry for every entry of canvas")
            loose = [i for i, (pin, token) in enumerate(zip(self.pinned, self.canvas, strict=True))
                     if pin and token is None]
            if loose:
                raise ValueError(f"position {loose[0]} is pinned, but canvas says None there")


Read = Callable[[Request], TextReader]


def unread(request: Request) -> TextReader:
    return Unread()


@dataclass(eq=False)  # a row is itself: comparing tensors, or what is not set yet, would fail
class Row:
    """A request while it runs. Tensors live on the CPU and have one entry per canvas position."""

    request: Request
    config: ModelConfig
    read: Read = unread
    began: float = field(default_factory=time.perf_counter)
    generator: torch.Generator = field(init=False)
    canvas_index: int = 0
    step: int = 0  # denoising steps done on this canvas
    canvas: Tensor = field(init=False)  # [C] what the next step starts from
    draft: Tensor = field(init=False)  # [C] argmax of the last step
    history: Tensor = field(init=False)  # [H, C] argmax canvases that must agree with the next, -1: none yet
    pinned: Tensor | None = None  # [C] bool
    token_ids: list[int] = field(default_factory=list)  # committed answer tokens
    context: list[int] = field(init=False)  # every token the cache holds or will hold: prompt and whole canvases
    steps: list[int] = field(default_factory=list)
    stop_token_id: int | None = None
    finish_reason: FinishReason | None = None
    redrawn_steps: int | None = None  # of a first canvas that came out empty; None: it did not
    inside_thought: bool = False  # what was committed ends in one
    thought_left: int = 0  # tokens that thoughts may still have, the mark that closes an open one included
    closes_thought: bool = False  # the next canvas begins with that mark

    def __post_init__(self) -> None:
        self.generator = seeds.generator(self.request.seed)
        self.context = list(self.request.prompt_ids)
        self._keys = prompt_keys(self.context, self.request.spans) if self.request.spans else None
        if (thoughts := self.request.thoughts) is not None:
            self.inside_thought = thoughts.inside
            self.thought_left = thoughts.limit(self.room, self.config.canvas_length)

    @functools.cached_property
    def reader(self) -> TextReader:
        """Has read all committed tokens, till it is asked to finish."""
        return self.read(self.request)

    @property
    def keys(self) -> list[int]:
        """What the tokens of the context are known by to those who keep what was read."""
        return self.context if self._keys is None else self._keys + self.context[len(self._keys) :]

    def piece(self, start: int, count: int) -> Piece:
        """``count`` tokens of the context from ``start`` on, to be read."""
        return piece_of(self.context, self.request.spans, start, count)

    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def random_canvas(self) -> Tensor:
        """[C] uniform tokens from the request's own generator."""
        return torch.randint(self.config.vocab_size, (self.config.canvas_length,), generator=self.generator)

    @property
    def room(self) -> int:
        """How many tokens the answer may still have: as many as were asked for and there are positions for canvases."""
        return self._room_behind(0)

    @property
    def settings(self) -> GenerationConfig:
        """The request's; while an empty canvas is drawn again, narrower ones."""
        settings = self.request.settings
        if self.redrawn_steps is None or self.canvas_index:
            return settings
        return settings.replace(t_min=settings.t_min * NARROWER, t_max=settings.t_max * NARROWER,
                                entropy_bound=settings.entropy_bound * NARROWER)

    def redraw(self) -> None:
        """Give up the canvas that is open: the next one is drawn in its place, from other noise and narrower."""
        self.redrawn_steps = self.step

    def start_canvas(self, known: list[int | None] | None = None) -> CanvasStarted:
        """Open a canvas of noise; the first one as the request seeds it. Tokens that are ``known`` [C] are pinned."""
        self.step = 0
        if self.closes_thought and known is None and self.request.thoughts is not None:
            known = [self.request.thoughts.closed, *([None] * (self.config.canvas_length - 1))]
        self.closes_thought = False
        self.canvas = self.random_canvas()
        self.pinned = None
        request = self.request
        if self.canvas_index == 0 and request.canvas is not None:
            self._place(request.canvas, request.pinned)
        if known is not None:
            self._place(known, [token is not None for token in known])
        self.draft = torch.full_like(self.canvas, -1)
        # No more drafts than there are steps can agree: a longer history would never be full.
        kept = min(request.settings.stability_threshold, request.settings.max_denoising_steps)
        self.history = torch.full((kept, len(self.canvas)), -1)
        pinned = [False] * len(self.canvas) if self.pinned is None else self.pinned.tolist()
        return CanvasStarted(request.id, self.canvas_index, self.canvas.tolist(), pinned, len(self.context),
                             request.settings.max_denoising_steps)

    def _place(self, tokens: list[int | None], pinned: list[bool] | None) -> None:
        """Write tokens over the beginning of the canvas, where they are not None, and pin those that are to stay."""
        given = torch.tensor([-1 if token is None else token for token in tokens])
        self.canvas[: len(given)] = torch.where(given >= 0, given, self.canvas[: len(given)])
        if pinned is not None and any(pinned):
            self.pinned = torch.zeros(len(self.canvas), dtype=torch.bool) if self.pinned is None else self.pinned
            self.pinned[: len(given)] |= torch.tensor(pinned)

    @property
    def temperature(self) -> float:
        settings = self.settings
        return temperature_at(self.step, settings.max_denoising_steps, settings.t_min, settings.t_max)

    def draw_noise(self) -> tuple[Tensor, Tensor]:
        """This step's randomness: the head's uniforms [C, tiles, 2] and the renoising tokens [C]."""
        tiles = vocab_tiles(self.config.vocab_size)
        uniform = torch.rand(self.config.canvas_length, tiles, 2, generator=self.generator)
        return uniform, self.random_canvas()

    def advance(self, draft: Tensor, canvas: Tensor, entropy: Tensor, accepted: Tensor) -> Denoised | None:
        """Take over a step's outcome, all [C] on the CPU; its event, if the request wants to hear of drafts."""
        temperature = self.temperature
        changed = draft != self.draft
        self.step += 1
        self.canvas, self.draft = canvas, draft
        if len(self.history):
            self.history = torch.cat([self.history[1:], draft.unsqueeze(0)])
        if not self.request.drafts:
            return None
        return Denoised(self.request.id, self.canvas_index, self.step, draft.tolist(), canvas.tolist(),
                        entropy.tolist(), accepted.tolist(), changed.tolist(), temperature, self.seconds())

    def close_canvas(self, least: int = 0) -> CanvasCommitted:
        """End this canvas: its draft up to a stop token, a stop string or the length limit joins the answer.

        A thought's draft is cut off where its budget is spent. ``least``: tokens that the answer behind it needs. Sets
        ``finish_reason`` unless another canvas follows.
        """
        kept, self.stop_token_id, self.finish_reason = self.draft_end()
        whole = self.draft.tolist()
        before = len(self.token_ids)
        if (cut := self._end_thought(kept, least)) is not None:
            # Where the thought stopped, the next canvas goes on: what stood behind it was never said.
            kept, whole, self.closes_thought = kept[:cut], kept[:cut], True
            self.stop_token_id = self.finish_reason = None
        self.token_ids += kept
        self.reader.feed(kept)
        if (length := self.reader.stop_place) is not None:
            length = max(length, before)  # it may lie in what was held back as a possible call; that is committed
            kept, self.token_ids = kept[: length - before], self.token_ids[:length]
            self.finish_reason, self.stop_token_id = "stop", None
            self.closes_thought = False
        self.steps.append(self.step)
        event = CanvasCommitted(self.request.id, self.canvas_index, kept, self.step, self.seconds())
        self.context += whole
        self.canvas_index += 1
        return event

    def draft_end(self) -> tuple[list[int], int | None, FinishReason | None]:
        """What of the draft is the answer's, the stop token behind it, and whether the answer ends with it."""
        tokens, room = self.draft.tolist(), self.room
        end = next((i for i, token in enumerate(tokens) if token in self.request.settings.eos_token_id), None)
        if end is not None and end <= room:
            return tokens[:end], tokens[end], "stop"
        return (tokens[:room], None, "length") if len(tokens) >= room else (tokens, None, None)

    def _end_thought(self, kept: list[int], least: int) -> int | None:
        """How many of a canvas' tokens to keep because a thought has spent its budget; None: all of them.

        A thought that could not be closed before the end of the context, with ``least`` tokens behind it, goes on.
        """
        thoughts = self.request.thoughts
        if thoughts is None:
            return None
        for place, token in enumerate(kept):
            inside = self.inside_thought and token != thoughts.closed
            if inside and self.thought_left <= 1 and self._room_behind(place) > least:
                return place
            self.thought_left -= self.inside_thought or token == thoughts.opened
            self.inside_thought = inside or token == thoughts.opened
        spent = self.inside_thought and self.thought_left <= 1 and self.finish_reason is None
        return len(kept) if spent and self._room_behind(len(kept)) > least else None

    def _room_behind(self, count: int) -> int:
        """Tokens that the answer may have behind the next ``count`` ones, if a canvas begins there."""
        left = self.request.settings.max_tokens - len(self.token_ids) - count
        return min(left, _canvas_room(self.config, len(self.context) + count))
