"""The tree of contexts read before: what is found, what is shared, what is let go, and that it makes no difference."""

import random

import pytest
import torch

from dgemma.cache.pages import Paged, PagedBatch, PageFormat
from dgemma.engine.prefixes import PrefixStore
from support.reference import tiny_config

W = tiny_config().sliding_window
PAGE = 5


@pytest.fixture
def store():
    return PrefixStore(page=PAGE)


def encode(network, cache, tokens):
    network.encode(torch.tensor([tokens]), PagedBatch([cache], [len(tokens)]))


def read(store, network, context, piece=PAGE):
    """Read a context as the engine does; the tokens that were known, and the open prefix."""
    prefix = store.open(context, network)
    known = prefix.cache.length
    while prefix.cache.length < len(context):
        done = prefix.cache.length
        encode(network, prefix.cache, context[done : done + piece])
        prefix.keep(context)
    return known, prefix


def hidden_of(network, cache):
    canvas = torch.arange(network.config.canvas_length).unsqueeze(0)
    return network.denoise(canvas, PagedBatch([cache]))


def fresh(network, context):
    cache = Paged(PageFormat(network.config, network.device, network.cache_type, PAGE))
    encode(network, cache, context)
    return hidden_of(network, cache)


@pytest.mark.parametrize("shared", [0, 1, 4, 5, 6, 17, 20])
@torch.inference_mode()
def test_a_context_goes_on_from_its_common_beginning_to_the_token(store, tiny_network, random_ids, shared):
    first, other = random_ids(1, 20)[0].tolist(), random_ids(1, 9)[0].tolist()
    other[0] = (first[shared] + 1) % 50 if shared < 20 else other[0]
    read(store, tiny_network, first)
    known, prefix = read(store, tiny_network, first[:shared] + other)
    assert known == shared
    torch.testing.assert_close(hidden_of(tiny_network, prefix.cache), fresh(tiny_network, first[:shared] + other),
                               atol=2e-5, rtol=1e-5)


@torch.inference_mode()
def test_a_context_that_is_all_known_is_not_read_again(store, tiny_network, random_ids):
    context = random_ids(1, 13)[0].tolist()
    read(store, tiny_network, context)
    assert store.open(context, tiny_network).cache.length == 13
    assert (store.hits, store.hit_tokens) == (1, 13)


@torch.inference_mode()
def test_growing_contexts_share_their_pages(store, tiny_network, random_ids):
    context = random_ids(1, 8 * PAGE)[0].tolist()
    for length in range(3, 8 * PAGE, 3):
        read(store, tiny_network, context[:length])
    _, prefix = read(store, tiny_network, context)
    alone = PrefixStore(page=PAGE)
    read(alone, tiny_network, context)
    assert store.nbytes == alone.nbytes
    held = {id(memory) for node in store._nodes() for memory in node.page.memories.values()}
    assert all(id(memory) in held for page in prefix.cache.pages for memory in page.memories.values())


@torch.inference_mode()
def test_memory_stays_within_the_budget_and_the_latest_stay(tiny_network, random_ids):
    contexts = [random_ids(1, 3 * PAGE)[0].tolist() for _ in range(6)]
    contexts = [[index, *context] for index, context in enumerate(contexts)]
    one = PrefixStore(page=PAGE)
    read(one, tiny_network, contexts[0])[1].close()
    assert one.spare == one.nbytes
    store = PrefixStore(3 * one.nbytes, page=PAGE)
    for context in contexts:
        read(store, tiny_network, context)[1].close()
        assert store.nbytes <= store.budget
        assert store.nbytes == sum(node.page.nbytes for node in store._nodes())
    assert store.open(contexts[-1], tiny_network).cache.length == len(contexts[-1])
    assert store.open(contexts[0], tiny_network).cache.length == 0


@torch.inference_mode()
def test_what_is_in_use_stays(tiny_network, random_ids):
    store = PrefixStore(page=PAGE)
    context = random_ids(1, 3 * PAGE)[0].tolist()
    _, prefix = read(store, tiny_network, context)
    store.shrink(0)
    assert sum(1 for _ in store._nodes()) == 3
    prefix.close()
    store.shrink(0)
    assert store.nbytes == sum(1 for _ in store._nodes()) == 0


@torch.inference_mode()
def test_without_its_sliding_layers_a_page_serves_longer_contexts_only(store, tiny_network, random_ids):
    context = random_ids(1, 4 * W)[0].tolist()
    _, prefix = read(store, tiny_network, context)
    first = next(store._nodes())
    store._forget_sliding(first)
    assert store.open(context[:PAGE], tiny_network).cache.length == 0
    known = store.open(context, tiny_network).cache
    assert known.length == len(context)
    torch.testing.assert_close(hidden_of(tiny_network, known), fresh(tiny_network, context), atol=2e-5, rtol=1e-5)
    # Read again, it is whole again.
    read(store, tiny_network, context[:PAGE])
    assert store.open(context[:PAGE], tiny_network).cache.length == PAGE


