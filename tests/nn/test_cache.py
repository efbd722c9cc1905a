"""The cache by itself (keys that say which token they are) and under the network."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dgemma.config import FULL, SLIDING
from dgemma.nn import KVCache
from reference import tiny_config

CONFIG = tiny_config()
WINDOW = CONFIG.sliding_window
CANVAS = CONFIG.canvas_length


@pytest.fixture(autouse=True, scope="module")
def without_gradients():
    """As when generating: only then do stored tensors carry room for a canvas."""
    with torch.no_grad():
        yield


def new_cache(rows: int) -> KVCache:
    return KVCache(CONFIG, rows, torch.device("cpu"))


def label(row: int, position: int) -> float:
    return 1000.0 * (row + 1) + position


def context(cache: KVCache, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of the past as the next pass sees them, [B, Hkv, S, d]: a canvas of no tokens."""
    geometry = CONFIG.layers[layer]
    nothing = torch.empty(cache.batch_size, geometry.num_key_value_heads, 0, geometry.head_dim)
    keys, values = cache.with_canvas(layer, nothing, nothing)
    return keys.clone(), values.clone()


def everything(cache: KVCache) -> list[torch.Tensor]:
    tensors = [tensor for layer in range(CONFIG.num_hidden_layers) for tensor in context(cache, layer)]
    return [*tensors, *(cache.positions[kind].clone() for kind in (SLIDING, FULL)), torch.tensor(cache.lengths)]


