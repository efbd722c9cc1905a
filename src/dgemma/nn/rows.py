"""Many requests in one forward: each has a cache of its own, in pages that any number of caches can share.

`RowCache` is what one request has read. `Passes` takes several of them through the network together: all their tokens
stand behind one another in one row, every weight is read once for all of them, and only attention looks at each by
itself. Nothing is padded and nothing is copied when a request comes or goes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dgemma.config import FULL, SLIDING, ModelConfig
from dgemma.kernels import grouped_attention
from dgemma.kernels.attention import COLUMNS, LAST, Visible, attends_natively
from dgemma.nn.cache import NAMES, Block, check_cache_type, joined, stored, token_bytes

PAGE = 256  # tokens of a page
# Queries times columns times heads of a row's attention below which rows are attended to in one padded call.
_SMALL = 1 << 19


@dataclass(frozen=True)
class Page:
    """Keys and values of up to `PAGE` tokens that follow on one another, a block for each layer.

    Never written to again. None stands for a sliding layer's block that nothing can see any more.
    """

    count: int
    blocks: tuple[Block | None, ...]

    @cached_property
    def nbytes(self) -> int:
        return sum(key.nbytes + value.nbytes for key, value in filter(None, self.blocks))

    def has_all(self) -> bool:
        """Whether the sliding layers' blocks are there, too."""
        return all(block is not None for block in self.blocks)

    def without_sliding(self, config: ModelConfig) -> Page:
        """The same page, its sliding layers' blocks let go (itself if there are none)."""
        return self if not self.has_all() else Page(self.count, tuple(None if layer.kind == SLIDING else block
                                      for layer, block in zip(config.layers, self.blocks, strict=True)))

    def beginning(self, count: int) -> Page:
        """The first ``count`` tokens, in memory of their own."""
        return Page(count, tuple(block and (_owned(block[0][:, :, :count]), _owned(block[1][:, :, :count]))
                                 for block in self.blocks))


