"""The head: from hidden states to argmax, sample, entropy and soft embedding in one walk over the vocabulary.

A full row of logits is 262144 wide; here only one tile of the vocabulary exists at a time. The sums are kept relative
to the largest logit met so far: a fixed reference such as the cap would underflow for a row whose logits are all low.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Part of what a seed means: the sample of a position is drawn tile by tile, so another width draws other tokens.
VOCAB_TILE = 4096


@dataclass
class CanvasStats:
    """One denoising step's predictions for every canvas position, at the step's temperature."""

    argmax: Tensor  # [B, C] most probable token
    sample: Tensor  # [B, C] a token drawn from the softmax
    entropy: Tensor  # [B, C] nats, float32
    soft: Tensor  # [B, C, D] expected embedding, times √D: the next step's self-conditioning


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """cap · tanh(logits / cap)."""
    return torch.tanh(logits / cap) * cap


def vocab_tiles(vocab_size: int) -> int:
    """How many tiles the vocabulary is walked in."""
    return -(-vocab_size // VOCAB_TILE)


@torch.no_grad()
def canvas_stats(hidden: Tensor, embedding: Tensor, temperature: Tensor, noise: Tensor, cap: float,
                 embed_scale: float) -> CanvasStats:
    """Predictions of a canvas from its hidden states, a tile of the vocabulary at a time.

    hidden [B, C, D]; embedding [V, D]; temperature [B]; noise [B, C, vocab_tiles(V), 2], uniform in [0, 1).

    The sample is a Gumbel-max over tiles, each standing for its total mass, with an inverse-CDF draw inside the
    winning one: the largest of a tile's perturbed logits is itself Gumbel-distributed around the log of its mass, so
    this is exactly a Gumbel-max over the vocabulary at two random numbers a tile. The entropy is log Z - Σ p·l.
    Sums are float32; temperatures must be above 0.
    """
    batch, canvas, width = hidden.shape
    rows = batch * canvas
    flat = hidden.reshape(rows, width)
    inverse_t = (1.0 / temperature.float()).repeat_interleave(canvas).unsqueeze(1)
    gumbel_u, inside_u = noise.reshape(rows, -1, 2).float().unbind(-1)
    gumbel = -torch.log(-torch.log(gumbel_u.clamp(1e-20, 1 - 1e-7)))

    best = flat.new_full((rows,), -torch.inf, dtype=torch.float32)  # the largest l / T so far
    mass = torch.zeros_like(best)  # Σ e^(l/T - best)
    weighted = torch.zeros_like(best)  # Σ e^(l/T - best) · (l/T - best)
    soft = flat.new_zeros(rows, width, dtype=torch.float32)  # Σ e^(l/T - best) · embedding
    best_key = torch.full_like(best, -torch.inf)
    argmax = torch.zeros(rows, dtype=torch.long, device=hidden.device)
    sample = torch.zeros_like(argmax)

    for tile, start in enumerate(range(0, embedding.shape[0], VOCAB_TILE)):
        table = embedding[start : start + VOCAB_TILE]
        scores = (flat @ table.T).float()
        scores.div_(cap).tanh_().mul_(cap * inverse_t)
        top, where = scores.max(dim=1)
        better = top > best
        argmax = torch.where(better, where + start, argmax)
        peak = torch.where(better, top, best)
        drop = (best - peak) if tile else torch.zeros_like(best)
        decay = drop.exp()
        weighted = (weighted + mass * drop) * decay
        mass = mass * decay
        if tile:
            soft.mul_(decay.unsqueeze(1))
        best = peak

        scores.sub_(best.unsqueeze(1))
        weights = scores.exp()
        tile_mass = weights.sum(1)
        weighted += scores.mul_(weights).sum(1)
        mass += tile_mass
        soft += (weights.to(table.dtype) @ table).float()

        key = tile_mass.log() + best + gumbel[:, tile]
        wins = (key > best_key).nonzero().squeeze(1)
        if len(wins):
            best_key[wins] = key[wins]
            cumulative = weights[wins].cumsum(1)
            total = cumulative[:, -1:]
            # Just below the total at most, or rounding could pick a last token of no weight.
            target = (inside_u[wins, tile].unsqueeze(1) * total).minimum(total.nextafter(torch.zeros_like(total)))
            sample[wins] = torch.searchsorted(cumulative, target, right=True).squeeze(1) + start

    entropy = (mass.log() - weighted / mass).clamp(min=0)
    expected = soft.div_(mass.unsqueeze(1)).mul_(embed_scale).to(hidden.dtype)
    return CanvasStats(argmax.view(batch, canvas), sample.view(batch, canvas), entropy.view(batch, canvas),
                       expected.view(batch, canvas, width))
