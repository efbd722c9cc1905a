"""Validation losses measure what they are named after, and nothing else moves them."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from dgemma.errors import DgemmaError
from dgemma.nn.adapters import AdapterConfig, attach
from dgemma.train import objective as objective_module
from dgemma.train.batch import collate
from dgemma.train.eval import validation
from dgemma.train.eval.validation import validation_losses
from dgemma.train.noise import draw_noise
from dgemma.train.objective import Objective, batch_loss
from support.reference import SHAPES, network_like, random_network, reference_model, tiny_config
from support.token_examples import random_example
from support.watched import Watched

VOCAB, CANVAS = 50, 8
PLAIN = Objective(causal_weight=0.0)


def example(length, real=CANVAS, seed=0, canvas=CANVAS, vocab=VOCAB):
    return random_example(length, canvas, vocab, real, length - 1, 0.5, seed)


EXAMPLES = [example(4), example(15, real=3), example(3, real=6), example(9), example(5, real=1)]  # the window is 6


@pytest.fixture
def network():
    return random_network(tiny_config())


def test_the_losses_are_those_of_transformers():
    """Both passes, from the noisy canvas that ours was given, by another implementation of the network."""
    reference = reference_model(SHAPES["alternating"], feedback=0.3)
    one, objective = example(20, real=16, canvas=16, vocab=160), dataclasses.replace(PLAIN, temperature=0.7)
    ours = network_like(reference)
    watched = Watched(ours)
    found = validation_losses(ours, [one], objective, levels=(0.5,), passes=watched.passes)
    noisy, clean = watched.canvases[0], torch.tensor(one.canvas_ids)
    assert torch.equal(noisy, watched.canvases[1])
    assert 2 < int((noisy[0] != clean).sum()) < 14
    arguments = dict(input_ids=torch.tensor([one.context_ids]), decoder_input_ids=noisy)
    first = reference(**arguments).logits
    second = reference(**arguments, self_conditioning_logits=first / 0.7).logits
    assert found["validation/loss"] == pytest.approx(F.cross_entropy(first[0], clean).item(), rel=1e-4)
    assert found["validation/conditioned"] == pytest.approx(F.cross_entropy(second[0], clean).item(), rel=1e-4)
    assert found["validation/loss"] != pytest.approx(found["validation/conditioned"], rel=1e-3)


@pytest.mark.parametrize("prediction", ["denoiser", "leave_one_out"])
@pytest.mark.parametrize("conditioned", [False, True])
def test_each_level_is_the_training_loss_at_that_noise(network, prediction, conditioned):
    objective = dataclasses.replace(PLAIN, prediction=prediction)
    for level in (0.3, 1.0):
        watched = Watched(network)
        found = validation_losses(network, EXAMPLES[1:2], objective, levels=(level,), passes=watched.passes)
        noisy, clean = watched.canvases[0], torch.tensor([EXAMPLES[1].canvas_ids])
        replaced = noisy != clean  # a token that was drawn again is left: it makes no difference to the loss
        same = dataclasses.replace(objective, self_conditioning_probability=float(conditioned))
        noise = draw_noise(same, 1, CANVAS, VOCAB, torch.Generator().manual_seed(0))
        t = (level - same.t_min) / (same.t_max - same.t_min)
        noise = dataclasses.replace(noise, t=torch.full_like(noise.t, t), draw=torch.where(replaced, 0.0, 2.0),
                                    tokens=noisy)
        loss, _ = batch_loss(network, collate(EXAMPLES[1:2]), same, noise)
        name = "validation/conditioned" if conditioned else f"validation/t={level:g}"
        assert found[name] == pytest.approx(loss.item(), rel=1e-5)


def test_neither_batches_nor_calls_nor_how_it_was_trained_matter(network):
    first = validation_losses(network, EXAMPLES, Objective())
    assert validation_losses(network, EXAMPLES, Objective()) == first
    for size in (1, 2):
        assert validation_losses(network, EXAMPLES, Objective(), batch_size=size) == pytest.approx(first, rel=1e-5)
    chain = Objective(passes=3, rollout=0.7, t_min=0.5, self_conditioning_probability=0.0, causal_on="prompt")
    assert validation_losses(network, EXAMPLES, chain) == first
    assert validation_losses(network, EXAMPLES, Objective(), seed=1)["validation/loss"] != first["validation/loss"]


def test_noise_grows_with_the_level_only(network):
    watched = Watched(network)
    validation_losses(network, EXAMPLES[:1], PLAIN, levels=(0.2, 0.6, 1.0), passes=watched.passes)
    low, _, middle, _, high, _ = watched.canvases
    clean = torch.tensor([EXAMPLES[0].canvas_ids])
    assert torch.equal(middle[low != clean], low[low != clean])
    assert torch.equal(high[middle != clean], middle[middle != clean])
    assert int((high != clean).sum()) > int((middle != clean).sum()) > 0
    assert [soft is None for soft in watched.soft] == [True, False] * 3


def test_groups_add_up_and_missing_ones_are_left_out(network):
    whole = [dataclasses.replace(one, weights=[1.0] * CANVAS) for one in EXAMPLES]
    found = validation_losses(network, whole, PLAIN, levels=(1.0,))
    assert set(found) == {f"validation/{name}" for name in ("loss", "t=1", "corrupted", "fill", "conditioned")}
    real = sum(one.real_length for one in whole)
    fill = CANVAS * len(whole) - real
    assert found["validation/loss"] == pytest.approx(
        (found["validation/corrupted"] * real + found["validation/fill"] * fill) / (real + fill))
    found = validation_losses(network, EXAMPLES[:1], PLAIN)
    assert "validation/fill" not in found
    assert {"validation/clean", "validation/corrupted"} <= set(found)
    levels = [found[f"validation/t={level:g}"] for level in validation.LEVELS]
    assert found["validation/loss"] == pytest.approx(sum(levels) / len(levels))


def test_weights_count_in_the_loss_and_not_in_the_groups(network):
    heavy = [dataclasses.replace(one, weights=[1.0] * one.real_length + [5.0] * (CANVAS - one.real_length))
             for one in EXAMPLES]
    light, heavy = (validation_losses(network, some, PLAIN) for some in (EXAMPLES, heavy))
    assert light["validation/loss"] != heavy["validation/loss"]
    assert light["validation/fill"] == heavy["validation/fill"]


def test_the_causal_loss_is_that_of_the_responses(network):
    alone = Objective(denoising_weight=0.0, causal_on="response")
    noise = draw_noise(alone, 1, CANVAS, VOCAB, torch.Generator().manual_seed(0))
    firsts = [dataclasses.replace(one, prompt_length=len(one.context_ids)) for one in EXAMPLES]
    losses = [batch_loss(network, collate([one]), alone, noise)[0].item() for one in firsts]
    tokens = [one.real_length for one in firsts]
    wanted = sum(loss * count for loss, count in zip(losses, tokens, strict=True)) / sum(tokens)
    found = validation_losses(network, firsts, Objective())
    assert found["validation/causal"] == pytest.approx(wanted, rel=1e-5)
    assert validation_losses(network, firsts, alone) == pytest.approx(
        {"validation/causal": wanted, "validation/loss": wanted}, rel=1e-5)
    assert "validation/causal" not in validation_losses(network, firsts, PLAIN)


def test_large_vocabularies_give_the_same_losses_in_tiles(network, monkeypatch):
    whole = validation_losses(network, EXAMPLES, Objective())
    monkeypatch.setattr(objective_module, "fits_whole", lambda tokens, vocab: False)
    assert validation_losses(network, EXAMPLES, Objective()) == pytest.approx(whole, rel=1e-5)


def test_the_network_is_used_without_dropout_and_left_as_it_was(network):
    plain = validation_losses(network, EXAMPLES, Objective())
    attach(network, AdapterConfig(r=2, alpha=4, dropout=0.9))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(name)))
    network.train()
    network.layers[0].eval()
    modes = [module.training for module in network.modules()]
    before = copy.deepcopy(network.state_dict())
    first = validation_losses(network, EXAMPLES, Objective())
    assert first == validation_losses(network, EXAMPLES, Objective())
    assert first["validation/loss"] != plain["validation/loss"]
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_a_stopped_validation_says_nothing(network):
    answers = iter([False, True])
    assert validation_losses(network, EXAMPLES, PLAIN, batch_size=2, stop=lambda: next(answers)) == {}


@pytest.mark.parametrize(("examples", "arguments"), [([], {}), (EXAMPLES, {"levels": (0.0,)}),
                                                     (EXAMPLES, {"levels": (1.5,)}), (EXAMPLES, {"batch_size": 0})])
def test_what_cannot_be_measured_is_refused(network, examples, arguments):
    with pytest.raises(DgemmaError, match="validation needs"):
        validation_losses(network, examples, PLAIN, **arguments)
