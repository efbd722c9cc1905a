"""What is asked of the engine: a prompt, and how its answer is to be drawn.

Works on token ids and settings; knows nothing of text or of who asks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dgemma.config import GenerationConfig, ModelConfig
from dgemma.diffusion.constraint import Constraint, Guide, held, said_tokens
from dgemma.diffusion.prompt import SoftSpan, check_spans
from dgemma.diffusion.reading import NoReader, TextReader
from dgemma.errors import ContextLengthError
from dgemma.fields import is_number
from dgemma.nn.loaded import LoadedAdapter


@dataclass(frozen=True)
class SamplingParams:
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
        if not (is_number(self.temperature) and (self.temperature == 0 or 1e-3 <= self.temperature <= 1e3)):
            raise ValueError(f"temperature must be 0 or a number from 0.001 to 1000, got {self.temperature!r}")
        if type(self.top_k) is not int or self.top_k < 0:
            raise ValueError(f"top_k must be a whole number of at least 0 (0: all tokens), got {self.top_k!r}")
        if not (is_number(self.top_p) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p must be a number above 0 and at most 1, got {self.top_p!r}")
        for token, bias in self.logit_bias:
            if type(token) is not int or not (is_number(bias) and abs(bias) <= 1e6):
                raise ValueError(f"logit_bias must be token ids with numbers up to a million, got {token!r}: {bias!r}")


def longest_prompt(config: ModelConfig) -> int:
    """Tokens of the longest prompt that leaves positions for a canvas."""
    return config.max_position_embeddings - config.canvas_length


def canvas_room(config: ModelConfig, context: int) -> int:
    """The tokens of all the canvases that there are positions for behind a context."""
    return (config.max_position_embeddings - context) // config.canvas_length * config.canvas_length


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
    marks those that must not change. A pinned token is said, as far as the answer is so long: no stop token before it
    ends the answer, but one that is pinned itself does. ``from_step`` says that the canvas has so many steps behind it:
    schedule and noise go on from there; ``soft`` [C, D] is what the last of them left for self-conditioning (None:
    nothing, as at a first step). ``seed`` fixes all of the request's randomness. ``logprobs`` asks for the
    log-probability of every answer token and of so many alternatives; ``constraint`` says what the answer may be;
    ``stop`` ends it before any of these strings; without ``drafts`` no Denoised events are made, and with
    ``candidates`` each tells so many of the most probable tokens at every place. Requests of one ``client`` wait for
    each other, not those of another for them; within a client the same goes for its ``user``s. What this request reads
    is read again by those of its ``tenant`` only, but for its first ``shared`` tokens. ``adapter`` is put on the
    network for this request. ``tools`` are the declarations of the tools that the answer may call (None: those that the
    prompt declares). ``held``: the constraint makes the calls. ``thoughts`` bounds them; with ``redraw_empty`` an
    answer that comes out empty at its first canvas is drawn again.
    """

    id: int
    prompt_ids: list[int]
    settings: GenerationConfig
    seed: int
    canvas: list[int | None] | None = None
    pinned: list[bool] | None = None
    sampling: SamplingParams = SamplingParams()
    logprobs: int | None = None
    constraint: Constraint | None = None
    stop: tuple[str, ...] = ()
    drafts: bool = True
    client: str = ""
    user: str = ""
    tenant: str = ""
    shared: int = 0
    adapter: LoadedAdapter | None = None
    tools: tuple[dict[str, Any], ...] | None = None
    held: bool = False
    thoughts: Thoughts | None = None
    redraw_empty: bool = False
    spans: tuple[SoftSpan, ...] = ()
    from_step: int = 0
    soft: Tensor | None = field(default=None, compare=False)
    candidates: int = 0

    @property
    def reading(self) -> dict[str, Any]:
        """What reading the answer needs to know beside the prompt, as keywords of `dgemma.chat.reply.ReplyReader`."""
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
        self._check_canvas(config)
        if self.logprobs is not None and (type(self.logprobs) is not int or self.logprobs < 0):
            raise ValueError(f"logprobs must be a whole number of at least 0, got {self.logprobs!r}")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop must be strings of at least one character, got {list(self.stop)!r}")
        odd = [token for token, _ in self.sampling.logit_bias if not 0 <= token < config.vocab_size]
        if odd:
            raise ValueError(f"token id {odd[0]} in logit_bias is outside the vocabulary of {config.vocab_size}")
        if self.constraint is not None:
            most = canvas_room(config, len(self.prompt_ids))
            try:
                guide = self.constraint.guide(min(self.settings.max_tokens, most))
            except ValueError as error:  # nothing valid is so short
                if self.settings.max_tokens < most:
                    raise
                message = str(error).removesuffix(": raise max_tokens")
                raise ValueError(f"{message}, to the end of the model's context") from error
            self._check_pins(guide, config, min(self.settings.max_tokens, most))

    def _check_pins(self, guide: Guide, config: ModelConfig, room: int) -> None:
        """Raises ValueError unless some valid answer has what is pinned where it is pinned."""
        if self.canvas is None or self.pinned is None or not any(self.pinned):
            return
        left = config.canvas_length - len(self.canvas)
        tokens = torch.tensor([*(token or 0 for token in self.canvas), *([0] * left)])
        pinned = torch.tensor([*self.pinned, *([False] * left)])
        pinned[room:] = False
        level = ((slice(i, i + 1), torch.zeros(1, config.vocab_size)) for i in range(config.canvas_length))
        guide.template(config.canvas_length, room)
        stops = self.settings.eos_token_id
        chosen = guide.choose(held(level, tokens, pinned, stops, room), config.canvas_length, room,
                              torch.zeros(len(tokens)))
        for place in (pinned & (chosen.draft != tokens)).nonzero().squeeze(1).tolist():
            raise ValueError("pinned contradicts response_format or tool_choice: no answer of that form has all that "
                             f"is pinned, token {self.canvas[place]} at position {place} for one")
        said = said_tokens(self.canvas, self.pinned, stops, room)
        if any(token in stops for token in chosen.draft[:said].tolist()):
            raise ValueError("pinned contradicts response_format or tool_choice: an answer of that form is over before "
                             "all that is pinned is said")

    def _check_canvas(self, config: ModelConfig) -> None:
        """Raises ValueError unless the canvas that the request starts from is one."""
        if self.canvas is not None:
            if len(self.canvas) > config.canvas_length:
                raise ValueError(f"canvas has {len(self.canvas)} tokens, the model's canvas {config.canvas_length}")
            odd = [token for token in self.canvas if token is not None and type(token) is not int]
            if odd:
                raise ValueError(f"canvas must hold token ids and None, not {odd[0]!r}")
            wrong = [token for token in self.canvas if token is not None and not 0 <= token < config.vocab_size]
            if wrong:
                raise ValueError(f"canvas has token id {wrong[0]}, outside the vocabulary of {config.vocab_size}")
        if self.pinned is not None:
            if self.canvas is None or len(self.pinned) != len(self.canvas):
                raise ValueError("pinned must have one entry for every entry of canvas")
            loose = [i for i, (pin, token) in enumerate(zip(self.pinned, self.canvas, strict=True))
                     if pin and token is None]
            if loose:
                raise ValueError(f"pinned has position {loose[0]}, but canvas says None there")
        if type(self.from_step) is not int or not 0 <= self.from_step < self.settings.max_denoising_steps:
            raise ValueError("from_step must be a whole number from 0 to max_denoising_steps - 1 "
                             f"({self.settings.max_denoising_steps - 1}), got {self.from_step!r}")
        if self.from_step and self.canvas is None:
            raise ValueError("from_step needs canvas: what stood there after so many steps")
        shape = [config.canvas_length, config.hidden_size]
        if self.soft is not None and (list(self.soft.shape) != shape or self.canvas is None):
            raise ValueError(f"soft must be {shape} numbers beside a canvas, got {list(self.soft.shape)}")
        if type(self.candidates) is not int or self.candidates < 0:
            raise ValueError(f"candidates must be a whole number of at least 0, got {self.candidates!r}")


MakeReader = Callable[[Request], TextReader]


def no_reader(request: Request) -> TextReader:
    return NoReader()
