"""The objective trains what the sampler will run: the canvas, the context, the conditioning."""

import dataclasses

import pytest
import torch

from dgemma.nn.passes import Passes
from dgemma.train import objective as objective_module
from dgemma.train.batch import Batch, collate
from dgemma.train.noise import corrupt, draw_noise, keyed_noise
from dgemma.train.objective import Objective, batch_loss, means, totals_of
from support.reference import random_network, tiny_config
from support.token_examples import random_example
from support.watched import Watched

PROMPT, CANVAS, VOCAB = 6, 8, 50


@pytest.fixture
def network():
    return random_network(tiny_config())


def batch(rows=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(VOCAB, (rows, PROMPT), generator=generator),
            torch.randint(VOCAB, (rows, CANVAS), generator=generator))


def block_diffusion_loss(network, context, canvas, objective, noise):
    """The loss of contexts of one length and canvases without fill."""
    return batch_loss(network, Batch(context, canvas), objective, noise)


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


def test_an_unconditioned_example_gets_true_zeros(network):
    objective = Objective(causal_weight=0.0)
    noise = dataclasses.replace(noise_for(objective), conditioned=torch.tensor([True, False, True]))
    watched = Watched(network)
    batch_loss(network, Batch(*batch()), objective, noise, passes=watched.passes)
    seen = watched.soft
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


def test_a_rolled_pass_continues_from_what_the_sampler_would_do(network):
    objective = Objective(causal_weight=0.0, passes=2, rollout=1.0, entropy_bound=1e9)
    watched = Watched(network)
    prompt, canvas = batch()
    noise = noise_for(objective)
    batch_loss(network, Batch(prompt, canvas), objective, noise, passes=watched.passes)
    canvases = watched.canvases
    cache = network.new_cache(3)
    network.encode(prompt, cache)
    logits = network.logits(network.denoise(canvases[0], cache)) / objective.temperature
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


# ---- each part a setting ---------------------------------------------------------------------------


def example(length, real=CANVAS, prompt=None, seed=0):
    return random_example(length, CANVAS, VOCAB, real, length if prompt is None else prompt, 0.25, seed)


def loss_of(network, examples, objective, noise, checkpointing=False, **changes):
    loss, parts = batch_loss(network, dataclasses.replace(collate(examples), **changes), objective, noise,
                             passes=Passes.of(network, checkpointing))
    return loss, means([parts])


def row_of(noise, row):
    """The noise of one example of a batch."""
    part = slice(row, row + 1)
    return dataclasses.replace(noise, t=noise.t[:, part], draw=noise.draw[part], tokens=noise.tokens[part],
                               conditioned=noise.conditioned[part], rolled=noise.rolled[:, part],
                               sampling=noise.sampling[:, part], renoise=noise.renoise[:, part])


