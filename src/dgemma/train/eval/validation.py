"""Validation losses: how well a network predicts held-out canvases, by noise level and by kind of token.

Works on a network and examples, with noise that is the same at every call. Knows nothing of text, samplers or training.

What is measured does not depend on how a network was trained (several passes, rollouts, a range of t): one pass over
the noisy canvas without self-conditioning, and one conditioned on that. So runs with different objectives compare.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dgemma.errors import DgemmaError
from dgemma.nn import DiffusionTransformer, KVCache
from dgemma.nn.head import vocab_tiles
from dgemma.nn.passes import Passes
from dgemma.train.batch import Batch, collate
from dgemma.train.data.examples import Example
from dgemma.train.noise import Noise, corrupt, keyed_noise, noise_key
from dgemma.train.objective import (
    Objective,
    causal_losses,
    observed_shift,
    prefixes,
    read,
    token_losses,
    whole_logits,
)

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
_STEP = 2**63  # a step that no run reaches: this noise is no training step's


@contextmanager
def in_use(network: nn.Module) -> Iterator[None]:
    """The network as it is when it is used, without dropout; every part of it is put back into its own mode."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.train(training)  # its parts, too, whose own modes come after it


class Sums:
    """Weighted means under construction, float64: the parts of any batches add up."""

    def __init__(self) -> None:
        self._sums: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(self, name: str, losses: Tensor, weights: Tensor) -> None:
        """Count losses by their weights (or where a mask is true), both of one shape and on the CPU."""
        losses, weights = losses.double(), weights.double()
        sums = self._sums[name]
        # What has no weight does not count, even where its loss is no number.
        sums[0] += torch.where(weights > 0, losses * weights, 0.0).sum().item()
        sums[1] += weights.sum().item()

    def means(self) -> dict[str, float]:
        """The mean of everything that has any weight, by name."""
        return {name: total / weight for name, (total, weight) in self._sums.items() if weight}


@torch.no_grad()
def validation_losses(network: DiffusionTransformer, examples: Sequence[Example], objective: Objective, *,
                      seed: int = 0, batch_size: int = 8, levels: Sequence[float] = LEVELS,
                      stop: Callable[[], bool] | None = None, passes: Passes | None = None) -> dict[str, float]:
    """Mean cross-entropies (nats per token) of held-out examples, at every noise level t of ``levels``, 0 < t <= 1.

    - ``validation/loss``: all levels together, ``validation/t=0.5``: one of them, ``validation/conditioned``: all
      levels once more, self-conditioned from that pass. By the examples' own weights, as in training.
    - ``validation/corrupted``, ``/clean`` (both without fill) and ``/fill``: unweighted, so that they compare between
      runs with other weights. What there is no token of is left out.
    - ``validation/causal``: the next-token loss of the responses, where the objective has a causal loss. With an
      objective that denoises nothing this is all there is, and ``validation/loss`` too.

    Example i's noise depends on the seed and on i only. Of the objective, the causal and denoising weights, the
    prediction and the temperature count. ``passes`` None: the network's own. Empty when ``stop`` ended it early: a part
    of the examples would be another measure. Raises DgemmaError when there are no examples or a level is out of range.
    """
    if not examples or batch_size < 1 or not levels or not all(0 < level <= 1 for level in levels):
        raise DgemmaError(f"validation needs at least one example, a batch size of at least 1 and noise levels above 0 "
                          f"and at most 1; got {len(examples)} examples, {batch_size} and {list(levels)}")
    passes = passes or Passes.of(network)
    denoises = objective.denoising_weight > 0
    # Of similar length together, so that little is padded.
    order = sorted(range(len(examples)), key=lambda index: len(examples[index].context_ids))
    sums = Sums()
    with in_use(network):
        for start in range(0, len(order), batch_size):
            if stop is not None and stop():
                return {}
            places = order[start : start + batch_size]
            batch = collate([examples[place] for place in places]).to(network.device)
            hidden, cache = read(network, batch, passes)
            if denoises:
                # One pass, so it holds no more than where canvases are corrupted, and what stands there then.
                noise = keyed_noise(Objective(), [noise_key(seed, _STEP, place) for place in places],
                                    batch.canvas.shape[1], network.config.vocab_size).to(network.device)
                seen = prefixes(batch, cache)
                for level in levels:
                    _denoise(network, passes, batch, seen, noise, objective, level, sums)
            if objective.causal_weight:
                losses = causal_losses(network, passes, batch, hidden, cache, "response").cpu()
                for name in ("causal",) if denoises else ("causal", "loss"):
                    sums.add(f"validation/{name}", losses, torch.ones_like(losses))
    return sums.means()


def _denoise(network: DiffusionTransformer, passes: Passes, batch: Batch, cache: KVCache, noise: Noise,
             objective: Objective, level: float, sums: Sums) -> None:
    """Both passes at one noise level over canvases that read the cache."""
    assert batch.weights is not None and batch.fill is not None  # collated
    t = torch.full((len(batch.canvas),), level, device=batch.canvas.device)
    noisy = corrupt(batch.canvas, t, noise.draw, noise.tokens)
    first = passes.denoise(noisy, cache)
    shift = observed_shift(objective, noisy, t, network)
    losses, weights = _losses(network, first, batch.canvas, shift), batch.weights.cpu()
    for name in ("loss", f"t={level:g}"):
        sums.add(f"validation/{name}", losses, weights)
    corrupted, fill = (noise.draw < level).cpu(), batch.fill.cpu()
    for name, mask in {"corrupted": corrupted & ~fill, "clean": ~corrupted & ~fill, "fill": fill}.items():
        sums.add(f"validation/{name}", losses, mask)
    temperature = torch.full_like(t, objective.temperature)
    uniform = torch.zeros(*noisy.shape, vocab_tiles(network.config.vocab_size), 2, device=noisy.device)
    second = passes.denoise(noisy, cache, network.head(first, temperature, uniform).soft)
    sums.add("validation/conditioned", _losses(network, second, batch.canvas, shift), weights)


def _losses(network: DiffusionTransformer, hidden: Tensor, targets: Tensor,
            shift: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """The cross-entropy of every target [B, C] from hidden states [B, C, D], on the CPU."""
    return token_losses(network, hidden, whole_logits(network, hidden), targets, shift)[0].float().cpu()
