"""Preflight checks of gradients and of what a step of the optimizers changes: adapters once, frozen weights never."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from dgemma import seeds
from dgemma.kernels import PackedWeight
from dgemma.nn.adapters import adaptable, adapters
from dgemma.train.batch import Batch
from dgemma.train.checks.bench import (
    Bench,
    Finding,
    beyond_the_window,
    distance_of,
    local,
    some_entries,
    tolerance_of,
)
from dgemma.train.parallel.distributed import let_go, whole


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
