"""Who runs, in what memory, and how much is read in a step.

Works on requests, what they hold and how much that may become; runs nothing.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right, insort
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from dgemma.diffusion.prompt import SoftSpan
from dgemma.diffusion.request import Request
from dgemma.diffusion.sequence import SequenceState
from dgemma.engine.prefixes import Prefix, PrefixStore
from dgemma.engine.runner import Slot
from dgemma.errors import ContextLengthError
from dgemma.memory.inference import sequence_bytes, working_bytes
from dgemma.nn import DiffusionTransformer


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


class Scheduler:
    """The requests that run (``slots``, at most ``most``), those that wait, and the memory that they are promised.

    A request is promised memory for its prompt and a canvas, and more as canvases follow, to the oldest first; what
    ``memory`` has lent of that is the prefixes' as long as nobody needs it. Whoever there is none for waits until
    others have finished; when all wait the youngest is to give way (`pause`): what it has read is let go, and read
    again when there is room. It has lost nothing then, and its tokens are the same.
    """

    def __init__(self, network: DiffusionTransformer, prefixes: PrefixStore, memory: Memory, most: int):
        self.network, self.prefixes, self.memory, self.most = network, prefixes, memory, most
        self.slots: list[Slot] = []
        self.paused: list[Slot] = []  # those that gave way, the oldest first; they come before what waits
        self._waiting = FairQueue()
        self._ages = itertools.count()

    @property
    def busy(self) -> bool:
        """Whether any request is running or waiting."""
        return bool(self.slots or self.paused or self._waiting)

    def sequences(self) -> list[SequenceState]:
        """All there are."""
        return [*(slot.sequence for slot in [*self.slots, *self.paused]), *self._waiting]

    # How much memory a request needs

    def check(self, request: Request) -> None:
        """Raises ContextLengthError when a request cannot run in the memory there is."""
        needed, most = self.memory_for(len(request.prompt_ids), request.spans), self.memory.most
        if most is not None and needed > most:
            raise ContextLengthError(f"the prompt of {len(request.prompt_ids)} tokens and one canvas need "
                                     f"{_mib(needed)} of memory; there are {_mib(most)}")
        bounded = self.bounded(request)
        if bounded is not request and request.constraint is not None:
            try:
                bounded.check(self.network.config)
            except ValueError as error:
                raise ContextLengthError(f"in the memory there is ({_mib(most or 0)}) this answer may have "
                                         f"{bounded.settings.max_tokens} tokens: {error}") from error

    def bounded(self, request: Request) -> Request:
        """The request, its answer no longer than all the memory there is allows: with it its length, and form, end."""
        most = self.memory.most
        if most is None or self.memory_of(request) <= most:
            return request
        lengths = range(1, request.settings.max_tokens + 1)
        length = bisect_right(lengths, most, key=lambda n: self.memory_of(request, n))
        return replace(request, settings=request.settings.replace(max_tokens=max(length, 1)))

    def memory_of(self, request: Request, max_tokens: int | None = None) -> int:
        """The most memory that a request can come to need, bytes; with an answer so long, if that is said."""
        return self.memory_for(self._most_tokens(request, max_tokens), request.spans)

    def memory_for(self, tokens: int, spans: Sequence[SoftSpan] = ()) -> int:
        """Memory of a request that holds so many tokens and has a canvas open, bytes.

        Keys and values, its part of a pass, and the soft tokens of its pictures (``spans``), which stay with it.
        """
        config, item = self.network.config, self.network.dtype.itemsize
        if self.network.device.type != "cpu":  # there a page is memory as soon as it is begun
            tokens = -(-tokens // self.prefixes.page) * self.prefixes.page
        return (sequence_bytes(config, tokens, self.network.cache_type or item)
                + working_bytes(config, config.canvas_length, item)
                + sum(span.embeddings.nbytes for span in spans))

    def _most_tokens(self, request: Request, max_tokens: int | None = None) -> int:
        """The most tokens whose keys and values a request can come to hold; with an answer so long, if that is said."""
        config = self.network.config
        max_tokens = request.settings.max_tokens if max_tokens is None else max_tokens
        canvases = -(-max_tokens // config.canvas_length)
        behind = (canvases - 1) * config.canvas_length
        if request.thoughts is not None:  # one that is cut off makes room for another canvas
            behind = max_tokens - 1
        return min(len(request.prompt_ids) + behind, config.max_position_embeddings)

    # Coming and going

    def push(self, sequence: SequenceState) -> None:
        """Let a sequence wait for its turn."""
        self._waiting.push(sequence)

    def following(self) -> SequenceState | None:
        """What comes next; None if nothing does, or there is no slot or memory for it. Those that run come first."""
        if len(self.slots) >= self.most or any(slot.stalled for slot in self.slots):
            return None
        sequence = self.paused[0].sequence if self.paused else self._waiting.peek()
        if sequence is None or not self.memory.fits(self.memory_for(self._tokens_ahead(sequence),
                                                                     sequence.request.spans)):
            return None
        return sequence

    def admit(self, prefix: Prefix) -> None:
        """Slot what is `following`, on what ``prefix`` has read."""
        if self.paused:
            slot = self.paused.pop(0)
            slot.prefix = prefix
        else:
            slot = Slot(self._waiting.pop(), prefix, age=next(self._ages))
        slot.tokens = self._tokens_ahead(slot.sequence)
        slot.memory = self.memory_for(slot.tokens, slot.sequence.request.spans)
        self._promise(slot.memory)
        self.slots.append(slot)

    def _tokens_ahead(self, sequence: SequenceState) -> int:
        """How many tokens a sequence holds when it has read the canvas that comes, as far as it ever will."""
        return min(len(sequence.context) + sequence.config.canvas_length, self._most_tokens(sequence.request))

    def grow(self) -> Slot | None:
        """Promise what the canvases that follow need, to the oldest first. If nobody can go on then, the youngest."""
        short = False
        for slot in sorted(self.slots, key=_age):
            tokens = self._tokens_ahead(slot.sequence)
            slot.stalled = False
            if tokens <= slot.tokens:
                continue
            needed = self.memory_for(tokens, slot.sequence.request.spans)
            if short or not self.memory.fits(needed - slot.memory):
                short = slot.stalled = True
                continue
            self._promise(needed - slot.memory)
            slot.memory, slot.tokens = needed, tokens
        return max(self.slots, key=_age) if short and all(slot.stalled for slot in self.slots) else None

    def pause(self, slot: Slot, nothing: Prefix) -> None:
        """Let go of what a request has read; it goes on later, from its committed tokens and where its noise stands."""
        self.leave(slot)
        slot.prefix, slot.memory, slot.tokens, slot.stalled = nothing, 0, 0, False
        insort(self.paused, slot, key=_age)

    def leave(self, slot: Slot) -> None:
        """A request is over, or to come again later."""
        self.slots.remove(slot)
        slot.prefix.close()
        self._promise(-slot.memory)

    def recall(self, wanted: Callable[[SequenceState], bool], nothing: Callable[[SequenceState], Prefix]) -> list[Slot]:
        """The slots of all sequences of a kind; those that do not run have one from now on, with ``nothing`` read."""
        self.slots += [Slot(sequence, nothing(sequence)) for sequence in self._waiting.remove(wanted)]
        self.slots += [slot for slot in self.paused if wanted(slot.sequence)]
        self.paused = [slot for slot in self.paused if not wanted(slot.sequence)]
        return [slot for slot in self.slots if wanted(slot.sequence)]

    def clear(self) -> list[SequenceState]:
        """Drop everything; what there was."""
        sequences = self.sequences()
        self._waiting, self.paused = FairQueue(), []
        for slot in list(self.slots):
            self.leave(slot)
        return sequences

    def _promise(self, size: int) -> None:
        """Promise so many bytes more (or fewer), some of those that prefixes are kept in if there are no others."""
        self.memory.reserved += size
        if self.memory.lent:
            self.prefixes.lend(self.memory.borrowed)


def _age(slot: Slot) -> int:
    return slot.age


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f} MiB"
