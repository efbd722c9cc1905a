"""What was read with other weights is not used again, whichever way they changed."""

import numpy as np
import pytest
import torch

from dgemma.engine import PrefixStore
from dgemma.engine.fingerprint import fingerprint
from dgemma.nn.adapters import AdapterConfig, adapters, attach, detach, install, merge
from support.engine_requests import PROMPT, C, tokens_of
from support.reference import random_network, tiny_config


@pytest.fixture
def network():
    return random_network(tiny_config(), feedback=0.2)


def projection(network):
    return network.layers[0].mlp.gate_proj.weight  # most others are normed behind: their size does not matter


def doubled_in_place(network):
    with torch.no_grad():
        projection(network).mul_(2)


def doubled_behind_autograd_s_back(network):
    projection(network).data.mul_(2)


def doubled_through_numpy(network):
    projection(network).detach().numpy()[:] *= np.float32(2)


def other_memory(network):
    projection(network).data = projection(network).data * 2


def one_number(network):
    projection(network).data[1, 2] += 1


def another_parameter(network):
    network.layers[1].input_layernorm.weight = torch.nn.Parameter(network.layers[1].input_layernorm.weight * 3)


def another_state(network):
    network.load_state_dict(random_network(tiny_config(), seed=9).state_dict())


def assigned_state(network):
    network.load_state_dict(random_network(tiny_config(), seed=9).state_dict(), assign=True)


def a_buffer(network):
    network.layers[0].encoder_layer_scalar.mul_(1.5)


def trained(network):
    network.requires_grad_(True)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.05)
    network.logits(network.encode(torch.tensor([PROMPT]), network.new_cache())).pow(2).mean().backward()
    optimizer.step()
    network.requires_grad_(False)


def an_adapter(network):
    attach(network, AdapterConfig(r=2, targets=("attention",)))
    for adapter in adapters(network).values():
        adapter.b.data.normal_(generator=torch.Generator().manual_seed(1))


def a_merged_adapter(network):
    an_adapter(network)
    merge(network)


def in_half(network):
    network.to(torch.bfloat16)


def a_hook(network):
    network.layers[0].register_forward_hook(lambda module, inputs, output: output * 1.5)


CHANGES = [doubled_in_place, doubled_behind_autograd_s_back, doubled_through_numpy, other_memory, one_number,
           another_parameter, another_state, assigned_state, a_buffer, trained, an_adapter, a_merged_adapter, in_half,
           a_hook]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_an_answer_is_that_of_the_network_as_it_is_now(network, engine_of, ask, answer, change):
    store = PrefixStore()
    request = ask(PROMPT * 3, max_tokens=2 * C)
    before = answer(engine_of(network, prefixes=store), request)
    assert answer(engine_of(network, prefixes=store), request).cached_tokens == len(PROMPT * 3)
    change(network)
    after = answer(engine_of(network, prefixes=store), request)
    assert after.cached_tokens == 0
    assert tokens_of([after]) == tokens_of([answer(engine_of(network), request)])
    assert after.token_ids != before.token_ids or change in (one_number, in_half, another_parameter)


@pytest.mark.parametrize("inference", [False, True])
def test_every_change_of_tensors_without_version_counters_is_seen(inference):
    with torch.inference_mode(inference):
        network = random_network(tiny_config())
    seen = {fingerprint(network)}
    for change in (doubled_in_place, one_number, a_buffer, doubled_behind_autograd_s_back):
        with torch.inference_mode(inference):
            change(network)
        seen.add(fingerprint(network))
    assert len(seen) == 5
    assert fingerprint(network) in seen


def test_one_engine_sees_a_change_between_its_requests(network, engine_of, ask, answer):
    engine, request = engine_of(network), ask(PROMPT * 3)
    answer(engine, request)
    doubled_behind_autograd_s_back(network)
    assert answer(engine, request).cached_tokens == 0
    assert answer(engine, request).cached_tokens == len(PROMPT * 3)


def test_an_adapter_that_is_put_on_and_off_finds_what_was_read_with_it(network, engine_of, ask, answer):
    engine, request = engine_of(network), ask(PROMPT * 3)
    plain = answer(engine, request)
    an_adapter(network)
    kept = {name: adapter.factors for name, adapter in adapters(network).items()}
    config = AdapterConfig(r=2, targets=("attention",))
    adapted = answer(engine, request)
    detach(network)
    again = answer(engine, request)
    assert (again.cached_tokens, again.token_ids) == (len(PROMPT * 3), plain.token_ids)
    install(network, config, kept)
    assert tokens_of([answer(engine, request)]) == tokens_of([adapted])
    install(network, config, {name: type(f)(f.a, f.b, None, 5 * f.scale) for name, f in kept.items()})
    stronger = answer(engine, request)
    assert stronger.cached_tokens == 0
    assert tokens_of([stronger]) == tokens_of([answer(engine_of(network), request)])


def test_dora_s_lengths_follow_the_weights_they_are_of(network, engine_of, ask, answer):
    attach(network, AdapterConfig(r=2, targets=("attention",), dora=True))
    for adapter in adapters(network).values():
        adapter.b.data.normal_(generator=torch.Generator().manual_seed(1))
    engine, request = engine_of(network), ask(PROMPT * 3, max_tokens=2 * C)
    for change in (doubled_in_place, doubled_behind_autograd_s_back):
        answer(engine, request)
        change(network)
        after = answer(engine, request)
        for adapter in adapters(network).values():
            adapter.forget()
        assert tokens_of([after]) == tokens_of([answer(engine_of(network), request)])


def test_of_a_large_network_a_change_of_a_whole_tensor_is_seen(network):
    seen = {fingerprint(network, whole=0)}
    for tensor in [*network.parameters(), *network.buffers()]:
        tensor.data.mul_(1.5)
        seen.add(fingerprint(network, whole=0))
    assert len(seen) == 1 + len([*network.parameters(), *network.buffers()])


def test_what_has_not_changed_is_the_same(network):
    first = fingerprint(network)
    network.encode(torch.tensor([PROMPT]), network.new_cache())
    assert fingerprint(network) == first
    network.cache_type = "f16"
    assert fingerprint(network) != first