@pytest.mark.parametrize(("objective", "recorded"), [
    # As recipes/sudoku.yaml has it, and a small causal loss on the prompt: recorded before anything else was a setting.
    (Objective(t_min=0.5, passes=3, rollout=0.7, causal_weight=0.0), [4.9175129, 5.0468240, 5.7766252]),
    (Objective(causal_weight=0.1, causal_on="prompt"), [4.7559586, 5.1647096, 5.2250009]),
], ids=["sudoku", "causal"])
def test_training_goes_as_it_always_did(network, objective, recorded):
    network.requires_grad_(True)
    generator = torch.Generator().manual_seed(5)
    prompt = torch.randint(VOCAB, (4, 9), generator=generator)
    canvas = torch.randint(VOCAB, (4, CANVAS), generator=generator)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-2)
    losses = []
    for step in range(3):
        loss, _ = block_diffusion_loss(network, prompt, canvas, objective, noise_for(objective, rows=4, seed=step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == pytest.approx(recorded, rel=2e-6)


@pytest.mark.parametrize("lengths", [(9, 4), (30, 3, 17)], ids=["short", "past-the-window"])
@pytest.mark.parametrize("causal_on", ["all", "prompt", "response"])
def test_contexts_of_unequal_length_count_as_if_each_were_alone(network, lengths, causal_on):
    examples = [example(n, real=CANVAS - i) for i, n in enumerate(lengths)]
    noise = noise_for(Objective(), rows=len(lengths))
    parts = ("loss/pass1", "loss/causal")
    objective = Objective(causal_on=causal_on)
    together = loss_of(network, examples, objective, noise)[1]
    alone = [loss_of(network, [one], objective, row_of(noise, i))[1] for i, one in enumerate(examples)]
    tokens = {"all": [n - 1 + one.real_length for n, one in zip(lengths, examples, strict=True)],
              "prompt": [n - 1 for n in lengths], "response": [one.real_length for one in examples]}[causal_on]
    for part, counts in zip(parts, ([sum(one.weights) for one in examples], tokens), strict=True):
        wanted = sum(a[part] * count for a, count in zip(alone, counts, strict=True)) / sum(counts)
        assert together[part] == pytest.approx(wanted, abs=1e-5)


def test_weights_count_each_position(network):
    objective, noise = Objective(causal_weight=0.0), noise_for(Objective(), rows=1)
    one = example(5)
    each = [loss_of(network, [one], objective, noise, weights=torch.eye(CANVAS)[i : i + 1])[0] for i in range(CANVAS)]
    weights = torch.rand(1, CANVAS)
    loss, parts = loss_of(network, [one], objective, noise, weights=weights)
    torch.testing.assert_close(loss, (torch.stack(each) * weights[0]).sum() / weights.sum())
    assert parts["loss/pass1"] == pytest.approx(loss.item())


def test_fill_has_the_objectives_weight_where_the_batch_has_none(network):
    noise = noise_for(Objective(), rows=1)
    objective = Objective(causal_weight=0.0, fill_weight=0.25)
    explicit = loss_of(network, [example(5, real=3)], objective, noise)
    implicit = loss_of(network, [example(5, real=3)], objective, noise, weights=None)
    assert implicit[0] == explicit[0]
    assert loss_of(network, [example(5, real=3)], Objective(causal_weight=0.0), noise, weights=None)[0] != explicit[0]


def test_parts_tell_corrupted_clean_and_fill_apart(network):
    objective = Objective(causal_weight=0.0)
    _, parts = loss_of(network, [example(5, real=6), example(7, real=4)], objective, noise_for(objective, rows=2),
                       weights=torch.ones(2, CANVAS))
    noise = noise_for(objective, rows=2)
    t = objective.t_min + (objective.t_max - objective.t_min) * noise.t[0]
    corrupted, fill = noise.draw < t.unsqueeze(1), torch.arange(CANVAS) >= torch.tensor([[6], [4]])
    counts = {"loss/corrupted": (corrupted & ~fill).sum(), "loss/clean": (~corrupted & ~fill).sum(),
              "loss/fill": fill.sum()}
    total = sum(parts[name] * count.item() for name, count in counts.items()) / (2 * CANVAS)
    assert parts["loss/pass1"] == pytest.approx(total)


def test_the_causal_loss_is_that_of_one_causal_pass_over_everything(network):
    examples, objective = [example(9), example(9, seed=1)], Objective(causal_weight=2.0)
    loss, parts = loss_of(network, examples, objective, noise_for(objective, rows=2))
    batch = collate(examples)
    ids = torch.cat([batch.context, batch.canvas], dim=1)
    log_p = network.logits(network.encode(ids, network.new_cache(2)))[:, :-1].log_softmax(-1)
    assert parts["loss/causal"] == pytest.approx(-log_p.gather(2, ids[:, 1:].unsqueeze(2)).mean().item())
    assert loss.item() == pytest.approx(parts["loss/pass1"] + 2 * parts["loss/causal"])


def test_leave_one_out_logits_become_the_denoisers_by_bayes_rule(network):
    """p(x | canvas) ∝ p_loo(x) · q(observed | x), with q = (1 - t) · [observed = x] + t / V written out."""
    objective = Objective(causal_weight=0.0, self_conditioning_probability=0.0, prediction="leave_one_out")
    examples, noise = [example(9), example(4)], noise_for(objective, rows=2)
    loss, parts = loss_of(network, examples, objective, noise)
    batch = collate(examples)
    cache = network.new_cache(2)
    network.encode(batch.context, cache, batch.lengths)
    t = (objective.t_min + (objective.t_max - objective.t_min) * noise.t[0])[:, None, None]
    noisy = corrupt(batch.canvas, t[:, 0, 0], noise.draw, noise.tokens)
    logits = network.logits(network.denoise(noisy, cache))
    q = (1 - t) * torch.nn.functional.one_hot(noisy, VOCAB) + t / VOCAB
    p = logits.softmax(-1) * q
    p = (p / p.sum(-1, keepdim=True)).gather(2, batch.canvas.unsqueeze(2))
    torch.testing.assert_close(loss, -p.log().mean())
    assert parts["accuracy/pass1"] == pytest.approx((logits.argmax(-1) == batch.canvas).float().mean().item())


def test_what_is_too_much_for_whole_logits_gives_the_same_in_tiles(network, monkeypatch):
    """Loss, self-conditioning and gradients."""
    network.requires_grad_(True)
    examples = [example(9), example(12, real=5)]
    noise = dataclasses.replace(noise_for(Objective(), rows=2), conditioned=torch.tensor([True, False]))
    results = []
    for prediction in ("denoiser", "leave_one_out"):
        for whole in (True, False):
            monkeypatch.setattr(objective_module, "fits_whole", lambda tokens, vocab, whole=whole: whole)
            loss, parts = loss_of(network, examples, Objective(prediction=prediction), noise)
            results.append((loss, parts, torch.autograd.grad(loss, list(network.parameters()))))
        torch.testing.assert_close(results[-2], results[-1], atol=1e-5, rtol=1e-5)


def test_a_chain_of_passes_works_with_a_large_vocabulary():
    """Where the sampler's draw comes from the head's tiles: nothing is ever as large as [tokens, vocabulary]."""
    network = random_network(tiny_config(vocab_size=9000)).requires_grad_(True)
    objective = Objective(passes=3, rollout=1.0)
    noise = draw_noise(objective, 2, CANVAS, 9000, torch.Generator().manual_seed(0))
    assert noise.sampling.numel() < CANVAS * 9000
    loss, _ = loss_of(network, [example(9), example(4)], objective, noise)
    loss.backward()
    assert loss.isfinite()


def test_nothing_is_wasted_on_conditioning_that_never_comes(network):
    watched = Watched(network)
    objective = Objective(self_conditioning_probability=0.0)
    batch_loss(network, Batch(*batch()), objective, noise_for(objective), passes=watched.passes)
    assert watched.soft == [None]


@pytest.mark.parametrize("context", [7, 40], ids=["within", "past-the-window"])
def test_checkpointing_gives_the_same_gradients(network, context):
    network.requires_grad_(True)
    gradients = []
    for checkpointing in (False, True):
        noise = noise_for(Objective(), rows=2)
        loss, _ = loss_of(network, [example(context), example(context - 4)], Objective(), noise, checkpointing)
        gradients.append(torch.autograd.grad(loss, list(network.parameters())))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-7, rtol=0)


def test_checkpointing_keeps_less_for_the_backward_pass(network):
    network.requires_grad_(True)
    kept = []
    for checkpointing in (False, True):
        saved = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.setdefault(t.data_ptr(), t),
                                                      lambda t: t):
            loss_of(network, [example(40)], Objective(), noise_for(Objective(), rows=1), checkpointing)
        kept.append(sum(t.nbytes for t in saved.values()))
    assert kept[1] < 0.5 * kept[0]


