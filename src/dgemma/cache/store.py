"""The cache of a fixed batch: for training, whose gradients it keeps, for parity and research.

Rows may have different lengths: a column that holds nothing for a row has position -1 there. Training shares one
reading among several canvases with `select`. `dgemma.cache.pages` has the cache of requests that come and go.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dgemma.cache import visibility
from dgemma.cache.visibility import Spans
from dgemma.config import FULL, SLIDING, ModelConfig
from dgemma.kernels import grouped_attention, q8_0
from dgemma.kernels.attention import Visible

# Most columns of a block. A whole block is never copied again, so appending costs the same however long the context.
BLOCK = 2048
# Long texts are read in pieces, so that no mask or score matrix is quadratic in their length.
READ_AT_ONCE = 1024

CACHE_TYPES = ("f32", "f16", "bf16", "q8_0")
_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in _DTYPES.items()}

Block = tuple[Tensor, Tensor]  # keys and values [B, Hkv, S, d] (q8_0: int8 [B, Hkv, S, row bytes])


@dataclass
class _Plan:
    """One encoder pass: where its tokens stand and which columns stay afterwards, per kind of layer."""

    lengths: list[int]  # every row's length once the pass is done
    positions: dict[str, Tensor]  # kind -> [B, S + T] positions of cached and new columns, -1 where empty
    keep: dict[str, int | Tensor]  # kind -> the columns that stay: so many of the last, or [B, K] indices per row


class KVCache:
    """Keys and values of the committed tokens, for every layer, in blocks of at most ``block`` columns.

    Full layers keep everything; sliding layers keep the last ``sliding_window - 1`` tokens, which is all that a
    causal token or a canvas can see of them. ``lengths`` counts the tokens that each row has seen.

    ``cache_type`` is what the numbers are kept in (`CACHE_TYPES`); None: the dtype they come in. What is kept is what
    is attended to, by the pass that reads it in, too: how a prompt was cut into passes makes no difference.

    ``spare`` is how many of the last tokens `select` may take away: sliding layers keep so many more. ``checkpointed``
    are the layers that passes with gradients run again (activation checkpointing).

    Nothing is reserved: the last block is as long as what it holds, and is copied when tokens are appended to it.
    Blocks are never written to again: a canvas, which comes as a block of its own while denoising, leaves no trace.
    """

    def __init__(self, config: ModelConfig, batch_size: int, device: torch.device, cache_type: str | None = None,
                 spare: int = 0, block: int = BLOCK, piece: int | None = None, checkpointed: Collection[int] = ()):
        """``piece``: tokens that are read at once (`READ_AT_ONCE`). Raises ValueError for an unknown ``cache_type``."""
        self.config = config
        self.device = device
        self.cache_type = check_cache_type(cache_type)
        self.spare, self.block, self.piece = spare, block, piece or READ_AT_ONCE
        self.checkpointed = checkpointed
        self.lengths = [0] * batch_size
        empty = torch.empty(batch_size, 0, dtype=torch.long, device=device)
        self.positions = {SLIDING: empty, FULL: empty}
        self._blocks: list[list[Block]] = [[] for _ in config.layers]  # sliding layers have one block at most

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Memory of the keys and values, in bytes, shared ones included (positions take 16 more per column)."""
        return sum(key.nbytes + value.nbytes for blocks in self._blocks for key, value in blocks)

    def snapshot(self) -> KVCache:
        """The cache as it is now, without copying: what is appended to this one later is not in it."""
        other = copy.copy(self)
        other._blocks = list(self._blocks)
        return other

    def reading(self, width: int, lengths: Sequence[int] | None,
                spans: Spans | None) -> Iterator[tuple[slice, _Reading]]:
        """Causal passes over ``width`` tokens in pieces (`dgemma.cache.Cache`)."""
        counts = [width] * self.batch_size if lengths is None else [int(n) for n in lengths]
        if len(counts) != self.batch_size or any(not 0 <= n <= width for n in counts):
            raise ValueError(f"lengths must be {self.batch_size} numbers between 0 and {width}, got {counts}")
        for columns in visibility.pieces(width, self.piece, spans):
            count = columns.stop - columns.start
            plan, positions = self.begin([min(max(n - columns.start, 0), count) for n in counts], count)
            yield columns, _Reading(self, plan, positions, visibility.within(columns, spans))

    def denoising(self, width: int) -> _Denoising:
        """A pass over canvases behind what was read (`dgemma.cache.Cache`)."""
        return _Denoising(self.as_it_is(), width)

    def as_it_is(self) -> KVCache:
        """What a layer of a pass that begins now runs on, however late it is run again."""
        return self.snapshot() if self.checkpointed and torch.is_grad_enabled() else self

    def begin(self, counts: list[int], width: int) -> tuple[_Plan, Tensor]:
        """Plan an encoder pass over ``width`` columns of which row b uses the first ``counts[b]``.

        Returns the plan and the new tokens' positions [B, width] (padding gets -1).
        """
        lengths = [have + new for have, new in zip(self.lengths, counts, strict=True)]
        column = torch.arange(width, device=self.device)
        padded = any(count < width for count in counts)
        new = torch.tensor(self.lengths, device=self.device).unsqueeze(1) + column
        if padded:
            new = torch.where(column < torch.tensor(counts, device=self.device).unsqueeze(1), new, -1)
        positions, keep = {}, {}
        for kind, cached in self.positions.items():
            both = torch.cat([cached, new], dim=1)
            room = visibility.reach(self.config, kind, max(lengths), self.spare)
            if padded:  # sort every row's columns by position, empty ones first, and keep the last
                keep[kind] = both.argsort(dim=1, stable=True)[:, both.shape[1] - room :]
            else:  # they are sorted: the cached ones always, and the new ones follow on them
                keep[kind] = room
            positions[kind] = both
        return _Plan(lengths, positions, keep), new

    def extend(self, plan: _Plan, layer: int, key: Tensor, value: Tensor) -> list[Block]:
        """Add a layer's new keys and values [B, Hkv, T, d]; returns old and new ones, S + T columns in all."""
        kind = self.config.layers[layer].kind
        new = (stored(key, self.cache_type), stored(value, self.cache_type))
        old, keep = self._blocks[layer], plan.keep[kind]
        if kind == FULL and isinstance(keep, int):
            self._blocks[layer] = _last(_append(old, new, self.block), keep)
            return [*old, new]
        both = joined([*old, new])
        if isinstance(keep, int):
            self._blocks[layer] = _last([both], keep)
        else:
            self._blocks[layer] = _cut(_columns(both, keep), self.block)
        return [both]

    def finish(self, plan: _Plan) -> None:
        """Make the plan's tokens part of the past."""
        for kind, positions in plan.positions.items():
            keep = plan.keep[kind]
            kept = positions[:, positions.shape[1] - keep :] if isinstance(keep, int) else positions.gather(1, keep)
            self.positions[kind] = kept
        self.lengths = plan.lengths

    def select(self, rows: Sequence[int], lengths: Sequence[int]) -> KVCache:
        """A cache of some of the rows, any of them several times, each as it was after its first so many tokens.

        Gradients flow through. Raises ValueError where a row never was so long or has lost what was seen then.
        """
        for row, length in zip(rows, lengths, strict=True):
            if not self.lengths[row] - self.spare <= length <= self.lengths[row]:
                raise ValueError(f"row {row} of {self.lengths[row]} tokens cannot be cut to {length}: the cache was "
                                 f"made with spare={self.spare}")
        other = type(self)(self.config, len(rows), self.device, self.cache_type, 0, self.block, self.piece,
                           self.checkpointed)
        other.lengths = list(lengths)
        chosen = torch.tensor(rows, device=self.device)
        limits = torch.tensor(lengths, device=self.device).unsqueeze(1)
        keep = {}
        for kind, positions in self.positions.items():
            left = positions[chosen]
            left = torch.where(left < limits, left, -1)
            # As `begin` does it: a row's columns by position, empty ones first.
            room = visibility.reach(self.config, kind, max(lengths))
            keep[kind] = left.argsort(dim=1, stable=True)[:, left.shape[1] - room :]
            other.positions[kind] = left.gather(1, keep[kind])
        for index, (blocks, layer) in enumerate(zip(self._blocks, self.config.layers, strict=True)):
            if blocks:
                picked = _map(joined(blocks), lambda t: t.index_select(0, chosen))
                other._blocks[index] = _cut(_columns(picked, keep[layer.kind]), self.block)
        return other

    def with_canvas(self, layer: int, key: Tensor, value: Tensor) -> list[Block]:
        """The context's keys and values and then a canvas' own [B, Hkv, C, d]; the past is left as it is.

        A short context is copied to make one block of both; a long one never is.
        """
        blocks = [*self._blocks[layer], (key, value)]
        short = sum(k.shape[2] for k, _ in blocks) <= self.block and all(k.dtype == key.dtype for k, _ in blocks)
        return [joined(blocks)] if short else blocks


