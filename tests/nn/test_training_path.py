"""With gradients other code runs (attention, the cache's growth): it must compute the same."""

import copy

import pytest
import torch

from support.reference import random_network, tiny_config


@pytest.fixture(scope="module", params=[4, 20], ids=["dense-experts", "grouped-experts"])
def networks(request):
    """The same network for inference and for training."""
    frozen = random_network(tiny_config(num_experts=request.param))
    return frozen, copy.deepcopy(frozen).requires_grad_(True)


def two_canvases(network, tokens, lengths, first, second, processed):
    """Everything a training step on a later canvas runs: prompt, commit, denoise with self-conditioning."""
    cache = network.new_cache(len(lengths))
    encoded = network.encode(tokens, cache, lengths)
    network.encode(first, cache)
    hidden = network.denoise(second, cache, network.soft_embeddings(processed))
    real = torch.arange(tokens.shape[1]) < torch.tensor(lengths).unsqueeze(1)
    return torch.cat([encoded[real].flatten(), network.logits(hidden).flatten()])


@pytest.mark.parametrize("lengths", [[14, 14], [14, 3]], ids=["even", "ragged"])
def test_training_computes_what_inference_does(networks, lengths, random_ids):
    frozen, trained = networks
    arguments = (random_ids(2, 14), lengths, random_ids(2, 8), random_ids(2, 8),
                 torch.randn(2, 8, 50, generator=torch.Generator().manual_seed(1)))
    with torch.inference_mode():
        wanted = two_canvases(frozen, *arguments)
    outputs = two_canvases(trained, *arguments)
    torch.testing.assert_close(outputs, wanted, atol=2e-5, rtol=0)
    outputs.square().mean().backward()
    for name, parameter in trained.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        parameter.grad = None


def test_a_cache_read_with_gradients_can_be_denoised_without(networks, random_ids):
    frozen, trained = networks
    prompt, canvas = random_ids(1, 9), random_ids(1, 8)
    theirs, ours = frozen.new_cache(1), trained.new_cache(1)
    with torch.no_grad():
        frozen.encode(prompt, theirs)
        wanted = frozen.denoise(canvas, theirs)
    trained.encode(prompt, ours)
    with torch.no_grad():
        torch.testing.assert_close(trained.denoise(canvas, ours), wanted, atol=2e-5, rtol=0)
    torch.testing.assert_close(trained.denoise(canvas, ours), wanted, atol=2e-5, rtol=0)
