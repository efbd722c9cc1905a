"""An engine in a thread of its own, for callers in an asyncio loop.

One `Service` holds a network and its adapters, and answers any number of requests at a time. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import itertools
import logging
import math
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Protocol, Self, TypeVar

from dgemma.diffusion.events import Denoised, Event, Failed, Finished
from dgemma.diffusion.request import MakeReader, Request
from dgemma.engine.engine import Counts, Engine
from dgemma.engine.prefixes import PrefixStore
from dgemma.engine.registry import AdapterRegistry
from dgemma.errors import DgemmaError
from dgemma.memory.inference import request_memory
from dgemma.nn import DiffusionTransformer
from dgemma.nn.loaded import LoadedAdapter, adapter_bytes
from dgemma.nn.packed import weight_bytes
from dgemma.weights.load import network_shapes

PREFIX_SHARE = 4  # one part in so many of the memory for requests keeps what was read before

MOST_NAMES = 100  # of adapters whose requests are counted by name, those that are offered now beside
OTHERS = "(others)"  # stands for adapters that are not there any more; none can be called so

FORM_THREADS = 2  # that work out forms of answers

T = TypeVar("T")
_forms = ThreadPoolExecutor(FORM_THREADS, thread_name_prefix="dgemma-forms")

log = logging.getLogger(__name__)


async def in_form_thread(function: Callable[[], T]) -> T:
    """What a function returns that may have to work out the form of an answer, which can take seconds.

    Forms have few threads of their own: however many of them wait there, the prompts of others are read meanwhile.
    Who is cancelled leaves the line; what has begun goes on to its end.
    """
    context = contextvars.copy_context()
    return await asyncio.get_running_loop().run_in_executor(_forms, context.run, function)


class Overloaded(Exception):  # noqa: N818  (nothing is wrong with the request)
    """The queue is full, or the service is stopping; try again in ``retry_after`` seconds."""

    def __init__(self, message: str, retry_after: float, stopping: bool = False):
        super().__init__(message)
        self.retry_after, self.stopping = retry_after, stopping


class RequestEvents(Protocol):
    """The events of a request that was taken, from CanvasStarted to Finished or Failed; each is given once.

    To be closed, whether or not anything was fetched: that cancels the request within one step if it is not over.
    """

    def __aiter__(self) -> Self: ...

    async def __anext__(self) -> Event: ...

    async def aclose(self) -> None: ...


@dataclass(frozen=True)
class Weights:
    """What the network holds."""

    nbytes: int
    type: str  # of most of these bytes, as GGUF calls it
    parameters: int
    on_gpu: bool


@dataclass(frozen=True)
class AdapterStats:
    """What one adapter's name stands for, and has stood for."""

    nbytes: int  # memory; of one that was replaced, too, until its last request is over
    running: int  # requests that run or wait
    requests: int  # so far


@dataclass
class Stats(Counts):
    """What the engine has done so far, and how things stand now."""

    waiting: int = 0
    running: int = 0
    reserved_bytes: int = 0  # memory promised to the running requests
    request_budget: int = 0  # memory that may be
    prefix_bytes: int = 0  # memory of what is kept to be read again
    prefix_budget: int = 0
    prefix_hits: int = 0  # requests that found some of their prompt there
    adapters: dict[str, AdapterStats] = field(default_factory=dict)  # by name