@torch.inference_mode()
def test_a_prefix_takes_over_what_somebody_else_has_read_meanwhile(store, tiny_network, random_ids):
    context = random_ids(1, 12)[0].tolist()
    late = store.open(context, tiny_network)
    read(store, tiny_network, context[:10])
    assert late.extend(context) == 10
    assert late.extend(context) == 0


@torch.inference_mode()
def test_forgetting_leaves_those_in_use_alone(store, tiny_network, random_ids):
    context = random_ids(1, 12)[0].tolist()
    _, prefix = read(store, tiny_network, context)
    store.clear()
    assert store.nbytes == 0
    torch.testing.assert_close(hidden_of(tiny_network, prefix.cache), fresh(tiny_network, context), atol=2e-5,
                               rtol=1e-5)
    prefix.close()
    assert store.open(context, tiny_network).cache.length == 0


@torch.inference_mode()
def test_any_order_of_reading_closing_and_forgetting_keeps_the_books_right(tiny_network):
    chance = random.Random(5)
    store = PrefixStore(page=PAGE)
    stems = [[chance.randrange(50) for _ in range(30)] for _ in range(2)]
    open_ones = []
    for _ in range(60):
        stem = chance.choice(stems)[: chance.randrange(31)]
        context = stem + [chance.randrange(3) for _ in range(chance.randrange(1, 8))]
        _, prefix = read(store, tiny_network, context, piece=chance.choice([1, 4, 7, 40]))
        torch.testing.assert_close(hidden_of(tiny_network, prefix.cache), fresh(tiny_network, context),
                                   atol=2e-5, rtol=1e-5)
        open_ones.append(prefix)
        if chance.random() < 0.6:
            open_ones.pop(chance.randrange(len(open_ones))).close()
        if chance.random() < 0.2:
            store.shrink(chance.randrange(store.nbytes + 1))
        nodes = list(store._nodes())
        assert store.nbytes == sum(node.page.nbytes for node in nodes)
        assert store.spare == sum(node.spare for node in nodes)
        assert all(node.holders >= 0 for node in nodes)
    for prefix in open_ones:
        prefix.close()
    assert store.spare == store.nbytes
    assert not any(node.holders for node in store._nodes())
    store.shrink(0)
    assert store.nbytes == 0


@torch.inference_mode()
def test_what_is_forgotten_while_it_is_used_counts_no_more(store, tiny_network, random_ids):
    _, prefix = read(store, tiny_network, random_ids(3 * PAGE).tolist())
    store.clear()
    prefix.close()
    assert store.nbytes == store.spare == 0


# Tenants


@torch.inference_mode()
def test_a_tenant_finds_nothing_that_another_has_read(store, tiny_network, random_ids):
    context = random_ids(1, 4 * PAGE)[0].tolist()
    for tenant in ("a", "b"):
        prefix = store.open(context, tiny_network, tenant=tenant)
        assert prefix.cache.length == 0
        encode(tiny_network, prefix.cache, context)
        prefix.keep(context)
        assert store.open(context[:7], tiny_network, tenant=tenant).cache.length == 7
    assert store.open(context, tiny_network).cache.length == 0


@pytest.mark.parametrize(("shared", "found"), [(0, 0), (PAGE - 1, 0), (PAGE, PAGE), (2 * PAGE + 3, 2 * PAGE),
                                               (4 * PAGE, 4 * PAGE)])
@torch.inference_mode()
def test_whole_pages_of_a_shared_beginning_are_found_by_all(store, tiny_network, random_ids, shared, found):
    context = random_ids(1, 4 * PAGE)[0].tolist()
    first = store.open(context, tiny_network, tenant="a", shared=shared)
    for start in range(0, len(context), 3):  # also in pieces that end within a page
        encode(tiny_network, first.cache, context[start : start + 3])
        first.keep(context)
    other = store.open(context, tiny_network, tenant="b", shared=shared)
    assert other.cache.length == found
    encode(tiny_network, other.cache, context[found:] or [1])
    assert store.open(context, tiny_network, tenant="a", shared=shared).cache.length == len(context)
    # Who knows a shared page but for one token learns nothing.
    guess = [*context[: PAGE - 1], (context[PAGE - 1] + 1) % 50, *context[PAGE:]]
    assert store.open(guess, tiny_network, tenant="b", shared=shared).cache.length == 0


@torch.inference_mode()
def test_tenants_and_trees_that_are_empty_leave_nothing_behind(tiny_network, random_ids):
    store = PrefixStore(page=PAGE)
    context = random_ids(1, 3 * PAGE)[0].tolist()
    for tenant in range(20):
        for shared in (0, PAGE):
            prefix = store.open(context, tiny_network, tenant=f"tenant {tenant}", shared=shared)
            while prefix.cache.length < len(context):
                encode(tiny_network, prefix.cache, context[prefix.cache.length :])
                prefix.keep(context)
            prefix.close()
    nodes = list(store._nodes())
    assert len(nodes) == 1 + 20 * 3 + 20 * 2
    assert store.nbytes == store.spare == sum(node.page.nbytes for node in nodes)
    store.shrink(0)
    assert store.nbytes == 0
    assert not store._tops
