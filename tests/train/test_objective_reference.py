"""A whole training step, losses and gradients, against transformers' network and the objective in a few plain lines.

There every canvas is denoised by itself and every token of a turn read anew: nothing is shared, padded or cut.
"""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from dgemma.train.batch import collate
from dgemma.train.noise import keyed_noise
from dgemma.train.objective import Objective, batch_loss, totals_of
from dgemma.weights.names import network_name
from support.reference import SHAPES, RoutingMargin, network_like, reference_model
from support.token_examples import Example


def turn(prompt, response, canvas, vocab, seed):
    """The canvases of a turn of so many tokens, with weights of all sizes."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab, (prompt + response,), generator=generator).tolist()
    found = []
    for start in range(prompt, prompt + response, canvas):
        real = min(canvas, len(ids) - start)
        weights = torch.rand(canvas, generator=generator).tolist()
        found.append(Example(ids[:start], ids[start : start + real] + [1] * (canvas - real), [0.0, *weights[1:]],
                             prompt, real))
    return found


@pytest.fixture(scope="module", params=["alternating", "seventeen-experts"])
def pair(request):
    reference = reference_model(SHAPES[request.param], seed=3).requires_grad_(True)
    network = network_like(reference).requires_grad_(True)
    mixing = reference.model.decoder.self_conditioning
    forward = mixing.forward
    # Ours trains no table through the soft embeddings either: they are an input.
    mixing.forward = lambda embeddings, soft: forward(embeddings, soft.detach())
    return reference, network


def plainly(model, examples, objective, noise, weights):
    """The loss of a step from transformers' network."""
    vocab, cap = model.config.text_config.vocab_size, model.final_logit_softcapping
    denoising = causal = torch.zeros(())
    count = 0.0
    for index, one in enumerate(examples):
        row = slice(index, index + 1)
        context, clean = torch.tensor([one.context_ids]), torch.tensor([one.canvas_ids])
        t = objective.t_min + (objective.t_max - objective.t_min) * noise.t[0, index]
        noisy = torch.where(noise.draw[row] < t, noise.tokens[row], clean)
        with torch.no_grad():
            first = model(input_ids=context, decoder_input_ids=noisy).logits / objective.temperature
        logits = model(input_ids=context, decoder_input_ids=noisy, self_conditioning_logits=first,
                       self_conditioning_mask=noise.conditioned[row]).logits
        if objective.prediction == "leave_one_out":
            logits = logits + F.one_hot(noisy, vocab) * torch.log1p(vocab * (1 - t) / t)
        denoising = denoising + (F.cross_entropy(logits[0], clean[0], reduction="none") * weights[index]).sum()
        ids = torch.tensor(one.context_ids + one.canvas_ids[: one.real_length])
        hidden = model.model.encoder(input_ids=ids.unsqueeze(0)).last_hidden_state
        losses = F.cross_entropy(torch.tanh(model.lm_head(hidden[0, :-1]) / cap) * cap, ids[1:], reduction="none")
        counted = torch.zeros_like(losses)
        if one.prompt_length == len(one.context_ids) and objective.causal_on != "response":
            counted[: one.prompt_length - 1] = 1
        if objective.causal_on != "prompt":
            counted[len(one.context_ids) - 1 :] = 1
        causal, count = causal + (losses * counted).sum(), count + counted.sum()
    return (objective.denoising_weight * denoising / weights.sum() + objective.causal_weight * causal / count)


def gradients(network, name_of):
    found = {name_of(name): parameter.grad for name, parameter in network.named_parameters()
             if parameter.grad is not None}
    network.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize(("objective", "own_weights"), [
    (Objective(), True), (Objective(fill_weight=0.3), False),
    (Objective(prediction="leave_one_out", causal_weight=0.2, self_conditioning_probability=1.0), True),
    (Objective(causal_on="response", denoising_weight=0.7, t_min=0.3, t_max=0.6), True),
], ids=["default", "fill", "leave-one-out", "response"])
def test_a_step_is_what_the_reference_makes_of_the_objective(pair, objective, own_weights):
    reference, network = pair
    config = network.config
    canvas, vocab, window = config.canvas_length, config.vocab_size, config.sliding_window
    turns = [turn(2 * window + 3, 2 * canvas + 2, canvas, vocab, 1), turn(3, canvas, canvas, vocab, 2),
             turn(1, canvas + 1, canvas, vocab, 3)]
    examples = [turns[2][1], turns[0][2], turns[1][0], turns[0][0], turns[2][0], turns[0][1]]
    weights = torch.tensor([one.weights for one in examples])
    if not own_weights:
        real = torch.tensor([one.real_length for one in examples])
        weights = torch.where(torch.arange(canvas) < real.unsqueeze(1), 1.0, objective.fill_weight)
    for seed in range(20):
        keys = [100 * seed + index for index in range(len(examples))]
        with RoutingMargin(network, config.top_k_experts) as margin:
            parts = [(collate(examples[part]), keys[part]) for part in (slice(0, 4), slice(4, 6))]
            if not own_weights:
                parts = [(dataclasses.replace(batch, weights=None), own) for batch, own in parts]
            totals = totals_of([batch for batch, _ in parts], objective)
            loss = sum(batch_loss(network, batch, objective, keyed_noise(objective, own, canvas, vocab), totals)[0]
                       for batch, own in parts)
        if margin.least > 2e-6:
            break
    else:
        pytest.fail("no noise leaves every router decided")
    wanted = plainly(reference, examples, objective, keyed_noise(objective, keys, canvas, vocab), weights)
    torch.testing.assert_close(loss, wanted, atol=0, rtol=1e-6)
    loss.backward()
    wanted.backward()
    theirs, ours = gradients(reference, network_name), gradients(network, str)
    assert theirs.keys() == ours.keys()
    for name, gradient in theirs.items():
        rows = slice(1, None) if name == "embed_tokens.weight" else slice(None)  # theirs has none for the padding's
        assert (ours[name][rows] - gradient[rows]).norm() < 5e-5 * gradient[rows].norm(), name
