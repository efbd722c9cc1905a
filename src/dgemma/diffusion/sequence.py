"""One request's way through its canvases: the state of a sequence, and what a denoising step does to it."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dgemma import seeds
from dgemma.config import GenerationConfig, ModelConfig
from dgemma.diffusion.constraint import said_tokens
from dgemma.diffusion.events import CanvasCommitted, CanvasStarted, Denoised, FinishReason
from dgemma.diffusion.prompt import Piece, piece_of, prompt_keys
from dgemma.diffusion.reading import ReadText, TextReader
from dgemma.diffusion.request import MakeReader, Request, canvas_room, no_reader
from dgemma.diffusion.sampler import temperature_at
from dgemma.nn.head import vocab_tiles

NARROWER = 0.5  # the temperatures and the entropy bound of a canvas that is drawn again, against those of the first


@dataclass(eq=False)  # a sequence is itself: comparing tensors, or what is not set yet, would fail
class SequenceState:
    """A request while it runs. Tensors live on the CPU and have one entry per canvas position."""

    request: Request
    config: ModelConfig
    make_reader: MakeReader = no_reader
    began: float = field(default_factory=time.perf_counter)
    generator: torch.Generator = field(init=False)
    canvas_index: int = field(init=False)
    step: int = 0  # denoising steps done on this canvas
    canvas: Tensor = field(init=False)  # [C] what the next step starts from
    draft: Tensor = field(init=False)  # [C] argmax of the last step
    history: Tensor = field(init=False)  # [H, C] argmax canvases that must agree with the next, -1: none yet
    pinned: Tensor | None = None  # [C] bool
    asked: Tensor | None = None  # [C] bool: what of it the request pins; a form's tokens are not
    token_ids: list[int] = field(init=False)  # committed answer tokens
    context: list[int] = field(init=False)  # every token the cache holds or will hold: prompt and whole canvases
    steps: list[int] = field(init=False)  # of each canvas that was committed
    stop_token_id: int | None = field(init=False)
    finish_reason: FinishReason | None = field(init=False)
    redrawn_steps: int | None = None  # of a first canvas that came out empty; None: it did not
    inside_thought: bool = False  # what was committed ends in one
    thought_left: int = 0  # tokens that thoughts may still have, the mark that closes an open one included
    closes_thought: bool = False  # the next canvas begins with that mark

    def __post_init__(self) -> None:
        self.generator = seeds.generator(self.request.seed)
        prompt, spans = self.request.prompt_ids, self.request.spans
        self._keys = prompt_keys(prompt, spans) if spans else None
        self._begin()

    def _begin(self) -> None:
        """Nothing of the answer is there."""
        self.token_ids, self.context, self.steps = [], list(self.request.prompt_ids), []
        self.canvas_index, self.stop_token_id, self.finish_reason = 0, None, None
        if (thoughts := self.request.thoughts) is not None:
            self.inside_thought = thoughts.inside
            self.thought_left = thoughts.limit(self.room, self.config.canvas_length)

    @functools.cached_property
    def reader(self) -> TextReader:
        """Has read all committed tokens."""
        return self.make_reader(self.request)

    @functools.cached_property
    def answer(self) -> ReadText:
        """What was said in all; nothing may follow once it was asked for."""
        return self.reader.finish()

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
        """Give up an answer of one canvas: the next one is drawn in its place, from other noise and narrower."""
        self.redrawn_steps = self.step
        del self.reader, self.answer
        self._begin()

    def start_canvas(self, known: list[int | None] | None = None) -> CanvasStarted:
        """Open a canvas of noise; the first one as the request seeds it. Tokens that are ``known`` [C] are pinned."""
        self.step = self.steps_before
        if self.closes_thought and known is None and self.request.thoughts is not None:
            known = [self.request.thoughts.closed, *([None] * (self.config.canvas_length - 1))]
        self.closes_thought = False
        self.canvas = self.random_canvas()
        self.pinned = self.asked = None
        request = self.request
        if self.canvas_index == 0 and request.canvas is not None:
            self._place(request.canvas, request.pinned)
            self.asked = None if self.pinned is None else self.pinned.clone()
            for _ in range(request.from_step):
                self.draw_noise()  # so that the next step has the noise that it has in a canvas of this seed
        if known is not None:
            self._place(known, [token is not None for token in known])
        self.draft = torch.full_like(self.canvas, -1)
        # No more drafts than there are steps can agree: a longer history would never be full.
        kept = min(request.settings.stability_threshold, request.settings.max_denoising_steps)
        self.history = torch.full((kept, len(self.canvas)), -1)
        pinned = [False] * len(self.canvas) if self.pinned is None else self.pinned.tolist()
        return CanvasStarted(request.id, self.canvas_index, self.canvas.tolist(), pinned, len(self.context),
                             request.settings.max_denoising_steps, self.steps_before)

    def _place(self, tokens: list[int | None], pinned: list[bool] | None) -> None:
        """Write tokens over the beginning of the canvas, where they are not None, and pin those that are to stay."""
        given = torch.tensor([-1 if token is None else token for token in tokens])
        self.canvas[: len(given)] = torch.where(given >= 0, given, self.canvas[: len(given)])
        if pinned is not None and any(pinned):
            self.pinned = torch.zeros(len(self.canvas), dtype=torch.bool) if self.pinned is None else self.pinned
            self.pinned[: len(given)] |= torch.tensor(pinned)

    @property
    def steps_before(self) -> int:
        """Steps that the open canvas had behind it when it came here."""
        return 0 if self.canvas_index else self.request.from_step

    @property
    def temperature(self) -> float:
        settings = self.settings
        return temperature_at(self.step, settings.max_denoising_steps, settings.t_min, settings.t_max)

    def draw_noise(self) -> tuple[Tensor, Tensor]:
        """This step's randomness: the head's uniforms [C, tiles, 2] and the renoising tokens [C]."""
        tiles = vocab_tiles(self.config.vocab_size)
        uniform = torch.rand(self.config.canvas_length, tiles, 2, generator=self.generator)
        return uniform, self.random_canvas()

    def advance(self, draft: Tensor, canvas: Tensor, entropy: Tensor, accepted: Tensor,
                candidates: list[list[tuple[int, float]]] | None = None) -> Denoised | None:
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
                        entropy.tolist(), accepted.tolist(), changed.tolist(), temperature, self.seconds(),
                        candidates)

    def close_canvas(self, least: int = 0) -> CanvasCommitted:
        """End this canvas: its draft up to a stop token, a stop string or the length limit joins the answer.

        A thought's draft is cut off where its budget is spent. ``least``: tokens that the answer behind it needs. Sets
        ``finish_reason`` unless another canvas follows.
        """
        whole = self.draft.tolist()
        kept, self.stop_token_id, self.finish_reason = self._end_of(whole)
        before = len(self.token_ids)
        if (cut := self._end_thought(kept, least)) is not None:
            # Where the thought stopped, the next canvas goes on: what stood behind it was never said.
            kept, whole, self.closes_thought = kept[:cut], kept[:cut], True
            self.stop_token_id = self.finish_reason = None
        self.token_ids += kept
        pieces = self.reader.feed(kept)
        if (length := self.reader.stop_place) is not None:
            length = max(length, before)  # it may lie in what was held back as a possible call; that is committed
            kept, self.token_ids = kept[: length - before], self.token_ids[:length]
            self.finish_reason, self.stop_token_id = "stop", None
            self.closes_thought = False
        steps = self.step - self.steps_before
        self.steps.append(steps)
        event = CanvasCommitted(self.request.id, self.canvas_index, kept, steps, self.seconds(), pieces=pieces)
        self.context += whole
        self.canvas_index += 1
        return event

    def end(self, reason: FinishReason, counted: bool = False) -> None:
        """Nothing follows; ``counted``: the steps of the canvas that is open are told of."""
        self.finish_reason = reason
        if counted and self.step > self.steps_before:
            self.steps.append(self.step - self.steps_before)

    def _end_of(self, tokens: list[int]) -> tuple[list[int], int | None, FinishReason | None]:
        """What of a canvas is the answer's, the stop token behind it, and whether the answer ends with it."""
        room, stops = self.room, self.request.settings.eos_token_id
        pinned = [] if self.asked is None else self.asked.tolist()
        said = said_tokens(tokens, pinned, stops, room)
        end = next((i for i in range(said, len(tokens)) if tokens[i] in stops), None)
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
        return min(left, canvas_room(self.config, len(self.context) + count))
