"""The block-diffusion objective: corrupt a canvas, predict every one of its tokens.

As in the public recipes for this model: t ~ U(ε, 1) per example, every canvas token replaced with probability t by a
uniform one, plain cross-entropy over all positions of the canvas (kept, replaced and fill alike), the encoder's causal
loss beside it, and self-conditioning from an earlier pass without gradient (nor one for the table that its soft
embeddings are averages of: they are an input); true zeros otherwise. Each of these is a setting. Works on token ids
and a network; knows nothing of text, files or optimizers. What it works on is made in `dgemma.train.batch` and
`dgemma.train.noise`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dgemma.diffusion.sampler import accept, renoise, token_entropy
from dgemma.errors import DgemmaError
from dgemma.nn import CanvasStats, DiffusionTransformer, KVCache
from dgemma.nn.head import fits_whole, vocab_tiles
from dgemma.nn.passes import Passes
from dgemma.train.batch import Batch
from dgemma.train.losses import chunked_cross_entropy, cross_entropy
from dgemma.train.noise import WHOLE_VOCAB, Noise, corrupt
from dgemma.train.sights import pictures_of

PREDICTIONS = ("denoiser", "leave_one_out")
CAUSAL_TOKENS = ("all", "prompt", "response")


@dataclass(frozen=True)
class Objective:
    """Settings of the objective; the defaults are those of the public recipes.

    ``fill_weight`` is the loss weight of the fill behind a response's end, where a batch brings no weights of its own.

    ``causal_on`` says whose tokens the causal loss counts: the prompt's, the response's or all. Each counts once, with
    the canvas it belongs to (the prompt's with the first): not fill, nor the earlier canvases of a context, nor a
    picture's soft tokens and the marks around them.

    ``denoising_weight`` 0 denoises no canvas at all: the causal loss alone is trained, an autoregressive model.

    ``prediction`` is what the canvas logits stand for: the "denoiser" (the clean token given the noisy canvas), or the
    "leave_one_out" posterior (the clean token given all *other* noisy tokens). The cross-entropy is the denoiser's in
    both cases: p(x | canvas) ∝ p_loo(x | others) · q(observed | x), which adds log(1 + V·(1 - t)/t) to the logit of the
    observed token (Gourevitch et al. 2026, arXiv:2605.22765). The sampler knows no t and reads the logits as they are.

    ``passes`` > 1 supervises a chain instead of throwing the first pass away: each later pass is conditioned on the
    one before it (without gradient) and continues on a less noisy canvas. With probability ``rollout`` that canvas is
    the one the sampler itself would have made of the earlier pass, mistakes included.
    """

    t_min: float = 0.001  # with t_max the range of t, a noise level; `GenerationConfig` calls temperatures so
    t_max: float = 1.0
    self_conditioning_probability: float = 0.5
    denoising_weight: float = 1.0
    causal_weight: float = 1.0
    passes: int = 1
    rollout: float = 0.0
    entropy_bound: float = 0.1
    temperature: float = 0.6  # of the self-conditioning softmax and of the rollout: the middle of the schedule
    fill_weight: float = 1.0
    causal_on: str = "all"
    prediction: str = "denoiser"

    def __post_init__(self) -> None:
        if not 0 <= self.t_min < self.t_max <= 1:
            raise ValueError(f"t_min and t_max must satisfy 0 <= t_min < t_max <= 1, got {self.t_min}, {self.t_max}")
        if self.passes < 1:
            raise ValueError(f"passes must be at least 1, got {self.passes}")
        for name in ("self_conditioning_probability", "rollout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        for name in ("denoising_weight", "causal_weight", "fill_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not self.denoising_weight and not self.causal_weight:
            raise ValueError("denoising_weight and causal_weight are both 0: there is nothing to train on")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        for name, known in (("causal_on", CAUSAL_TOKENS), ("prediction", PREDICTIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.prediction == "leave_one_out" and (self.t_min == 0 or self.rollout):
            raise ValueError("prediction leave_one_out needs to know every canvas' noise: t_min above 0 and rollout 0")


@dataclass(frozen=True)
class Totals:
    """What the losses of a step are divided by: over all its parts, on whatever process."""

    canvas: float  # the sum of the weights of all positions of all canvases
    causal: float  # the number of tokens that the causal loss counts


def totals_of(batches: Iterable[Batch], objective: Objective) -> Totals:
    """The totals of a step that is trained in parts; the batches are best still on the CPU."""
    canvas, causal = 0.0, 0
    for batch in batches:
        weights = _weights(batch, objective)
        canvas += batch.canvas.numel() if weights is None else weights.cpu().double().sum().item()
        if objective.causal_weight:
            causal += sum(int(mask.sum()) for mask in _counted(batch, objective.causal_on))
    return Totals(canvas, causal)


def means(parts: Iterable[dict[str, Tensor]]) -> dict[str, float]:
    """The numbers for the log of a step from the parts of all its batches; NaN where there is nothing of a kind."""
    sums: dict[str, list[float]] = {}
    for part in parts:
        for name, (total, count) in zip(part, torch.stack(list(part.values())).tolist(), strict=True):
            have = sums.setdefault(name, [0.0, 0.0])
            have[0], have[1] = have[0] + total, have[1] + count
    return {name: total / count if count else float("nan") for name, (total, count) in sums.items()}


def batch_loss(network: DiffusionTransformer, batch: Batch, objective: Objective, noise: Noise,
               totals: Totals | None = None, passes: Passes | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The training loss of one batch, by ``passes`` (None: the network's own) -> (scalar, its parts for the log).

    Canvas losses are averaged by their weights, causal ones over the tokens that count; with ``totals`` the averages
    are those of a whole step, and the losses of its batches add up to that of the step.

    A part is a sum and a count [2]: those of several batches can be added up, `means` makes numbers of them. They are
    ``loss/passN`` and ``accuracy/passN``, weighted; of the first pass ``loss/corrupted``, ``loss/clean`` (both without
    fill) and ``loss/fill``, unweighted; ``loss/causal``.
    """
    passes = passes or Passes.of(network)
    hidden, cache = read(network, batch, passes)
    loss = torch.zeros((), device=batch.canvas.device)
    parts: dict[str, Tensor] = {}
    if objective.denoising_weight:
        denoising, parts = _denoising_loss(network, passes, batch, prefixes(batch, cache), objective, noise, totals)
        loss = loss + objective.denoising_weight * denoising
    if objective.causal_weight:
        losses = causal_losses(network, passes, batch, hidden, cache, objective.causal_on)
        count = losses.numel()
        parts["loss/causal"] = _part(losses, count)
        loss = loss + objective.causal_weight * losses.sum() / max(count if totals is None else totals.causal, 1)
    return loss, parts


def read(network: DiffusionTransformer, batch: Batch, passes: Passes) -> tuple[Tensor, KVCache]:
    """Every row of the context read once, its pictures seen -> its hidden states [R, T, D] and a cache of R rows."""
    spare, lengths = 0, batch.lengths
    if batch.owners is not None:
        lengths = tuple(batch.before[index] for index in batch.last)
        spare = max(lengths[row] - before for row, before in zip(batch.rows, batch.before, strict=True))
    cache = network.new_cache(len(batch.context), spare, checkpointed=passes.checkpointed)
    if not batch.sights:
        return passes.encode(batch.context, cache, lengths), cache
    return passes.encode(batch.context, cache, lengths, spans=batch.spans, seen=seen_in(batch, passes)), cache


def seen_in(batch: Batch, passes: Passes) -> list[tuple[int, int, Tensor]]:
    """The soft tokens of a batch's pictures, each with its row and the column where they start. Raises DgemmaError for
    a picture that cannot be read, and where nothing sees it."""
    if passes.see is None:
        raise DgemmaError("there are pictures in these examples, and nothing that sees them: the network has no tower")
    soft = passes.see(pictures_of([sight for _, sight in batch.sights]))
    return [(row, sight.start, rows) for (row, sight), rows in zip(batch.sights, soft, strict=True)]


def prefixes(batch: Batch, cache: KVCache) -> KVCache:
    """What every canvas sees of the rows that were read: a cache of B rows."""
    return cache if batch.owners is None else cache.select(batch.owners, batch.before)


def _denoising_loss(network: DiffusionTransformer, passes: Passes, batch: Batch, cache: KVCache, objective: Objective,
                    noise: Noise, totals: Totals | None) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean over the passes of a batch's canvases, which read the cache, and its parts."""
    canvas = batch.canvas
    t = objective.t_min + (objective.t_max - objective.t_min) * noise.t[0]
    noisy = corrupt(canvas, t, noise.draw, noise.tokens)
    corrupted = noise.draw < t.unsqueeze(1)
    weights = _weights(batch, objective)
    parts: dict[str, Tensor] = {}
    soft = None
    if objective.passes == 1 and objective.self_conditioning_probability:
        with torch.no_grad():
            first = _soft(network, passes.denoise(noisy, cache), objective)
            # True zeros where the example is not conditioned: not the softmax of zero logits.
            soft = torch.where(noise.conditioned[:, None, None], first, 0.0)
    total = torch.zeros((), device=canvas.device)
    for index in range(objective.passes):
        out = passes.denoise(noisy, cache, soft)
        # Small vocabularies are worked on whole: fewer operations.
        logits = whole_logits(network, out)
        losses, predicted = token_losses(network, out, logits, canvas, observed_shift(objective, noisy, t, network))
        right = (predicted == canvas).float()
        if index == 0:
            parts |= _by_group(losses.detach(), corrupted, batch.fill)
        count = canvas.numel()
        if weights is not None:
            losses, right, count = losses * weights, right * weights, weights.sum()
        total = total + losses.sum() / ((count if totals is None else totals.canvas) * objective.passes)
        parts[f"loss/pass{index + 1}"] = _part(losses, count)
        parts[f"accuracy/pass{index + 1}"] = _part(right, count)
        if index + 1 < objective.passes:
            with torch.no_grad():
                t = t * noise.t[index + 1]
                lighter = corrupt(canvas, t, noise.draw, noise.tokens)
                soft, sample, entropy = _sample(network, out.detach(), logits, objective, noise.sampling[index])
                accepted = accept(entropy, torch.full_like(t, objective.entropy_bound))
                rolled = renoise(sample, accepted, noise.renoise[index])
                noisy = torch.where(noise.rolled[index].unsqueeze(1), rolled, lighter)
    return total, parts


def _weights(batch: Batch, objective: Objective) -> Tensor | None:
    """The loss weight of every canvas position [B, C]; None: 1."""
    if batch.weights is not None or batch.fill is None:
        return batch.weights
    return torch.where(batch.fill, objective.fill_weight, 1.0)


def _part(values: Tensor, count: Tensor | int) -> Tensor:
    """Sum and count [2] of some numbers."""
    total = values.detach().sum()
    return torch.stack([total, torch.as_tensor(count, dtype=total.dtype, device=total.device)])


def whole_logits(network: DiffusionTransformer, hidden: Tensor) -> Tensor | None:
    """The logits of hidden states [.., D] where they are few enough to be held at once."""
    tokens = hidden.numel() // hidden.shape[-1]
    return network.logits(hidden) if fits_whole(tokens, network.config.vocab_size) else None


def token_losses(network: DiffusionTransformer, hidden: Tensor, logits: Tensor | None, targets: Tensor,
                 shift: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Losses and most probable tokens, both of the targets' shape, from hidden states [.., D], or from their logits
    (`whole_logits`)."""
    flat = targets.flatten()
    extra = () if shift is None else shift
    if logits is not None:
        losses, predicted = cross_entropy(logits.flatten(0, -2), flat, *extra)
    else:
        losses, predicted = chunked_cross_entropy(hidden.flatten(0, -2), network.embed_tokens.weight, flat,
                                                  network.config.final_logit_softcapping, *extra)
    return losses.view_as(targets), predicted.view_as(targets)


def observed_shift(objective: Objective, noisy: Tensor, t: Tensor,
                   network: DiffusionTransformer) -> tuple[Tensor, Tensor] | None:
    """Observed tokens [N] and what makes leave-one-out logits of them those of the denoiser [N]."""
    if objective.prediction != "leave_one_out":
        return None
    shift = torch.log1p(network.config.vocab_size * (1 - t) / t)
    return noisy.flatten(), shift.repeat_interleave(noisy.shape[1])


def _by_group(losses: Tensor, corrupted: Tensor, fill: Tensor | None) -> dict[str, Tensor]:
    groups = {"loss/corrupted": corrupted, "loss/clean": ~corrupted}
    if fill is not None:
        groups = {name: mask & ~fill for name, mask in groups.items()} | {"loss/fill": fill}
    return {name: _part(torch.where(mask, losses, 0.0), mask.sum()) for name, mask in groups.items()}


def _soft(network: DiffusionTransformer, hidden: Tensor, objective: Objective) -> Tensor:
    """The soft embeddings [B, C, D] that the sampler would feed to the next step."""
    batch, canvas, _ = hidden.shape
    vocab = network.config.vocab_size
    if fits_whole(batch * canvas, vocab):
        return network.soft_embeddings(network.logits(hidden) / objective.temperature)
    return _statistics(network, hidden, objective, hidden.new_zeros(batch, canvas, vocab_tiles(vocab), 2)).soft


def _sample(network: DiffusionTransformer, hidden: Tensor, logits: Tensor | None, objective: Objective,
            sampling: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the sampler makes of a pass: soft embeddings [B, C, D], drawn tokens [B, C], entropies [B, C]."""
    if network.config.vocab_size > WHOLE_VOCAB:
        stats = _statistics(network, hidden, objective, sampling)
        return stats.soft, stats.sample, stats.entropy
    processed = (network.logits(hidden) if logits is None else logits.detach()) / objective.temperature
    return network.soft_embeddings(processed), (processed + sampling).argmax(-1), token_entropy(processed)


def _statistics(network: DiffusionTransformer, hidden: Tensor, objective: Objective,
                noise: Tensor) -> CanvasStats:
    return network.head(hidden, torch.full((len(hidden),), objective.temperature, device=hidden.device), noise)


def causal_losses(network: DiffusionTransformer, passes: Passes, batch: Batch, hidden: Tensor, cache: KVCache,
                  causal_on: str) -> Tensor:
    """The cross-entropy of every next token that counts [N]: hidden [R, T, D] are the context's, read already.

    The last canvas of a row is read behind it, clean, and the cache takes it in: nothing may be denoised with that
    afterwards.
    """
    states, tokens = hidden[:, :-1], batch.context[:, 1:]
    counted, real = _counted(batch, causal_on)
    if causal_on != "prompt":
        last, rows = list(batch.last), torch.arange(len(hidden), device=hidden.device)
        ends = torch.tensor([batch.before[index] for index in last], device=hidden.device) - 1
        canvas = batch.canvas[last]
        response = passes.encode(canvas, cache)
        states = torch.cat([states, hidden[rows, ends].unsqueeze(1), response[:, :-1]], dim=1)
        tokens = torch.cat([tokens, canvas], dim=1)
        counted = torch.cat([counted, real], dim=1)
    states, tokens = states[counted], tokens[counted]
    return token_losses(network, states, whole_logits(network, states), tokens)[0]


def _counted(batch: Batch, causal_on: str) -> tuple[Tensor, Tensor]:
    """What the causal loss counts of every row's context, from the second token on [R, T - 1], and of the last canvas
    behind it [R, C]."""
    context = torch.zeros(len(batch.context), batch.context.shape[1] - 1, dtype=torch.bool)
    last, width = batch.last, batch.canvas.shape[1]
    for index, (row, before) in enumerate(zip(batch.rows, batch.before, strict=True)):
        prompt = before if batch.prompts is None else batch.prompts[index]
        if causal_on != "response" and before == prompt:
            context[row, : prompt - 1] = True
        if causal_on != "prompt" and index != last[row]:  # an earlier canvas, which is a part of the row
            context[row, before - 1 : before - 1 + width] = True
    for row, sight in batch.sights:  # nor are soft tokens predicted, or the marks before and behind them
        context[row, max(sight.start - 2, 0) : sight.stop] = False
    canvas = torch.ones_like(batch.canvas, dtype=torch.bool) if batch.fill is None else ~batch.fill
    return context.to(batch.context.device), canvas[list(last)] & (causal_on != "prompt")
