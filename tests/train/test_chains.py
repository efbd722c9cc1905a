"""Chains: the sampler's own canvases, carried from step to step."""

import dataclasses

import pytest
import torch

from dgemma.diffusion.sampler import accept, converged, renoise, token_entropy
from dgemma.errors import DgemmaError
from dgemma.train.batch import collate
from dgemma.train.chains import Chains
from dgemma.train.examples import Example
from dgemma.train.noise import keyed_noise
from dgemma.train.objective import Objective, Reached, Start, chain_loss
from dgemma.train.turns import Turn
from reference import random_network, tiny_config
from token_examples import random_example

CANVAS, VOCAB, SIZE = 8, 50, 4
SHAPE = (CANVAS, 2)
CHAINS = Objective(causal_weight=0.0, passes=2, rollout=1.0, chains=3, t_min=0.9)


def example(step, place, length=6):
    return Example(Turn([1] * length, [2], f"step {step}", 1), 0, [step, place] + [0] * (CANVAS - 2), [1.0] * CANVAS)


def batches(step):
    return [example(step, place) for place in range(SIZE)]


def reached(count, settled=(), value=1):
    return Reached(torch.full((count, CANVAS), value), torch.full((count, CANVAS, 2), float(value)),
                   torch.tensor([place in settled for place in range(count)]))


