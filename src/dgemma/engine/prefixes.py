"""Contexts that were read lately, kept so that a conversation's next turn reads only what is new."""

from __future__ import annotations

from collections import deque

from dgemma.nn import KVCache


class PrefixStore:
    """The caches (one row each) of the last few contexts; the oldest goes first."""

    def __init__(self, capacity: int = 2):
        self._entries: deque[tuple[list[int], KVCache]] = deque(maxlen=capacity)

    def longest(self, context: list[int]) -> tuple[int, KVCache | None]:
        """How many tokens of ``context`` the best entry covers, and a cache to go on from; (0, None) if none does.

        Only whole entries count: a sliding layer has forgotten what a shortened one would need.
        """
        found = [entry for entry in self._entries if context[: len(entry[0])] == entry[0]]
        if not found:
            return 0, None
        known, cache = max(found, key=lambda entry: len(entry[0]))
        return len(known), cache.snapshot()

    def keep(self, context: list[int], cache: KVCache) -> None:
        """Remember ``cache`` (one row) as the cache of ``context``."""
        self._entries = deque((e for e in self._entries if e[0] != context), maxlen=self._entries.maxlen)
        self._entries.append((list(context), cache.snapshot()))

    def clear(self) -> None:
        self._entries.clear()
