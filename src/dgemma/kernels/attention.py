"""Grouped-query attention over keys and values that come in blocks of columns, in whatever type they are kept.

Scores are made for a tile of queries and columns at a time, and the softmax is summed up over the tiles: what is
allocated does not grow with the number of columns. Knows nothing of the cache or of passes, only which columns each
query sees (`Visible`).
"""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from dgemma.kernels import native
from dgemma.kernels.q8_0 import unpack

COLUMNS = 2048  # the most columns of a tile; keys and values are widened so many at a time
SCORES = 1 << 21  # the most scores of a tile, over all heads and rows of the batch (8 MB in float32)

Blocks = Sequence[tuple[Tensor, Tensor]]  # keys and values [B, Hkv, S_i, d], int8 for q8_0: S columns together
LAST = torch.iinfo(torch.long).max


@dataclass(frozen=True)
class TileSize:
    """The most columns and scores of a tile, but at least so many queries, however large the batch."""

    columns: int = COLUMNS
    scores: int = SCORES
    rows: int = 16


_TILE = TileSize()


@dataclass(frozen=True)
class Tile:
    """Queries ``rows`` and columns [start, stop) of a block; ``first`` counts the columns before the block."""

    rows: slice
    block: int
    first: int
    start: int
    stop: int
    masked: bool  # whether some query does not see some column


@dataclass(frozen=True)
class Visible:
    """What each query sees: the columns whose position is between its ``first`` and its ``last`` one, both included.

    ``first`` and ``last`` [B, T] (or [B, 1]: the same for all queries), ``positions`` [B, S] of the columns, -1 where
    a column is empty. A mask is made of them a tile at a time.
    """

    first: Tensor
    last: Tensor
    positions: Tensor
    _plans: dict[tuple[int, ...], list[Tile]] = field(default_factory=dict, repr=False, compare=False)

    def mask(self, rows: slice = slice(None), columns: slice = slice(None)) -> Tensor:
        """[B, t, s] for these queries and columns, True where the query sees the column; t is 1 for [B, 1] bounds."""
        rows = rows if self.first.shape[1] > 1 else slice(None)
        positions = self.positions[:, columns].unsqueeze(1)
        return (self.first[:, rows].unsqueeze(2) <= positions) & (positions <= self.last[:, rows].unsqueeze(2))

    def tiles(self, widths: Sequence[int], queries: int, step: int, most: int = COLUMNS) -> list[Tile]:
        """The tiles in which anything is seen, each cut to the columns that are; made once for all layers of a pass.

        Not on a GPU, which would have to wait for what is seen: there they are all tiles, every one masked.
        """
        key = (*widths, queries, step, most)
        if key not in self._plans:
            tiles = _split(widths, queries, step, most)
            self._plans[key] = self._plan(tiles) if self.positions.device.type == "cpu" else [
                replace(tile, masked=True) for tile in tiles]
        return self._plans[key]

    def _plan(self, tiles: list[Tile]) -> list[Tile]:
        plan = []
        bounds: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        for tile in tiles:
            columns = (tile.first + tile.start, tile.first + tile.stop)
            if columns not in bounds:
                bounds[columns] = self.positions[:, slice(*columns)].aminmax(dim=1)
            low, high = bounds[columns]
            rows = tile.rows if self.first.shape[1] > 1 else slice(None)
            firsts, lasts = self.first[:, rows], self.last[:, rows]
            if bool(((firsts.amax(1) <= low) & (high <= lasts.amin(1))).all()):
                plan.append(Tile(tile.rows, tile.block, tile.first, tile.start, tile.stop, False))
                continue
            positions = self.positions[:, slice(*columns)]
            seen = ((firsts.amin(1, keepdim=True) <= positions) & (positions <= lasts.amax(1, keepdim=True))).any(0)
            places = seen.nonzero()
            if len(places):
                start, stop = int(places[0]), int(places[-1]) + 1
                plan.append(Tile(tile.rows, tile.block, tile.first, tile.start + start, tile.start + stop, True))
        return plan


