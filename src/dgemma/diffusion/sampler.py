"""Entropy-bound sampling as pure functions over tensors.

One step of denoising, given the network's predictions: which positions to believe (`accept`), what the next canvas is
(`renoise`), whether the canvas is done (`converged`). After Ben-Hamu et al. 2025, "Accelerated sampling from masked
diffusion models via entropy bounded unmasking" (arXiv 2505.24857), as DiffusionGemma's reference applies it.
"""

from __future__ import annotations

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


def converged(argmax: Tensor, history: Tensor, entropy: Tensor, confidence_threshold: Tensor) -> Tensor:
    """Whether each row may stop: its argmax canvas is stable and its mean entropy is low, both at once.

    argmax [B, C]; history [H, B, C], the argmax canvases of the H earlier steps that must agree (-1 where there was
    none yet; H may be 0); entropy [B, C]; confidence_threshold [B] -> [B] bool.
    """
    stable = (history == argmax).all(-1).all(0)
    return stable & (entropy.mean(-1) < confidence_threshold)


class Sampler(Protocol):
    """What the loop asks of a sampler; rows of one batch may have different settings."""

    def advance(self, stats: CanvasStats, random: Tensor, settings: list[GenerationConfig]) -> tuple[Tensor, Tensor]:
        """The next canvas [B, C] and which positions were accepted [B, C]; ``random`` [B, C] are uniform tokens."""
        ...

    def done(self, stats: CanvasStats, histories: list[Tensor], settings: list[GenerationConfig]) -> list[bool]:
        """Whether each row's canvas is finished; ``histories`` are its earlier argmax canvases, [H, C] each."""
        ...


class EntropyBoundSampler:
    """The reference's sampler: `accept`, `renoise` and `converged` over a batch."""

    def advance(self, stats: CanvasStats, random: Tensor, settings: list[GenerationConfig]) -> tuple[Tensor, Tensor]:
        bound = torch.tensor([s.entropy_bound for s in settings], device=stats.entropy.device)
        accepted = accept(stats.entropy, bound)
        return renoise(stats.sample, accepted, random), accepted

    def done(self, stats: CanvasStats, histories: list[Tensor], settings: list[GenerationConfig]) -> list[bool]:
        argmax, entropy = stats.argmax.cpu(), stats.entropy.cpu()
        threshold = torch.tensor([s.confidence_threshold for s in settings])
        # Row by row: rows may ask for histories of different lengths.
        return [bool(converged(argmax[i : i + 1], history.unsqueeze(1), entropy[i : i + 1], threshold[i : i + 1]))
                for i, history in enumerate(histories)]
