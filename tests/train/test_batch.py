"""Canvases of one turn share one reading of their context, and nothing about what is learnt changes by that."""

import dataclasses

import pytest
import torch

from dgemma.nn import KVCache
from dgemma.nn.passes import Passes
from dgemma.train.batch import collate
from dgemma.train.noise import keyed_noise
from dgemma.train.objective import Objective, batch_loss, means, prefixes, read
from support.reference import random_network, tiny_config
from support.token_examples import Example

VOCAB, CANVAS, WINDOW = 50, 8, 6


def turn(prompt, response, seed=0):
    """The canvases of a turn of so many tokens."""
    generator = torch.Generator().manual_seed(1000 * seed + prompt)
    ids, pad = torch.randint(VOCAB, (prompt + response,), generator=generator).tolist(), -response % CANVAS
    return [Example(ids[:start], ids[start : start + CANVAS] + [1] * (pad if start + CANVAS > len(ids) else 0),
                    ([1.0] * (len(ids) - start) + [0.3] * CANVAS)[:CANVAS], prompt, min(CANVAS, len(ids) - start))
            for start in range(prompt, prompt + response, CANVAS)]


def unshared(examples):
    """The batch as it would be if every canvas read its own context."""
    alone = [collate([one]) for one in examples]
    width = max(batch.context.shape[1] for batch in alone)
    batch = collate(examples)
    context = torch.cat([torch.nn.functional.pad(one.context, (0, width - one.context.shape[1])) for one in alone])
    return dataclasses.replace(batch, context=context, owners=None)


@pytest.fixture
def network():
    return random_network(tiny_config()).requires_grad_(True)


# Mixed up, with a turn of which one canvas is missing, and two turns that are the same.
TURNS = [turn(20, 37), turn(7, 3, seed=1), turn(33, 30, seed=2), turn(5, 12, seed=3), turn(5, 12, seed=3)]
EXAMPLES = [TURNS[0][3], TURNS[2][3], TURNS[0][0], TURNS[1][0], TURNS[2][0], TURNS[3][0], TURNS[4][0], TURNS[0][4],
            TURNS[3][1], TURNS[2][1], TURNS[4][1], TURNS[0][1], TURNS[0][2]]


def test_canvases_of_a_turn_share_a_row_and_stay_in_their_order():
    batch = collate(EXAMPLES)
    assert batch.owners == (0, 1, 0, 2, 1, 3, 4, 0, 3, 1, 4, 0, 0)
    assert batch.canvas.tolist() == [one.canvas_ids for one in EXAMPLES]
    for index, one in enumerate(EXAMPLES):
        assert batch.context[batch.rows[index], : batch.before[index]].tolist() == one.context_ids
    assert batch.context.shape == (5, 33 + 3 * CANVAS)  # as long as the longest that a canvas needs
    assert [EXAMPLES[index] for index in batch.last] == [turns[-1] for turns in TURNS[:1] + TURNS[2:3] + TURNS[1:2]
                                                        + TURNS[3:]]


@pytest.mark.parametrize("change", ["prompt", "canvas", "response", "turn"])
def test_what_is_not_the_same_turn_is_read_apart(change):
    first, second, *_ = turn(9, 24)
    if change == "prompt":
        second = dataclasses.replace(second, context_ids=[second.context_ids[0] ^ 1, *second.context_ids[1:]])
    elif change == "canvas":  # another answer to the same prompt
        first = dataclasses.replace(first, canvas_ids=first.canvas_ids[::-1])
    elif change == "response":  # one that had ended
        first = dataclasses.replace(first, real_length=5)
    else:  # the answer is a part of a later turn's prompt
        second = dataclasses.replace(second, prompt_length=11)
    assert collate([first, second]).owners is None


@pytest.mark.parametrize("objective", [Objective(), Objective(passes=3, rollout=0.5, causal_on="response"),
                                       Objective(causal_on="prompt"), Objective(denoising_weight=0.0)],
                         ids=["default", "chain", "prompt", "causal-only"])
