"""What a query sees, written down as the rule says it."""

from dataclasses import replace

import pytest
import torch

from dgemma.cache import KVCache, visibility
from dgemma.cache.pages import Paged, PagedBatch, PageFormat
from dgemma.config import FULL, SLIDING
from support.reference import tiny_config

CONFIG = tiny_config()
W = CONFIG.sliding_window


def seen(visible, queries, columns):
    return torch.ones(1, queries, columns, dtype=torch.bool) if visible is None else visible.mask()


@pytest.mark.parametrize("kind", [SLIDING, FULL])
@pytest.mark.parametrize("spans", [[], [(2, 6)], [(0, 1), (3, W + 5)]], ids=str)
@pytest.mark.parametrize("pictures", ["sliding", "full", "causal"])
def test_reading_is_causal_within_the_window_and_a_picture_sees_itself_in_the_layers_named(kind, spans, pictures):
    count = 2 * W + 3
    positions = torch.arange(count).unsqueeze(0)
    config = replace(CONFIG, picture_attention=pictures)
    visible = visibility.causal(config, kind, positions, positions, [spans])
    for query in range(count):
        own = next(((start, stop) for start, stop in spans if start <= query < stop), (query, query + 1))
        for column in range(count):
            picture, inside = own[0] <= column < own[1], kind == FULL or query - column < W
            wanted = (column <= query or (pictures == "sliding" and kind == SLIDING and picture)) and inside
            wanted = wanted or (pictures == "full" and picture)
            assert bool(seen(visible, count, count)[0, query, column]) == wanted


@pytest.mark.parametrize("kind", [SLIDING, FULL])
def test_a_canvas_sees_itself_and_one_stretch_of_what_was_read(kind):
    lengths, width = [3, 2 * W], 4
    columns = torch.full((2, 2 * W), -1)
    for row, length in enumerate(lengths):
        columns[row, 2 * W - length :] = torch.arange(length)
    mask = visibility.canvas(CONFIG, kind, lengths, columns, width).mask().expand(2, width, -1)
    for row, length in enumerate(lengths):
        first = 0 if kind == FULL else max(length - (W - 1), 0)
        wanted = [*((first <= position) for position in columns[row].tolist()), *[True] * width]
        assert all(mask[row, query].tolist() == wanted for query in range(width))


def test_a_canvas_that_sees_all_there_is_needs_no_mask():
    columns = torch.arange(3).unsqueeze(0)
    assert visibility.canvas(CONFIG, FULL, [3], columns, 4) is None


@pytest.mark.parametrize(("spans", "expected"), [
    (None, [(0, 4), (4, 8), (8, 10)]), ([[(3, 6)]], [(0, 6), (6, 10)]), ([[(3, 6), (6, 9)]], [(0, 6), (6, 10)]),
    ([[(3, 6)], [(5, 9)]], [(0, 9), (9, 10)])], ids=str)
def test_no_picture_is_cut_where_a_long_text_is_read_in_pieces(spans, expected):
    assert [(piece.start, piece.stop) for piece in visibility.pieces(10, 4, spans)] == expected


@pytest.mark.parametrize("start", [0, 2])
@torch.inference_mode()
def test_pages_and_the_store_see_the_same_of_a_picture(tiny_network, random_ids, start):
    ids, picture = random_ids(1, 3 * W), torch.randn(1, 5, CONFIG.hidden_size)
    inputs = tiny_network.embed(ids)
    inputs[:, start : start + 5] = picture
    spans = [[(start, start + 5)]]
    store = KVCache(CONFIG, 1, torch.device("cpu"), piece=4)
    sequence = Paged(PageFormat(CONFIG, torch.device("cpu"), size=3))
    ours = tiny_network.encode(inputs, PagedBatch([sequence], [3 * W]), spans=spans)
    theirs = tiny_network.encode(inputs, store, spans=spans)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)
    assert not torch.allclose(ours, tiny_network.encode(inputs, tiny_network.new_cache(1)), atol=1e-3)
