"""Both sides of the training benchmark do the same work: the same loss, the same gradients of the same adapters."""

import pytest
import torch
import training

from dgemma.train.batch import Batch
from dgemma.train.noise import draw_noise
from support.reference import SHAPES, network_like, reference_model

pytest.importorskip("peft")
CONTEXT, ROWS = 11, 2


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("name", ["alternating", "seventeen-experts"])
def test_loss_and_gradients_are_the_rivals(name, checkpointing):
    shape = SHAPES[name] | {"sliding_window": 64, "tie_word_embeddings": True}
    theirs = reference_model(shape, seed=2)
    ours = network_like(theirs)
    vocab, canvas = ours.config.vocab_size, ours.config.canvas_length
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(vocab, (ROWS, CONTEXT + canvas), generator=generator)
    batch = Batch(ids[:, :CONTEXT], ids[:, CONTEXT:])
    noise = draw_noise(training.OBJECTIVE, ROWS, canvas, vocab, generator)
    wanted, found = training.peft_adapters(theirs.train()), training.our_adapters(ours)
    with torch.no_grad():
        for key, parameter in [*wanted.items(), *found.items()]:
            parameter.mul_(100 if key.endswith(".b") else 1)  # gradients of a size that matters, into both factors
    if checkpointing:
        theirs.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    losses = [training.their_loss(theirs, batch, noise), training.our_loss(ours, batch, noise, checkpointing)]
    torch.testing.assert_close(losses[1], losses[0], atol=1e-4, rtol=0)
    for loss in losses:
        loss.backward()
    assert found.keys() == wanted.keys() and len(found) > 10
    assert {id(p) for p in theirs.parameters() if p.requires_grad} == {id(p) for p in wanted.values()}
    for key, parameter in found.items():
        assert wanted[key].grad.abs().max() > 2e-3, key
        torch.testing.assert_close(parameter.grad, wanted[key].grad, atol=1e-4, rtol=1e-4)


def test_the_table_compares_medians():
    def run(seconds, peak):
        return {"seconds": seconds, "processor": [one / 2 for one in seconds], "losses": [12.5], "loaded": 1e9,
                "peak": peak}

    setup = training.Setup(2, 512, 1, 2, 1)
    lines = training.report(setup, {"transformers": [run([8.0, 9.0], 5e9), run([7.0], 5e9)],
                                    "dgemma": [run([2.0], 2e9)]})
    assert lines[-1] == ("dgemma against transformers: 4.00 x faster (4.00 x in processor time), 0.25 of the memory "
                         "over the weights, 0.40 of all")
