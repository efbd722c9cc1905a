"""One denoising step of several requests at once: the network's pass, what each request narrows or forces, the sampler.

Works on tensors and rows; knows nothing of queues or memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dgemma.diffusion.constraint import Guide, Walk
from dgemma.diffusion.events import Denoised, TokenLogprob
from dgemma.diffusion.logprobs import token_logprobs
from dgemma.diffusion.row import Row
from dgemma.diffusion.sampler import Sampler
from dgemma.engine.prefixes import Prefix
from dgemma.nn import CanvasStats, DiffusionTransformer
from dgemma.nn.distributions import Distributions, favoured, narrowed_stats


@dataclass(eq=False)
class Seat:
    """A request that runs: its row, what it has read, and what its canvas carries from step to step."""

    row: Row
    prefix: Prefix
    memory: int = 0  # bytes promised to it
    tokens: int = 0  # how many it may hold in these
    most: int = 0  # how many it can come to hold
    age: int = 0  # whoever came later has a larger one
    stalled: bool = False  # it cannot go on before others have given memory back
    guide: Guide | None = None
    soft: Tensor | None = None  # [C, D] self-conditioning; None while no canvas is open
    noise: tuple[Tensor, Tensor] | None = None  # drawn for the step that comes; kept if that has to be run again
    hidden: Tensor | None = None  # [C, D] of the last step
    cached_tokens: int = 0
    logprobs: list[TokenLogprob] | None = None

    @property
    def unread(self) -> int:
        """Tokens that must be read before a canvas can be opened."""
        return len(self.row.context) - self.prefix.cache.length

    @property
    def reads_long(self) -> bool:
        """Whether it has to read a prompt, or again what it let go; else it is a canvas at most."""
        return self.unread > (self.row.config.canvas_length if self.row.canvas_index else 0)


@dataclass(frozen=True)
class Outcome:
    """What a step did to one seat."""

    event: Denoised | None  # None when the request does not want to hear of drafts
    done: bool  # the canvas is finished
    finite: bool = True  # if not, the step has come to nothing: the seat is as it was


def denoise(network: DiffusionTransformer, sampler: Sampler, seats: Sequence[Seat]) -> list[Outcome]:
    """One denoising step of every seat's canvas. Raises what goes wrong, and has changed no seat then."""
    rows, device = [seat.row for seat in seats], network.device
    for seat in seats:
        seat.noise = seat.noise or seat.row.draw_noise()
    canvas = torch.stack([row.canvas for row in rows]).to(device)
    fresh = torch.stack([seat.noise[1] for seat in seats if seat.noise]).to(device)
    soft = torch.stack([seat.soft for seat in seats if seat.soft is not None])
    hidden = network.denoise_rows(canvas, [seat.prefix.cache for seat in seats], soft)
    stats, finite = _predictions(network, seats, hidden)
    if any(row.pinned is not None for row in rows):
        none = torch.zeros(canvas.shape[1], dtype=torch.bool)
        pinned = torch.stack([none if row.pinned is None else row.pinned for row in rows]).to(device)
        _force(network, stats, pinned, canvas)
        fresh = torch.where(pinned, canvas, fresh)
    settings = [row.settings for row in rows]
    next_canvas, accepted = sampler.advance(stats, fresh, settings)
    done = sampler.done(stats, [row.history for row in rows], settings)

    *columns, finite = [t.cpu() for t in (stats.argmax, next_canvas, stats.entropy, accepted, finite)]
    outcomes = []
    for index, (seat, sound) in enumerate(zip(seats, finite.tolist(), strict=True)):
        if not sound:
            outcomes.append(Outcome(None, False, finite=False))
            continue
        seat.soft, seat.hidden, seat.noise = stats.soft[index], hidden[index], None
        event = seat.row.advance(*(column[index] for column in columns))
        outcomes.append(Outcome(event, done[index] or seat.row.step == settings[index].max_denoising_steps))
    return outcomes


def logprobs_of(network: DiffusionTransformer, seat: Seat, count: int) -> list[TokenLogprob] | None:
    """The log-probabilities of a closing canvas' first ``count`` tokens, if the request asks for them."""
    if seat.row.request.logprobs is None or seat.hidden is None:
        return None
    return token_logprobs(_distributions(network, seat, seat.hidden, 1.0), seat.row.draft, seat.row.request.logprobs,
                          count)