class Service:
    """Answers requests of many callers in shared batches.

    ``make_reader`` makes what reads a request's answer; ``prefixes`` keep what was read before, within a share of the
    memory. At most ``max_num_seqs`` requests run at a time, and as many as ``memory`` bytes are enough for (None:
    measured); at most ``max_queue`` more wait.
    """

    def __init__(self, network: DiffusionTransformer, make_reader: MakeReader, prefixes: PrefixStore, *,
                 max_num_seqs: int = 32, max_queue: int = 256, memory: int | None = None):
        memory = request_memory(network) if memory is None else memory
        self.network, self.prefixes = network, prefixes
        self.prefixes.resize(memory // PREFIX_SHARE)
        self.engine = Engine(network, make_reader, max_num_seqs, self.prefixes,
                             memory=memory - self.prefixes.budget, lent=self.prefixes.budget, isolate=True,
                             whole_pages=True, between=self._receive)
        self.adapters = AdapterRegistry(network)
        self._adapter_requests: Counter[str] = Counter()
        self._changing = threading.Lock()  # what an adapter's name means; its requests reach the inbox before its end
        self._inbox: queue.SimpleQueue[Request | LoadedAdapter | int | None] = queue.SimpleQueue()
        self._mail = _Mail(max_num_seqs + max_queue)
        self._ids = itertools.count(1)
        self._thread = threading.Thread(target=self._work, daemon=True, name="dgemma-engine")
        self._stopping = self._cut = self._last = self._gone = False
        self._seconds = 1.0  # that an answer took lately, on average

    def start(self) -> None:
        """Begin to work; a service works once only."""
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """Whether the engine's thread is there."""
        return self._thread.is_alive() and not self._gone

    def weights(self) -> Weights:
        """What the network holds, without its adapters."""
        kinds = weight_bytes(self.network)
        parameters = sum(math.prod(shape) for shape in network_shapes(self.network.config).values())
        return Weights(kinds.total(), kinds.most_common(1)[0][0], parameters, self.network.device.type == "cuda")

    def stats(self) -> Stats:
        engine = self.engine
        return Stats(**asdict(engine.counts), waiting=max(len(self._mail) - engine.running, 0), running=engine.running,
                     reserved_bytes=engine.memory.reserved, request_budget=engine.memory.limit or 0,
                     prefix_bytes=self.prefixes.nbytes, prefix_budget=self.prefixes.budget - self.prefixes.lent,
                     prefix_hits=self.prefixes.hits, adapters=self._adapter_stats())

    def _adapter_stats(self) -> dict[str, AdapterStats]:
        sizes: Counter[str] = Counter()
        for adapter in self.engine.all_adopted():
            sizes[adapter.name] += adapter.nbytes
        used = Counter(mailbox.adapter.name for mailbox in self._mail.all() if mailbox.adapter is not None)
        with self._changing:
            requests = self._adapter_requests.copy()
        return {name: AdapterStats(sizes[name], used[name], requests.get(name, 0))
                for name in [*sizes, *(requests.keys() - sizes)]}

    def _count_request(self, name: str) -> None:
        """Count a request of an adapter. Clients may load adapters under ever new names: not all of them are kept."""
        counts = self._adapter_requests
        counts[name] = counts.pop(name, 0) + 1  # the names stand in the order of their last requests
        if len(counts) > MOST_NAMES:
            known = self.adapters.paths()
            gone = next((name for name in counts if name != OTHERS and name not in known), None)
            if gone is not None:
                counts[OTHERS] += counts.pop(gone)

    def load_adapter(self, name: str, path: str | Path) -> bool:
        """Read an adapter's files and offer it under a name; whether in place of another one. For any thread.

        Requests that came before keep what they began with. Raises DgemmaError, and changes nothing, when the files do
        not fit this model or its memory.
        """
        files = self.adapters.read(name, path)
        self._check_room(path, adapter_bytes(files.factors))
        adapter = self.adapters.loaded(name, files)
        with self._changing:
            self._check_room(path, adapter.nbytes)  # others may have come meanwhile
            self.engine.adopt(adapter)
            before = self.adapters.put(adapter, path)
            if before is not None:
                self._inbox.put(before)
        return before is not None

    def _check_room(self, path: str | Path, nbytes: int) -> None:
        room = self.engine.room
        if room is not None and nbytes > room:
            raise DgemmaError(f"{path}: this adapter needs {nbytes / 2**20:.1f} MiB of memory; there are "
                              f"{room / 2**20:.1f} MiB beside what requests need at least")

    def unload_adapter(self, name: str) -> None:
        """Offer an adapter no more; requests that came before still finish. Raises `UnknownAdapterError`."""
        with self._changing:
            self._inbox.put(self.adapters.take(name))

    async def admit(self, request: Request) -> RequestEvents:
        """Take a request, whose turn will come, and return its events; its id is replaced.

        Its adapter stays its own even if that is not offered any more. Raises `Overloaded` when the queue is full,
        ValueError when the network, or its memory, cannot run it. Of drafts (Denoised) that were not fetched in time
        only the last is kept, so a slow reader costs no more memory than the answer takes.
        """
        self._refuse(request)
        check = functools.partial(self.engine.check, request)
        await (asyncio.to_thread(check) if request.constraint is None else in_form_thread(check))
        with self._changing:
            request = replace(request, id=next(self._ids))
            mailbox = _Mailbox(asyncio.get_running_loop(), request, self._give_up)
            self._refuse(request, mailbox)
            if self._gone:  # just now: nobody would ever answer
                self._mail.pop(request.id)
                raise _stopping()
            self._inbox.put(request)
            if (adapter := request.adapter) is not None:
                self._count_request(adapter.name)
                if not self.adapters.offers(adapter):  # not any more, since the request came
                    self.engine.adopt(adapter)
                    self._inbox.put(adapter)
        return mailbox

    def _give_up(self, request: int) -> None:
        self._mail.pop(request)
        self._inbox.put(request)

    async def stop(self, grace: float = 30.0) -> int:
        """Take no more requests, wait for those that run; after ``grace`` seconds end them. How many were cut short."""
        self._stopping = True
        end = time.monotonic() + grace
        while len(self._mail) and self.healthy and time.monotonic() < end:
            await asyncio.sleep(0.02)
        cut = len(self._mail)
        self._cut = True
        self._inbox.put(None)
        while self.healthy:
            await asyncio.sleep(0.02)
        return cut

    def _refuse(self, request: Request, mailbox: _Mailbox | None = None) -> None:
        """Raise `Overloaded` if a request cannot be taken now; if it can, and has a mailbox, put that in its place."""
        if self._stopping or self._gone:
            raise _stopping()
        if (refusal := self._mail.refusal(request, mailbox)) is not None:
            raise Overloaded(refusal, self._patience())

    def _patience(self) -> float:
        """Seconds until about as many requests have ended as run at a time."""
        return min(max(1.0, self._seconds * len(self._mail) / max(self.engine.max_batch, 1)), 60.0)

    def _work(self) -> None:
        """The engine's thread. However it ends, nobody waits for it any more then."""
        try:
            self._serve()
        finally:
            self._gone = True
            self._deliver([Failed(mailbox.request, "the engine has stopped") for mailbox in self._mail.all()])

    def _serve(self) -> None:
        """What has come in, a step, what came out."""
        engine = self.engine
        while True:
            self._receive(wait=not (engine.busy or self._last))
            if not engine.busy:
                if self._last:
                    return
                continue
            if self._cut:
                engine.cancel_all()
            try:
                events = engine.step()
            except Exception as error:  # not one request's fault: none of them can go on
                log.critical("the engine failed; every request that runs ends", exc_info=error)
                events = engine.give_up(error)
            self._deliver(events)

    def _receive(self, wait: bool = False) -> None:
        """Take in what has come, and wait for something if there is nothing."""
        while wait or not self._inbox.empty():
            item, wait = self._inbox.get(), False
            if item is None:
                self._last = True
            elif isinstance(item, Request):
                self._submit(item)
            elif isinstance(item, LoadedAdapter):  # its last request has come
                self.engine.retire(item)
            else:
                self.engine.cancel(item)

    def _submit(self, request: Request) -> None:
        if self._mail.get(request.id) is None:
            return  # given up before it was seen
        try:
            self.engine.enqueue(request)  # checked before it was put in the inbox
        except Exception as error:
            self._deliver([Failed(request.id, f"{type(error).__name__}: {error}")])

    def _deliver(self, events: list[Event]) -> None:
        """Hand events to those who wait for them, with one call for each loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Mailbox, Event]]] = {}
        for event in events:
            over = isinstance(event, (Finished, Failed))
            mailbox = self._mail.pop(event.request) if over else self._mail.get(event.request)
            if isinstance(event, Finished):
                self._seconds += 0.1 * (event.generation.seconds - self._seconds)
            if mailbox is not None:
                by_loop.setdefault(mailbox.loop, []).append((mailbox, event))
        for loop, letters in by_loop.items():
            try:
                loop.call_soon_threadsafe(_put_all, letters)
            except RuntimeError:  # the loop is closed: nobody waits there any more
                for _, event in letters:
                    self._mail.pop(event.request)
                    self.engine.cancel(event.request)


class _Mailbox:
    """Events on their way to one caller (`RequestEvents`); used in the caller's loop only."""

    def __init__(self, loop: asyncio.AbstractEventLoop, request: Request, give_up: Callable[[int], None]):
        self.loop, self.request, self.client, self.user = loop, request.id, request.client, request.user
        self.adapter = request.adapter
        self._give_up = give_up
        self._over = False  # whether the last event was fetched, or nobody wants it any more
        self._events: deque[Event] = deque()
        self._some = asyncio.Event()

    def put(self, event: Event) -> None:
        if isinstance(event, Denoised) and self._events and isinstance(self._events[-1], Denoised):
            self._events.pop()
        self._events.append(event)
        self._some.set()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        if self._over:
            raise StopAsyncIteration
        while not self._events:
            self._some.clear()
            await self._some.wait()
        event = self._events.popleft()
        self._over = isinstance(event, (Finished, Failed))
        return event

    async def aclose(self) -> None:
        if not self._over:
            self._over = True
            self._give_up(self.request)


class _Mail:
    """The mailboxes of all requests that run or wait, at most ``most``; for any thread."""

    def __init__(self, most: int):
        self.most = most
        self._boxes: dict[int, _Mailbox] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._boxes)

    def all(self) -> list[_Mailbox]:
        with self._lock:
            return list(self._boxes.values())

    def get(self, request: int) -> _Mailbox | None:
        return self._boxes.get(request)

    def pop(self, request: int) -> _Mailbox | None:
        with self._lock:
            return self._boxes.pop(request, None)

    def refusal(self, request: Request, mailbox: _Mailbox | None) -> str | None:
        """Why there is no place for a request now; None if there is one, which its mailbox then takes.

        Who has half of all places, or more, leaves room for somebody else: a user a quarter of them, a client, whose
        users any number of names can be invented for, an eighth.
        """
        with self._lock:
            taken = len(self._boxes)
            if taken >= self.most:
                return f"{taken} requests are running or waiting, and no more can wait"
            users = [box.user for box in self._boxes.values() if box.client == request.client]
            for mine, part in ((users.count(request.user), 4), (len(users), 8)):
                if 2 * mine >= self.most and part * taken >= (part - 1) * self.most:
                    return f"{mine} requests of yours are running or waiting already"
            if mailbox is not None:
                self._boxes[mailbox.request] = mailbox
            return None


def _stopping() -> Overloaded:
    return Overloaded("the server is stopping", 10.0, stopping=True)


def _put_all(letters: list[tuple[_Mailbox, Event]]) -> None:
    for mailbox, event in letters:
        mailbox.put(event)
