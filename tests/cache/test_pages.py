"""Several requests in one forward, each with a cache in pages, against the same requests one by one."""

import pytest
import torch

from dgemma.cache.pages import SMALL, Page, Paged, PagedBatch, PageFormat
from support.reference import random_network, tiny_config

W = tiny_config().sliding_window


@pytest.fixture(params=[SMALL, -1], ids=["together", "alone"])
def small(request):
    """Attention of small sequences in one padded call, or every one by itself."""
    return request.param


def paged(network, pages=(), size=5):
    """A sequence that has read nothing, in pages so small that short texts have many."""
    return Paged(PageFormat(network.config, network.device, network.cache_type, size), pages)


def read(network, sequences, texts, small=SMALL):
    ids = torch.tensor([[token for text in texts for token in text]])
    return network.encode(ids, PagedBatch(sequences, [len(text) for text in texts], small))


def canvas_and_soft(network, rows):
    generator = torch.Generator().manual_seed(3)
    config = network.config
    canvas = torch.randint(config.vocab_size, (rows, config.canvas_length), generator=generator)
    return canvas, torch.randn(rows, config.canvas_length, config.hidden_size, generator=generator)


def reference(network, ids, canvas, soft):
    """The hidden states of one canvas behind ``ids``, by the plain cache."""
    cache = network.new_cache(1)
    network.encode(torch.tensor([ids]), cache)
    return network.denoise(canvas, cache, soft)


@pytest.mark.parametrize("lengths", [[3], [1, 4, 9, 20], [7, 7, 7], [W - 1, W, W + 1, 3 * W]])
@torch.inference_mode()
def test_rows_together_give_what_each_gives_alone(tiny_network, random_ids, small, lengths):
    prompts = [random_ids(1, length)[0].tolist() for length in lengths]
    canvas, soft = canvas_and_soft(tiny_network, len(prompts))
    caches = [paged(tiny_network) for _ in prompts]
    read(tiny_network, caches, prompts, small)
    hidden = tiny_network.denoise(canvas, PagedBatch(caches, small=small), soft)
    for row, prompt in enumerate(prompts):
        alone = reference(tiny_network, prompt, canvas[row : row + 1], soft[row : row + 1])
        torch.testing.assert_close(hidden[row : row + 1], alone, atol=2e-5, rtol=1e-5)
        assert caches[row].length == len(prompt)


@pytest.mark.parametrize("cuts", [[1] * 23, [5, 5, 13], [4, 1, 18], [23]])
@torch.inference_mode()
def test_how_a_prompt_is_cut_makes_no_difference(tiny_network, random_ids, small, cuts):
    ids = random_ids(1, sum(cuts))[0].tolist()
    canvas, soft = canvas_and_soft(tiny_network, 1)
    cache, rest = paged(tiny_network), ids
    for count in cuts:
        read(tiny_network, [cache], [rest[:count]], small)
        rest = rest[count:]
    hidden = tiny_network.denoise(canvas, PagedBatch([cache]), soft)
    torch.testing.assert_close(hidden, reference(tiny_network, ids, canvas, soft), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("shared", [1, 5, 12, 20])
@torch.inference_mode()
def test_a_row_goes_on_from_the_beginning_of_another(tiny_network, random_ids, shared):
    first, second = random_ids(1, 20)[0].tolist(), random_ids(1, 11)[0].tolist()
    cache = paged(tiny_network)
    kept: list[Page] = []
    for token in first:  # one by one: every page is met before a sliding layer lets it go
        read(tiny_network, [cache], [[token]])
        index = (cache.length - 1) // 5
        kept[index:] = [cache.pages[index]]
    pages = kept[: -(-shared // 5)]
    if shared % 5:
        pages[-1] = pages[-1].beginning(shared % 5)
    other = paged(tiny_network, pages)
    read(tiny_network, [other], [second])
    canvas, soft = canvas_and_soft(tiny_network, 1)
    hidden = tiny_network.denoise(canvas, PagedBatch([other]), soft)
    expected = reference(tiny_network, first[:shared] + second, canvas, soft)
    torch.testing.assert_close(hidden, expected, atol=2e-5, rtol=1e-5)


@torch.inference_mode()
def test_sliding_layers_let_go_of_what_nothing_can_see(tiny_network, random_ids):
    cache = paged(tiny_network)
    read(tiny_network, [cache], [random_ids(1, 4 * W)[0].tolist()])
    assert all(page.has_all() for page in cache.pages)  # whoever keeps them can go on from any token
    read(tiny_network, [cache], [[1]])
    gone = [not page.has_all() for page in cache.pages]
    assert sum(gone) == (4 * W - (W - 1)) // 5
    assert gone == sorted(gone, reverse=True)


@torch.inference_mode()
def test_a_pass_that_fails_leaves_the_caches_as_they_were(tiny_network, monkeypatch):
    cache = paged(tiny_network)
    read(tiny_network, [cache], [[1, 2, 3]])
    pages = list(cache.pages)
    monkeypatch.setattr(tiny_network.layers[-1], "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        read(tiny_network, [cache], [[4, 5]])
    assert cache.pages == pages


@torch.inference_mode()
def test_what_is_read_stays_where_it_was_written(tiny_network, random_ids):
    cache, places = paged(tiny_network), {}
    for token in random_ids(1, 23)[0].tolist():
        read(tiny_network, [cache], [[token]])
        for number, page in enumerate(cache.pages):
            for kind, memory in page.memories.items():
                found = [side.data_ptr() for block in memory.blocks.values() for side in block]
                assert places.setdefault((number, kind), found) == found


@torch.inference_mode()
def test_whoever_goes_on_from_a_page_leaves_what_another_wrote_there(tiny_network, random_ids):
    first, second = random_ids(2, 4).tolist()
    canvas, soft = canvas_and_soft(tiny_network, 1)
    one = paged(tiny_network)
    read(tiny_network, [one], [[7, 8]])
    other = paged(tiny_network, one.pages)
    read(tiny_network, [one], [first])
    read(tiny_network, [other], [second])
    for sequence, text in ((one, first), (other, second)):
        hidden = tiny_network.denoise(canvas, PagedBatch([sequence]), soft)
        torch.testing.assert_close(hidden, reference(tiny_network, [7, 8, *text], canvas, soft), atol=2e-5, rtol=1e-5)


@torch.inference_mode()
def test_a_sequence_can_be_taken_back_to_what_it_had_read(tiny_network):
    caches = [paged(tiny_network) for _ in range(2)]
    batch = PagedBatch(caches, [3, 3])
    tiny_network.encode(torch.tensor([[1, 2, 3, 4, 5, 6]]), batch)
    batch.undo(0)
    assert [cache.length for cache in caches] == [0, 3]


def test_pages_keep_no_gradients():
    network = random_network(tiny_config()).requires_grad_(True)
    with pytest.raises(ValueError, match="train with network.new_cache"):
        read(network, [paged(network)], [[1, 2, 3]])


@pytest.mark.parametrize("cache_type", ["bf16", "q8_0", "f32"])
@torch.inference_mode()
def test_cache_types_give_what_the_plain_cache_gives(random_ids, cache_type):
    network = random_network(tiny_config(), cache_type=cache_type)
    ids = random_ids(1, 30)[0].tolist()
    canvas, soft = canvas_and_soft(network, 1)
    cache = paged(network)
    read(network, [cache], [ids])
    hidden = network.denoise(canvas, PagedBatch([cache]), soft)
    torch.testing.assert_close(hidden, reference(network, ids, canvas, soft), atol=2e-4, rtol=1e-3)
