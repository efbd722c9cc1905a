"""The head: from hidden states to argmax, sample, entropy and soft embedding in one walk over the vocabulary.

A full row of logits is 262144 wide; here only one tile of the vocabulary exists at a time. The sums are kept relative
to the largest logit met so far: a fixed reference such as the cap would underflow for a row whose logits are all low.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dgemma.kernels import Weight, linear, mix_rows, native

# Part of what a seed means: the sample of a position is drawn tile by tile, so another width draws other tokens.
VOCAB_TILE = 4096
# Most logits of a loss (training and its memory plan) at a time: 32 MB in float32, a few times that while worked on.
LOGITS = 1 << 23
_LEAST_TILE = 256  # tokens of the vocabulary in a tile of a loss, however many rows there are


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


def vocab_tiles(vocab_size: int, tile: int = VOCAB_TILE) -> int:
    """How many tiles the vocabulary is walked in."""
    return -(-vocab_size // tile)


def fits_whole(tokens: int, vocab: int) -> bool:
    """Whether so many tokens' logits are few enough to be held at once."""
    return tokens * vocab <= LOGITS


def tile_width(tokens: int, vocab: int, most: int = LOGITS) -> int:
    """How many tokens of the vocabulary there are in a tile of a loss, for the logits of so many tokens."""
    return min(vocab, max(min(_LEAST_TILE, most), most // max(tokens, 1)))


@torch.no_grad()
def canvas_stats(hidden: Tensor, embedding: Weight, temperature: Tensor, noise: Tensor, cap: float,
                 embed_scale: float, sharpness: Tensor | None = None,
                 mix: Callable[[Tensor, Tensor, Tensor, Weight], None] = mix_rows,
                 tile: int = VOCAB_TILE) -> CanvasStats:
    """Predictions of a canvas from its hidden states, ``tile`` tokens of the vocabulary at a time.

    hidden [B, C, D]; embedding [V, D]; temperature [B]; noise [B, C, vocab_tiles(V, tile), 2], uniform in [0, 1). The
    sample is drawn from the probabilities to the power of ``sharpness`` [B] (None: 1), renormalised. ``mix`` sums up
    the soft embeddings, as `mix_rows` does.

    The sample is a Gumbel-max over tiles, each standing for its total mass, with an inverse-CDF draw inside the
    winning one: the largest of a tile's perturbed logits is itself Gumbel-distributed around the log of its mass, so
    this is exactly a Gumbel-max over the vocabulary at two random numbers a tile. The entropy is log Z - Σ p·l.
    Sums are float32; temperatures must be above 0.
    """
    batch, canvas, width = hidden.shape
    rows = batch * canvas
    flat = hidden.reshape(rows, width)
    inverse_t = (1.0 / temperature.float()).repeat_interleave(canvas)
    gumbel_u, inside = noise.reshape(rows, -1, 2).float().permute(2, 1, 0).contiguous()
    gumbel = -torch.log(-torch.log(gumbel_u.clamp(1e-20, 1 - 1e-7)))
    sums = _Sums(rows, hidden.device, None if sharpness is None else sharpness.float().repeat_interleave(canvas))
    soft = flat.new_zeros(rows, width, dtype=torch.float32)  # Σ e^(l/T - best) · embedding
    add_tile = sums.add_tile_natively if hidden.device.type == "cpu" and native.available() else sums.add_tile
    for index, start in enumerate(range(0, embedding.shape[0], tile)):
        table = embedding[start : start + tile]
        scores = linear(flat, table).float()
        add_tile(scores, start, cap, inverse_t, gumbel[index], inside[index])
        mix(soft, sums.decay, scores, table)

    entropy = (sums.mass.log() - sums.weighted / sums.mass).clamp(min=0)
    expected = soft.div_(sums.mass.unsqueeze(1)).mul_(embed_scale).to(hidden.dtype)
    return CanvasStats(sums.argmax.view(batch, canvas), sums.sample.view(batch, canvas), entropy.view(batch, canvas),
                       expected.view(batch, canvas, width))


class _Sums:
    """What is known of every row's distribution after some tiles, all [rows]."""

    def __init__(self, rows: int, device: torch.device, sharpness: Tensor | None = None):
        self.sharpness = sharpness
        self.best = torch.full((rows,), -torch.inf, device=device)  # the largest l/T so far
        self.mass = torch.zeros_like(self.best)  # Σ e^(l/T - best)
        self.weighted = torch.zeros_like(self.best)  # Σ e^(l/T - best) · (l/T - best)
        self.best_key = torch.full_like(self.best, -torch.inf)  # the largest perturbed mass of a tile
        self.decay = torch.zeros_like(self.best)  # what sums relative to the former best shrink by
        self.argmax = torch.zeros(rows, dtype=torch.long, device=device)
        self.sample = torch.zeros_like(self.argmax)

    def add_tile_natively(self, scores: Tensor, start: int, cap: float, inverse_t: Tensor, gumbel: Tensor,
                          inside: Tensor) -> None:
        """`add_tile` in one pass of C++."""
        native.head_tile(scores, start, cap, inverse_t, gumbel, inside, vars(self))

    def add_tile(self, scores: Tensor, start: int, cap: float, inverse_t: Tensor, gumbel: Tensor,
                 inside: Tensor) -> None:
        """Take in raw logits [rows, n] of the tokens from ``start`` on; they become e^(l/T - best) in place."""
        scores.div_(cap).tanh_().mul_((cap * inverse_t).unsqueeze(1))
        top, where = scores.max(dim=1)
        better = top > self.best
        self.argmax = torch.where(better, where + start, self.argmax)
        peak = torch.where(better, top, self.best)
        drop = (self.best - peak) if start else torch.zeros_like(peak)
        self.decay = drop.exp() if start else torch.zeros_like(peak)
        self.weighted = (self.weighted + self.mass * drop) * self.decay
        self.mass = self.mass * self.decay
        self.best = peak

        scores.sub_(peak.unsqueeze(1))
        distance = scores.clone()
        scores.exp_()
        tile_mass = scores.sum(1)
        self.weighted += distance.mul_(scores).sum(1)
        self.mass += tile_mass

        # Scores to the power of `sharpness` are the masses that the draw is from.
        drawn, key, power = tile_mass, peak + gumbel, None
        if self.sharpness is not None:
            power = self.sharpness.unsqueeze(1)
            drawn, key = (scores**power).sum(1), peak * self.sharpness + gumbel
        key += drawn.log()
        wins = key > self.best_key
        self.best_key = torch.where(wins, key, self.best_key)
        cumulative = (scores if power is None else scores**power).cumsum(1)
        total = cumulative[:, -1:]
        # Just below the total at most, or rounding could pick a last token of no weight.
        target = (inside.unsqueeze(1) * total).minimum(total.nextafter(torch.zeros_like(total)))
        drawn = torch.searchsorted(cumulative, target, right=True).squeeze(1) + start
        self.sample = torch.where(wins, drawn, self.sample)
