"""The best and the drawn path, against trying every canvas of a tiny vocabulary."""

import functools
import itertools
import re
from collections import Counter

import pytest
import torch

from dgemma.constrain import constraint_of
from support.constrain_helpers import tokenizer_of, walk

PIECES = ["a", "b", "ab", "ba", b"\xc3", b"\xa9"]  # the last two are the halves of é
STOPS = (0, 1)
FIRST = 4  # the first piece's id
CANVAS = 4
PATTERNS = ["(a|b)(ab)*", "a?b{1,3}|é+", "((a|b)*é)?", "[ab]{2}|[ab]{6}"]


def bytes_of(token):
    piece = PIECES[token - FIRST]
    return piece if isinstance(piece, bytes) else piece.encode()


def valid(tokens, pattern, room):
    """Whether a canvas may be: up to a stop token its text matches, or can still be completed in the room."""
    end = next((place for place, token in enumerate(tokens) if token in STOPS), None)
    text = tokens if end is None else tokens[:end]
    if any(token < FIRST for token in text) or len(text) > room:
        return len(text) > room and end is None and valid((*tokens[:room], 0), pattern, room) and tokens[room] in STOPS
    data = b"".join(map(bytes_of, text))
    return completes(data, pattern, 0 if end is not None else room - len(text))


@functools.cache
def completes(data, pattern, count):
    """Whether so many tokens, or fewer, make a text of these bytes that matches."""
    return matches(data, pattern) or (count > 0 and any(
        completes(data + bytes_of(token), pattern, count - 1) for token in range(FIRST, FIRST + len(PIECES))))


@functools.cache
def all_valid(pattern, room):
    """Every canvas that may be."""
    every = itertools.product(range(FIRST + len(PIECES)), repeat=CANVAS)
    return [tokens for tokens in every if valid(tokens, pattern, room)]


@functools.cache
def matches(data, pattern):
    try:
        return re.fullmatch(pattern, data.decode()) is not None
    except UnicodeDecodeError:
        return False


def setting(pattern, seed, sharpness=1.5):
    tokenizer = tokenizer_of(PIECES)
    constraint = constraint_of({"type": "regex", "regex": pattern}, tokenizer, STOPS)
    generator = torch.Generator().manual_seed(seed)
    scores = (torch.randn(CANVAS, tokenizer.vocab_size, generator=generator) * sharpness).log_softmax(-1)
    return constraint, scores


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("room", [3, 4, 6])
def test_the_draft_is_the_most_probable_valid_canvas(pattern, room):
    for seed in range(3):
        constraint, scores = setting(pattern, seed)
        chosen = constraint.guide(room).choose(walk(scores, 3), CANVAS, room, torch.rand(CANVAS))
        rows = scores.tolist()
        best = max(all_valid(pattern, room),
                   key=lambda tokens: sum(row[token] for row, token in zip(rows, tokens, strict=True)))
        assert tuple(chosen.draft.tolist()) == best


def until_stop(tokens):
    """A canvas up to its stop token; what follows does not matter."""
    end = next((place for place, token in enumerate(tokens) if token in STOPS), CANVAS - 1)
    return tuple(tokens[: end + 1])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_sample_is_drawn_from_the_distribution_over_valid_canvases(pattern):
    draws, room = 1000, 5
    constraint, scores = setting(pattern, seed=7)
    guide, generator = constraint.guide(room), torch.Generator().manual_seed(0)
    drawn = Counter(until_stop(guide.choose([(slice(0, CANVAS), scores)], CANVAS, room,
                                            torch.rand(CANVAS, generator=generator)).sample.tolist())
                    for _ in range(draws))
    mass = {}
    for head in set(map(until_stop, all_valid(pattern, room))):
        mass[head] = sum(scores[i, token].item() for i, token in enumerate(head))
    total = torch.tensor(list(mass.values())).logsumexp(0)
    assert set(drawn) <= set(mass)
    # Pearson's statistic over canvases expected at least five times, the rest together.
    expected = {head: draws * (log - total).exp().item() for head, log in mass.items()}
    common = [head for head, count in expected.items() if count >= 5]
    pairs = [(drawn[head], expected[head]) for head in common]
    rest = draws - sum(count for _, count in pairs), draws - sum(count for count in [e for _, e in pairs])
    statistic = sum((seen - want) ** 2 / want for seen, want in [*pairs, rest] if want > 1)
    freedom = len(pairs)
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5 + 5


@pytest.mark.parametrize("pattern", PATTERNS)
def test_fixed_places_are_those_where_every_valid_canvas_agrees(pattern):
    room = 4
    constraint, scores = setting(pattern, seed=1)
    chosen = constraint.guide(room).choose(walk(scores), CANVAS, room, torch.rand(CANVAS))
    for place in range(CANVAS):
        assert bool(chosen.fixed[place]) == (len({tokens[place] for tokens in all_valid(pattern, room)}) == 1)


def test_the_same_uniforms_draw_the_same_canvas_however_the_walk_is_cut():
    constraint, scores = setting(PATTERNS[0], seed=2)
    uniform = torch.rand(CANVAS, generator=torch.Generator().manual_seed(3))
    one, other = (constraint.guide(9).choose(walk(scores, step), CANVAS, 9, uniform) for step in (1, 4))
    assert torch.equal(one.sample, other.sample)
    assert torch.equal(one.draft, other.draft)


def test_a_walk_that_ends_early_is_an_error():
    constraint, scores = setting(PATTERNS[0], seed=2)
    with pytest.raises(ValueError, match="ended after 3 of 4"):
        constraint.guide(9).choose(walk(scores[:3]), CANVAS, 9, torch.rand(CANVAS))