def test_sharing_changes_neither_losses_nor_gradients(network, objective):
    noise = keyed_noise(objective, range(len(EXAMPLES)), CANVAS, VOCAB)
    found = []
    for batch in (collate(EXAMPLES), unshared(EXAMPLES)):
        loss, parts = batch_loss(network, batch, objective, noise)
        gradients = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
        found.append((loss.detach(), means([parts]), [0 if g is None else g for g in gradients]))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)


def test_sharing_works_with_checkpointing(network):
    noise, gradients = keyed_noise(Objective(), range(len(EXAMPLES)), CANVAS, VOCAB), []
    for checkpointing in (False, True):
        loss, _ = batch_loss(network, collate(EXAMPLES), Objective(), noise,
                             passes=Passes.of(network, checkpointing))
        gradients.append(torch.autograd.grad(loss, list(network.parameters())))
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-5)


def test_a_token_counts_once_however_its_turn_is_spread_over_batches(network):
    """Against one causal pass over the whole turn."""
    canvases, objective = TURNS[0], Objective()
    ids = torch.tensor([canvases[-1].context_ids + canvases[-1].canvas_ids[: canvases[-1].real_length]])
    log_p = network.logits(network.encode(ids, network.new_cache()))[:, :-1].log_softmax(-1)
    wanted = -log_p.gather(2, ids[:, 1:].unsqueeze(2)).sum().item()
    for cuts in ([canvases], [canvases[:2], canvases[2:]], [canvases[::2], canvases[1::2]], [[c] for c in canvases]):
        parts = [batch_loss(network, collate(some), objective,
                            keyed_noise(objective, range(len(some)), CANVAS, VOCAB))[1] for some in cuts]
        total = torch.stack([part["loss/causal"] for part in parts]).sum(0)
        assert total.tolist() == pytest.approx([wanted, ids.shape[1] - 1], rel=1e-5)


def test_a_canvas_sees_nothing_of_what_stands_behind_its_context(network):
    batch = collate(TURNS[2])
    noisy = torch.randint(VOCAB, batch.canvas.shape, generator=torch.Generator().manual_seed(0))
    before = network.denoise(noisy, prefixes(batch, read(network, batch, Passes.of(network))[1]))
    for index, start in enumerate(batch.before):
        for place in {start - 1, start, min(start + 3, batch.context.shape[1] - 1)} & set(
                range(batch.context.shape[1])):
            context = batch.context.clone()
            context[0, place] = (context[0, place] + 1) % VOCAB
            changed = dataclasses.replace(batch, context=context)
            after = network.denoise(noisy, prefixes(changed, read(network, changed, Passes.of(network))[1]))
            assert torch.equal(after[index], before[index]) == (place >= start)


def test_the_cache_gives_back_what_it_held_of_a_row_before(network):
    """Rows of unequal length, read in two pieces, cut far beyond and within the window, against caches of their own."""
    ids = torch.randint(VOCAB, (2, 40), generator=torch.Generator().manual_seed(0))
    cache = network.new_cache(2, spare=25)
    network.encode(ids[:, :30], cache, [30, 17])
    network.encode(ids[:, 30:], cache, [10, 0])
    rows, lengths = (0, 1, 0, 1, 0), (15, 17, 40, 2, 33)
    chosen = cache.select(rows, lengths)
    canvas = torch.randint(VOCAB, (5, CANVAS), generator=torch.Generator().manual_seed(1))
    found = network.denoise(canvas, chosen)
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        alone = network.new_cache()
        network.encode(ids[row : row + 1, :length], alone)
        torch.testing.assert_close(found[index], network.denoise(canvas[index : index + 1], alone)[0], atol=1e-5,
                                   rtol=1e-5)
    assert cache.lengths == [40, 17] and chosen.lengths == list(lengths)
    for length in (14, 41):
        with pytest.raises(ValueError, match=f"row 0 of 40 tokens cannot be cut to {length}: .* spare=25"):
            cache.select([0], [length])


def test_a_cache_without_spare_keeps_no_more_than_the_window(network):
    ids = torch.randint(VOCAB, (1, 40), generator=torch.Generator().manual_seed(0))
    widths = []
    for spare in (0, 10):
        cache: KVCache = network.new_cache(spare=spare)
        network.encode(ids, cache)
        widths.append(min(positions.shape[1] for positions in cache.positions.values()))
    assert widths == [WINDOW - 1, WINDOW - 1 + 10]