def assert_same(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def write(cache: KVCache, names: list[int], counts: list[int], padding: int = 0) -> None:
    """Encode ``counts`` tokens a row, whose keys and values say which row (by name) and position they are of."""
    width = max(counts) + padding
    plan, positions = cache.begin(counts, width)
    for layer, geometry in enumerate(CONFIG.layers):
        key = torch.full((len(names), geometry.num_key_value_heads, width, geometry.head_dim), -7.0)
        for row, name in enumerate(names):
            for column in range(counts[row]):
                assert positions[row, column] == cache.lengths[row] + column
                key[row, :, column] = label(name, cache.lengths[row] + column)
        cache.extend(plan, layer, key, -key)
    cache.finish(plan)


def assert_holds(cache: KVCache, names: list[int], lengths: list[int]) -> None:
    """Row i holds the last tokens that it may still see, each once and in order, and says where they stand."""
    assert cache.lengths == lengths
    for layer, geometry in enumerate(CONFIG.layers):
        keys, values = context(cache, layer)
        positions = cache.positions[geometry.kind]
        assert keys.shape[2] == values.shape[2] == positions.shape[1]
        for row, (name, length) in enumerate(zip(names, lengths, strict=True)):
            first = 0 if geometry.kind == FULL else max(0, length - (WINDOW - 1))
            filled = positions[row] >= 0
            assert positions[row, filled].tolist() == list(range(first, length))
            wanted = torch.tensor([label(name, position) for position in range(first, length)])
            for tensor, sign in ((keys, 1), (values, -1)):
                assert torch.equal(tensor[row][:, filled], sign * wanted[:, None].expand_as(tensor[row][:, filled]))


# What is kept


@pytest.mark.parametrize("length", [1, WINDOW - 2, WINDOW - 1, WINDOW, 3 * WINDOW])
def test_sliding_layers_keep_one_token_less_than_their_window(length):
    cache = new_cache(2)
    write(cache, [0, 1], [length, length])
    assert context(cache, 0)[0].shape[2] == min(length, WINDOW - 1)
    assert context(cache, 2)[0].shape[2] == length
    assert_holds(cache, [0, 1], [length, length])


def test_a_long_context_takes_memory_in_full_layers_only():
    cache, sizes = new_cache(1), []
    for _ in range(2):
        write(cache, [0], [100])
        sizes.append(cache.nbytes)
    full = CONFIG.layers[2]
    assert sizes[1] - sizes[0] == 2 * 100 * full.num_key_value_heads * full.head_dim * 4


def test_rows_of_unequal_length_keep_what_each_can_see():
    cache = new_cache(3)
    write(cache, [0, 1, 2], [2, 13, WINDOW - 1])
    write(cache, [0, 1, 2], [5, 1, 0])
    assert_holds(cache, [0, 1, 2], [7, 14, WINDOW - 1])


def test_padding_columns_are_not_kept():
    cache = new_cache(2)
    write(cache, [0, 1], [3, 4], padding=6)
    assert_holds(cache, [0, 1], [3, 4])
    assert context(cache, 2)[0].shape[2] == 4


# Taking caches apart and putting them together


def test_selected_rows_come_in_the_order_asked_for():
    cache = new_cache(3)
    write(cache, [0, 1, 2], [2, 13, 9])
    chosen = cache.select([2, 0])
    assert_holds(chosen, [2, 0], [9, 2])
    write(chosen, [2, 0], [1, 1])
    assert_holds(chosen, [2, 0], [10, 3])
    assert_holds(cache, [0, 1, 2], [2, 13, 9])


def test_columns_that_only_a_departed_row_needed_go_with_the_next_pass():
    cache = new_cache(2)
    write(cache, [0, 1], [2, 50])
    short = cache.select([0])
    write(short, [0], [1])
    assert_holds(short, [0], [3])
    assert context(short, 2)[0].shape[2] == 3


def test_concatenated_rows_stay_what_they_were():
    long, short, empty = new_cache(1), new_cache(2), new_cache(1)
    write(long, [0], [14])
    write(short, [1, 2], [3, 1])
    joined = KVCache.concat([long, short, empty])
    assert_holds(joined, [0, 1, 2, 3], [14, 3, 1, 0])
    write(joined, [0, 1, 2, 3], [CANVAS] * 4)
    assert_holds(joined, [0, 1, 2, 3], [14 + CANVAS, 3 + CANVAS, 1 + CANVAS, CANVAS])


@pytest.mark.parametrize("rows", [[1], [2, 0], [0, 1, 2], [2, 0, 1]])
def test_replaced_rows_are_the_part_s_and_the_others_stay(rows):
    cache = new_cache(3)
    write(cache, [0, 1, 2], [2, 13, 7])
    part = cache.select(rows)
    write(part, rows, [CANVAS] * len(rows))
    merged = cache.replace(rows, part)
    lengths = [n + CANVAS * (row in rows) for row, n in enumerate([2, 13, 7])]
    assert_holds(merged, [0, 1, 2], lengths)


def test_a_snapshot_stays_what_it_was_while_its_origin_goes_on():
    cache = new_cache(2)
    write(cache, [0, 1], [4, 9])
    kept, before = cache.snapshot(), everything(cache)
    canvas = torch.ones(2, 1, CANVAS, CONFIG.layers[2].head_dim)
    cache.with_canvas(2, canvas, canvas)
    write(cache, [0, 1], [1, 6])
    cache.with_canvas(2, canvas, canvas)
    assert_holds(cache, [0, 1], [5, 15])
    assert_same(everything(kept), before)


def test_a_snapshot_copies_nothing():
    cache = new_cache(1)
    write(cache, [0], [50])
    assert cache.snapshot()._keys[2].data_ptr() == cache._keys[2].data_ptr()


def test_rows_selected_from_a_snapshot_go_on_apart():
    cache = new_cache(2)
    write(cache, [0, 1], [4, 9])
    kept, before = cache.snapshot(), everything(cache)
    branch = kept.select([0, 1])
    write(branch, [0, 1], [3, 3])
    assert_holds(branch, [0, 1], [7, 12])
    assert_same(everything(kept), before)
    assert_same(everything(cache), before)


def test_rows_selected_from_a_snapshot_can_denoise_at_the_same_time():
    """Each has room of its own for its canvas: another thread may come between writing and reading it."""
    cache = new_cache(1)
    write(cache, [0], [9])
    caches = [cache, cache.snapshot().select([0]), cache.snapshot().select([0])]
    geometry = CONFIG.layers[2]
    canvases = [torch.full((1, geometry.num_key_value_heads, CANVAS, geometry.head_dim), float(i)) for i in range(3)]
    seen = [one.with_canvas(2, canvas, canvas) for one, canvas in zip(caches, canvases, strict=True)]
    for (keys, values), canvas in zip(seen, canvases, strict=True):
        assert torch.equal(keys[:, :, 9:], canvas)
        assert torch.equal(values[:, :, 9:], canvas)


@st.composite
def histories(draw):
    """A few operations on a batch; every number is drawn when its operation is reached."""
    return draw(st.lists(st.tuples(st.sampled_from(["write", "select", "join", "replace", "snapshot"]),
                                   st.integers(0, 2**16)), max_size=8))


@given(histories())
@settings(max_examples=60, deadline=None)
def test_any_history_leaves_every_row_its_last_tokens(history):
    cache, names, lengths, fresh = new_cache(2), [0, 1], [0, 0], 2
    for operation, seed in history:
        random = torch.Generator().manual_seed(seed)

        def number(low, high, random=random):
            return int(torch.randint(low, high + 1, (), generator=random))

        if operation == "write":
            counts = [number(0, 2 * WINDOW) for _ in names]
            write(cache, names, counts, padding=max(number(-3, 2), 0 if max(counts) else 1))
            lengths = [n + count for n, count in zip(lengths, counts, strict=True)]
        elif operation == "select":
            rows = torch.randperm(len(names), generator=random)[: number(1, len(names))].tolist()
            cache, names, lengths = cache.select(rows), [names[r] for r in rows], [lengths[r] for r in rows]
        elif operation == "join" and len(names) < 5:
            other, count = new_cache(1), number(0, 2 * WINDOW)
            if count:
                write(other, [fresh], [count])
            cache, names, lengths = KVCache.concat([cache, other]), [*names, fresh], [*lengths, count]
            fresh += 1
        elif operation == "replace":
            rows = torch.randperm(len(names), generator=random)[: number(1, len(names))].tolist()
            part = cache.select(rows)
            write(part, [names[r] for r in rows], [CANVAS] * len(rows))
            cache = cache.replace(rows, part)
            lengths = [n + CANVAS * (r in rows) for r, n in enumerate(lengths)]
        elif operation == "snapshot":
            old, cache = cache, cache.snapshot().select(list(range(len(names))))
            write(old, names, [WINDOW] * len(names))
        if cache.positions[FULL].shape[1]:
            assert_holds(cache, names, lengths)


# Under the network


def test_denoising_leaves_the_cache_as_it_was(tiny_network, random_ids):
    cache = tiny_network.new_cache(2)
    with torch.inference_mode():
        tiny_network.encode(random_ids(2, 11), cache, [11, 4])
        before = everything(cache)
        canvas = random_ids(2, CANVAS)
        first = tiny_network.denoise(canvas, cache)
        assert_same(everything(cache), before)
        tiny_network.denoise(random_ids(2, CANVAS), cache, torch.ones_like(first))
        assert_same(everything(cache), before)
        assert torch.equal(tiny_network.denoise(canvas, cache), first)


def test_an_empty_cache_can_be_denoised_against(tiny_network, random_ids):
    canvas = random_ids(1, CANVAS)
    hidden = tiny_network.denoise(canvas, tiny_network.new_cache(1))
    assert hidden.isfinite().all()


def test_rows_joined_from_several_caches_denoise_as_they_did_alone(tiny_network, random_ids):
    prompts, canvases, late = [random_ids(1, n) for n in (3, 17, 6)], random_ids(3, CANVAS), random_ids(3, CANVAS)
    alone, after, caches = [], [], []
    for i, prompt in enumerate(prompts):
        cache = tiny_network.new_cache(1)
        tiny_network.encode(prompt, cache)
        caches.append(cache.select([0]))
        alone.append(tiny_network.denoise(canvases[i : i + 1], cache))
        tiny_network.encode(canvases[i : i + 1], cache)
        after.append(tiny_network.denoise(late[i : i + 1], cache))
    joined = KVCache.concat(caches)
    torch.testing.assert_close(tiny_network.denoise(canvases, joined), torch.cat(alone), atol=1e-5, rtol=0)
    # Rows 2 and 0 go on to their next canvas, row 1 does not.
    part = joined.select([2, 0])
    tiny_network.encode(canvases[[2, 0]], part)
    joined = joined.replace([2, 0], part)
    hidden = tiny_network.denoise(torch.stack([late[0], canvases[1], late[2]]), joined)
    torch.testing.assert_close(hidden, torch.cat([after[0], alone[1], after[2]]), atol=1e-5, rtol=0)


def test_a_branch_of_a_snapshot_goes_on_like_a_cache_that_read_the_same(tiny_network, random_ids):
    prompt, more, canvas = random_ids(1, 15), random_ids(1, 4), random_ids(1, CANVAS)
    whole, start = tiny_network.new_cache(1), tiny_network.new_cache(1)
    tiny_network.encode(torch.cat([prompt, more], dim=1), whole)
    tiny_network.encode(prompt, start)
    branch = start.snapshot().select([0])
    tiny_network.encode(random_ids(1, 9), start)  # what the origin reads next is no matter
    tiny_network.encode(more, branch)
    torch.testing.assert_close(tiny_network.denoise(canvas, branch), tiny_network.denoise(canvas, whole),
                               atol=1e-5, rtol=0)


def test_a_cache_of_another_batch_size_is_refused(tiny_network, random_ids):
    cache = tiny_network.new_cache(2)
    with pytest.raises(ValueError, match="3 rows, the cache 2"):
        tiny_network.encode(random_ids(3, 4), cache)
    with pytest.raises(ValueError, match="1 rows, the cache 2"):
        tiny_network.denoise(random_ids(1, CANVAS), cache)
    with pytest.raises(ValueError, match="lengths must be 2 numbers between 0 and 4"):
        tiny_network.encode(random_ids(2, 4), cache, [1, 5])