def test_later_passes_go_on_where_the_sampler_would():
    network = random_network(tiny_config())
    examples = [random_example(6, CANVAS, VOCAB, CANVAS, 6, 1.0, seed) for seed in range(3)]
    noise = [keyed_noise(CHAINS, [10 * step, 10 * step + 1, 10 * step + 2], CANVAS, VOCAB) for step in range(2)]
    denoise, seen = network.denoise, []
    network.denoise = lambda ids, cache, soft=None: (seen.append((ids, soft)), denoise(ids, cache, soft))[1]
    start = None
    for part in noise:
        _, _, came = chain_loss(network, collate(examples), CHAINS, part, start=start)
        start = Start(came.noisy, came.soft, torch.tensor([False, False, True]))

    canvas, soft, before = seen[0][0], None, None
    cache = network.new_cache(3)
    network.encode(collate(examples).context, cache)
    for index, (ids, conditioning) in enumerate(seen):
        rows = 3 if index < 2 else 2  # the last one began anew in the second step
        assert torch.equal(ids[:rows], canvas[:rows])
        assert soft is None or torch.equal(conditioning[:rows], soft[:rows])
        logits = network.logits(denoise(ids, cache, conditioning)) / CHAINS.temperature
        step = noise[index // 2]
        accepted = accept(token_entropy(logits), torch.full((3,), CHAINS.entropy_bound))
        canvas = renoise((logits + step.sampling[index % 2]).argmax(-1), accepted, step.renoise[index % 2])
        soft, before, earlier = network.soft_embeddings(logits), logits.argmax(-1), before
    assert torch.equal(seen[2][1][2], torch.zeros_like(seen[2][1][2]))
    assert torch.equal(came.settled, converged(before, earlier.unsqueeze(0), token_entropy(logits),
                                               torch.full((3,), CHAINS.confidence_threshold)))


def test_a_canvas_settles_where_two_passes_agree_and_are_sure():
    network = random_network(tiny_config())
    examples = [random_example(6, CANVAS, VOCAB, CANVAS, 6, 1.0, seed) for seed in range(3)]
    noise = keyed_noise(CHAINS, [1, 2, 3], CANVAS, VOCAB)
    network.denoise = lambda ids, cache, soft=None: torch.ones(*ids.shape, network.config.hidden_size)
    for threshold, settles in ((1e-9, False), (1e9, True)):
        objective = dataclasses.replace(CHAINS, confidence_threshold=threshold)
        assert chain_loss(network, collate(examples), objective, noise)[2].settled.tolist() == [settles] * 3


def test_an_ended_chain_makes_room_for_an_example_of_the_next_step():
    chains = Chains(SIZE, 6, batches, 0, SHAPE)
    chains.take(0, SIZE)
    values = chains.put(reached(SIZE, settled=[1]), passes=2)
    assert values == {"chains/passes_before": 0.0, "chains/ended": 0.25, "chains/settled": 1.0}
    examples, start = chains.take(1, SIZE)
    assert sorted(one.canvas_ids[0] for one in examples) == [0, 0, 0, 1]
    assert [one.canvas_ids[0] == 1 for one in examples] == start.fresh.tolist()
    assert start.soft[~start.fresh].eq(1.0).all()


def test_a_chain_ends_after_so_many_passes():
    chains = Chains(SIZE, 6, batches, 0, SHAPE)
    for step in range(3):
        chains.take(step, SIZE)
        values = chains.put(reached(SIZE), passes=2)
    assert values["chains/ended"] == 1.0 and values["chains/settled"] == 0.0
    examples, start = chains.take(3, SIZE)
    assert {one.canvas_ids[0] for one in examples} == {3}
    assert start.fresh.all()


def test_every_chain_is_taken_up_again_with_its_own_state():
    chains = Chains(12, 100, batches, 0, SHAPE)
    taken = {}
    for step in range(40):
        examples, start = chains.take(step, SIZE)
        assert len(examples) == SIZE
        for place, one in enumerate(examples):
            name = tuple(one.canvas_ids)
            if name in taken:
                assert start.noisy[place].eq(taken[name]).all() and not start.fresh[place]
            taken[name] = step + 1
        chains.put(reached(SIZE, value=step + 1), passes=1)
    assert len(taken) == 12


def test_examples_of_similar_length_are_taken_together():
    def uneven(step):
        return [example(step, place, 3 + 20 * (place % 2)) for place in range(SIZE)]

    chains = Chains(4 * SIZE, 100, uneven, 0, SHAPE)
    mixed = 0
    for step in range(20):
        examples, _ = chains.take(step, SIZE)
        mixed += len({one.context_length for one in examples}) > 1
        chains.put(reached(SIZE), passes=1)
    assert mixed <= 4  # while there are few


def test_what_is_saved_goes_on_the_same():
    chains, other = Chains(8, 4, batches, 0, SHAPE), Chains(8, 4, batches, 0, SHAPE)
    for step in range(3):
        chains.take(step, SIZE)
        chains.put(reached(SIZE, settled=[step], value=step), passes=2)
    other.load({name: tensor.clone() for name, tensor in chains.tensors().items()})
    for step in range(3, 6):
        (examples, start), (others, another) = chains.take(step, SIZE), other.take(step, SIZE)
        assert examples == others
        assert all(torch.equal(one, two) for one, two in zip(vars(start).values(), vars(another).values(), strict=True))
        assert chains.put(reached(SIZE), 2) == other.put(reached(SIZE), 2)


def test_chains_of_other_data_are_refused():
    chains = Chains(8, 4, batches, 0, SHAPE)
    chains.take(0, SIZE)
    chains.put(reached(SIZE), passes=2)
    with pytest.raises(DgemmaError, match="example 1 of step 0, which there is not: the data has changed"):
        Chains(8, 4, lambda step: batches(step)[:1], 0, SHAPE).load(chains.tensors())
    with pytest.raises(DgemmaError, match="holds 0 chains"):
        Chains(8, 4, batches, 0, SHAPE).load({})


@pytest.mark.parametrize("wrong", [{"passes": 1}, {"rollout": 0.7}, {"denoising_weight": 0.0, "causal_weight": 1.0},
                                   {"chain_passes": 0}, {"chains": -1}])
def test_settings_that_chains_cannot_work_with_are_refused(wrong):
    with pytest.raises(ValueError, match="chains"):
        dataclasses.replace(CHAINS, **wrong)
