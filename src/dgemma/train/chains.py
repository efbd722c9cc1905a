"""Canvases that the network being trained denoises itself, step by step, from one training step to the next.

A step trained on its own sees a canvas as noise makes it, or a few passes later. What the sampler meets in its tenth
step, a dead end above all, it never sees. So some canvases are kept here as they were left, beside the soft embeddings
that they are conditioned on; every step takes a few of them up again (`Objective.chains`). One that is done with
makes room for a new example. There are many more of them than a step takes: a network that trained on the same few
puzzles for a dozen steps would learn those by heart.

Works on examples and tensors; knows nothing of networks and losses. After the carried state of Wang et al. 2025,
"Hierarchical reasoning model" (arXiv:2506.21734, deep supervision).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from dgemma.errors import DgemmaError
from dgemma.train.batch import Example
from dgemma.train.noise import noise_key
from dgemma.train.objective import Reached, Start

_PLACE = 2**33  # no example has it: this randomness is no canvas' noise

Batches = Callable[[int], Sequence[Example]]


class Chains:
    """``count`` canvases on their way, of the examples of ``batches`` (which depend on the step only).

    A chain ends where the sampler would stop, or after ``most`` passes. ``shape`` is that of a canvas' soft
    embeddings [C, D], which are kept as ``dtype``.
    """

    def __init__(self, count: int, most: int, batches: Batches, seed: int, shape: tuple[int, int],
                 dtype: torch.dtype = torch.float32):
        self.count, self.most, self.batches, self.seed = count, most, batches, seed
        self._examples: list[Example | None] = [None] * count
        self._origins = torch.full((count, 2), -1)  # the step that every example is from, and its place in it
        self._passes = torch.zeros(count, dtype=torch.long)
        self._noisy = torch.zeros(count, shape[0], dtype=torch.long)
        self._soft = torch.zeros(count, *shape, dtype=dtype)
        self._taken: list[int] = []

    def take(self, step: int, size: int) -> tuple[list[Example], Start]:
        """Up to ``size`` chains to go on with, and where they stand.

        The step's new examples take the places of chains that have ended.
        """
        empty = [row for row, example in enumerate(self._examples) if example is None]
        for place, (row, example) in enumerate(zip(empty, self.batches(step), strict=False)):
            self._examples[row] = example
            self._origins[row] = torch.tensor([step, place])
            self._passes[row] = 0
        # Of similar length together, so that little is padded; among equals by chance.
        chance = np.random.default_rng(noise_key(self.seed, step, _PLACE)).random(self.count + 1)
        running = sorted((len(example.context_ids), chance[row], row) for row, example in enumerate(self._examples)
                         if example is not None)
        block = int(chance[-1] * -(-len(running) // size)) * size
        begin = max(0, min(block, len(running) - size))
        self._taken = [row for _, _, row in running[begin : begin + size]]
        examples = [example for row in self._taken if (example := self._examples[row]) is not None]
        return examples, Start(self._noisy[self._taken], self._soft[self._taken], self._passes[self._taken] == 0)

    def put(self, reached: Reached, passes: int) -> dict[str, float]:
        """Keep how far the chains just taken came in ``passes`` more passes -> numbers for the log."""
        rows = torch.tensor(self._taken)
        age = self._passes[rows].float().mean().item()
        self._noisy[rows], self._soft[rows] = reached.noisy.cpu(), reached.soft.detach().to(self._soft)
        self._passes[rows] += passes
        settled = reached.settled.cpu()
        ended = settled | (self._passes[rows] >= self.most)
        for row in rows[ended].tolist():
            self._examples[row] = None
        values = {"chains/passes_before": age, "chains/ended": ended.float().mean().item()}
        if ended.any():
            values["chains/settled"] = (settled.sum() / ended.sum()).item()
        return values

    def tensors(self) -> dict[str, Tensor]:
        """All that a resumed run needs, by name."""
        running = torch.tensor([example is not None for example in self._examples])
        return {"chains/origins": torch.where(running[:, None], self._origins, -1), "chains/passes": self._passes,
                "chains/noisy": self._noisy, "chains/soft": self._soft}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up the `tensors` of an earlier run; its examples are made anew.

        Raises DgemmaError where they are of another number of chains, or of other data.
        """
        origins = tensors.get("chains/origins")
        if origins is None or len(origins) != self.count:
            raise DgemmaError(f"holds {0 if origins is None else len(origins)} chains, and the recipe asks for "
                              f"{self.count} (objective.chains)")
        self._origins, self._passes = origins, tensors["chains/passes"]
        self._noisy, self._soft = tensors["chains/noisy"], tensors["chains/soft"]
        made: dict[int, Sequence[Example]] = {}
        for row, (step, place) in enumerate(origins.tolist()):
            if step >= 0:
                if step not in made:
                    made[step] = self.batches(step)
                if place >= len(made[step]):
                    raise DgemmaError(f"holds a chain of example {place} of step {step}, which there is not: the data "
                                      "has changed since")
                self._examples[row] = made[step][place]
