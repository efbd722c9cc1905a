"""Preflight: in seconds, whether a run is about to train what will be sampled.

Works on a loaded network and a few examples, with the very loss function that the run uses; every check is a function
that changes nothing and returns a `Finding`. Knows nothing of data files or of the training loop.

The checks look at what goes into `denoise` and comes out of it, and at the loss; not at how the loss is written. So
they hold for any objective, and catch what the public recipes got wrong: a canvas that never arrived, contexts cut at
the sliding window, a cache overwritten by a canvas, adapters applied twice, "no self-conditioning" that was not zero,
and checkpointing that lost the cache.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dgemma import seeds
from dgemma.cache.pages import Paged, PagedBatch, PageFormat
from dgemma.chat.pictures import Picture
from dgemma.config import SLIDING
from dgemma.engine.pictures import PictureEncoder
from dgemma.errors import DgemmaError
from dgemma.kernels import PackedWeight
from dgemma.nn import DiffusionTransformer, KVCache
from dgemma.nn.adapters import adaptable, adapters
from dgemma.nn.head import vocab_tiles
from dgemma.nn.packed import packed_bytes
from dgemma.nn.passes import Passes, Patched
from dgemma.train.batch import Batch, collate
from dgemma.train.data.examples import Example
from dgemma.train.noise import Noise, draw_noise
from dgemma.train.objective import Objective, batch_loss, embedded, prefixes, read
from dgemma.train.parallel.distributed import let_go, whole

POSITIONS = 32  # canvas positions whose logits are compared: [32, V] at a time
SAMPLED = 4096  # entries of a tensor that are compared, where the whole would double the memory
_NOISE = 10  # a difference counts when it is so many times that of the same computation done twice (0 on a CPU)


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
    return Finding("canvas is used", wrong == 0 and same and change > _NOISE * abs(first - again),
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
    return Finding("no target leaks", leak <= _NOISE * floor and later <= limit and neighbour <= limit,
                   f"predictions moved by {leak:.2g} with the canvas to be predicted, by {later:.2g} with what follows "
                   f"in its turn, by {neighbour:.2g} with other rows",
                   "the answer can be seen while it is predicted (the loss will be far too good and samples bad): a "
                   "canvas must see its own context only, never itself clean, a later canvas or another example")


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
    return Finding("pictures are seen", min(changes) > _NOISE * max(floors),
                   f"predictions of {len(changes)} canvases with pictures before them moved by {min(changes):.2g} at "
                   f"least with the pictures' negatives, by {max(floors):.2g} without any change",
                   "the network trains on words about pictures that it does not see: their soft tokens must stand in "
                   "the context that the canvas reads")


def checkpointing_changes_nothing(bench: Bench) -> Finding:
    """Gradients with and without activation checkpointing are the same, past the sliding window too.

    A run with checkpointing may not have the memory to do without: then it is left out in one block of each kind only.
    """
    everywhere = frozenset(range(len(bench.network.layers)))
    kinds = {layer: index for index, layer in enumerate(bench.network.config.layers)}  # each geometry's last block
    without = [everywhere - {index} for index in kinds.values()] if bench.passes.checkpointed else [frozenset[int]()]
    checkpointed, distances, problem = everywhere, {}, ""
    try:
        for batch in (bench.batch, *beyond_the_window(bench)) if bench.past_window else (bench.batch,):
            found = _checkpointed(bench, batch, checkpointed := everywhere).gradients()
            for checkpointed in without:
                wanted = _checkpointed(bench, batch, checkpointed).gradients()
                for name in wanted.keys() | found.keys():
                    both = name in wanted and name in found
                    distance = distance_of(found[name], wanted[name]) if both else float("inf")
                    distances[name] = max(distance, distances.get(name, 0.0))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # torch compares what a block made the first and the second time, in part
        if not checkpointed:
            raise
        problem = f"; running a block again failed: {error}"
    worst = max(distances, key=lambda name: distances[name], default="none")
    largest = distances.get(worst, 0.0)
    return Finding("checkpointing changes nothing", not problem and largest <= tolerance_of(bench.network),
                   f"gradients differ by {largest:.2g} of their size at most{problem}",
                   f"a block that is run again for its gradient sees other keys and values than before (worst: "
                   f"{worst}); train without checkpointing until that is mended")


def _checkpointed(bench: Bench, batch: Batch, layers: Collection[int]) -> Bench:
    return dataclasses.replace(bench, batch=batch, passes=dataclasses.replace(bench.passes, checkpointed=layers))


@torch.no_grad()
def adapters_count_once(bench: Bench) -> Finding:
    """A matrix with its adapter computes what the matrix merged with it once would; one of each name is looked at.

    A new adapter adds nothing, so its B is random while it is looked at.
    """
    places, generator = adaptable(bench.network), seeds.generator(bench.seed)
    chosen = {name.rpartition(".")[2]: name for name, adapter in adapters(bench.network).items() if adapter.b.ndim == 2}
    distances = {}
    for name in chosen.values():
        with whole(bench.network, name):
            module, attribute = places[name]
            weight, adapter = getattr(module, attribute), adapters(bench.network)[name]
            kept = adapter.b.clone()
            adapter.b.copy_(torch.randn(kept.shape, generator=generator))
            try:
                dtype = bench.network.dtype if isinstance(weight, PackedWeight) else weight.dtype
                x = torch.randn(16, weight.shape[-1], generator=generator).to(bench.network.device, dtype)
                plain = weight.dequantize() if isinstance(weight, PackedWeight) else weight
                merged = adapter.factors.merged_rows(plain.float(), 0)
                distances[name] = distance_of(module(x), x.float() @ merged.T)
            finally:
                adapter.b.copy_(kept)
    worst = max(distances, key=lambda name: distances[name], default="")
    largest = distances.get(worst, 0.0)
    return Finding("adapters count once", largest <= max(tolerance_of(bench.network), 1e-2),
                   f"{len(distances)} adapted matrices differ by {largest:.2g} of their output from the merged ones"
                   if distances else "the network has no adapters on plain matrices",
                   "what is trained is not what merging gives: encoder and decoder share their weights, so an adapter "
                   f"must be applied, and merged, exactly once (worst: {worst or 'none'})")


def frozen_stays_frozen(bench: Bench, optimizers: Sequence[torch.optim.Optimizer] | None = None) -> Finding:
    """After one step of the optimizers, what needs no gradient is as it was, and something else is not.

    Weights and optimizer states are put back. ``optimizers`` None: AdamW, of one trainable parameter after the other,
    so that no second copy of all of them is needed.
    """
    network = bench.network
    let_go(network)
    trainable = {name: p for name, p in network.named_parameters() if p.requires_grad}
    frozen = {name: tensor for name, tensor in [*network.named_parameters(), *network.named_buffers()]
              if name not in trainable}
    before = {name: some_entries(tensor) for name, tensor in frozen.items()}
    for parameter in trainable.values():
        parameter.grad = None
    try:
        with torch.enable_grad():
            bench.loss(bench.batch, bench.noise()).backward()
        if optimizers is None:
            steps = [([torch.optim.AdamW([p], lr=1e-3, weight_decay=0.1)], {name: p}) for name, p in trainable.items()]
        else:
            steps = [(optimizers, trainable)]
        moved, changed = 0, dict[str, None]()  # in the order in which they stand in the network
        for step in steps:
            with _stepped(*step) as count:
                moved += count
                changed |= dict.fromkeys(name for name, tensor in frozen.items()
                                         if not torch.equal(before[name], some_entries(tensor)))
    finally:
        for parameter in trainable.values():
            parameter.grad = None
    return Finding("frozen stays frozen", not changed and moved > 0,
                   f"{len(changed)} of {len(frozen)} frozen tensors changed in one step"
                   + (f" ({', '.join(list(changed)[:3])})" if changed else "")
                   + f", {moved} of {len(trainable)} trainable ones did",
                   "the optimizer must move what is trained and nothing else: look at its parameter list, at weights "
                   "that share memory, and at whether the loss reaches the trained ones at all")


@contextmanager
def _stepped(optimizers: Sequence[torch.optim.Optimizer],
             trainable: Mapping[str, torch.nn.Parameter]) -> Iterator[int]:
    """How many of these parameters a step has moved; they and the optimizers are as before afterwards."""
    kept = {name: local(p).to("cpu", copy=True) for name, p in trainable.items()}
    states = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]
    try:
        for optimizer in optimizers:
            optimizer.step()
        yield sum(not torch.equal(kept[name], local(p).cpu()) for name, p in trainable.items())
    finally:
        with torch.no_grad():
            for name, parameter in trainable.items():
                local(parameter).copy_(kept[name])
        for optimizer, state in zip(optimizers, states, strict=True):
            optimizer.load_state_dict(state)


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


def run_preflight(network: DiffusionTransformer, examples: Sequence[Example], objective: Objective | None = None, *,
                  passes: Passes | None = None, loss_of: LossOf = batch_loss,
                  optimizers: Sequence[torch.optim.Optimizer] | None = None, seed: int = 0,
                  past_window: bool = True) -> list[Finding]:
    """All checks on a few examples, with the run's own objective.

    They take no more memory than a training step on these examples, with checkpointing where ``passes`` have it;
    with ``past_window`` (contexts of this run may be longer than the sliding window) than one on a context so long.
    On several processes all of them come here, after the network was sharded, with the same examples. ``passes``,
    ``loss_of`` and ``optimizers`` (of which none may hold what is frozen) are the run's where they are not the
    package's. The network is as before afterwards. Raises DgemmaError for examples that are unusable.
    """
    try:
        batch = collate(examples).to(network.device)
    except ValueError as error:
        raise DgemmaError(f"preflight: the examples cannot be used: {error}") from error
    bench = Bench(network, passes or Passes.of(network), batch, objective or Objective(), loss_of, seed, past_window)
    training = network.training
    network.eval()  # dropout, where an adapter has it, would make every comparison random
    try:
        checks = []
        if bench.objective.denoising_weight:  # else nothing is denoised that could be looked at
            checks += [canvas_is_used(bench), no_target_leaks(bench), training_equals_sampling(bench),
                       null_conditioning_is_zero(bench)]
            checks += [pictures_are_seen(bench)] if batch.sights else []
        checks += [adapters_count_once(bench), checkpointing_changes_nothing(bench),
                   frozen_stays_frozen(bench, optimizers)]
    finally:
        network.train(training)
        let_go(network)
    return checks


def require(checks: Sequence[Finding]) -> None:
    """Raises DgemmaError naming all checks that failed, if any did."""
    failures = [check for check in checks if not check.passed]
    if failures:
        raise DgemmaError("preflight: this run would go wrong:\n" + "\n".join(
            f"- {check.name}: {check.measured}. {check.meaning}" for check in failures))


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


@torch.no_grad()
def _compared(bench: Bench, sampler: DiffusionTransformer, row: int, passes: list[DenoisingPass]) -> float:
    """The largest distance between the logits of a row's passes and the engine's, and between what they fed back."""
    batch, config = bench.batch, sampler.config
    own, length = batch.rows[row], batch.before[row]
    inputs, spans = batch.context[own : own + 1, :length], None
    if batch.sights:
        # As the engine sees them: not by what the loss does.
        engine_passes = dataclasses.replace(bench.passes, see=PictureEncoder.of(bench.network).see)
        inputs = embedded(sampler, batch, engine_passes)[own : own + 1, :length]
        spans = (batch.spans or [])[own : own + 1]
    cache = Paged(PageFormat(config, sampler.device, sampler.cache_type))
    sampler.encode(inputs, PagedBatch([cache], [length]), spans=spans)
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
