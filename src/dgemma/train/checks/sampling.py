"""Preflight check that a run trains on the activations that its network samples with."""

from __future__ import annotations

import dataclasses

import torch

from dgemma.cache.pages import Paged, PagedBatch, PageFormat
from dgemma.engine.pictures import PictureEncoder
from dgemma.nn import DiffusionTransformer
from dgemma.nn.head import vocab_tiles
from dgemma.train.checks.bench import (
    Bench,
    DenoisingPass,
    Finding,
    beyond_the_window,
    by_canvas,
    distance_of,
    tolerance_of,
)
from dgemma.train.objective import seen_in

POSITIONS = 32  # canvas positions whose logits are compared: [32, V] at a time


def training_equals_sampling(bench: Bench, sampler: DiffusionTransformer | None = None) -> Finding:
    """What the loss computes logits from is what the engine's own passes compute, self-conditioning included.

    On every canvas of the batch, and on two canvases of one turn with a context longer than the sliding window.
    ``sampler`` is the network that will sample, where it is another one (adapters merged into the weights).
    """
    sampler = sampler or bench.network
    worst = 0.0
    for batch in (bench.batch, *beyond_the_window(bench)):
        part = dataclasses.replace(bench, batch=batch)
        for row, passes in enumerate(by_canvas(part.denoised(batch, part.noise(conditioned=True)))):
            worst = max(worst, _compared(part, sampler, row, passes))
    tolerance = tolerance_of(bench.network)
    window = bench.network.config.sliding_window
    longest = bench.batch.context.shape[1]
    return Finding("training equals sampling", worst <= tolerance,
                   f"logits differ by {worst:.2g} of their deviation at most ({tolerance:.2g} allowed); contexts up to "
                   f"{longest} tokens and one past the window of {window}",
                   "the network is trained on other activations than it samples with: the context was cut or "
                   "overwritten (cache, sliding window), or adapters are applied twice or not at all")


@torch.no_grad()
def _compared(bench: Bench, sampler: DiffusionTransformer, row: int, passes: list[DenoisingPass]) -> float:
    """The largest distance between the logits of a row's passes and the engine's, and between what they fed back."""
    batch, config = bench.batch, sampler.config
    own, length = batch.rows[row], batch.before[row]
    ids, spans, pictures = batch.context[own : own + 1, :length], None, []
    if batch.sights:
        # As the engine sees them: not by what the loss does.
        engine_passes = dataclasses.replace(bench.passes, see=PictureEncoder.of(bench.network).see)
        pictures = [(0, start, soft) for place, start, soft in seen_in(batch, engine_passes) if place == own]
        spans = (batch.spans or [])[own : own + 1]
    cache = Paged(PageFormat(config, sampler.device, sampler.cache_type))
    sampler.encode(ids, PagedBatch([cache], [length]), spans=spans, seen=pictures)
    width = batch.canvas.shape[1]
    places = torch.linspace(0, width - 1, min(width, POSITIONS)).round().long()
    temperature = torch.tensor([bench.objective.temperature], device=sampler.device)
    zeros = torch.zeros(1, width, config.hidden_size, dtype=sampler.dtype, device=sampler.device)
    uniform = torch.zeros(1, width, vocab_tiles(config.vocab_size), 2, device=sampler.device)
    worst, fed = 0.0, zeros
    for seen in passes:
        soft = zeros if seen.soft is None else seen.soft
        if bool(soft.any()):
            worst = max(worst, distance_of(soft, fed))
        hidden = sampler.denoise(seen.canvas, PagedBatch([cache]), soft)
        worst = max(worst, distance_of(bench.network.logits(seen.hidden[:, places]), sampler.logits(hidden[:, places])))
        fed = sampler.head(hidden, temperature, uniform).soft
    return worst