def grouped_attention(query: Tensor, blocks: Blocks, visible: Visible | None, tile: TileSize = _TILE) -> Tensor:
    """Softmax attention with scale 1.0, each key-value head shared by a group of query heads.

    query [B, T, Hq, d]; ``blocks`` are the columns' keys and values; ``visible`` None means that every query sees every
    column; ``tile`` bounds what is made at a time. Returns [B, T, Hq * d] in the query's dtype.

    Narrow keys are multiplied as they are where that is fast, and widened a tile at a time where it is not (see
    `working_dtype`); scores and sums are float32 in any case. The group is folded into the query rows, so keys and
    values are never repeated in memory.
    """
    batch, length, heads, dim = query.shape
    kv_heads = blocks[0][0].shape[1]
    group = heads // kv_heads
    dtype = working_dtype(query, blocks[0][0].dtype)
    folded = query.to(dtype).view(batch, length, kv_heads, group, dim).transpose(1, 2)
    folded = folded.reshape(batch, kv_heads, length * group, dim)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, *(t for b in blocks for t in b))):
        out = _attend_for_training(folded, blocks, visible, group, dtype)
    elif attends_natively(query, blocks[0][0].dtype):
        bounds = None if visible is None else (visible.first, visible.last, visible.positions)
        narrow = [(_widen(key, dim, dtype), _widen(value, dim, dtype)) for key, value in blocks]
        out = native.attend(folded, narrow, group, bounds)
    else:
        widths = [key.shape[2] for key, _ in blocks]
        widest = min(tile.columns, max(*widths, 1))
        fused = (dtype == torch.float32 or query.device.type != "cpu") and len(widths) == 1
        if fused and widths[0] <= tile.columns and (
                visible is None or batch * length * group * widest <= 4 * tile.scores):
            out = _attend_at_once(folded, blocks[0], visible, group, dtype)
        else:
            step = min(length, max(tile.rows, tile.scores // (batch * heads * widest)))
            tiles = (_split if visible is None else visible.tiles)(widths, length, step, tile.columns)
            out = _attend(folded, blocks, visible, group, dtype, tiles, tile.columns)
    out = out.to(query.dtype).view(batch, kv_heads, length, group, dim).transpose(1, 2)
    return out.reshape(batch, length, heads * dim)


def attends_natively(query: Tensor, stored: torch.dtype) -> bool:
    """Whether columns are attended to in C++, in whatever blocks they come."""
    return (query.device.type == "cpu" and working_dtype(query, stored) == torch.bfloat16
            and native.can_attend(query.shape[-1]))


def working_dtype(query: Tensor, stored: torch.dtype, fast: bool | None = None) -> torch.dtype:
    """The dtype of the products: the narrower of the query's and the keys', but float32 on a CPU that has no fast bf16
    (``fast`` says whether it does, by default `fast_bf16`).

    int8 (q8_0) counts as bfloat16. On a CPU float16 is widened, too.
    """
    narrow = query.dtype
    if narrow == torch.float32:
        narrow = torch.bfloat16 if stored == torch.int8 else stored
    if query.device.type == "cpu" and narrow != torch.float64 and not (
            narrow == torch.bfloat16 and (fast_bf16() if fast is None else fast)):
        return torch.float32
    return narrow


@cache
def fast_bf16() -> bool:
    """Whether this machine's CPU multiplies bfloat16 faster than float32."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, name, lambda: False)() for name in names)
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _split(widths: Sequence[int], queries: int, step: int, most: int) -> list[Tile]:
    """All queries and all columns in tiles, a tile's columns for all queries before the next ones."""
    tiles, first = [], 0
    for block, width in enumerate(widths):
        for start in range(0, width, most):
            stop = min(start + most, width)
            tiles += [Tile(slice(row, min(row + step, queries)), block, first, start, stop, False)
                      for row in range(0, queries, step)]
        first += width
    return tiles


def _attend(query: Tensor, blocks: Blocks, visible: Visible | None, group: int, dtype: torch.dtype,
            tiles: Sequence[Tile], most: int) -> Tensor:
    """query [B, Hkv, T * group, d] -> the same shape, float32; the softmax of each row summed up tile by tile, of at
    ``most`` so many columns."""
    batch, kv_heads, rows, dim = query.shape
    total = torch.zeros(batch, kv_heads, rows, dim, device=query.device)  # Σ e^(score - peak) · value
    norm = torch.zeros(batch, kv_heads, rows, 1, device=query.device)  # Σ e^(score - peak)
    peak = torch.full_like(norm, -torch.inf)  # the largest score so far
    lowest = torch.finfo(torch.float32).min
    scratch = _Scratch(query)
    widened: tuple[tuple[int, int] | None, Tensor, Tensor] = (None, query, query)
    for tile in tiles:
        part = tile.start // most
        begin = part * most
        if widened[0] != (tile.block, part):  # once for all queries
            key, value = (_widen(t[:, :, begin : begin + most], dim, dtype) for t in blocks[tile.block])
            widened = ((tile.block, part), key, value)
        columns = slice(tile.start - begin, tile.stop - begin)
        key, value = (t[:, :, columns].flatten(0, 1) for t in widened[1:])
        own = slice(tile.rows.start * group, tile.rows.stop * group)
        scores = scratch.scores(query[:, :, own].flatten(0, 1), key).view(batch, kv_heads, -1, key.shape[1])
        if tile.masked and visible is not None:
            hidden = ~visible.mask(tile.rows, slice(tile.first + tile.start, tile.first + tile.stop))
            by_query = scores.view(batch, kv_heads, -1, group, key.shape[1])
            by_query.masked_fill_(hidden[:, None, :, None], -torch.inf)
        before = peak[:, :, own]
        highest = torch.maximum(before, scores.amax(-1, keepdim=True)).clamp_(min=lowest)  # finite: nothing seen yet
        weights = scores.sub_(highest).exp_()
        decay = (before - highest).exp_()
        norm[:, :, own] = norm[:, :, own] * decay + weights.sum(-1, keepdim=True)
        weighted = torch.bmm(scratch.narrowed(weights).flatten(0, 1), value)
        total[:, :, own] *= decay
        total[:, :, own] += weighted.view(batch, kv_heads, -1, dim)
        peak[:, :, own] = highest
    return total.div_(norm)


class _Scratch:
    """Memory for a tile's scores, used again for the next tile: fresh pages would cost more than the arithmetic."""

    def __init__(self, query: Tensor):
        self._query = query
        self._wide = torch.empty(0, device=query.device)
        self._narrow, self._rest = query.new_empty(0), query.new_empty(0)

    def scores(self, query: Tensor, key: Tensor) -> Tensor:
        """query [N, R, d] · key [N, S, d] -> [N, R, S], float32 and exact to it, whatever dtype the two have."""
        shape = (*query.shape[:2], key.shape[1])
        self._wide = wide = _room(self._wide, shape)
        if query.dtype == torch.float32:
            return torch.bmm(query, key.mT, out=wide.view(shape))
        # A product of narrow matrices comes rounded to their dtype. What the rounding took away is a second product,
        # the first one subtracted before it is rounded: still faster than widening both.
        self._narrow, self._rest = _room(self._narrow, shape), _room(self._rest, shape)
        rounded = torch.bmm(query, key.mT, out=self._narrow.view(shape))
        rest = torch.baddbmm(rounded, query, key.mT, beta=-1, out=self._rest.view(shape))
        return wide.view(shape).copy_(rounded).add_(rest)

    def narrowed(self, weights: Tensor) -> Tensor:
        """The weights in the dtype of the products."""
        if self._query.dtype == torch.float32:
            return weights
        return self._narrow.view(weights.shape).copy_(weights)


def _room(buffer: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A flat tensor of that many elements, in the memory of ``buffer`` if it has enough."""
    count = math.prod(shape)
    held = buffer.untyped_storage().nbytes() // buffer.element_size()
    return buffer.as_strided((count,), (1,), 0) if count <= held else buffer.new_empty(count)


def _widen(tensor: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    return unpack(tensor, dim, dtype) if tensor.dtype == torch.int8 else tensor.to(dtype)


def _attend_at_once(query: Tensor, block: tuple[Tensor, Tensor], visible: Visible | None, group: int,
                    dtype: torch.dtype) -> Tensor:
    """One block of columns that is not wide: the fused kernel."""
    key, value = (_widen(t, query.shape[-1], dtype) for t in block)
    mask = None if visible is None else _for_every_head(visible.mask(), query.shape[2], group)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=1.0)


def _attend_for_training(query: Tensor, blocks: Blocks, visible: Visible | None, group: int,
                         dtype: torch.dtype) -> Tensor:
    """All columns at once: contexts are short in training, and its backward pass needs the weights anyway."""
    key, value = (torch.cat([_widen(t, query.shape[-1], dtype) for t in side], dim=2)
                  for side in zip(*blocks, strict=True))
    mask = None if visible is None else _for_every_head(visible.mask(), query.shape[2], group)
    if query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=1.0)
    # On a CPU the fused kernel's backward is several times slower than two plain products.
    scores = query @ key.mT
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ value


def _for_every_head(mask: Tensor, rows: int, group: int) -> Tensor:
    """A mask [B, T or 1, S] for folded queries: [B, 1, rows, S]."""
    if mask.shape[1] > 1:
        mask = mask.repeat_interleave(group, dim=1)
    return mask.unsqueeze(1).expand(-1, -1, rows, -1)
