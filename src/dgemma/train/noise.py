"""The noise of training: all that is random in a batch, drawn beforehand so that its loss is a pure function.

Every canvas' noise can have a key of its own (`keyed_noise`): it is then the same in whatever batch, part of a batch
or process the canvas is trained, and a resumed run goes on as if it had never stopped. Knows nothing of networks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dgemma.nn.head import vocab_tiles

if TYPE_CHECKING:
    from dgemma.train.objective import Objective

# Vocabularies up to this size are sampled from whole rows of logits, larger ones in the head's tiles.
WHOLE_VOCAB = 4096


@dataclass(frozen=True)
class Noise:
    """All the randomness of one batch of B canvases."""

    t: Tensor  # [passes, B] uniform: the first pass' noise, scaled into [t_min, t_max]; then factors of the t before
    draw: Tensor  # [B, C] uniform: a position is corrupted while this is below t
    tokens: Tensor  # [B, C] the random token it then gets
    conditioned: Tensor  # [B] bool: the first pass is self-conditioned (one supervised pass only)
    rolled: Tensor  # [passes, B] bool: the next pass continues from the sampler's own canvas
    sampling: Tensor  # [passes - 1, B, C, V] Gumbel noise of that sampler; large V: [.., tiles, 2], see `canvas_stats`
    renoise: Tensor  # [passes - 1, B, C] its fresh tokens

    def to(self, device: torch.device) -> Noise:
        """The same noise on another device."""
        return Noise(**{f.name: getattr(self, f.name).to(device) for f in dataclasses.fields(self)})


def draw_noise(objective: Objective, batch: int, canvas: int, vocab: int, generator: torch.Generator) -> Noise:
    """The noise of ``batch`` canvases of ``canvas`` tokens, from one generator."""
    return _drawn(objective, batch, canvas, vocab, lambda shape: torch.rand(shape, generator=generator),
                  lambda shape: torch.randint(vocab, shape, generator=generator))


def keyed_noise(objective: Objective, keys: Sequence[int], canvas: int, vocab: int) -> Noise:
    """The noise of canvases of ``canvas`` tokens, each from a generator of its own with a 64-bit key."""
    # Not torch's generator: on a CPU it reads the lower 32 bits of a seed only.
    rows = []
    for key in keys:
        rng = np.random.Generator(np.random.PCG64(key))
        rows.append(_drawn(objective, 1, canvas, vocab,
                           lambda shape, rng=rng: torch.from_numpy(rng.random(shape, np.float32)),
                           lambda shape, rng=rng: torch.from_numpy(rng.integers(vocab, size=shape))))
    by_pass = ("t", "rolled", "sampling", "renoise")  # whose first dimension is not the batch
    return Noise(**{f.name: torch.cat([getattr(row, f.name) for row in rows], dim=1 if f.name in by_pass else 0)
                    for f in dataclasses.fields(Noise)})


def noise_key(seed: int, step: int, place: int) -> int:
    """The 64-bit key of the example at a place of a step's whole batch, well mixed."""
    # In words of one width, so that no number can run into the next.
    words = np.array([seed % 2**64, step, place], dtype=np.uint64).view(np.uint32)
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])


def corrupt(canvas: Tensor, t: Tensor, draw: Tensor, tokens: Tensor) -> Tensor:
    """Canvas [B, C] with each token replaced by that of ``tokens`` where its ``draw`` is below t [B]."""
    return torch.where(draw < t.unsqueeze(1), tokens, canvas)


def _drawn(objective: Objective, batch: int, canvas: int, vocab: int, uniform: Callable[[tuple[int, ...]], Tensor],
           integers: Callable[[tuple[int, ...]], Tensor]) -> Noise:
    later = objective.passes - 1
    if vocab <= WHOLE_VOCAB:
        sampling = -torch.log(-torch.log(uniform((later, batch, canvas, vocab)).clamp(1e-20, 1 - 1e-7)))
    else:
        sampling = uniform((later, batch, canvas, vocab_tiles(vocab), 2))
    return Noise(
        t=uniform((objective.passes, batch)),
        draw=uniform((batch, canvas)),
        tokens=integers((batch, canvas)),
        conditioned=uniform((batch,)) < objective.self_conditioning_probability,
        rolled=uniform((objective.passes, batch)) < objective.rollout,
        sampling=sampling,
        renoise=integers((later, batch, canvas)),
    )
