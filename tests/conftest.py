"""What several rooms' tests share; the networks themselves are built in `reference.py`."""

import signal

import pytest

import dgemma  # noqa: F401  before torch: its threads wait asleep then (dgemma/openmp.py)

# Whoever runs the tests in the background has Ctrl-C ignored, here and in all that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_network():
    """Our network alone: two sliding layers and a full one, canvas of 8; not to be changed."""
    from support.reference import random_network, tiny_config

    return random_network(tiny_config(), feedback=0.2)


@pytest.fixture
def random_ids():
    """A function (rows, columns) -> random token ids of the tiny networks' vocabulary, seeded."""
    import torch

    generator = torch.Generator().manual_seed(7)
    return lambda *shape, vocab=50: torch.randint(vocab, shape, generator=generator)