class _Reading:
    """A causal pass over a piece of a text."""

    def __init__(self, cache: KVCache, plan: _Plan, positions: Tensor, spans: Spans | None):
        self.positions, self.checkpointed = positions, cache.checkpointed
        self._cache, self._plan = cache, plan
        self._visible = {kind: visibility.causal(cache.config, kind, positions, seen, spans)
                         for kind, seen in plan.positions.items()}
        self._before = cache.as_it_is()
        self._read: set[int] = set()

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # A layer runs again for its gradient: on the cache as it was, and leaving it as it is by now.
        into = self._before.snapshot() if layer in self._read else self._cache
        self._read.add(layer)
        blocks = into.extend(self._plan, layer, key, value)
        return grouped_attention(query, blocks, self._visible[into.config.layers[layer].kind])

    def finish(self) -> None:
        self._cache.finish(self._plan)


class _Denoising:
    """A pass over canvases of ``width`` tokens."""

    def __init__(self, cache: KVCache, width: int):
        self._cache, self.checkpointed = cache, cache.checkpointed
        self._visible: dict[str, Visible | None] = {
            kind: visibility.canvas(cache.config, kind, cache.lengths, columns, width)
            for kind, columns in cache.positions.items()}
        self.positions = visibility.behind(cache.lengths, width, cache.device)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        blocks = self._cache.with_canvas(layer, key, value)
        return grouped_attention(query, blocks, self._visible[self._cache.config.layers[layer].kind])

    def finish(self) -> None:
        """Nothing stays of a canvas."""


