"""The key-value cache: what the encoder has read, as far as a later pass can still see it.

The network uses three calls only: `begin` a pass, `extend` layer by layer, `finish`; and `with_canvas` while
denoising. Rows may have different lengths: a column that holds nothing for a row has position -1 there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dgemma.config import FULL, SLIDING, ModelConfig


@dataclass
class _Pass:
    """One encoder pass: where its tokens stand and which columns stay afterwards, per kind of layer."""

    lengths: list[int]  # every row's length once the pass is done
    positions: dict[str, Tensor]  # kind -> [B, S + T] positions of cached and new columns, -1 where empty
    keep: dict[str, slice | Tensor]  # kind -> the columns that stay: the last few, or [B, K] indices per row


class KVCache:
    """Keys and values of the committed tokens, for every layer, [B, Hkv, S, d] each.

    Full layers keep everything; sliding layers keep the last ``sliding_window - 1`` tokens, which is all that a
    causal token or a canvas can see of them. ``lengths`` counts the tokens that each row has seen.
    """

    def __init__(self, config: ModelConfig, batch_size: int, device: torch.device):
        self.config = config
        self.device = device
        self.lengths = [0] * batch_size
        empty = torch.empty(batch_size, 0, dtype=torch.long, device=device)
        self.positions = {SLIDING: empty, FULL: empty}
        # Each tensor carries room for a canvas behind its S columns, so that denoising need not copy the context.
        self._keys: list[Tensor | None] = [None] * config.num_hidden_layers
        self._values: list[Tensor | None] = [None] * config.num_hidden_layers

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return sum(t.nbytes for t in [*self._keys, *self._values] if t is not None)

    def begin(self, counts: list[int], width: int) -> tuple[_Pass, Tensor]:
        """Plan an encoder pass over ``width`` columns of which row b uses the first ``counts[b]``.

        Returns the plan and the new tokens' positions [B, width] (padding gets -1).
        """
        lengths = [have + new for have, new in zip(self.lengths, counts, strict=True)]
        column = torch.arange(width, device=self.device)
        even = len(set(self.lengths)) == 1 and all(count == width for count in counts)
        if even:
            new = (column + self.lengths[0]).expand(self.batch_size, width)
        else:
            start = torch.tensor(self.lengths, device=self.device).unsqueeze(1)
            filled = column < torch.tensor(counts, device=self.device).unsqueeze(1)
            new = torch.where(filled, start + column, -1)
        positions, keep = {}, {}
        for kind, cached in self.positions.items():
            both = torch.cat([cached, new], dim=1)
            room = max(lengths) if kind == FULL else min(max(lengths), self.config.sliding_window - 1)
            if even and cached.shape[1] <= self.lengths[0]:  # no empty columns among the cached ones
                keep[kind] = slice(both.shape[1] - min(room, both.shape[1]), both.shape[1])
            else:  # sort every row's columns by position, empty ones first, and keep the last
                keep[kind] = both.argsort(dim=1, stable=True)[:, both.shape[1] - room :]
            positions[kind] = both
        return _Pass(lengths, positions, keep), new

    def extend(self, plan: _Pass, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add a layer's new keys and values [B, Hkv, T, d]; returns old and new ones together, [B, Hkv, S + T, d]."""
        keys, values = self._context(layer)
        if keys is not None and values is not None:
            key, value = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
        keep = plan.keep[self.config.layers[layer].kind]
        self._keys[layer], self._values[layer] = self._stored(key, keep), self._stored(value, keep)
        return key, value

    def finish(self, plan: _Pass) -> None:
        """Make the plan's tokens part of the past."""
        for kind, positions in plan.positions.items():
            keep = plan.keep[kind]
            self.positions[kind] = positions[:, keep] if isinstance(keep, slice) else positions.gather(1, keep)
        self.lengths = plan.lengths

    def with_canvas(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The context's keys and values followed by a canvas' own, [B, Hkv, S + C, d]; the past is left as it is."""
        keys, values = self._keys[layer], self._values[layer]
        if keys is None or values is None:
            return key, value
        start, width = self.positions[self.config.layers[layer].kind].shape[1], key.shape[2]
        if torch.is_grad_enabled() or keys.shape[2] < start + width:
            return (torch.cat([keys[:, :, :start], key], dim=2), torch.cat([values[:, :, :start], value], dim=2))
        keys[:, :, start : start + width] = key
        values[:, :, start : start + width] = value
        return keys[:, :, : start + width], values[:, :, : start + width]

    def select(self, rows: list[int]) -> KVCache:
        """A cache of these rows alone (copied), in this order."""
        other = KVCache(self.config, len(rows), self.device)
        index = torch.tensor(rows, dtype=torch.long, device=self.device)
        other.lengths = [self.lengths[row] for row in rows]
        other.positions = {kind: p.index_select(0, index) for kind, p in self.positions.items()}
        other._keys = [None if k is None else k.index_select(0, index) for k in self._keys]
        other._values = [None if v is None else v.index_select(0, index) for v in self._values]
        return other

    def snapshot(self) -> KVCache:
        """This past, kept: the same memory, for reading. To go on from it, take a `select` of it."""
        other = KVCache(self.config, self.batch_size, self.device)
        other.lengths, other.positions = list(self.lengths), dict(self.positions)
        other._keys, other._values = list(self._keys), list(self._values)
        return other

    def replace(self, rows: list[int], part: KVCache) -> KVCache:
        """This cache with the given rows taken from ``part``, in order."""
        rest = [row for row in range(self.batch_size) if row not in rows]
        if not rest and rows == sorted(rows):
            return part
        merged = KVCache.concat([self.select(rest), part]) if rest else part
        order = {row: place for place, row in enumerate([*rest, *rows])}
        return merged.select([order[row] for row in range(self.batch_size)])

    @staticmethod
    def concat(caches: list[KVCache]) -> KVCache:
        """One batch of all the rows of ``caches``; shorter contexts are padded in front with empty columns."""
        first = caches[0]
        out = KVCache(first.config, sum(c.batch_size for c in caches), first.device)
        out.lengths = [length for c in caches for length in c.lengths]
        widths = {kind: max(c.positions[kind].shape[1] for c in caches) for kind in first.positions}
        for kind, width in widths.items():
            parts = [c.positions[kind] for c in caches]
            out.positions[kind] = torch.cat(
                [torch.nn.functional.pad(p, (width - p.shape[1], 0), value=-1) for p in parts])
        for layer in range(first.config.num_hidden_layers):
            width = widths[first.config.layers[layer].kind]
            for target, source in ((out._keys, 0), (out._values, 1)):
                parts = [c._context(layer)[source] for c in caches]
                held = [p for p in parts if p is not None]
                if not held:
                    continue
                padded = [_widen(p if p is not None else held[0].new_empty(c.batch_size, held[0].shape[1], 0,
                                                                          held[0].shape[3]), width)
                          for p, c in zip(parts, caches, strict=True)]
                target[layer] = out._with_room(torch.cat(padded))
        return out

    def _context(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        keys, values = self._keys[layer], self._values[layer]
        if keys is None or values is None:
            return None, None
        width = self.positions[self.config.layers[layer].kind].shape[1]
        return keys[:, :, :width], values[:, :, :width]

    def _stored(self, tensor: Tensor, keep: slice | Tensor) -> Tensor:
        if isinstance(keep, slice):
            kept = tensor[:, :, keep]
        else:
            index = keep[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3])
            kept = tensor.gather(2, index)
        return self._with_room(kept)

    def _with_room(self, tensor: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return tensor
        batch, heads, _, dim = tensor.shape
        return torch.cat([tensor, tensor.new_empty(batch, heads, self.config.canvas_length, dim)], dim=2)


def _widen(tensor: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, 0, width - tensor.shape[2], 0))
