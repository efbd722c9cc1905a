"""Adapters that take turns on one network: every request gets the tokens of a network with its adapter alone."""

import copy
import gc
import weakref

import pytest
import torch

from dgemma.diffusion.events import Denoised, Failed, Finished
from dgemma.engine.prefixes import PrefixStore
from dgemma.gguf.blocks import BLOCK_TYPES
from dgemma.gguf.quantize import quantize
from dgemma.kernels import PackedWeight
from dgemma.nn.adapters import AdapterConfig, adaptable, adapter_parameters, adapters, attach
from dgemma.nn.loaded import loadable
from dgemma.nn.packed import set_weights
from dgemma.weights.gguf_model import is_matrix
from dgemma.weights.load import empty_network
from support.reference import random_network, tiny_config

CONFIGS = {"sql": AdapterConfig(r=3, alpha=6, targets=("attention", "mlp", "self_conditioning", "experts")),
           "mails": AdapterConfig(r=2, alpha=8, targets=("attention", "experts.down_proj"), dora=True)}
PROMPT = [5, 6, 7, 8, 9, 10, 11, 12, 13]


def packed_network():
    config = tiny_config(hidden_size=32, intermediate_size=64, moe_intermediate_size=32, head_dim=16,
                         global_head_dim=32)
    kind = BLOCK_TYPES["Q8_0"]
    network = empty_network(config)
    set_weights(network, {name: PackedWeight(quantize(tensor, kind), kind) if is_matrix(name, tuple(tensor.shape))
                          else tensor for name, tensor in random_network(config, feedback=0.2).state_dict().items()})
    return network.eval().requires_grad_(False)


@pytest.fixture(params=[4, 20, "packed"], ids=["dense-experts", "grouped-experts", "packed"])
def any_network(request):
    return packed_network() if request.param == "packed" else (
        random_network(tiny_config(num_experts=request.param), feedback=0.2))


@pytest.fixture
def network():
    return random_network(tiny_config(), feedback=0.2)


def alone(network, name, seed=5):
    """A copy with the adapter of that name attached for good, as if it had been trained."""
    network = copy.deepcopy(network)
    attach(network, CONFIGS[name])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(network).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return network


def mounted(network, other, name):
    """The adapter of another network with the same weights, to take its turns on this one."""
    return loadable(name, adaptable(network), CONFIGS[name],
                     {place: adapter.factors for place, adapter in adapters(other).items()})


def made(network, name, seed=5):
    return mounted(network, alone(network, name, seed), name)


