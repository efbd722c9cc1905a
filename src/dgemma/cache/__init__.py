"""Keys and values of what was read, and who sees which of them.

The network asks for two kinds of passes (`Cache`) and, in each, for attention layer by layer (`Pass`). Who owns the
memory implements these: `pages` that any number of sequences share (the engine's), and `store`, the cache of a fixed
batch, which keeps gradients. `visibility` is the one place that says what a query sees. Knows nothing of weights.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Protocol

from torch import Tensor

from dgemma.cache.store import CACHE_TYPES, KVCache, check_cache_type
from dgemma.cache.visibility import Spans

__all__ = ["CACHE_TYPES", "Cache", "KVCache", "Pass", "Spans", "check_cache_type"]


class Pass(Protocol):
    """One pass over T tokens of each of B rows, or a piece of one."""

    @property
    def positions(self) -> Tensor:
        """[B, T], -1 where a row has padding."""
        ...

    @property
    def checkpointed(self) -> Collection[int]:
        """The layers to run again for their gradients, rather than to keep all that these need."""
        ...

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [B, T, Hq, d], key and value [B, Hkv, T, d] of this pass -> what the queries see, in sum [B, T, Hq·d].

        Called once for every layer, in order; again where a layer is run again for its gradient.
        """
        ...

    def finish(self) -> None:
        """All layers have run: a causal pass' tokens are part of the past now."""
        ...


class Cache(Protocol):
    """What was read, of B rows."""

    @property
    def batch_size(self) -> int: ...

    def reading(self, width: int, lengths: Sequence[int] | None,
                spans: Spans | None) -> Iterator[tuple[slice, Pass]]:
        """Causal passes over the next ``width`` tokens: the columns of each, to be finished before the next is made.

        ``lengths`` [B]: how many of the tokens are a row's own (None: all), the rest is padding. ``spans`` are pictures
        (`Spans`). Raises ValueError for lengths that do not fit.
        """
        ...

    def denoising(self, width: int) -> Pass:
        """A pass over canvases of ``width`` tokens that stand behind what was read; leaves no trace."""
        ...
