"""One training step: its examples and their noise, forward and backward in micro-batches, the optimizers.

Works on a network, a source of examples and optimizers; knows nothing of folders, evaluation and when to stop.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from dgemma.errors import DgemmaError
from dgemma.nn import DiffusionTransformer, KVCache
from dgemma.nn.passes import Passes
from dgemma.train.batch import Batch, collate
from dgemma.train.data.examples import Example
from dgemma.train.data.sources import Source
from dgemma.train.noise import keyed_noise, noise_key
from dgemma.train.objective import batch_loss, means, totals_of
from dgemma.train.optim.optimizers import Optimizers, learning_rate_factor
from dgemma.train.parallel.distributed import Ranks, Share, clip_gradients
from dgemma.train.recipe import Recipe

_FIRST_STEPS = 16


class Stepper:
    """Takes the steps of a recipe; each depends on its number and the weights only.

    ``optimizers`` have the network's parameters, ``passes`` are what `shard` gave. All of ``ranks`` take every step
    together.
    """

    def __init__(self, recipe: Recipe, network: DiffusionTransformer, passes: Passes, source: Source,
                 optimizers: Optimizers, ranks: Ranks, max_steps: int):
        self.recipe, self.network, self.source, self.optimizers = recipe, network, source, optimizers
        self.ranks, self.max_steps = ranks, max_steps
        self._passes = passes
        self.compiled: Compiled | None = None
        if recipe.compile:
            # Told by the first steps' batches, so that a resumed run compiles the same.
            self.compiled = Compiled(passes, network.config.hidden_size,
                                     [collate(share.items) for step in range(_FIRST_STEPS)
                                      for share in self._shares(source.batch(step))])

    def take(self, step: int) -> tuple[dict[str, float], int]:
        """Step number ``step``, from 0 -> what it measured, and how many tokens it trained on.

        Raises DgemmaError when the gradient is not finite; the parameters are as they were then.
        """
        recipe, settings = self.recipe, self.recipe.optimizer
        config, device = self.network.config, self.ranks.device
        examples = self.source.batch(step)
        shares = self._shares(examples)
        batches = [collate(share.items) for share in shares]
        # Several processes: what divides the losses is the whole step's, the others' examples included.
        totals = totals_of(batches if self.ranks.world == 1 else [collate(examples)], recipe.objective)
        torch.manual_seed(noise_key(recipe.seed, step, 2**32 + self.ranks.rank) % 2**63)  # of dropout
        parts = []
        tokens = 0
        for share, batch in zip(shares, batches, strict=True):
            tokens += int(sum(batch.before[i] for i in batch.last) + batch.canvas.numel()) * bool(share.weight)
            keys = [noise_key(recipe.seed, step, share.start + place) for place in range(len(share.items))]
            noise = keyed_noise(recipe.objective, keys, config.canvas_length, config.vocab_size).to(device)
            passes = self._passes if self.compiled is None else self.compiled.passes_for(batch)
            with torch.autocast(device.type, torch.bfloat16) if recipe.autocast else nullcontext():
                loss, part = batch_loss(self.network, batch.to(device), recipe.objective, noise, totals, passes)
            (loss * share.weight).backward()
            self.optimizers.gather()
            parts.append({name: value * share.weight for name, value in part.items()})
        norm = clip_gradients(self.optimizers.masters.values(), settings.clip)
        if not math.isfinite(norm):
            raise DgemmaError(f"training diverged at step {step}: the gradient is not finite; start again with a "
                              "lower learning rate")
        factor = learning_rate_factor(step, self.max_steps, settings)
        self.optimizers.step(factor)
        sums = self.ranks.sum({"tokens": torch.tensor(float(tokens)), **{
            name: torch.stack([part[name].double() for part in parts]).sum(0) for name in parts[0]}})
        values = means([{name: sums[name] for name in parts[0]}])
        loss = values.get("loss/pass1", values.get("loss/causal", math.nan))
        return {"loss": loss, **values, "gradient_norm": norm, "learning_rate": factor * (
            settings.muon_lr if settings.kind == "muon" else settings.lr)}, int(sums["tokens"].item())

    def _shares(self, examples: list[Example]) -> list[Share]:
        return self.ranks.share(examples, self.recipe.micro_batch or len(examples))


class Compiled:
    """Passes as compiled code, each by itself: the time that takes does not grow with the passes of a loss.

    Every shape is compiled anew, for minutes (so is a pass without gradients, and a second reading for a causal loss):
    only one is, that at least half of ``batches`` have. What is of another shape or padded runs as it is. ``shape`` is
    that of contexts and canvases; None: nothing is compiled. Canvases are always conditioned (zeros are none), by
    float32 of ``hidden_size``: one piece of code.
    """

    def __init__(self, passes: Passes, hidden_size: int, batches: Iterable[Batch],
                 compile: Callable[..., Any] = torch.compile):
        self._plain = passes
        denoise = _compiled(passes.denoise, compile)

        def conditioned(canvas_ids: Tensor, cache: KVCache, soft: Tensor | None = None) -> Tensor:
            soft = torch.zeros(*canvas_ids.shape, hidden_size, device=canvas_ids.device) if soft is None else soft
            return denoise(canvas_ids, cache, soft.float())

        self._compiled = Passes(_compiled(passes.encode, compile), conditioned, passes.checkpointed)
        shapes = Counter(map(_shape, batches))
        shape, count = shapes.most_common(1)[0]
        self.shape = shape if 2 * count >= shapes.total() else None

    def passes_for(self, batch: Batch) -> Passes:
        """Compiled passes where there are any for the batch's shape."""
        return self._plain if self.shape is None or _shape(batch) != self.shape else self._compiled


def _compiled(function: Callable[..., Tensor], compile: Callable[..., Any]) -> Callable[..., Tensor]:
    compiled = compile(function, dynamic=False)

    def called(*arguments: object) -> Tensor:
        try:
            return compiled(*arguments)
        except RuntimeError as error:
            from torch._dynamo.exc import TorchDynamoException

            if not isinstance(error, TorchDynamoException):
                raise
            raise DgemmaError(f"torch.compile failed ({str(error).strip().splitlines()[0]}): it needs a C++ compiler; "
                              "without one set compile: false in the recipe") from error

    return called


def _shape(batch: Batch) -> tuple[torch.Size, torch.Size] | None:
    """What code is compiled for: the shapes of contexts and canvases; None where rows are padded, shared or have
    pictures."""
    plain = batch.lengths is None and batch.owners is None and not batch.sights
    return (batch.context.shape, batch.canvas.shape) if plain else None
