"""Who comes next, and how much is read in a step. Works on requests and numbers; knows nothing of the network."""

from __future__ import annotations

import itertools
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence

from dgemma.diffusion.sequence import SequenceState


class FairQueue:
    """Waiting sequences: first come, first served within a user; a client's users take turns, and so do the clients.

    A client with many users has one turn as every other client has, and its users share that.
    """

    def __init__(self) -> None:
        # client -> user -> sequences; whose turn it is stands first, and no line is empty
        self._clients: OrderedDict[str, OrderedDict[str, deque[SequenceState]]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self._lines()))

    def __iter__(self) -> Iterator[SequenceState]:
        return itertools.chain.from_iterable(self._lines())

    def _lines(self) -> Iterator[deque[SequenceState]]:
        return itertools.chain.from_iterable(users.values() for users in self._clients.values())

    def push(self, sequence: SequenceState) -> None:
        users = self._clients.setdefault(sequence.request.client, OrderedDict())
        users.setdefault(sequence.request.user, deque()).append(sequence)

    def peek(self) -> SequenceState | None:
        """The sequence that comes next. It stays next until it is taken, so nobody is overtaken for being large."""
        return next(self._lines())[0] if self._clients else None

    def pop(self) -> SequenceState:
        """Take what comes next; its user goes to the end of the client's line, the client to that of all."""
        client, users = self._clients.popitem(last=False)
        user, line = users.popitem(last=False)
        sequence = line.popleft()
        if line:
            users[user] = line
        if users:
            self._clients[client] = users
        return sequence

    def remove(self, wanted: Callable[[SequenceState], bool]) -> list[SequenceState]:
        """Take out all sequences of a kind."""
        gone = [sequence for sequence in self if wanted(sequence)]
        for client, users in list(self._clients.items()):
            for user, line in list(users.items()):
                rest = deque(sequence for sequence in line if not wanted(sequence))
                if rest:
                    users[user] = rest
                else:
                    del users[user]
            if not users:
                del self._clients[client]
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
    """Memory promised to requests, bytes. ``limit`` None: there is no limit; ``lent`` more are another's if need be."""

    def __init__(self, limit: int | None, lent: int = 0):
        self.limit, self.lent, self.reserved = limit, lent, 0

    @property
    def most(self) -> int | None:
        """What one request alone may have."""
        return None if self.limit is None else self.limit + self.lent

    @property
    def borrowed(self) -> int:
        """How much of what is lent has been promised."""
        return 0 if self.limit is None else min(max(self.reserved - self.limit, 0), self.lent)

    def take(self, nbytes: int) -> None:
        """Take so much (or give it back) for what is no request's."""
        if self.limit is not None:
            self.limit -= nbytes

    def fits(self, size: int) -> bool:
        """Whether so much more may be promised; one request alone always may."""
        return self.most is None or not self.reserved or self.reserved + size <= self.most
