"""Spans of soft tokens in a prompt: read whole, and known by what they hold."""

import pytest
import torch

from dgemma.diffusion.prompt import SoftSpan
from dgemma.engine import PrefixStore
from dgemma.errors import ContextLengthError
from support.engine_requests import C, tokens_of
from support.reference import random_network, tiny_config

PROMPT = list(range(3, 23))


def picture(digest, start=6, count=8, seed=0):
    numbers = torch.randn(count, tiny_config().hidden_size, generator=torch.Generator().manual_seed(seed))
    return SoftSpan(start, numbers, digest)


def test_embeddings_that_are_those_of_the_tokens_change_nothing(engine_of, ask, answer):
    network = random_network(tiny_config(layer_types=["full_attention"] * 2, num_hidden_layers=2))
    rows = network.embed(torch.tensor(PROMPT[6:14]))
    engine = engine_of(network)
    plain = answer(engine, ask(PROMPT, max_tokens=2 * C))
    soft = answer(engine_of(network), ask(PROMPT, max_tokens=2 * C, spans=(SoftSpan(6, rows, b"text"),)))
    assert tokens_of([soft]) == tokens_of([plain])


def test_a_picture_changes_the_answer(engine_of, ask, answer):
    plain, soft = (answer(engine_of(), ask(PROMPT, max_tokens=2 * C, spans=spans)) for spans in ((), (picture(b"a"),)))
    assert tokens_of([soft]) != tokens_of([plain])


def test_a_picture_is_read_again_only_where_it_is_the_same(engine_of, ask, answer):
    store = PrefixStore(page=4)
    def cached(*spans):
        return answer(engine_of(prefixes=store), ask(PROMPT, spans=spans)).cached_tokens

    assert [cached(picture(b"a")), cached(picture(b"a")), cached(picture(b"b", seed=1)), cached(), cached(picture(
        b"a", start=7))] == [0, len(PROMPT), 6, 6, 7]


def test_a_picture_is_read_in_one_pass_however_little_is_read_at_a_time(engine_of, ask, answer, encoded):
    request = ask(PROMPT, max_tokens=2 * C, spans=(picture(b"a"),))
    whole = answer(engine_of(), request)
    encoded.clear()
    pieces = answer(engine_of(piece=4), request)
    assert encoded[:3] == [[4], [10], [4]]
    assert tokens_of([pieces]) == tokens_of([whole])


def test_soft_tokens_count_among_what_a_request_needs(engine_of, ask):
    plain, seeing = ask(PROMPT, max_tokens=C), ask(PROMPT, max_tokens=C, spans=(picture(b"a"),))
    probe = engine_of().scheduler
    needed, soft = probe.memory_of(plain), seeing.spans[0].embeddings.nbytes
    assert probe.memory_of(seeing) == needed + soft > needed
    engine = engine_of(memory=needed)
    engine.check(plain)
    with pytest.raises(ContextLengthError, match="memory"):
        engine.check(seeing)
    engine = engine_of(memory=needed + soft)
    engine.check(seeing)
    engine.submit(seeing)
    engine.step()
    assert engine.memory.reserved == needed + soft
    assert engine.clear() and engine.memory.reserved == 0


@pytest.mark.parametrize("spans", [(picture(b"a", start=15),), (picture(b"a"), picture(b"b", start=10)),
                                   (SoftSpan(2, torch.zeros(3, 5), b"a"),)], ids=["past the end", "over", "narrow"])
def test_spans_that_do_not_fit_are_refused(engine_of, ask, spans):
    with pytest.raises(ValueError, match="soft tokens"):
        engine_of().submit(ask(PROMPT, spans=spans))
