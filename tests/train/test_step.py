"""Steps by compiled passes: of one shape only, and what they compute is what the network computes."""

import pytest
import torch

from dgemma.errors import DgemmaError
from dgemma.nn.passes import Passes
from dgemma.train.batch import Batch, collate
from dgemma.train.noise import keyed_noise
from dgemma.train.objective import Objective, batch_loss
from dgemma.train.step import Compiled
from support.reference import random_network, tiny_config
from support.token_examples import random_example

CANVAS, VOCAB = 8, 50


def batch(rows, width):
    return Batch(torch.arange(rows * width).view(rows, width) % VOCAB, torch.arange(rows * CANVAS).view(rows, CANVAS))


def compiled_for(network, batches, compile):
    return Compiled(Passes.of(network), network.config.hidden_size, batches, compile)


class Compiler:
    """Compiles nothing; ``calls`` are how often what was to be compiled is called, by name."""

    def __init__(self):
        self.calls = {}

    def __call__(self, function, **_):
        def counted(*args):
            self.calls[function.__name__] += 1
            return function(*args)

        self.calls[function.__name__] = 0
        return counted


def test_the_most_frequent_shape_runs_compiled_and_no_other():
    compiler, network = Compiler(), random_network(tiny_config())
    passes = compiled_for(network, [batch(2, 5), batch(3, 6), batch(3, 6)], compiler)
    objective = Objective(passes=3, causal_weight=0.0)
    for some, expected in ((batch(2, 5), {"encode": 0, "denoise": 0}), (batch(3, 6), {"encode": 1, "denoise": 3})):
        noise = keyed_noise(objective, list(range(len(some.canvas))), CANVAS, VOCAB)
        loss, _ = batch_loss(network, some, objective, noise, passes=passes.passes_for(some))
        assert compiler.calls == expected
        torch.testing.assert_close(loss, batch_loss(network, some, objective, noise)[0], rtol=0, atol=0)


def test_no_shape_is_compiled_that_hardly_comes_back():
    network = random_network(tiny_config())
    assert compiled_for(network, [batch(2, width) for width in (5, 5, 6, 7, 8)], Compiler()).shape is None


def test_a_compiler_that_is_missing_is_told():
    from torch._dynamo.exc import TorchDynamoException

    def compile(function, **_):
        def failing(*_):
            raise TorchDynamoException("no g++\nand much more")

        return failing

    network = random_network(tiny_config())
    some = batch(2, 5)
    passes = compiled_for(network, [some], compile).passes_for(some)
    with pytest.raises(DgemmaError, match=r"torch.compile failed \(no g\+\+\).*compile: false"):
        passes.encode(some.context, network.new_cache(2))


def test_padded_batches_are_never_compiled():
    compiler, network = Compiler(), random_network(tiny_config())
    padded = collate([random_example(width, CANVAS, VOCAB, real=CANVAS, prompt=width, fill_weight=1.0)
                      for width in (5, 7)])
    passes = compiled_for(network, [padded], compiler)
    assert passes.shape is None
    passes.passes_for(padded).denoise(padded.canvas, network.new_cache(2))
    assert compiler.calls == {"encode": 0, "denoise": 0}