def test_interleaved_requests_get_what_each_adapter_gives_alone(any_network, engine_of, ask, answer):
    others = {name: alone(any_network, name) for name in CONFIGS}
    ours = {name: mounted(any_network, other, name) for name, other in others.items()}
    order = [None, "sql", "mails", "sql", None, "mails"]
    requests = [ask(PROMPT[: 9 - i // 3], id=i, seed=i // 2, max_tokens=24, adapter=name and ours[name])
                for i, name in enumerate(order)]
    together = answer(engine_of(any_network), *requests)
    for i, name in enumerate(order):
        wanted = answer(engine_of(others.get(name, any_network)),
                        ask(PROMPT[: 9 - i // 3], seed=i // 2, max_tokens=24))
        assert together[i].token_ids == wanted.token_ids, name
    by_adapter = [answer(engine_of(any_network), ask(PROMPT, max_tokens=24, adapter=adapter)).token_ids
                  for adapter in (None, *ours.values())]
    assert len(set(map(tuple, by_adapter))) == 3  # the adapters do something
    assert not adapters(any_network)


def test_what_one_adapter_has_read_is_not_known_to_another(network, engine_of, ask, answer):
    store, sql, mails = PrefixStore(), made(network, "sql"), made(network, "mails")
    engine = engine_of(network, prefixes=store)
    known = [answer(engine, ask(PROMPT, adapter=adapter)).cached_tokens
             for adapter in (None, sql, mails, sql, None, mails)]
    assert known[:3] == [0, 0, 0] and known[3:] == [len(PROMPT)] * 3
    whole = store.nbytes
    store.forget(sql)
    assert store.nbytes == store.spare == whole * 2 // 3
    store.clear()
    assert store.nbytes == store.spare == 0


def test_every_adapter_s_requests_take_a_step_in_every_step(network, engine_of, ask):
    engine = engine_of(network)
    sql, mails = made(network, "sql"), made(network, "mails")
    for i, adapter in enumerate([sql] * 5 + [mails, None]):
        engine.submit(ask(PROMPT, id=i, adapter=adapter, max_denoising_steps=3))
    for _ in range(3):
        denoised = [event.request for event in engine.step() if isinstance(event, Denoised)]
        assert {0, 5, 6} <= set(denoised)  # of those with one prompt and adapter the first one reads
        assert not adapters(network)


def test_a_replaced_adapter_serves_those_who_began_with_it(network, engine_of, ask):
    old, new = made(network, "sql", seed=5), made(network, "sql", seed=6)
    engine = engine_of(network)
    engine.adopt(old)
    engine.submit(ask(PROMPT, id=0, max_tokens=24, adapter=old))
    engine.step()
    engine.adopt(new)
    engine.retire(old)
    engine.submit(ask(PROMPT, id=1, max_tokens=24, adapter=new))
    tokens = {}
    while engine.busy:
        tokens |= {e.request: e.generation.token_ids for e in engine.step() if isinstance(e, Finished)}
    for request, seed in enumerate((5, 6)):
        wanted = [event.generation.token_ids for event in engine_of(alone(network, "sql", seed)).run(
            [ask(PROMPT, max_tokens=24)]) if isinstance(event, Finished)]
        assert [tokens[request]] == wanted


def test_a_retired_adapter_goes_with_its_last_request(network, engine_of, ask):
    adapter, store = made(network, "sql"), PrefixStore()
    engine = engine_of(network, max_batch=1, prefixes=store, memory=1 << 24)
    engine.adopt(adapter)
    assert engine.memory.limit == (1 << 24) - adapter.nbytes
    for i in range(2):  # one runs, one waits
        engine.submit(ask(PROMPT, id=i, adapter=adapter))
    engine.step()
    engine.retire(adapter)
    assert engine.retired == [adapter] and store.nbytes
    while engine.busy:
        engine.step()
    assert not engine.retired and not store.nbytes and engine.memory.limit == 1 << 24
    gone = weakref.ref(adapter)
    del adapter
    gc.collect()
    assert gone() is None


def test_an_adapter_adopted_twice_takes_its_memory_once_until_it_has_retired_twice(network, engine_of, ask):
    adapter, store = made(network, "sql"), PrefixStore()
    engine = engine_of(network, prefixes=store, memory=1 << 24)
    for _ in range(2):
        engine.adopt(adapter)
    assert engine.memory.limit == (1 << 24) - adapter.nbytes
    list(engine.run([ask(PROMPT, adapter=adapter)]))
    engine.retire(adapter)
    assert not engine.retired and engine.adopted and store.nbytes
    assert engine.memory.limit == (1 << 24) - adapter.nbytes
    engine.retire(adapter)
    assert not engine.adopted and not store.nbytes and engine.memory.limit == 1 << 24


def test_a_retired_adapter_goes_when_all_requests_are_dropped(network, engine_of, ask):
    adapter = made(network, "sql")
    engine = engine_of(network, memory=1 << 24)
    engine.adopt(adapter)
    engine.submit(ask(PROMPT, adapter=adapter))
    engine.step()
    engine.retire(adapter)
    engine.clear()
    assert not engine.retired and not engine.adopted and engine.memory.limit == 1 << 24


def test_an_idle_adapter_goes_at_once(network, engine_of):
    adapter = made(network, "sql")
    engine = engine_of(network, memory=1 << 24)
    engine.adopt(adapter)
    engine.retire(adapter)
    assert not engine.retired and engine.memory.limit == 1 << 24


def test_an_adapter_that_fails_fails_its_own_requests_only(network, engine_of, ask, answer):
    good, bad = made(network, "mails"), made(network, "sql")

    def fail(*_):
        raise RuntimeError("broken adapter")

    for part in filter(None, bad.parts.values()):
        part.forward = fail
    wanted = [answer(engine_of(network), ask(PROMPT, seed=3, adapter=adapter)).token_ids for adapter in (None, good)]
    over = [event for event in engine_of(network, isolate=True).run(
        [ask(PROMPT, id=i, seed=3, adapter=adapter) for i, adapter in enumerate([bad, None, bad, good])])
        if isinstance(event, (Finished, Failed))]
    assert {event.request for event in over if isinstance(event, Failed)} == {0, 2}
    assert [event.generation.token_ids for event in sorted(over, key=lambda event: event.request)
            if isinstance(event, Finished)] == wanted
    with pytest.raises(RuntimeError, match="broken adapter"):
        list(engine_of(network).run([ask(PROMPT, adapter=bad)]))
    assert not adapters(network)


def test_its_memory_is_that_of_its_numbers(network):
    sql, mails = made(network, "sql"), made(network, "mails")
    sizes = {name: sum(p.numel() * (2 if key.endswith("magnitude") else 1) * 4
                       for key, p in adapter_parameters(alone(network, name)).items()) for name in CONFIGS}
    assert {"sql": sql.nbytes, "mails": mails.nbytes} == sizes