@pytest.mark.parametrize(("examples", "message"), [
    ([], "at least one"), ([dataclasses.replace(example(4), context_ids=[])], "empty"),
    ([example(4), dataclasses.replace(example(4), canvas_ids=[1, 2])], "of one length"),
    ([dataclasses.replace(example(4), weights=[0.0] * CANVAS)], "all 0"),
])
def test_examples_that_make_no_batch_are_refused(examples, message):
    with pytest.raises(ValueError, match=message):
        collate(examples)


@pytest.mark.parametrize(("settings", "message"), [
    (dict(causal_on="nothing"), "causal_on must be one of all, prompt, response"),
    (dict(prediction="leave_one_out", t_min=0.0), "t_min above 0"),
    (dict(prediction="leave_one_out", passes=2, rollout=0.5), "rollout 0"),
    (dict(self_conditioning_probability=1.5), "between 0 and 1"), (dict(fill_weight=-1.0), "negative"),
    (dict(temperature=0.0), "temperature"), (dict(denoising_weight=-1.0), "negative"),
    (dict(denoising_weight=0.0, causal_weight=0.0), "nothing to train on"),
])
def test_other_settings_that_make_no_sense_are_refused_too(settings, message):
    with pytest.raises(ValueError, match=message):
        Objective(**settings)


