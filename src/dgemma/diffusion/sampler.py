"""Entropy-bound sampling as pure functions over tensors.

One step of denoising, given the network's predictions: which positions to believe (`accept`), what the next canvas is
(`renoise`), whether the canvas is done (`converged`). After Ben-Hamu et al. 2025, "Accelerated sampling from masked
diffusion models via entropy bounded unmasking" (arXiv 2505.24857), as DiffusionGemma's reference applies it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dgemma.config import GenerationConfig
from dgemma.nn.head import CanvasStats


def temperature_at(step: int, max_steps: int, t_min: float, t_max: float) -> float:
    """The linear schedule: t_min + (t_max - t_min)·n/N where n = N, N-1, … 1 counts the steps that remain.

    ``step`` counts from 0, so n = max_steps - step.
    """
    return t_min + (t_max - t_min) * (max_steps - step) / max_steps


def token_entropy(processed: Tensor) -> Tensor:
    """Processed logits [..., V] -> the entropy of their softmax [...] in nats."""
    log_p = processed.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def accept(entropy: Tensor, entropy_bound: Tensor) -> Tensor:
    """Which positions to keep: the most certain ones, while their joint dependence stays bounded.

    entropy [B, C] nats, entropy_bound [B] -> mask [B, C]. Sorted ascending, a position is kept while the sum of the
    entropies before it is at most the bound (cumsum minus its own), so at least one always is.
    """
    ordered, order = entropy.sort(dim=-1)
    kept = ordered.cumsum(-1) - ordered <= entropy_bound.unsqueeze(-1)
    return torch.zeros_like(kept).scatter(-1, order, kept)


def renoise(sample: Tensor, accepted: Tensor, random: Tensor) -> Tensor:
    """The next canvas [B, C]: the sample where accepted, fresh uniform tokens elsewhere."""
    return torch.where(accepted, sample, random)


def converged(argmax: Tensor, history: Tensor, entropy: Tensor, confidence_threshold: Tensor,
              stability_threshold: Tensor | None = None) -> Tensor:
    """Whether each row may stop: its argmax canvas is stable and its mean entropy is low, both at once.

    argmax [B, C]; history [H, B, C], the argmax canvases of the H earlier steps, the last one last (-1 where there was
    none yet; H may be 0), of which the last ``stability_threshold`` [B] must agree (None: all);
    entropy [B, C]; confidence_threshold [B] -> [B] bool.
    """
    same = (history == argmax).all(-1)
    if stability_threshold is not None:
        back = torch.arange(len(history), 0, -1, device=history.device).unsqueeze(1)
        same = same | (back > stability_threshold)
    return same.all(0) & (entropy.mean(-1) < confidence_threshold)


@dataclass(frozen=True)
class StepSettings:
    """The settings of the rows of one step, [B] each."""

    temperature: Tensor  # of the step
    entropy_bound: Tensor
    confidence_threshold: Tensor
    stability_threshold: Tensor  # how many earlier drafts must be the same
    last: Tensor  # bool: there are no more steps
    sharpness: Tensor | None = None  # the draw is from probabilities to this power (None: 1)

    @classmethod
    def of(cls, rows: Sequence[GenerationConfig], steps: Sequence[int], device: torch.device,
           sharpness: Sequence[float] = ()) -> StepSettings:
        """For rows that have done ``steps`` each. ``sharpness`` (empty: 1) as above."""
        def column(values: Iterable[float | bool]) -> Tensor:
            return torch.tensor(list(values), device=device)

        return cls(column(temperature_at(step, row.max_denoising_steps, row.t_min, row.t_max)
                          for row, step in zip(rows, steps, strict=True)),
                   column(float(row.entropy_bound) for row in rows),
                   column(float(row.confidence_threshold) for row in rows),
                   column(row.stability_threshold for row in rows),
                   column(step + 1 >= row.max_denoising_steps for row, step in zip(rows, steps, strict=True)),
                   column(sharpness) if any(power != 1 for power in sharpness) else None)


class Sampler(Protocol):
    """What a step asks of a sampler, for rows of different settings; tensors to tensors, nothing goes to the host."""

    def advance(self, stats: CanvasStats, random: Tensor, settings: StepSettings) -> tuple[Tensor, Tensor]:
        """The next canvas [B, C] and which positions were accepted [B, C]; ``random`` [B, C] are uniform tokens."""
        ...

    def done(self, stats: CanvasStats, history: Tensor, settings: StepSettings) -> Tensor:
        """Whether each row's canvas is finished [B]; ``history`` [H, B, C] as in `converged`."""
        ...


class EntropyBoundSampler:
    """The reference's sampler: `accept`, `renoise` and `converged`."""

    def advance(self, stats: CanvasStats, random: Tensor, settings: StepSettings) -> tuple[Tensor, Tensor]:
        accepted = accept(stats.entropy, settings.entropy_bound)
        return renoise(stats.sample, accepted, random), accepted

    def done(self, stats: CanvasStats, history: Tensor, settings: StepSettings) -> Tensor:
        return settings.last | converged(stats.argmax, history, stats.entropy, settings.confidence_threshold,
                                         settings.stability_threshold)
