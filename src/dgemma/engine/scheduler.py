"""Who comes next, and how much is read in a step. Works on requests and numbers; knows nothing of the network."""

from __future__ import annotations

import itertools
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence

from dgemma.diffusion.row import Row


class FairQueue:
    """Waiting rows: first come, first served within a client, and the clients take turns."""

    def __init__(self) -> None:
        self._lines: OrderedDict[str, deque[Row]] = OrderedDict()  # the client whose turn it is stands first

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[Row]:
        return itertools.chain.from_iterable(self._lines.values())

    def push(self, row: Row) -> None:
        self._lines.setdefault(row.request.client, deque()).append(row)

    def peek(self) -> Row | None:
        """The row that comes next. It stays next until it is taken, so nobody is overtaken for being large."""
        return next(iter(self._lines.values()))[0] if self._lines else None

    def pop(self) -> Row:
        """Take the row that comes next; its client goes to the end of the line."""
        client, line = self._lines.popitem(last=False)
        row = line.popleft()
        if line:
            self._lines[client] = line
        return row

    def remove(self, wanted: Callable[[Row], bool]) -> list[Row]:
        """Take out all rows of a kind."""
        gone = [row for line in self._lines.values() for row in line if wanted(row)]
        for client, line in list(self._lines.items()):
            rest = deque(row for row in line if not wanted(row))
            if rest:
                self._lines[client] = rest
            else:
                del self._lines[client]
        return gone


def shares(unread: Sequence[int], budget: int) -> list[int]:
    """How much of each unread text to read in one step of at most ``budget`` tokens: an equal share for everybody.

    What short texts leave over goes to the longer ones: a long prompt neither waits for short ones nor holds them up.
    """
    given = [0] * len(unread)
    order = sorted(range(len(unread)), key=lambda index: unread[index])
    for place, index in enumerate(order):
        given[index] = min(unread[index], max(budget, 0) // (len(order) - place))
        budget -= given[index]
    return given


class Memory:
    """Memory promised to requests, bytes. ``limit`` None: there is no limit."""

    def __init__(self, limit: int | None):
        self.limit, self.reserved = limit, 0

    def fits(self, size: int) -> bool:
        """Whether so much more may be promised; one request alone always may."""
        return self.limit is None or not self.reserved or self.reserved + size <= self.limit
