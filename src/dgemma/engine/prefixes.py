"""Contexts that were read lately, kept so that a conversation's next turn reads only what is new."""

from __future__ import annotations

from dataclasses import dataclass

from dgemma.nn import KVCache


@dataclass(frozen=True)
class _Entry:
    context: list[int]
    cache: KVCache  # one row


class PrefixStore:
    """The last prompt that was read, and the last context that an answer of several canvases grew to.

    Two slots, because the next turn may continue either: the longer one if the answer stands in it as it was written,
    the prompt if not (thoughts are not sent back).
    """

    def __init__(self) -> None:
        self._prompt: _Entry | None = None
        self._continuation: _Entry | None = None

    def longest(self, context: list[int]) -> tuple[int, KVCache | None]:
        """How many tokens of ``context`` the best entry covers, and a cache to go on from; (0, None) if none does.

        Only whole entries count: a sliding layer has forgotten what a shortened one would need.
        """
        entries = [e for e in (self._prompt, self._continuation) if e and context[: len(e.context)] == e.context]
        if not entries:
            return 0, None
        best = max(entries, key=lambda entry: len(entry.context))
        return len(best.context), best.cache.select([0])

    def keep_prompt(self, context: list[int], cache: KVCache) -> None:
        """Remember the cache (one row) of a prompt."""
        self._prompt = _Entry(list(context), cache.snapshot())

    def keep_continuation(self, context: list[int], cache: KVCache) -> None:
        """Remember the cache (one row) of a prompt and the canvases committed behind it."""
        self._continuation = _Entry(list(context), cache.snapshot())

    def clear(self) -> None:
        """Forget both."""
        self._prompt = self._continuation = None
