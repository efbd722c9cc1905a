"""Whole distributions some positions at a time: the head's own numbers, transformers' narrowing, exact draws."""

import pytest
import torch

from dgemma.engine.runner import token_logprobs
from dgemma.nn import canvas_stats, distributions
from dgemma.nn import head as head_module
from dgemma.nn.distributions import Distributions, favoured, narrowed_stats
from support.block_bytes import packed

CAP, SCALE, VOCAB, WIDTH = 30.0, 5.0, 48, 12
NO_BIAS = torch.zeros(VOCAB)


@pytest.fixture(autouse=True, params=[4 * VOCAB * 3, 1 << 20], ids=["three-at-a-time", "all-at-once"])
def parts(request, monkeypatch):
    """Small parts, tiles and candidate lists, so that all of them end somewhere in the middle."""
    monkeypatch.setattr(distributions, "LOGITS_BYTES", request.param)
    monkeypatch.setattr(distributions, "VOCAB_TILE", 13)
    monkeypatch.setattr(distributions, "_SORTED", (2, 9))


def inputs(canvas=7, size=1.0, seed=0):
    """hidden [C, D], embedding [V, D], uniform [C]"""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(canvas, WIDTH, generator=generator)
    return hidden, size * torch.randn(VOCAB, WIDTH, generator=generator), torch.rand(canvas, generator=generator)


def plain(hidden, embedding, temperature, bias=NO_BIAS):
    """Log-probabilities [C, V] all at once, in float64."""
    logits = (hidden.double() @ embedding.double().T).div(CAP).tanh() * CAP
    return ((logits + bias) / temperature).log_softmax(-1)


def test_positions_come_in_order_with_their_log_probabilities():
    hidden, embedding, _ = inputs()
    bias = torch.zeros(VOCAB)
    bias[3], bias[40] = -100.0, 5.0
    for given, added in ((None, NO_BIAS), (bias, bias)):
        seen = list(Distributions(hidden, embedding, CAP, 0.6, given))
        assert [i for part, _ in seen for i in range(7)[part]] == list(range(7))
        assert all(log_p.dtype == torch.float32 and len(log_p) == part.stop - part.start for part, log_p in seen)
        found = torch.cat([log_p for _, log_p in seen]).double()
        torch.testing.assert_close(found, plain(hidden, embedding, 0.6, added), atol=2e-5, rtol=1e-5)


def test_a_part_stays_within_its_memory():
    hidden, embedding, _ = inputs(canvas=50)
    largest = max(log_p.nbytes for _, log_p in Distributions(hidden, embedding, CAP, 0.6))
    assert largest <= distributions.LOGITS_BYTES


@pytest.mark.parametrize("size", [0.05, 1.0, 10.0], ids=["flat", "moderate", "saturated"])
def test_argmax_entropy_and_soft_are_the_heads(size):
    hidden, embedding, uniform = inputs(size=size)
    noise = torch.rand(1, 7, head_module.vocab_tiles(VOCAB), 2)
    head = canvas_stats(hidden.unsqueeze(0), embedding, torch.tensor([0.6]), noise, CAP, SCALE)
    ours = narrowed_stats(Distributions(hidden, embedding, CAP, 0.6), embedding, SCALE, uniform, 3, 0.5)
    assert torch.equal(ours.argmax, head.argmax)
    torch.testing.assert_close(ours.entropy, head.entropy, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.soft / size, head.soft / size, atol=1e-4 * SCALE, rtol=1e-5)


