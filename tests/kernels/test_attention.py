"""Grouped-query attention against repeated key-value heads and a softmax written out."""

from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dgemma.kernels import attention, grouped_attention, q8_0
from dgemma.kernels.attention import LAST, TileSize, Visible, working_dtype

HEADS = [(1, 1), (4, 4), (4, 2), (6, 2), (8, 1)]
BATCH, LENGTH, SEEN, DIM = 2, 11, 29, 8


@pytest.fixture(params=["one-tile", "small-tiles"])
def attend(request):
    """Every test twice: as one tile, and in tiles of 5 columns and a few queries."""
    tile = TileSize() if request.param == "one-tile" else TileSize(columns=5, scores=1, rows=3)
    return partial(grouped_attention, tile=tile)


def inputs(heads: int, kv_heads: int, dtype=torch.float32):
    generator = torch.Generator().manual_seed(heads * 10 + kv_heads)
    query = torch.randn(BATCH, LENGTH, heads, DIM, generator=generator)
    key, value = (torch.randn(BATCH, kv_heads, SEEN, DIM, generator=generator) for _ in range(2))
    return query.to(dtype), key.to(dtype), value.to(dtype)


def in_blocks(key, value, widths=(7, 1, 0, 13, 8)):
    assert sum(widths) == SEEN
    return list(zip(key.split(widths, dim=2), value.split(widths, dim=2), strict=True))


def visible(kind: str) -> Visible | None:
    """What the network makes: a causal pass, one with a window, one over rows of unequal length, two canvases."""
    old = SEEN - LENGTH
    columns, queries = torch.arange(SEEN).expand(BATCH, -1), torch.arange(old, SEEN).expand(BATCH, -1)
    none = torch.zeros_like(queries)
    if kind == "everything":
        return None
    if kind == "causal":
        return Visible(none, queries, columns)
    if kind == "window":
        return Visible(queries - 5, queries, columns)
    if kind == "ragged":  # row 1 has 6 tokens less in the past and 4 in this pass, the rest of which is padding
        empty = torch.full((6,), -1)
        columns = torch.stack([columns[0], torch.cat([empty, columns[1, : old - 6], columns[1, old - 6 : old - 2],
                                                      torch.full((LENGTH - 4,), -1)])])
        queries = torch.stack([queries[0], columns[1, old:]])
        return Visible((queries - 20).clamp(min=0).masked_fill(queries < 0, -1),
                       queries.masked_fill(queries < 0, LAST), columns)
    if kind == "canvas":
        columns = torch.stack([columns[0], torch.cat([torch.full((9,), -1), columns[1, : SEEN - 9]])])
        return Visible(torch.tensor([[4], [0]]), torch.full((BATCH, 1), LAST), columns)
    raise ValueError(kind)


KINDS = ["everything", "causal", "window", "ragged", "canvas"]


def naive(query, key, value, seen):
    batch, length, heads, dim = query.shape
    group = heads // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = query.transpose(1, 2) @ key.transpose(2, 3)
    if seen is not None:
        scores = scores.masked_fill(~seen.mask().unsqueeze(1), -torch.inf)
    out = scores.softmax(-1) @ value
    return out.transpose(1, 2).reshape(batch, length, heads * dim)


