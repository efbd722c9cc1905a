"""What was made lately, kept as long as it takes no more than so many bytes together.

Knows nothing of what it keeps but how large that says it is.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """Something that knows its memory, which may grow while it is used."""

    @property
    def nbytes(self) -> int: ...


V = TypeVar("V", bound=Sized)


class ByteCache(Generic[V]):
    """Values by key, at most ``limit`` bytes of them; those that were asked for longest ago go first.

    A value that alone is larger is not kept. Values are measured anew whenever the cache is used. For any thread.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._values: OrderedDict[Hashable, tuple[V, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._values)

    @property
    def nbytes(self) -> int:
        """Memory of all that is kept, as it is now."""
        with self._lock:
            return self._total()

    def get(self, key: Hashable) -> V | None:
        """The value of a key, which counts as used just now; None when it is not kept."""
        with self._lock:
            found = self._values.get(key)
            if found is None:
                return None
            self._values.move_to_end(key)
            self._trim()
            return found[0]

    def put(self, key: Hashable, value: V, beside: int = 0) -> None:
        """Keep a value; ``beside``: bytes that its key takes."""
        with self._lock:
            self._values.pop(key, None)
            self._values[key] = value, beside
            self._trim()

    def clear(self) -> None:
        with self._lock:
            self._values.clear()

    def _total(self) -> int:
        return sum(value.nbytes + beside for value, beside in self._values.values())

    def _trim(self) -> None:
        total = self._total()
        while total > self.limit and self._values:
            _, (value, beside) = self._values.popitem(last=False)
            total -= value.nbytes + beside
