"""Several requests in one forward, each with a cache in pages, against the same requests one by one."""

import pytest
import torch

from dgemma.nn import rows as rows_module
from dgemma.nn.rows import Page
from support.reference import random_network, tiny_config

W = tiny_config().sliding_window


@pytest.fixture(params=[True, False], ids=["together", "alone"])
def grouping(request, monkeypatch):
    """Attention of small rows in one padded call, or every row by itself."""
    if not request.param:
        monkeypatch.setattr(rows_module, "_SMALL", -1)


@pytest.fixture
def small_pages(monkeypatch):
    """Pages of 5 tokens, so that short texts have many."""
    monkeypatch.setattr(rows_module, "PAGE", 5)


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
def test_rows_together_give_what_each_gives_alone(tiny_network, random_ids, grouping, small_pages, lengths):
    prompts = [random_ids(1, length)[0].tolist() for length in lengths]
    canvas, soft = canvas_and_soft(tiny_network, len(prompts))
    caches = [tiny_network.new_row() for _ in prompts]
    tiny_network.encode_rows(list(zip(prompts, caches, strict=True)))
    hidden = tiny_network.denoise_rows(canvas, caches, soft)
    for row, prompt in enumerate(prompts):
        alone = reference(tiny_network, prompt, canvas[row : row + 1], soft[row : row + 1])
        torch.testing.assert_close(hidden[row : row + 1], alone, atol=2e-5, rtol=1e-5)
        assert caches[row].length == len(prompt)


@pytest.mark.parametrize("cuts", [[1] * 23, [5, 5, 13], [4, 1, 18], [23]])
@torch.inference_mode()
def test_how_a_prompt_is_cut_makes_no_difference(tiny_network, random_ids, grouping, small_pages, cuts):
    ids = random_ids(1, sum(cuts))[0].tolist()
    canvas, soft = canvas_and_soft(tiny_network, 1)
    cache, rest = tiny_network.new_row(), ids
    for count in cuts:
        tiny_network.encode_rows([(rest[:count], cache)])
        rest = rest[count:]
    hidden = tiny_network.denoise_rows(canvas, [cache], soft)
    torch.testing.assert_close(hidden, reference(tiny_network, ids, canvas, soft), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("shared", [1, 5, 12, 20])
@torch.inference_mode()
def test_a_row_goes_on_from_the_beginning_of_another(tiny_network, random_ids, small_pages, shared):
    first, second = random_ids(1, 20)[0].tolist(), random_ids(1, 11)[0].tolist()
    cache = tiny_network.new_row()
    kept: list[Page] = []
    for token in first:  # one by one: every page is met before a sliding layer lets it go
        tiny_network.encode_rows([([token], cache)])
        index = (cache.length - 1) // 5
        kept[index:] = [cache.pages[index]]
    pages = kept[: -(-shared // 5)]
    if shared % 5:
        pages[-1] = pages[-1].beginning(shared % 5)
    other = tiny_network.new_row(pages)
    tiny_network.encode_rows([(second, other)])
    canvas, soft = canvas_and_soft(tiny_network, 1)
    hidden = tiny_network.denoise_rows(canvas, [other], soft)
    expected = reference(tiny_network, first[:shared] + second, canvas, soft)
    torch.testing.assert_close(hidden, expected, atol=2e-5, rtol=1e-5)


@torch.inference_mode()
def test_sliding_layers_let_go_of_what_nothing_can_see(tiny_network, random_ids, small_pages):
    cache = tiny_network.new_row()
    tiny_network.encode_rows([(random_ids(1, 4 * W)[0].tolist(), cache)])
    assert all(page.has_all() for page in cache.pages)  # whoever keeps them can go on from any token
    tiny_network.encode_rows([([1], cache)])
    gone = [not page.has_all() for page in cache.pages]
    assert sum(gone) == (4 * W - (W - 1)) // 5
    assert gone == sorted(gone, reverse=True)


@torch.inference_mode()
def test_a_pass_that_fails_leaves_the_caches_as_they_were(tiny_network, monkeypatch):
    cache = tiny_network.new_row()
    tiny_network.encode_rows([([1, 2, 3], cache)])
    pages = list(cache.pages)
    monkeypatch.setattr(tiny_network.layers[-1], "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tiny_network.encode_rows([([4, 5], cache)])
    assert cache.pages == pages


@torch.inference_mode()
def test_pages_of_one_pass_do_not_hold_each_others_memory(tiny_network):
    caches = [tiny_network.new_row() for _ in range(3)]
    tiny_network.encode_rows([([1, 2, 3], cache) for cache in caches])
    for cache in caches:
        for key, value in cache.pages[0].blocks:
            assert key.untyped_storage().nbytes() == key.nbytes
            assert value.untyped_storage().nbytes() == value.nbytes


@pytest.mark.parametrize("cache_type", ["bf16", "q8_0", "f32"])
@torch.inference_mode()
def test_cache_types_give_what_the_plain_cache_gives(random_ids, cache_type):
    network = random_network(tiny_config())
    network.cache_type = cache_type
    ids = random_ids(1, 30)[0].tolist()
    canvas, soft = canvas_and_soft(network, 1)
    cache = network.new_row()
    network.encode_rows([(ids, cache)])
    hidden = network.denoise_rows(canvas, [cache], soft)
    torch.testing.assert_close(hidden, reference(network, ids, canvas, soft), atol=2e-4, rtol=1e-3)