def test_the_masks_are_those_of_the_words():
    assert visible("causal").mask()[0].equal(torch.ones(LENGTH, SEEN).tril(SEEN - LENGTH).bool())
    assert visible("window").mask()[0].sum(1).tolist() == [6] * LENGTH
    ragged = visible("ragged").mask()
    assert ragged[1, :4].sum(1).tolist() == [13, 14, 15, 16]
    assert ragged[1, 4:].all()  # padding
    assert visible("canvas").mask().sum(2).tolist() == [[SEEN - 4], [SEEN - 9]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_the_softmax_written_out(heads, kind, training, attend):
    query, key, value = (tensor.requires_grad_(training) for tensor in inputs(*heads))
    with torch.set_grad_enabled(training):
        whole = attend(query, [(key, value)], visible(kind))
        blocks = attend(query, in_blocks(key, value), visible(kind))
    wanted = naive(query, key, value, visible(kind))
    for out in (whole, blocks):
        assert out.requires_grad == training
        torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_training_path_has_the_right_gradients(kind, attend):
    def gradients(function):
        leaves = [tensor.requires_grad_() for tensor in inputs(6, 2)]
        function(*leaves).square().sum().backward()
        return [leaf.grad for leaf in leaves]

    ours = gradients(lambda query, key, value: attend(query, in_blocks(key, value), visible(kind)))
    theirs = gradients(lambda query, key, value: naive(query, key, value, visible(kind)))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_what_is_hidden_does_not_matter(attend):
    query, key, value = inputs(4, 2)
    with torch.no_grad():
        before = attend(query, in_blocks(key, value), visible("window"))
        key[:, :, : SEEN - LENGTH - 5], value[:, :, : SEEN - LENGTH - 5] = 1e4, 1e4
        assert torch.equal(attend(query, in_blocks(key, value), visible("window")), before)


def test_large_scores_do_not_overflow(attend):
    query, key, value = inputs(4, 2)
    with torch.no_grad():
        out = attend(query * 100, in_blocks(key, value), visible("causal"))
    torch.testing.assert_close(out, naive(query * 100, key, value, visible("causal")), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("fast", [False, True], ids=["widened", "as-they-are"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("query_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", ["f32", "f16", "bf16", "q8_0"])
def test_keys_of_another_type_than_the_query(stored, query_dtype, kind, fast, attend, monkeypatch):
    monkeypatch.setattr(attention, "fast_bf16", lambda: fast)
    query, key, value = inputs(8, 2)
    query = query.to(query_dtype)
    wanted = naive(query.float(), key, value, visible(kind))
    dtypes = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
    blocks = [tuple(q8_0.pack(t) if stored == "q8_0" else t.to(dtypes[stored]) for t in block)
              for block in in_blocks(key, value)]
    with torch.no_grad():
        out = attend(query, blocks, visible(kind))
    assert out.dtype == query_dtype
    torch.testing.assert_close(out.float(), wanted, atol=0.05, rtol=0.02)


def test_products_are_as_narrow_as_is_fast():
    wide, narrow = torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16)
    assert working_dtype(wide, torch.float32, fast=True) == torch.float32
    for query, stored in ((wide, torch.bfloat16), (wide, torch.int8), (narrow, torch.bfloat16), (narrow, torch.int8)):
        assert working_dtype(query, stored, fast=True) == torch.bfloat16
    assert working_dtype(wide, torch.float16, fast=True) == torch.float32
    for query in (wide, narrow):
        for stored in (torch.bfloat16, torch.int8):
            assert working_dtype(query, stored, fast=False) == torch.float32
    assert isinstance(attention.fast_bf16(), bool)


def test_narrow_scores_are_as_exact_as_wide_ones():
    """bfloat16 has 8 bits: a score of 60 rounded to it would be off by up to an eighth."""
    generator = torch.Generator().manual_seed(0)
    query = (torch.randn(1, 2, 40, 64, generator=generator) * 2.5).bfloat16()
    key = (torch.randn(1, 2, 30, 64, generator=generator) * 2.5).bfloat16()
    exact = query.float() @ key.float().mT
    assert exact.abs().max() > 60
    assert ((query @ key.mT).float() - exact).abs().max() > 0.1
    scores = attention._Scratch(query).scores(query.flatten(0, 1), key.flatten(0, 1))
    assert (scores.view_as(exact) - exact).abs().max() < 1e-3


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_bfloat16_is_close_to_float32(training, attend):
    narrow = [tensor.requires_grad_(training) for tensor in inputs(8, 2, dtype=torch.bfloat16)]
    with torch.set_grad_enabled(training):
        out = attend(narrow[0], in_blocks(*narrow[1:]), visible("window"))
    assert out.dtype == torch.bfloat16
    wanted = naive(*(tensor.float() for tensor in narrow), visible("window"))
    torch.testing.assert_close(out.float(), wanted, atol=0.05, rtol=0.05)


class Largest(TorchDispatchMode):
    """While it is open, the most elements of any tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):  # an expanded tensor counts what it holds
                held = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.elements = max(self.elements, min(tensor.numel(), held))
        return out


@pytest.mark.parametrize("stored", ["f32", "bf16", "q8_0"])
def test_nothing_grows_with_the_context(stored):
    """8 times the context, the same largest tensor; and nothing like queries × context."""
    tile = TileSize(columns=64, scores=1 << 14)
    sizes = []
    for seen in (512, 4096):
        query = torch.randn(1, 256, 4, 16)
        key, value = (torch.randn(1, 2, 64, 16) for _ in range(2))
        if stored != "f32":
            key, value = (q8_0.pack(t) if stored == "q8_0" else t.bfloat16() for t in (key, value))
        positions = torch.arange(seen).unsqueeze(0)
        with torch.no_grad(), Largest() as largest:
            grouped_attention(query, [(key, value)] * (seen // 64),
                              Visible(torch.zeros(1, 256, dtype=torch.long), positions[:, -256:], positions), tile)
        sizes.append(largest.elements)
    assert sizes[0] == sizes[1] <= 256 * 4 * 64


def test_the_tiles_that_nobody_sees_are_left_out():
    seen, queries = torch.arange(400).unsqueeze(0), torch.arange(300, 400).unsqueeze(0)
    window = Visible(queries - 49, queries, seen)
    tiles = window.tiles([400], 100, 25)
    assert min(tile.start for tile in tiles) == 300 - 49
    assert sum((tile.stop - tile.start) * 25 for tile in tiles) <= 100 * (50 + 24)
    causal = Visible(torch.zeros_like(queries), queries, seen)
    assert sum(tile.masked for tile in causal.tiles([300, 100], 100, 25)) <= 4 * -(-100 // min(attention.COLUMNS, 100))
    assert not any(tile.masked for tile in causal.tiles([300, 100], 100, 25) if tile.block == 0)
    assert causal.tiles([300, 100], 100, 25) is causal.tiles([300, 100], 100, 25)
