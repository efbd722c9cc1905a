"""Requests and engines over the tiny network: token ids in, token ids out."""

import pytest

from dgemma.config import GenerationConfig
from dgemma.diffusion.events import Finished
from dgemma.diffusion.request import Request
from dgemma.engine import Engine
from dgemma.engine.runner import Runner
from support.passes import watched
from support.readers import reading

# By default nothing stops early: neither a stop token nor an adaptive stop.
PLAIN = {"max_denoising_steps": 4, "eos_token_id": (), "confidence_threshold": 1e-9, "entropy_bound": 2.0,
         "max_tokens": 8}


@pytest.fixture
def engine_of(tiny_network, encoded):
    """A function that makes an engine over the tiny network (or another one), with ``passes`` of a test's own."""

    def make(network=None, passes=None, sampler=None, **options):
        network = network or tiny_network
        passes = passes or watched(network, encode=lambda inputs, cache: encoded.append(list(cache.counts)))
        make_reader = reading(lambda request, tokens: (f"{len(tokens)} tokens", None, []))
        return Engine(network, **{"make_reader": make_reader, "runner": Runner(network, sampler, passes)} | options)

    return make


@pytest.fixture
def ask():
    """A function that makes a request."""

    def make(prompt=(5, 6, 7), id=0, seed=0, **options):
        own = {name: options.pop(name) for name in list(options) if name in Request.__dataclass_fields__}
        return Request(id, list(prompt), GenerationConfig(**PLAIN | options), seed, **own)

    return make


@pytest.fixture
def answer():
    """A function that runs requests on an engine and returns their generations (one, or a list by id)."""

    def run(engine, *requests):
        done = {event.request: event.generation for event in engine.run(requests) if isinstance(event, Finished)}
        generations = [done[request.id] for request in requests]
        return generations[0] if len(generations) == 1 else generations

    return run


@pytest.fixture
def encoded():
    """Every encoder pass that is made, as the tokens of each of its sequences."""
    return []