def test_a_bias_changes_all_of_them():
    hidden, embedding, uniform = inputs()
    bias = torch.zeros(VOCAB)
    bias[plain(hidden, embedding, 0.6)[0].argmax()] = -100.0
    bias[5] = 8.0
    stats = narrowed_stats(Distributions(hidden, embedding, CAP, 0.6, bias), embedding, SCALE, uniform, 0, 1.0, 1e6)
    log_p = plain(hidden, embedding, 0.6, bias)
    assert torch.equal(stats.argmax[0], log_p.argmax(-1))
    assert torch.equal(stats.sample, stats.argmax)
    torch.testing.assert_close(stats.entropy[0].double(), -(log_p.exp() * log_p).sum(-1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(stats.soft[0].double(), SCALE * log_p.exp() @ embedding.double(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("top_k", "top_p"),
    [(0, 1.0), (1, 1.0), (5, 1.0), (0, 0.5), (0, 0.9), (0, 0.999), (0, 1e-9), (7, 0.8), (100, 1.0), (100, 0.7)],
)
@pytest.mark.parametrize(("size", "sharpness"), [(0.1, 1.0), (0.5, 1.0), (0.1, 4.0), (0.5, 0.5)],
                         ids=["flat", "peaked", "flat-sharpened", "peaked-flattened"])
def test_draws_are_those_of_transformers_warpers(top_k, top_p, size, sharpness):
    """Evenly spread uniform numbers draw every token as often as its share says, to one draw."""
    transformers = pytest.importorskip("transformers")
    draws = 1000
    for seed in range(4):
        hidden, embedding, _ = inputs(canvas=1, size=size, seed=seed)
        scores = sharpness * plain(hidden, embedding, 0.8)
        if top_k:
            scores = transformers.TopKLogitsWarper(top_k)(None, scores)
        if top_p < 1:
            scores = transformers.TopPLogitsWarper(top_p)(None, scores)
        uniform = (torch.arange(draws) + 0.5) / draws
        walk = Distributions(hidden.expand(draws, WIDTH), embedding, CAP, 0.8)
        sample = narrowed_stats(walk, embedding, SCALE, uniform, top_k, top_p, sharpness).sample
        counts = torch.bincount(sample.flatten(), minlength=VOCAB)
        expected = scores.softmax(-1)[0] * draws
        assert (counts - expected).abs().max() < 1.5
        assert set(counts.nonzero().flatten().tolist()) <= set((expected > 0).nonzero().flatten().tolist())


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.9), (5, 0.9)])
def test_uniform_numbers_at_their_ends_draw_kept_tokens(top_k, top_p):
    hidden, embedding, _ = inputs(size=3.0)
    log_p = plain(hidden, embedding, 0.6)
    for end in (0.0, 1.0 - 2**-24):
        sample = narrowed_stats(Distributions(hidden, embedding, CAP, 0.6), embedding, SCALE, torch.full((7,), end),
                                top_k, top_p).sample[0]
        assert (log_p.gather(1, sample.unsqueeze(1)).exp().float() > 0).all()
        if top_k:
            assert (log_p.topk(top_k).indices == sample.unsqueeze(1)).any(1).all()


def test_log_probabilities_of_tokens_and_of_the_best_ones():
    hidden, embedding, _ = inputs()
    log_p = plain(hidden, embedding, 1.0)
    ids = torch.tensor([3, 1, 4, 1, 5, 9, 2])
    found = token_logprobs(Distributions(hidden, embedding, CAP, 1.0), ids, 4, 5)
    assert [entry.token_id for entry in found] == ids[:5].tolist()
    for place, entry in enumerate(found):
        assert entry.logprob == pytest.approx(log_p[place, ids[place]].item(), abs=1e-4)
        values, tokens = log_p[place].topk(4)
        assert [token for token, _ in entry.top] == tokens.tolist()
        assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-4)
    assert token_logprobs(Distributions(hidden, embedding, CAP, 1.0), ids, 0, 2)[1].top == []
    assert token_logprobs(Distributions(hidden, embedding, CAP, 1.0), ids, 4, 0) == []


def test_bfloat16_is_as_close_as_the_heads():
    hidden, embedding, uniform = (tensor.bfloat16() for tensor in inputs(size=0.25))
    stats = narrowed_stats(Distributions(hidden, embedding, CAP, 0.6), embedding, SCALE, uniform.float(), 5, 1.0)
    noise = torch.rand(1, 7, head_module.vocab_tiles(VOCAB), 2)
    head = canvas_stats(hidden.unsqueeze(0), embedding, torch.tensor([0.6]), noise, CAP, SCALE)
    assert stats.soft.dtype == torch.bfloat16
    torch.testing.assert_close(stats.entropy, head.entropy, atol=0.03, rtol=0)
    torch.testing.assert_close(stats.soft.float(), head.soft.float(), atol=0.1, rtol=0.02)


@pytest.mark.parametrize("kind", ["Q4_0", "Q6_K", "Q8_0"])
def test_a_packed_table_is_read_as_the_head_reads_it(kind):
    embedding = packed(kind, VOCAB, 512)
    generator = torch.Generator().manual_seed(0)
    hidden, uniform = torch.randn(7, 512, generator=generator), torch.rand(7, generator=generator)
    noise = torch.rand(1, 7, head_module.vocab_tiles(VOCAB), 2, generator=generator)
    head = canvas_stats(hidden.unsqueeze(0), embedding, torch.tensor([0.6]), noise, CAP, SCALE)
    ours = narrowed_stats(Distributions(hidden, embedding, CAP, 0.6), embedding, SCALE, uniform, 5, 1.0, False)
    assert torch.equal(ours.argmax, head.argmax)
    torch.testing.assert_close(ours.entropy, head.entropy, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.soft, head.soft, atol=0.02 * head.soft.abs().max().item(), rtol=0.01)


@pytest.mark.parametrize(("top_k", "top_p"), [(1, 1.0), (5, 1.0), (0, 0.5), (7, 0.8), (0, 1.0)])
def test_the_favoured_are_those_that_transformers_keeps(top_k, top_p):
    transformers = pytest.importorskip("transformers")
    hidden, embedding, _ = inputs(size=0.3)
    log_p = plain(hidden, embedding, 0.8).float()
    scores = log_p.clone()
    if top_k:
        scores = transformers.TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = transformers.TopPLogitsWarper(top_p)(None, scores)
    lowered = favoured(log_p.clone(), top_k, top_p)
    assert torch.equal(lowered == log_p, scores.isfinite())
    assert (lowered[lowered != log_p] < -1000).all()