# ---- a step in parts -------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [Objective(causal_weight=0.5), Objective(passes=2, causal_on="response"),
                                       Objective(denoising_weight=0.0), Objective(causal_weight=0.0)],
                         ids=["default", "chain", "causal-only", "denoising-only"])
def test_the_parts_of_a_step_add_up_to_it(network, objective):
    """Losses, gradients and what goes into the log; means of each part's own would not."""
    network.requires_grad_(True)
    examples = [example(n, real=real, seed=real) for n, real in ((9, 8), (30, 2), (3, 5), (17, 8), (12, 1), (12, 7))]
    parts = [collate(examples[start : start + 2]) for start in (0, 2, 4)]
    keys, found = [11, 12, 13, 14, 15, 16], []
    for batches, rows in (([collate(examples)], [keys]), (parts, [keys[:2], keys[2:4], keys[4:]])):
        totals = totals_of(batches, objective)
        shares = [batch_loss(network, batch, objective, keyed_noise(objective, own, CANVAS, VOCAB), totals)
                  for batch, own in zip(batches, rows, strict=True)]
        loss = torch.stack([share for share, _ in shares]).sum()
        gradients = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
        found.append((totals, loss.detach(), means(logged for _, logged in shares),
                      torch.cat([g.flatten() for g in gradients if g is not None])))
    (totals, loss, log, gradient), (other_totals, other_loss, other_log, other) = found
    assert dataclasses.astuple(totals) == pytest.approx(dataclasses.astuple(other_totals), rel=1e-12)
    assert abs(loss - other_loss) < 1e-6 * loss and (gradient - other).norm() < 1e-5 * gradient.norm()
    assert other_log == pytest.approx(log, rel=1e-5)
    whole = batch_loss(network, collate(examples), objective, keyed_noise(objective, keys, CANVAS, VOCAB))[0]
    assert abs(whole - loss) < 1e-6 * loss  # a batch alone is a step of its own


def test_totals_count_weights_and_causal_tokens():
    batch = collate([example(9, real=6), example(5)])
    assert dataclasses.astuple(totals_of([batch], Objective())) == (6 + 2 * 0.25 + 8, 8 + 6 + 4 + 8)
    assert totals_of([batch, batch], Objective(causal_on="prompt")).causal == 2 * (8 + 4)
    assert totals_of([batch], Objective(causal_on="response")).causal == 6 + 8
    assert totals_of([batch], Objective(causal_weight=0.0)).causal == 0


def test_a_mean_over_nothing_is_not_a_number(network):
    noise = dataclasses.replace(noise_for(Objective(), rows=1), draw=torch.ones(1, CANVAS))
    _, parts = loss_of(network, [example(5)], Objective(), noise)
    assert parts["loss/corrupted"] != parts["loss/corrupted"] and parts["loss/clean"] == parts["loss/pass1"]


def test_the_autoregressive_baseline_denoises_nothing(network):
    examples, noise = [example(9), example(4, real=3)], noise_for(Objective(), rows=2)
    _, both = loss_of(network, examples, Objective(), noise)
    watched, alone = Watched(network), Objective(denoising_weight=0.0, causal_weight=2.0)
    loss, parts = batch_loss(network, collate(examples), alone, noise, passes=watched.passes)
    assert means([parts]) == {"loss/causal": both["loss/causal"]} and not watched.canvases
    assert loss.item() == pytest.approx(2 * both["loss/causal"])


def test_the_denoising_loss_has_a_weight_of_its_own(network):
    noise = noise_for(Objective(), rows=1)
    loss, parts = loss_of(network, [example(9)], Objective(denoising_weight=0.5, causal_weight=2.0), noise)
    assert loss.item() == pytest.approx(0.5 * parts["loss/pass1"] + 2 * parts["loss/causal"])
