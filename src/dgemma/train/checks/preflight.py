"""Preflight: in seconds, whether a run is about to train what will be sampled.

Works on a loaded network and a few examples, with the very loss function that the run uses (`bench`); every check
(`inputs`, `sampling`, `updates`) is a function that changes nothing and returns a `Finding`. Knows nothing of data
files or of the training loop.

The checks look at what goes into `denoise` and comes out of it, and at the loss; not at how the loss is written. So
they hold for any objective, and catch what the public recipes got wrong: a canvas that never arrived, contexts cut at
the sliding window, a cache overwritten by a canvas, adapters applied twice, "no self-conditioning" that was not zero,
and checkpointing that lost the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dgemma.errors import DgemmaError
from dgemma.nn import DiffusionTransformer
from dgemma.nn.passes import Passes
from dgemma.train.batch import collate
from dgemma.train.checks.bench import Bench, Finding, LossOf
from dgemma.train.checks.inputs import canvas_is_used, no_target_leaks, null_conditioning_is_zero, pictures_are_seen
from dgemma.train.checks.sampling import training_equals_sampling
from dgemma.train.checks.updates import adapters_count_once, checkpointing_changes_nothing, frozen_stays_frozen
from dgemma.train.data.examples import Example
from dgemma.train.objective import Objective, batch_loss
from dgemma.train.parallel.distributed import let_go


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
