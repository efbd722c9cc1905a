"""A denoising step as a function of tensors: nothing of it reaches the host, whatever its rows are."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from dgemma.cache.pages import Paged, PagedBatch, PageFormat
from dgemma.config import GenerationConfig
from dgemma.diffusion.sampler import EntropyBoundSampler, StepSettings
from dgemma.engine.step import StepState, denoising_step
from dgemma.nn.head import vocab_tiles
from dgemma.nn.passes import Passes
from support.reference import random_network, tiny_config

DEVICE = "meta"  # tensors without numbers; what is no CPU is taken for a GPU


def shapes_only(**changes):
    """A network of which there are only shapes, on no device at all: a value of it cannot be asked for."""
    return random_network(tiny_config(**changes)).to(DEVICE, torch.bfloat16)


def state_of(network, rows, pinned=False, sharpness=()):
    config = network.config
    shape = (rows, config.canvas_length)

    def ids(*shape):
        return torch.zeros(shape, dtype=torch.long, device=DEVICE)

    settings = [GenerationConfig(entropy_bound=0.1 * (row + 1), max_denoising_steps=4 + row) for row in range(rows)]
    return StepState(ids(*shape), torch.zeros(*shape, config.hidden_size, dtype=network.dtype, device=DEVICE),
                     torch.rand(*shape, vocab_tiles(config.vocab_size), 2, device=DEVICE), ids(*shape), ids(2, *shape),
                     StepSettings.of(settings, list(range(rows)), torch.device(DEVICE), sharpness),
                     ids(*shape) > 0 if pinned else None, ids(rows) > 0)


def caches_of(network, lengths):
    form = PageFormat(network.config, torch.device(DEVICE), network.cache_type, size=8)
    caches = [Paged(form) for _ in lengths]
    network.encode(torch.zeros(1, sum(lengths), dtype=torch.long, device=DEVICE), PagedBatch(caches, lengths))
    return caches


@pytest.mark.parametrize("lengths", [[3], [9, 9], [1, 30, 4, 17]], ids=str)
@pytest.mark.parametrize("experts", [4, 20])
@torch.no_grad()
def test_a_step_asks_nothing_of_the_host(lengths, experts):
    network = shapes_only(num_experts=experts, hidden_size=32, moe_intermediate_size=16)
    caches = caches_of(network, lengths)
    state = state_of(network, len(lengths), pinned=len(lengths) == 2, sharpness=[2.0] * len(lengths))

    def step(canvas, soft):
        result = denoising_step(network, Passes.of(network), EntropyBoundSampler(), PagedBatch(caches),
                                StepState(**vars(state) | {"canvas": canvas, "soft": soft}))
        return vars(result)

    result = step(state.canvas, state.soft)
    assert result["canvas"].shape == state.canvas.shape and result["done"].shape == (len(lengths),)
    assert all(tensor.device.type == DEVICE for tensor in result.values())
    traced = make_fx(step)(state.canvas, state.soft)
    assert len(list(traced.graph.nodes)) > 100


@pytest.mark.parametrize("asks", [lambda t: t.sum().item(), lambda t: bool(t.any()), lambda t: t.nonzero(),
                                  lambda t: t.tolist()])
def test_a_step_that_asked_would_be_found_out(asks):
    class Asking(EntropyBoundSampler):
        def done(self, stats, history, settings):
            asks(stats.entropy)
            return super().done(stats, history, settings)

    network = shapes_only()
    with torch.no_grad(), pytest.raises((RuntimeError, NotImplementedError)):
        denoising_step(network, Passes.of(network), Asking(), PagedBatch(caches_of(network, [3])),
                       state_of(network, 1))
