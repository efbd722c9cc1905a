"""One denoising step, from canvas to next canvas, as a function of tensors.

Nothing in it brings a value to Python, so it can be traced and captured; rows may be in any states. What some requests
choose on the host (forms, narrowed draws) comes in as ``predict``, which stands in the head's place. Knows nothing of
requests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dgemma.cache import Cache
from dgemma.diffusion.sampler import Sampler, StepSettings
from dgemma.nn import CanvasStats, DiffusionTransformer
from dgemma.nn.passes import Passes

Predict = Callable[[Tensor], CanvasStats]  # of hidden states [B, C, D]


@dataclass(frozen=True)
class StepState:
    """What a step starts from, a row for each sequence."""

    canvas: Tensor  # [B, C]
    soft: Tensor  # [B, C, D] self-conditioning, zeros at a canvas' first step
    noise: Tensor  # [B, C, tiles, 2] uniform in [0, 1): the head's draw
    random: Tensor  # [B, C] uniform tokens: what is not accepted becomes these
    history: Tensor  # [H, B, C] the drafts of earlier steps, the last one last; -1 where there was none
    settings: StepSettings
    pinned: Tensor | None = None  # [B, C] positions that must not change
    greedy: Tensor | None = None  # [B] rows whose sample is the most probable token


@dataclass(frozen=True)
class StepResult:
    """What a step comes to."""

    draft: Tensor  # [B, C] the most probable tokens
    canvas: Tensor  # [B, C] what the next step starts from
    entropy: Tensor  # [B, C] nats
    accepted: Tensor  # [B, C]
    soft: Tensor  # [B, C, D]
    hidden: Tensor  # [B, C, D]
    done: Tensor  # [B] the canvas is finished
    finite: Tensor  # [B] if not, all the rest of the row means nothing


def denoising_step(network: DiffusionTransformer, passes: Passes, sampler: Sampler, cache: Cache, state: StepState,
                   predict: Predict | None = None) -> StepResult:
    """One step of every row."""
    hidden = passes.denoise(state.canvas, cache, state.soft)
    stats = predict(hidden) if predict is not None else (
        network.head(hidden, state.settings.temperature, state.noise, state.settings.sharpness))
    finite = (hidden.isfinite().flatten(1).all(1) & stats.entropy.isfinite().all(1)
              & stats.soft.isfinite().flatten(1).all(1))
    if state.greedy is not None:
        stats.sample = torch.where(state.greedy.unsqueeze(1), stats.argmax, stats.sample)
    random = state.random
    if state.pinned is not None:
        stats = forced(network, stats, state.pinned, state.canvas)
        random = torch.where(state.pinned, state.canvas, random)
    canvas, accepted = sampler.advance(stats, random, state.settings)
    done = sampler.done(stats, state.history, state.settings)
    return StepResult(stats.argmax, canvas, stats.entropy, accepted, stats.soft, hidden, done, finite)


def forced(network: DiffusionTransformer, stats: CanvasStats, known: Tensor, tokens: Tensor) -> CanvasStats:
    """Predictions in which positions [B, C] that are known say so: their token, no entropy, its own embedding."""
    return CanvasStats(torch.where(known, tokens, stats.argmax), torch.where(known, tokens, stats.sample),
                       stats.entropy.masked_fill(known, 0.0),
                       torch.where(known.unsqueeze(-1), network.embed(tokens), stats.soft))