def stored(tensor: Tensor, cache_type: str | None) -> Tensor:
    """Keys or values as they are kept."""
    if cache_type == "q8_0":
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise ValueError("a q8_0 cache cannot be trained through; use f32, f16 or bf16")
        return q8_0.pack(tensor)
    return tensor.to(_DTYPES.get(cache_type or "", tensor.dtype)).contiguous()


def check_cache_type(name: str | None) -> str | None:
    """``name`` if it is one of `CACHE_TYPES` or None; raises ValueError if not."""
    if name is not None and name not in CACHE_TYPES:
        raise ValueError(f"cache_type must be one of {', '.join(CACHE_TYPES)}, got {name!r}")
    return name


def token_bytes(head_dim: int, cache_type: str | int) -> int:
    """Bytes of one key (or value) of one head; a number is that of bytes per element."""
    if cache_type == "q8_0":
        return q8_0.row_bytes(head_dim)
    return head_dim * (cache_type if isinstance(cache_type, int) else _DTYPES[cache_type].itemsize)


def _map(block: Block, change) -> Block:
    key, value = block
    return change(key), change(value)


def _columns(block: Block, keep: Tensor) -> Block:
    """Each row's own columns ``keep`` [B, K] of a block."""
    return _map(block, lambda t: t.gather(2, keep[:, None, :, None].expand(-1, t.shape[1], -1, t.shape[3])))


def joined(blocks: list[Block]) -> Block:
    """Several blocks as one."""
    if len(blocks) == 1:
        return blocks[0]
    return torch.cat([key for key, _ in blocks], dim=2), torch.cat([value for _, value in blocks], dim=2)


def _cut(block: Block, most: int) -> list[Block]:
    """A block in pieces of at most ``most`` columns, each with memory of its own if there are several."""
    width = block[0].shape[2]
    if width <= most:
        return [block] if width else []
    return [_map(block, lambda t, start=start: t[:, :, start : start + most].contiguous())
            for start in range(0, width, most)]


def _append(blocks: list[Block], new: Block, most: int) -> list[Block]:
    """``blocks`` with more columns; only a last block that is not whole is copied."""
    if blocks and blocks[-1][0].shape[2] < most:
        return [*blocks[:-1], *_cut(joined([blocks[-1], new]), most)]
    return [*blocks, *_cut(new, most)]


def _last(blocks: list[Block], columns: int) -> list[Block]:
    """The last ``columns`` of all columns, without keeping the others' memory."""
    surplus = sum(key.shape[2] for key, _ in blocks) - columns
    kept = []
    for block in blocks:
        width = block[0].shape[2]
        if surplus <= 0:
            kept.append(block)
        elif surplus < width:
            kept.append(_map(block, lambda t, surplus=surplus: t[:, :, surplus:].contiguous()))
        surplus -= width
    return kept