def _predictions(network: DiffusionTransformer, seats: Sequence[Seat], hidden: Tensor) -> tuple[CanvasStats, Tensor]:
    """Every row's predictions, and whether all of a row's numbers are finite [B].

    Most rows are predicted in one walk over the vocabulary, narrowed ones each by itself.
    """
    finite = hidden.isfinite().flatten(1).all(1)
    special = any(_narrows(seat) or seat.guide is not None for seat in seats)  # their choices are made on the host
    sound = finite.tolist() if special else [True] * len(seats)
    narrow = [index for index, seat in enumerate(seats) if sound[index] and _narrows(seat)]
    plain = [index for index in range(len(seats)) if index not in narrow]
    stats: CanvasStats | None = None
    if plain:
        noise = torch.stack([seats[i].noise[0] for i in plain]).to(hidden.device)  # type: ignore[index]
        temperature = torch.tensor([seats[i].row.temperature for i in plain], device=hidden.device)
        stats = network.head(hidden[plain] if narrow else hidden, temperature, noise,
                             _sharpness([seats[i] for i in plain], hidden.device))
    if narrow:
        ones = [_narrowed(network, seats[index], hidden[index]) for index in narrow]
        parts = [*ones, stats] if stats else ones
        order = torch.tensor([*narrow, *plain], device=hidden.device).argsort()
        stats = CanvasStats(*(torch.cat([getattr(part, name) for part in parts])[order]
                              for name in ("argmax", "sample", "entropy", "soft")))
    assert stats is not None
    finite &= stats.entropy.isfinite().all(1) & stats.soft.isfinite().flatten(1).all(1)
    sound = finite.tolist() if special else sound
    for index, seat in enumerate(seats):
        if seat.guide is not None and sound[index]:
            _guide(network, seat, hidden[index], stats, index)
        if seat.row.request.choices.temperature == 0:
            stats.sample[index] = stats.argmax[index]
    return stats, finite


def _sharpness(seats: Sequence[Seat], device: torch.device) -> Tensor | None:
    """[B] one over each request's temperature, None where all are 1. (0 draws nothing: any number will do.)"""
    scales = [seat.row.request.choices.temperature or 1.0 for seat in seats]
    return None if all(scale == 1 for scale in scales) else 1 / torch.tensor(scales, device=device)


def _narrows(seat: Seat) -> bool:
    choices = seat.row.request.choices
    draws = choices.temperature and seat.guide is None  # else the sample is another one
    return bool(choices.logit_bias or (draws and (choices.top_k or choices.top_p < 1)))


def _draws_narrowed(seat: Seat) -> bool:
    choices = seat.row.request.choices
    return bool(choices.temperature and (choices.top_k or choices.top_p < 1))


def _distributions(network: DiffusionTransformer, seat: Seat, hidden: Tensor, temperature: float) -> Distributions:
    bias = None
    if seat.row.request.choices.logit_bias:
        tokens, values = zip(*seat.row.request.choices.logit_bias, strict=True)
        bias = torch.zeros(network.config.vocab_size, device=hidden.device)
        bias[list(tokens)] = torch.tensor(values, dtype=torch.float32, device=hidden.device)
    return Distributions(hidden, network.embed_tokens.weight, network.config.final_logit_softcapping, temperature, bias)


def _narrowed(network: DiffusionTransformer, seat: Seat, hidden: Tensor) -> CanvasStats:
    choices, noise = seat.row.request.choices, seat.noise
    assert noise is not None
    return narrowed_stats(_distributions(network, seat, hidden, seat.row.temperature), network.embed_tokens.weight,
                          network.embed_scale, noise[0][:, 0, 0].to(hidden.device), choices.top_k, choices.top_p,
                          1 / (choices.temperature or 1.0))


def _guide(network: DiffusionTransformer, seat: Seat, hidden: Tensor, stats: CanvasStats, index: int) -> None:
    """Put what the constraint chooses in the place of the row's argmax and sample."""
    row, noise = seat.row, seat.noise
    assert seat.guide is not None and noise is not None
    # What is valid as it was predicted is the most probable canvas, and a draw as good as one among the valid ones.
    if getattr(seat.guide, "may_be_empty", False) and not _draws_narrowed(seat) and all(
            seat.guide.takes(tokens[index].tolist(), network.config.canvas_length, row.room)
            for tokens in (stats.argmax, stats.sample)):
        return
    # The most probable path is the same at any temperature, so the walk is at the draw's.
    choices = row.request.choices
    walk: Walk = _distributions(network, seat, hidden, row.temperature * (choices.temperature or 1.0))
    if _draws_narrowed(seat):
        walk = ((place, favoured(log_p, choices.top_k, choices.top_p)) for place, log_p in walk)
    chosen = seat.guide.choose(walk, network.config.canvas_length, row.room, noise[0][:, 0, 0])
    stats.argmax[index] = chosen.draft.to(hidden.device)
    stats.sample[index] = chosen.sample.to(hidden.device)
    one = CanvasStats(*(getattr(stats, name)[index : index + 1] for name in ("argmax", "sample", "entropy", "soft")))
    _force(network, one, chosen.fixed.to(hidden.device).unsqueeze(0), one.argmax)
    stats.entropy[index], stats.soft[index] = one.entropy[0], one.soft[0]


def _force(network: DiffusionTransformer, stats: CanvasStats, known: Tensor, tokens: Tensor) -> None:
    """Make positions [B, C] that are known say so: their own token, no entropy, its own embedding as conditioning."""
    stats.argmax = torch.where(known, tokens, stats.argmax)
    stats.sample = torch.where(known, tokens, stats.sample)
    stats.entropy = stats.entropy.masked_fill(known, 0.0)
    stats.soft = torch.where(known.unsqueeze(-1), network.embed(tokens), stats.soft)
