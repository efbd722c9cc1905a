"""The block-diffusion objective: corrupt a canvas, predict every one of its tokens.

As in the public recipes for this model: t ~ U(ε, 1) per example, every canvas token replaced with probability t by a
uniform one, plain cross-entropy over all positions of the canvas (kept, replaced and fill alike), an optional
causal loss on the prompt, and self-conditioning from an earlier pass without gradient; true zeros otherwise.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dgemma.diffusion.sampler import accept, renoise, token_entropy
from dgemma.nn import DiffusionTransformer


@dataclass(frozen=True)
class Objective:
    """Settings of the objective; the defaults are those of the public recipes.

    ``passes`` > 1 supervises a chain instead of throwing the first pass away: each later pass is conditioned on the
    one before it (without gradient) and continues on a less noisy canvas. With probability ``rollout`` that canvas is
    the one the sampler itself would have made of the earlier pass, mistakes included.
    """

    t_min: float = 0.001
    t_max: float = 1.0
    self_conditioning_probability: float = 0.5
    causal_weight: float = 1.0
    passes: int = 1
    rollout: float = 0.0
    entropy_bound: float = 0.1
    temperature: float = 0.6  # of the self-conditioning softmax and of the rollout: the middle of the schedule

    def __post_init__(self) -> None:
        if not 0 <= self.t_min < self.t_max <= 1:
            raise ValueError(f"t_min and t_max must satisfy 0 <= t_min < t_max <= 1, got {self.t_min}, {self.t_max}")
        if self.passes < 1:
            raise ValueError(f"passes must be at least 1, got {self.passes}")


@dataclass(frozen=True)
class Noise:
    """All the randomness of one batch, drawn beforehand so that the loss is a pure function."""

    t: Tensor  # [passes, B] uniform: how noisy each pass' canvas is
    draw: Tensor  # [B, C] uniform: a position is corrupted while this is below t
    tokens: Tensor  # [B, C] the random token it then gets
    conditioned: Tensor  # [B] bool: the first pass is self-conditioned (one supervised pass only)
    rolled: Tensor  # [passes, B] bool: the next pass continues from the sampler's own canvas
    sampling: Tensor  # [passes - 1, B, C, V] Gumbel noise of that sampler
    renoise: Tensor  # [passes - 1, B, C] its fresh tokens

    def to(self, device: torch.device) -> Noise:
        """The same noise on another device."""
        return Noise(**{f.name: getattr(self, f.name).to(device) for f in dataclasses.fields(self)})


def draw_noise(objective: Objective, batch: int, canvas: int, vocab: int, generator: torch.Generator) -> Noise:
    """The noise of one batch of ``batch`` canvases of ``canvas`` tokens."""
    later = objective.passes - 1

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    gumbel = -torch.log(-torch.log(uniform(later, batch, canvas, vocab).clamp(1e-20, 1 - 1e-7)))
    return Noise(
        t=uniform(objective.passes, batch),
        draw=uniform(batch, canvas),
        tokens=torch.randint(vocab, (batch, canvas), generator=generator),
        conditioned=uniform(batch) < objective.self_conditioning_probability,
        rolled=uniform(objective.passes, batch) < objective.rollout,
        sampling=gumbel,
        renoise=torch.randint(vocab, (later, batch, canvas), generator=generator),
    )


def corrupt(canvas: Tensor, t: Tensor, draw: Tensor, tokens: Tensor) -> Tensor:
    """Canvas [B, C] with each token replaced by that of ``tokens`` where its ``draw`` is below t [B]."""
    return torch.where(draw < t.unsqueeze(1), tokens, canvas)


def block_diffusion_loss(network: DiffusionTransformer, prompt: Tensor, canvas: Tensor, objective: Objective,
                         noise: Noise) -> tuple[Tensor, dict[str, Tensor]]:
    """The training loss of one batch: prompts [B, T], clean canvases [B, C] -> (scalar, parts of it for the log)."""
    cache = network.new_cache(canvas.shape[0])
    hidden = network.encode(prompt, cache)
    t = objective.t_min + (objective.t_max - objective.t_min) * noise.t[0]
    noisy = corrupt(canvas, t, noise.draw, noise.tokens)
    parts: dict[str, Tensor] = {}
    soft = None
    if objective.passes == 1:
        with torch.no_grad():
            logits = network.logits(network.denoise(noisy, cache)) / objective.temperature
            # True zeros where the example is not conditioned: not the softmax of zero logits.
            soft = network.soft_embeddings(logits) * noise.conditioned[:, None, None]
    total = torch.zeros((), device=canvas.device)
    for index in range(objective.passes):
        logits = network.logits(network.denoise(noisy, cache, soft))
        loss = F.cross_entropy(logits.flatten(0, 1), canvas.flatten())
        total = total + loss / objective.passes
        parts[f"loss/pass{index + 1}"] = loss.detach()
        parts[f"accuracy/pass{index + 1}"] = (logits.detach().argmax(-1) == canvas).float().mean()
        if index + 1 < objective.passes:
            with torch.no_grad():
                processed = logits.detach() / objective.temperature
                soft = network.soft_embeddings(processed)
                t = t * noise.t[index + 1]
                lighter = corrupt(canvas, t, noise.draw, noise.tokens)
                bound = torch.full_like(t, objective.entropy_bound)
                accepted = accept(token_entropy(processed), bound)
                rolled = renoise((processed + noise.sampling[index]).argmax(-1), accepted, noise.renoise[index])
                noisy = torch.where(noise.rolled[index].unsqueeze(1), rolled, lighter)
    if objective.causal_weight:
        logits = network.logits(hidden[:, :-1])
        causal = F.cross_entropy(logits.flatten(0, 1), prompt[:, 1:].flatten())
        total = total + objective.causal_weight * causal
        parts["loss/causal"] = causal.detach()
    return total, parts
