"""The objective trains what the sampler will run: the canvas, the context, the conditioning."""

import dataclasses

import pytest
import torch

from dgemma.train.objective import Objective, block_diffusion_loss, corrupt, draw_noise
from reference import random_network, tiny_config

PROMPT, CANVAS, VOCAB = 6, 8, 50


@pytest.fixture
def network():
    return random_network(tiny_config())


def batch(rows=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(VOCAB, (rows, PROMPT), generator=generator),
            torch.randint(VOCAB, (rows, CANVAS), generator=generator))


def noise_for(objective, rows=3, seed=0):
    return draw_noise(objective, rows, CANVAS, VOCAB, torch.Generator().manual_seed(seed))


def test_corruption_replaces_where_the_draw_is_below_t():
    canvas, tokens = torch.tensor([[1, 2, 3], [1, 2, 3]]), torch.tensor([[7, 8, 9], [7, 8, 9]])
    draw = torch.tensor([[0.1, 0.5, 0.9], [0.1, 0.5, 0.9]])
    assert corrupt(canvas, torch.tensor([0.6, 0.0]), draw, tokens).tolist() == [[7, 8, 3], [1, 2, 3]]


def test_the_loss_is_the_cross_entropy_of_every_position(network):
    objective = Objective(causal_weight=0.0, self_conditioning_probability=0.0)
    prompt, canvas = batch()
    noise = noise_for(objective)
    loss, _ = block_diffusion_loss(network, prompt, canvas, objective, noise)
    cache = network.new_cache(3)
    network.encode(prompt, cache)
    t = objective.t_min + (objective.t_max - objective.t_min) * noise.t[0]
    noisy = corrupt(canvas, t, noise.draw, noise.tokens)
    log_p = network.logits(network.denoise(noisy, cache)).log_softmax(-1)
    torch.testing.assert_close(loss, -log_p.gather(-1, canvas.unsqueeze(-1)).mean())


def test_an_unconditioned_example_gets_true_zeros(network, monkeypatch):
    objective = Objective(causal_weight=0.0)
    noise = dataclasses.replace(noise_for(objective), conditioned=torch.tensor([True, False, True]))
    seen = []
    denoise = network.denoise
    monkeypatch.setattr(network, "denoise", lambda ids, cache, soft=None: (seen.append(soft),
                                                                            denoise(ids, cache, soft))[1])
    block_diffusion_loss(network, *batch(), objective, noise)
    assert seen[0] is None
    assert torch.equal(seen[1][1], torch.zeros_like(seen[1][1]))
    assert seen[1][0].abs().sum() > 0


def test_the_prompt_and_the_canvas_given_are_those_used(network):
    objective = Objective(causal_weight=0.0)
    prompt, canvas = batch()
    noise = noise_for(objective)
    before, _ = block_diffusion_loss(network, prompt, canvas, objective, noise)
    for changed in ((prompt + 1) % VOCAB, canvas), (prompt, (canvas + 1) % VOCAB):
        after, _ = block_diffusion_loss(network, *changed, objective, noise)
        assert after != before


def test_no_gradient_flows_from_a_pass_into_the_one_before(network):
    network.requires_grad_(True)
    prompt, canvas = batch()
    objective = Objective(causal_weight=0.0, passes=2)
    noise = noise_for(objective)
    calls = []
    soft_embeddings = network.soft_embeddings
    network.soft_embeddings = lambda logits: calls.append(soft_embeddings(logits)) or calls[-1]
    block_diffusion_loss(network, prompt, canvas, objective, noise)[0].backward()
    assert len(calls) == 1
    assert not calls[0].requires_grad


def test_a_rolled_pass_continues_from_what_the_sampler_would_do(network, monkeypatch):
    objective = Objective(causal_weight=0.0, passes=2, rollout=1.0, entropy_bound=1e9)
    canvases = []
    denoise = network.denoise
    monkeypatch.setattr(network, "denoise", lambda ids, cache, soft=None: (canvases.append(ids),
                                                                            denoise(ids, cache, soft))[1])
    prompt, canvas = batch()
    noise = noise_for(objective)
    block_diffusion_loss(network, prompt, canvas, objective, noise)
    cache = network.new_cache(3)
    network.encode(prompt, cache)
    logits = network.logits(denoise(canvases[0], cache)) / objective.temperature
    # The bound accepts everything, so the next canvas is the sample itself.
    assert torch.equal(canvases[1], (logits + noise.sampling[0]).argmax(-1))


def test_a_small_network_learns_one_batch(network):
    network.requires_grad_(True)
    prompt, canvas = batch(rows=2)
    objective = Objective(passes=2, rollout=0.5)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    losses = []
    for step in range(30):
        loss, _ = block_diffusion_loss(network, prompt, canvas, objective, noise_for(objective, rows=2, seed=step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="t_min"):
        Objective(t_min=0.5, t_max=0.5)
    with pytest.raises(ValueError, match="passes"):
        Objective(passes=0)