class RowCache:
    """One request's keys and values: full layers keep all tokens, sliding layers those that can still be seen.

    Page i holds the tokens from i · `PAGE` on; only the last one may be short. ``cache_type`` is what the numbers are
    kept in, as in `KVCache`.
    """

    def __init__(self, config: ModelConfig, cache_type: str | None = None, pages: Iterable[Page] = ()):
        self.config, self.cache_type = config, check_cache_type(cache_type)
        self.pages = list(pages)

    @property
    def length(self) -> int:
        """The tokens read so far."""
        return PAGE * (len(self.pages) - 1) + self.pages[-1].count if self.pages else 0

    @property
    def nbytes(self) -> int:
        """Memory of the keys and values, in bytes, shared pages included."""
        return sum(page.nbytes for page in self.pages)

    def reach(self, kind: str) -> int:
        """How many of the last tokens a canvas, or the next token, sees in layers of this kind."""
        return self.length if kind == FULL else min(self.length, self.config.sliding_window - 1)

    def context(self, layer: int) -> list[Block]:
        """The blocks of the columns within a layer's reach."""
        first = self.length - self.reach(self.config.layers[layer].kind)
        blocks: list[Block] = []
        for page in self.pages[first // PAGE :]:
            block = page.blocks[layer]
            assert block is not None, "a sliding layer's block was let go too early"
            blocks.append(block)
        skip = first % PAGE
        if blocks and skip:
            blocks[0] = (blocks[0][0][:, :, skip:], blocks[0][1][:, :, skip:])
        return blocks

    def with_tokens(self, new: Sequence[Block]) -> list[Page]:
        """The pages with some more tokens, a block [1, Hkv, T, d] for each layer; the cache stays as it is.

        What no later token can see of the sliding layers is let go with the pass after the one that brought it: until
        then whoever keeps these pages has them whole, and others can go on from any of their tokens.
        """
        count, pages = new[0][0].shape[2], list(self.pages)
        first = self.length - self.reach(SLIDING)
        tail = pages.pop() if pages and pages[-1].count < PAGE else None
        have = tail.count if tail else 0
        both = [joined([old, block]) if old else block
                for old, block in zip(tail.blocks if tail else [None] * len(new), new, strict=True)]
        for start in range(0, have + count, PAGE):
            stop = min(start + PAGE, have + count)
            pages.append(Page(stop - start, tuple(
                (_owned(key[:, :, start:stop]), _owned(value[:, :, start:stop])) for key, value in both)))
        for index in range(first // PAGE - 1, -1, -1):
            if not pages[index].has_all():
                break
            pages[index] = pages[index].without_sliding(self.config)
        return pages


def row_bytes(config: ModelConfig, tokens: int, cache_type: str | int) -> int:
    """The most memory that the keys and values of one request of ``tokens`` tokens take, and a pass over them.

    Sliding layers hold up to a page more than their window, and the context of one layer at a time may be copied into
    the blocks that attention wants. ``cache_type`` as in `token_bytes`.
    """
    kept = {SLIDING: min(tokens, config.sliding_window - 1 + PAGE - 1), FULL: tokens}
    layers = [2 * layer.num_key_value_heads * token_bytes(layer.head_dim, cache_type) * kept[layer.kind]
              for layer in config.layers]
    return sum(layers) + max(layers)


@dataclass(frozen=True)
class _Group:
    """Rows whose attention is one call: their places in the batch, and per kind of layer what their queries see."""

    rows: list[int]
    visible: dict[str, Visible | None]
    widths: dict[str, int]  # columns of context, padding in front included


class Passes:
    """One pass of several rows, ``counts[i]`` tokens each: causal (an encoder's) or of whole canvases.

    All tokens stand in one row of N. ``positions`` [1, N]. After an encoder's pass call `finish`: until then the
    caches are as they were, and so they stay when something fails.
    """

    def __init__(self, caches: Sequence[RowCache], counts: Sequence[int], device: torch.device, causal: bool):
        self.caches, self.counts, self.causal, self.device = list(caches), list(counts), causal, device
        ends = torch.tensor(self.counts).cumsum(0).tolist()
        self._spans = [slice(end - count, end) for end, count in zip(ends, self.counts, strict=True)]
        self.positions = torch.cat([torch.arange(cache.length, cache.length + count, device=device)
                                    for cache, count in zip(self.caches, self.counts, strict=True)]).unsqueeze(0)
        self._new: list[list[Block]] = [[] for _ in self.caches]
        self._groups: list[_Group] | None = None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [1, N, Hq, d], key and value [1, Hkv, N, d] of this pass -> [1, N, Hq · d]."""
        groups = self._groups = self._groups or self._grouped(query, key)
        kind = self.caches[0].config.layers[layer].kind
        cache_type = self.caches[0].cache_type
        kept = (stored(key, cache_type), stored(value, cache_type)) if self.causal else (key, value)
        out = query.new_empty(1, query.shape[1], query.shape[2] * query.shape[3])
        for group in groups:
            visible = group.visible[kind]
            if len(group.rows) == 1:
                span = self._spans[group.rows[0]]
                own = (kept[0][:, :, span], kept[1][:, :, span])
                blocks = _runs([*self.caches[group.rows[0]].context(layer), own], query)
                out[:, span] = grouped_attention(query[:, span], blocks, visible)
                continue
            contexts = [self.caches[row].context(layer) for row in group.rows]
            if len(group.rows) == len(self.caches):  # all of them, and they stand behind one another already
                block = _stacked([_by_row(side, len(group.rows)) for side in kept], contexts, group.widths[kind])
                queries = query.view(len(group.rows), -1, *query.shape[2:])
                out = grouped_attention(queries, [block], visible).view(out.shape)
                continue
            spans = [self._spans[row] for row in group.rows]
            own = [torch.cat([side[:, :, span] for span in spans]) for side in kept]
            block = _stacked(own, contexts, group.widths[kind])
            answers = grouped_attention(torch.cat([query[:, span] for span in spans]), [block], visible)
            for span, answer in zip(spans, answers, strict=True):
                out[0, span] = answer
        if self.causal:
            for new, span in zip(self._new, self._spans, strict=True):
                new.append((kept[0][:, :, span], kept[1][:, :, span]))
        return out

    def finish(self, fine: Tensor) -> list[bool]:
        """Make an encoder pass' tokens part of the past, of all caches or, should it fail, of none.

        A row that is not ``fine`` [N] in all its tokens is left out; which ones are.
        """
        alright = fine.tolist()
        rows = [all(alright[span]) for span in self._spans]
        made = [cache.with_tokens(new) if good else cache.pages
                for cache, new, good in zip(self.caches, self._new, rows, strict=True)]
        for cache, pages in zip(self.caches, made, strict=True):
            cache.pages = pages
        return rows

    def _grouped(self, query: Tensor, key: Tensor) -> list[_Group]:
        """Rows with little to attend to, of one count, together; every other row by itself."""
        together: dict[int, list[int]] = {}
        groups = []
        for row, (cache, count) in enumerate(zip(self.caches, self.counts, strict=True)):
            small = count * (cache.length + count) * query.shape[2] <= _SMALL
            if small and cache.cache_type in (None, NAMES.get(key.dtype)):
                together.setdefault(count, []).append(row)
            else:
                groups.append(self._group([row]))
        return groups + [self._group(rows) for rows in together.values()]

    def _group(self, rows: list[int]) -> _Group:
        visible: dict[str, Visible | None] = {}
        widths: dict[str, int] = {}
        for kind in (SLIDING, FULL):
            reaches = [self.caches[row].reach(kind) for row in rows]
            widths[kind] = width = max(reaches)
            if not self.causal and len(set(reaches)) == 1:
                visible[kind] = None
                continue
            lengths = torch.tensor([self.caches[row].length for row in rows], device=self.device).unsqueeze(1)
            column = torch.arange(-width, self.counts[rows[0]], device=self.device)
            empty = column < -torch.tensor(reaches, device=self.device).unsqueeze(1)
            seen = (lengths + column).masked_fill(empty, -1)
            own = seen[:, width:]
            reach = self.caches[0].config.sliding_window if kind == SLIDING else LAST
            visible[kind] = (Visible((own - (reach - 1)).clamp(min=0), own, seen) if self.causal else
                             Visible(torch.zeros_like(lengths), torch.full_like(lengths, LAST), seen))
        return _Group(rows, visible, widths)


def _owned(columns: Tensor) -> Tensor:
    """The same numbers in memory that holds nothing else."""
    alone = columns.is_contiguous() and columns.untyped_storage().nbytes() == columns.nbytes
    return columns if alone else columns.clone(memory_format=torch.contiguous_format)


def _by_row(side: Tensor, rows: int) -> Tensor:
    """Keys or values [1, Hkv, N, d] of rows of one length, seen as [rows, Hkv, N / rows, d]."""
    return side[0].unflatten(1, (rows, -1)).transpose(0, 1)


def _stacked(own: Sequence[Tensor], contexts: list[list[Block]], width: int) -> Block:
    """Contexts, padded in front to ``width`` columns, and the rows' own keys and values [n, Hkv, T, d]: one block."""
    sides = []
    for side, new in enumerate(own):
        rows, heads, count, dim = new.shape
        out = new.new_zeros(rows, heads, width + count, dim)
        out[:, :, width:] = new
        for row, context in enumerate(contexts):
            start = width - sum(block[side].shape[2] for block in context)
            for block in context:
                stop = start + block[side].shape[2]
                out[row, :, start:stop] = block[side][0]
                start = stop
        sides.append(out)
    return sides[0], sides[1]


def _runs(blocks: list[Block], query: Tensor) -> list[Block]:
    """The same columns in blocks as wide as attention's tiles, where it wants them so and their types allow it."""
    if attends_natively(query, blocks[0][0].dtype):
        return blocks
    runs: list[list[Block]] = []
    width = 0
    for block in blocks:
        columns = block[0].shape[2]
        if runs and width + columns <= COLUMNS and runs[-1][0][0].dtype == block[0].dtype:
            runs[-1].append(block)
            width += columns
        else:
            runs.append([block])
            width = columns
    return [joined(run) for run in runs]
