"""Preflight checks of what a canvas is denoised from: itself, its own context and pictures, and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from dgemma.chat.pictures import Picture
from dgemma.nn.passes import Patched
from dgemma.train.checks.bench import NOISE, Bench, Finding, beyond_the_window, by_canvas, movement, tolerance_of
from dgemma.train.objective import prefixes, read


@torch.no_grad()
def canvas_is_used(bench: Bench) -> Finding:
    """The canvas given is the canvas that is denoised: the right share of it is kept, and changing it is felt."""
    batch, clean = bench.batch, bench.noise(t=0.0)
    given = batch.canvas
    wrong = sum(int((seen.canvas != given).sum()) for seen in bench.denoised(batch, clean))
    # A position without loss, changed: what its target is does not count, so the loss moves only through the input.
    weights = torch.ones_like(given, dtype=torch.float32)  # not the example's own, of which nothing might be left
    weights[:, -1] = 0.0
    without = dataclasses.replace(batch, weights=weights)
    alone = dataclasses.replace(bench, objective=dataclasses.replace(bench.objective, causal_weight=0.0))
    first, again = (float(alone.loss(without, clean)) for _ in range(2))
    moved = given.clone()
    moved[:, -1] = (moved[:, -1] + 1) % bench.network.config.vocab_size
    change = abs(float(alone.loss(dataclasses.replace(without, canvas=moved), clean)) - first)
    same = abs(first - again) <= tolerance_of(bench.network) * abs(first)
    return Finding("canvas is used", wrong == 0 and same and change > NOISE * abs(first - again),
                   f"{wrong} of {given.numel()} tokens changed on the way; the loss moved by {change:.2g} with one "
                   f"token a row, by {abs(first - again):.2g} without any",
                   "the network must denoise the canvas of the example: if not, it trains on something else, such as "
                   "pure noise; look at the name under which the canvas is passed")


def no_target_leaks(bench: Bench) -> Finding:
    """With every token replaced by noise, no prediction may depend on what stands behind its context.

    That is the clean canvas; where several canvases of a turn read one row, the rest of the row, which begins with that
    very canvas; and other rows. The network always has such a turn to read, past the sliding window.
    """
    batch, noise, limit = bench.batch, bench.noise(t=1.0), tolerance_of(bench.network)
    other = dataclasses.replace(batch, canvas=(batch.canvas + 1) % bench.network.config.vocab_size)
    reference = bench.denoised(batch, noise)
    leak, floor = (movement(reference, bench.denoised(changed, noise)) for changed in (other, batch))
    turns = [dataclasses.replace(bench, batch=turn) for turn in (batch, *beyond_the_window(bench))]
    later, neighbour = max(map(_later_leak, turns)), _neighbour_leak(bench)
    return Finding("no target leaks", leak <= NOISE * floor and later <= limit and neighbour <= limit,
                   f"predictions moved by {leak:.2g} with the canvas to be predicted, by {later:.2g} with what follows "
                   f"in its turn, by {neighbour:.2g} with other rows",
                   "the answer can be seen while it is predicted (the loss will be far too good and samples bad): a "
                   "canvas must see its own context only, never itself clean, a later canvas or another example")


@torch.no_grad()
def pictures_are_seen(bench: Bench) -> Finding:
    """The loss of every example with pictures moves with what is in them, and with nothing else."""
    batch, see = bench.batch, bench.passes.see
    assert see is not None

    def see_negatives(pictures: Sequence[Patched]) -> list[Tensor]:
        return see([dataclasses.replace(one, pixels=255 - one.pixels) if isinstance(one, Picture) else one
                    for one in pictures])

    noise, changes, floors = bench.noise(t=1.0), [], []
    rows = {row for row, _ in batch.sights}
    first, again, other = (bench.denoised(batch, noise, passes) for passes in
                           (bench.passes, bench.passes, dataclasses.replace(bench.passes, see=see_negatives)))
    for index, own in enumerate(batch.rows):
        if own in rows:
            before, same, after = (list(by_canvas(found))[index] for found in (first, again, other))
            changes.append(movement(before, after))
            floors.append(movement(before, same))
    return Finding("pictures are seen", min(changes) > NOISE * max(floors),
                   f"predictions of {len(changes)} canvases with pictures before them moved by {min(changes):.2g} at "
                   f"least with the pictures' negatives, by {max(floors):.2g} without any change",
                   "the network trains on words about pictures that it does not see: their soft tokens must stand in "
                   "the context that the canvas reads")


def null_conditioning_is_zero(bench: Bench) -> Finding:
    """An example that is not self-conditioned is denoised with zeros, exactly: what the sampler's first step gets."""
    network, noise = bench.network, bench.noise(conditioned=False)
    seen = bench.denoised(bench.batch, noise)
    supervised = seen[0] if bench.objective.passes > 1 else seen[-1]
    largest = 0.0 if supervised.soft is None else float(supervised.soft.abs().max())
    with torch.no_grad():
        cache = prefixes(bench.batch, read(network, bench.batch, bench.passes)[1])
        shape = (*bench.batch.canvas.shape, network.config.hidden_size)
        zeros = torch.zeros(shape, dtype=network.dtype, device=network.device)
        none, zero = (bench.passes.denoise(bench.batch.canvas, cache, soft) for soft in (None, zeros))
    same = torch.equal(none, zero)
    return Finding("null self-conditioning is zero", largest == 0 and same,
                   f"largest number fed: {largest:.2g}; no conditioning and zeros {'agree' if same else 'differ'}",
                   "without self-conditioning the soft embeddings are true zeros; the softmax of zero logits is the "
                   "mean embedding instead, which the first sampling step never sees")


def _later_leak(bench: Bench) -> float:
    """How far a canvas' predictions move with what stands behind its context in the row that it reads."""
    batch, noise, worst = bench.batch, bench.noise(t=1.0), 0.0
    reference = list(by_canvas(bench.denoised(batch, noise)))
    for index in set(range(len(batch.canvas))) - set(batch.last):
        context = batch.context.clone()
        behind = context[batch.rows[index], batch.before[index] :]
        behind.copy_((behind + 1) % bench.network.config.vocab_size)
        seen = list(by_canvas(bench.denoised(dataclasses.replace(batch, context=context), noise)))
        worst = max(worst, movement(reference[index], seen[index]))
    return worst


def _neighbour_leak(bench: Bench) -> float:
    """How far the first canvas' predictions move with the rows that it does not read."""
    batch, noise = bench.batch, bench.noise(t=1.0)
    if len(batch.context) == 1:
        return 0.0
    others = torch.arange(len(batch.context)) != batch.rows[0]
    context = batch.context.clone()
    context[others] = (context[others] + 1) % bench.network.config.vocab_size
    seen = bench.denoised(dataclasses.replace(batch, context=context), noise)
    return movement(next(by_canvas(bench.denoised(batch, noise))), next(by_canvas(seen)))
