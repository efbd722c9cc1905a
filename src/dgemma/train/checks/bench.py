"""What the preflight's checks work on: a network with the loss that a run uses, watched, and how results are compared.

Every check looks at what goes into `denoise` and comes out of it, and at the loss, not at how the loss is written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dgemma import seeds
from dgemma.config import SLIDING
from dgemma.errors import DgemmaError
from dgemma.nn import DiffusionTransformer, KVCache
from dgemma.nn.packed import packed_bytes
from dgemma.nn.passes import Passes
from dgemma.train.batch import Batch
from dgemma.train.noise import Noise, draw_noise
from dgemma.train.objective import Objective, batch_loss
from dgemma.train.parallel.distributed import let_go

SAMPLED = 4096  # entries of a tensor that are compared, where the whole would double the memory
NOISE = 10  # a difference counts when it is so many times that of the same computation done twice (0 on a CPU)


@dataclass(frozen=True)
class Finding:
    """One question and its answer. ``measured`` is the evidence, ``meaning`` what to do about a failure."""

    name: str
    passed: bool
    measured: str
    meaning: str


class LossOf(Protocol):
    """The loss that is looked at, as `batch_loss` is called."""

    def __call__(self, network: DiffusionTransformer, batch: Batch, objective: Objective, noise: Noise, *,
                 passes: Passes) -> tuple[Tensor, dict[str, Tensor]]: ...


@dataclass(frozen=True)
class DenoisingPass:
    """One call of `denoise`: what went in and what came out, without gradients."""

    canvas: Tensor  # [B, C]
    soft: Tensor | None  # [B, C, D]
    hidden: Tensor  # [B, C, D]


@dataclass(frozen=True)
class Bench:
    """What every check works on."""

    network: DiffusionTransformer
    passes: Passes
    batch: Batch
    objective: Objective
    loss_of: LossOf = batch_loss
    seed: int = 0
    past_window: bool = True  # whether the run's contexts may be longer than the sliding window

    def noise(self, t: float | None = None, conditioned: bool | None = None) -> Noise:
        """The same noise every time; ``t`` 0 corrupts nothing and 1 everything, ``conditioned`` none or all rows."""
        rows, width = self.batch.canvas.shape
        noise = draw_noise(self.objective, rows, width, self.network.config.vocab_size,
                           seeds.generator(self.seed)).to(self.network.device)
        if t is not None:  # and no canvas of the sampler's own making
            noise = dataclasses.replace(noise, draw=torch.full_like(noise.draw, 1.0 - t),
                                        t=torch.full_like(noise.t, t), rolled=torch.zeros_like(noise.rolled))
        if conditioned is not None:
            noise = dataclasses.replace(noise, conditioned=torch.full_like(noise.conditioned, conditioned))
        return noise

    def loss(self, batch: Batch, noise: Noise, passes: Passes | None = None) -> Tensor:
        """The loss, by the run's passes or by others."""
        return self.loss_of(self.network, batch, self.objective, noise, passes=passes or self.passes)[0]

    def denoised(self, batch: Batch, noise: Noise, passes: Passes | None = None) -> list[DenoisingPass]:
        """Every denoising pass that the loss makes, in order."""
        made: list[DenoisingPass] = []
        own = passes or self.passes

        def denoise(canvas_ids: Tensor, cache: KVCache, soft: Tensor | None = None) -> Tensor:
            hidden = own.denoise(canvas_ids, cache, soft)
            made.append(DenoisingPass(canvas_ids, soft, hidden.detach()))
            return hidden

        with torch.no_grad():
            self.loss(batch, noise, dataclasses.replace(own, denoise=denoise))
        if not made:
            raise DgemmaError("preflight: the loss function never denoised a canvas with the passes that it was given; "
                              "there is nothing that could be checked")
        return made

    def gradients(self) -> dict[str, Tensor]:
        """Some of every trainable parameter's gradient, by name; every ``.grad`` is as it was afterwards."""
        let_go(self.network)
        parameters = {name: p for name, p in self.network.named_parameters() if p.requires_grad}
        if not parameters:
            raise DgemmaError("preflight: no parameter of the network requires a gradient: there is nothing to train")
        before = {name: parameter.grad for name, parameter in parameters.items()}
        try:
            for parameter in parameters.values():
                parameter.grad = None
            with torch.enable_grad():
                self.loss(self.batch, self.noise(conditioned=True)).backward()
            return {name: some_entries(parameter.grad) for name, parameter in parameters.items()
                    if parameter.grad is not None}
        finally:
            for name, parameter in parameters.items():
                parameter.grad = before[name]


def by_canvas(passes: list[DenoisingPass]) -> Iterator[list[DenoisingPass]]:
    """Each canvas' own part of every pass."""
    for index in range(len(passes[0].canvas)):
        part = slice(index, index + 1)
        yield [DenoisingPass(seen.canvas[part], None if seen.soft is None else seen.soft[part], seen.hidden[part])
               for seen in passes]


def movement(before: list[DenoisingPass], after: list[DenoisingPass]) -> float:
    """How far what was predicted is from what was predicted before, at most."""
    return max(distance_of(b.hidden, a.hidden) for a, b in zip(before, after, strict=True))


def distance_of(found: Tensor, wanted: Tensor) -> float:
    """The root mean square of the difference, in units of that of ``wanted``; infinite where a number is not one."""
    found, wanted = found.float(), wanted.float()
    if not wanted.numel():  # another process has all of it
        return 0.0
    size = wanted.square().mean().sqrt().item()
    distance = (found - wanted).square().mean().sqrt().item()
    if distance != distance:
        return float("inf")
    return distance / size if size > 0 else (0.0 if distance == 0 else float("inf"))


def tolerance_of(network: DiffusionTransformer) -> float:
    """How far two right computations may be apart, by what the weights are computed in."""
    if network.dtype in (torch.bfloat16, torch.float16):
        return 5e-2
    return 2e-2 if packed_bytes(network) else 1e-3


def local(tensor: Tensor) -> Tensor:
    """The tensor without its history; of one that several processes share, this process' part."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # pyright: ignore[reportAttributeAccessIssue]


def some_entries(tensor: Tensor) -> Tensor:
    """Up to `SAMPLED` of a tensor's entries (of this process' part of it), evenly spread, in memory of their own."""
    flat = local(tensor).flatten()
    return flat[:: max(1, len(flat) // SAMPLED)].clone()


def beyond_the_window(bench: Bench) -> list[Batch]:
    """A turn of two canvases with a context past the sliding window, made of the first example's own tokens."""
    config, batch = bench.network.config, bench.batch
    if not any(layer.kind == SLIDING for layer in config.layers):
        return []
    length = batch.before[0]
    own, canvas = batch.context[batch.rows[0]][None, :length], batch.canvas[:1]
    # Before the example's own context: its end, which matters most, stays where it is.
    missing = max(config.sliding_window + canvas.shape[1] - length, 0)
    row = torch.cat([own.repeat(1, -(-missing // length))[:, :missing], own, canvas], dim=1)
    before = row.shape[1] - canvas.shape[1]
    sights = tuple((0, dataclasses.replace(sight, start=sight.start + missing)) for owner, sight in batch.sights
                   if owner == batch.rows[0])
    return [Batch(row, torch.cat([canvas, canvas.flip(1)]), (before, row.shape[1]), (before, before), owners=(0, 0),
                  sights=sights)]
