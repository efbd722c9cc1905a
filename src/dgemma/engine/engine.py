"""The denoising loop: requests in different states, one batch.

Every `step` seats what waits, reads some of what is unread (prompts, finished canvases that another one follows), runs
one denoising step for every open canvas, and closes the canvases that are done. Knows nothing of HTTP or of text, but
for `read`, which makes a reader of a request's answer.
"""

from __future__ import annotations

import itertools
import logging
import threading
from bisect import bisect_right, insort
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from dgemma.diffusion.events import Event, Failed, Finished, Generation
from dgemma.diffusion.prompt import uncut
from dgemma.diffusion.row import Read, Request, Row, unread
from dgemma.diffusion.sampler import Sampler
from dgemma.engine.fingerprint import fingerprint
from dgemma.engine.prefixes import Prefix, PrefixStore
from dgemma.engine.runner import Outcome, Runner, Seat, logprobs_of
from dgemma.engine.scheduler import FairQueue, Memory, shares
from dgemma.errors import ContextLengthError, DgemmaError, NotFiniteError
from dgemma.memory.inference import sequence_bytes, working_bytes
from dgemma.nn import DiffusionTransformer
from dgemma.nn.activation import MountedAdapter
from dgemma.nn.adapters import LowRank

# Numbers of hidden states that a CPU works on at a time. More rows in a pass reuse weights better, but beyond about so
# many its matrices leave the caches: at the 26B's width 4 canvases cost 1.6 s each, 8 cost 1.9 (1 alone: 1.8).
CACHED = 3 << 20
PIECE = 512  # tokens of prompts that one step may always read; a stop is heard between two pieces

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass
class Counts:
    """What an engine has done so far."""

    steps: int = 0  # forward passes over canvases
    rows: int = 0  # canvases denoised by these, all together
    canvases: int = 0  # committed
    redrawn: int = 0  # first canvases that came out empty, and were drawn again
    prompt_tokens: int = 0  # asked for
    cached_tokens: int = 0  # of these, read before by somebody
    read_tokens: int = 0  # of these, read here (the rest was cancelled before)
    answer_tokens: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    gave_way: int = 0  # times that a request let its memory go for others, to go on later


class Engine:
    """Runs requests on a network, up to ``max_batch`` at a time, and as many as ``memory`` bytes are enough for.

    ``read`` makes what reads a request's answer (by default nothing does: answers are tokens without text). A request's
    randomness is its own, so its tokens do not depend on who shares the batch (up to rounding, which in bfloat16 can
    tip a choice). ``prefixes`` may outlive the engine. With ``isolate``, whatever goes wrong inside a
    request ends that one with a Failed event; without, it is raised. ``between`` is called between the passes of a
    step; it may `submit`, `cancel` and `retire`. With ``whole_pages`` only these are told of what was read before.
    ``runner`` takes sequences through the network, by default one with ``sampler``.

    A request is promised memory for its prompt and a canvas, and more as canvases follow, to the oldest first; ``lent``
    bytes of that are the prefixes' as long as nobody needs them. Whoever there is none for waits until others have
    finished; when all wait the youngest gives way: what it has read is let go, and read again when there is room. It
    has lost nothing then, and its tokens are the same. An answer ends where the memory of all would end.

    Requests of different adapters share steps, but not passes: a pass is of one adapter's requests, which is put on the
    network for it. Between two steps the network is as it was found.
    """

    def __init__(self, network: DiffusionTransformer, read: Read = unread, max_batch: int = 32,
                 prefixes: PrefixStore | None = None, sampler: Sampler | None = None, *,
                 memory: int | None = None, lent: int = 0, isolate: bool = False,
                 whole_pages: bool = False, between: Callable[[], None] | None = None,
                 runner: Runner | None = None):
        self.network, self.read, self.max_batch = network, read, max_batch
        self.prefixes = prefixes or PrefixStore()
        self.runner = runner or Runner(network, sampler)
        self.isolate, self.whole_pages, self.between = isolate, whole_pages, between
        self.memory = Memory(memory, lent)
        self.counts = Counts()
        self._waiting = FairQueue()
        self._seats: list[Seat] = []
        self._paused: list[Seat] = []  # those that gave way, the oldest first; they come before what waits
        self._ages = itertools.count()
        self._weights: bytes | None = None  # the network's fingerprint, when it was last looked at
        self._events: list[Event] = []  # of the step that runs
        self._cancelled: set[int] = set()
        self._mounted: MountedAdapter | None = None
        self.adopted: Counter[MountedAdapter] = Counter()  # how often each was, less how often let go
        self.retired: list[MountedAdapter] = []  # adapters that only wait for their last requests
        self._adopting = threading.Lock()
        self._stop = False  # cancel everything; a plain flag, since signal handlers must not meet a lock

    @property
    def busy(self) -> bool:
        """Whether any request is running or waiting."""
        return bool(self._seats or self._paused or self._waiting)

    @property
    def waiting(self) -> int:
        return len(self._waiting) + len(self._paused)

    @property
    def running(self) -> int:
        return len(self._seats)

    def submit(self, request: Request) -> None:
        """Queue a request; raises ValueError as `check` does."""
        self.check(request)
        self.enqueue(request)

    def enqueue(self, request: Request) -> None:
        """Queue a request that `check` has found nothing wrong with."""
        self._waiting.push(Row(self._bounded(request), self.network.config, self.read))

    def check(self, request: Request) -> None:
        """Raises ValueError when the network cannot run a request, or not in the memory there is."""
        request.check(self.network.config)
        needed, most = self._memory_for(len(request.prompt_ids)), self.memory.most
        if most is not None and needed > most:
            raise ContextLengthError(f"the prompt of {len(request.prompt_ids)} tokens and one canvas need "
                                     f"{_mib(needed)} of memory; there are {_mib(most)}")
        bounded = self._bounded(request)
        if bounded is not request and request.constraint is not None:
            try:
                bounded.check(self.network.config)
            except ValueError as error:
                raise ContextLengthError(f"in the memory there is ({_mib(most or 0)}) this answer may have "
                                         f"{bounded.settings.max_tokens} tokens: {error}") from error

    def memory_of(self, request: Request) -> int:
        """The most memory that a request can come to need, bytes: keys and values, and its part of a pass."""
        return self._memory_for(self._most_tokens(request))

    def _most_tokens(self, request: Request, max_tokens: int | None = None) -> int:
        """The most tokens whose keys and values a request can come to hold; with an answer so long, if that is said."""
        config = self.network.config
        max_tokens = request.settings.max_tokens if max_tokens is None else max_tokens
        canvases = -(-max_tokens // config.canvas_length)
        behind = (canvases - 1) * config.canvas_length
        if request.thoughts is not None:  # one that is cut off makes room for another canvas
            behind = max_tokens - 1
        return min(len(request.prompt_ids) + behind, config.max_position_embeddings)

    def _bounded(self, request: Request) -> Request:
        """The request, its answer no longer than all the memory there is allows: with it its length, and form, end."""
        most = self.memory.most
        if most is None or self.memory_of(request) <= most:
            return request
        lengths = range(1, request.settings.max_tokens + 1)
        length = bisect_right(lengths, most, key=lambda n: self._memory_for(self._most_tokens(request, n)))
        return replace(request, settings=request.settings.replace(max_tokens=max(length, 1)))

    def _memory_for(self, tokens: int) -> int:
        config, item = self.network.config, self.network.dtype.itemsize
        return (sequence_bytes(config, tokens, self.network.cache_type or item)
                + working_bytes(config, config.canvas_length, item))

    def cancel(self, request_id: int) -> None:
        """End a request before its next denoising step; what it committed stays."""
        self._cancelled.add(request_id)

    def cancel_all(self) -> None:
        """End every request before its next denoising step, or the next piece of its prompt; from any thread."""
        self._stop = True

    # Adapters that stay while requests come and go

    @property
    def room(self) -> int | None:
        """Memory that further adapters may have, bytes: all but what the shortest request needs."""
        return None if self.memory.limit is None else max(self.memory.limit - self._memory_for(1), 0)

    def adopt(self, adapter: MountedAdapter) -> None:
        """Take an adapter's memory off what there is for requests, once however often; from any thread."""
        with self._adopting:
            self.adopted[adapter] += 1
            if self.adopted[adapter] == 1:
                self.memory.take(adapter.nbytes)

    def all_adopted(self) -> list[MountedAdapter]:
        """The adapters that take memory now; from any thread."""
        with self._adopting:
            return list(self.adopted)

    def retire(self, adapter: MountedAdapter) -> None:
        """Undo an `adopt`: no more requests come because of it. What the adapter holds is let go after the last one."""
        self.retired.append(adapter)
        self._let_go()

    def _let_go(self) -> None:
        if not self.retired:
            return
        rows = [*(seat.row for seat in [*self._seats, *self._paused]), *self._waiting]
        used = {row.request.adapter for row in rows}
        for adapter in [adapter for adapter in self.retired if adapter not in used]:
            self.retired.remove(adapter)
            with self._adopting:
                self.adopted[adapter] -= 1
                if self.adopted[adapter]:
                    continue  # adopted again: another request comes
                del self.adopted[adapter]
                self.memory.take(-adapter.nbytes)
            self.prefixes.forget(adapter)

    def _mount(self, adapter: MountedAdapter | None) -> None:
        """Put an adapter on the network; None takes off the one that is on it."""
        before, self._mounted = self._mounted, adapter
        if adapter is not None and adapter is not before:
            adapter.put_on()
        elif adapter is None and before is not None:
            before.take_off()

    def run(self, requests: Iterable[Request]) -> Iterator[Event]:
        """Submit the requests and yield their events until all are finished."""
        for request in requests:
            self.submit(request)
        try:
            while self.busy:
                yield from self.step()
        finally:
            self.clear()  # left in the middle

    def clear(self) -> list[int]:
        """Drop every request, without an event; their ids."""
        rows = [seat.row for seat in [*self._seats, *self._paused]] + self._waiting.remove(lambda _: True)
        self._paused.clear()
        for seat in list(self._seats):
            self._leave(seat)
        self._let_go()
        return [row.request.id for row in rows]

    def give_up(self, error: Exception) -> list[Event]:
        """End every request because of an error that is nobody's own; the engine can go on with new ones."""
        events: list[Event] = list(self._events)  # of the step that failed
        failed = [Failed(request, f"{type(error).__name__}: {error}") for request in self.clear()]
        self.counts.failed += len(failed)
        return events + failed

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Read a piece of what is unread, then one denoising step of every open canvas; what happened meanwhile."""
        self._events = []
        try:
            self._drop_cancelled()
            self._grow()
            self._admit()
            self._read()
            self._open()
            if self._stop:
                self._drop_cancelled()
            self._denoise_all()
        finally:
            self._mount(None)
        self._let_go()
        return self._events

    def _denoise_all(self) -> None:
        """One denoising step of every open canvas."""
        opened = [seat for seat in self._seats if seat.soft is not None]
        for number, group in enumerate(self._passes(opened)):
            if number and self.between is not None:
                self.between()
            going_on = [seat for seat in group if not (self._stop or seat.row.request.id in self._cancelled)]
            for seat, outcome in self._each(going_on, self._denoise):
                if not outcome.finite:
                    self._not_finite(seat, f"while step {seat.row.step + 1} of canvas {seat.row.canvas_index + 1} was "
                                           "computed")
                    continue
                if outcome.event is not None:
                    self._events.append(outcome.event)
                if outcome.done:
                    self._alone(seat, self._close)

    def _passes(self, seats: list[Seat]) -> list[list[Seat]]:
        """The seats that share a forward pass: all of an adapter's, but on a CPU no more than its caches can hold."""
        config, together = self.network.config, len(seats)
        if self.network.device.type == "cpu":
            together = max(CACHED // (config.canvas_length * config.hidden_size), 1)
        return [group[start : start + together] for group in _by_adapter(seats)
                for start in range(0, len(group), together)]

    def _admit(self) -> None:
        """Seat what waits, in order, while there are seats and memory; those that run already come first."""
        if any(seat.stalled for seat in self._seats):
            return
        weights: bytes | None = None
        while len(self._seats) < self.max_batch:
            row = self._paused[0].row if self._paused else self._waiting.peek()
            if row is None:
                return
            most = self._most_tokens(row.request)
            tokens = min(len(row.context) + row.config.canvas_length, most)
            needed = self._memory_for(tokens)
            if not self.memory.fits(needed):
                return
            # Looking takes some ms: whoever joins others finds the network that they run on.
            weights = weights or (self._weights if self._seats else None) or self._look_at_weights()
            prefix = self._prefix(row.request, weights)
            if self._paused:
                seat = self._paused.pop(0)
                seat.prefix = prefix
            else:
                seat = Seat(self._waiting.pop(), prefix, age=next(self._ages))
                self.counts.prompt_tokens += len(row.context)
            seat.memory, seat.tokens, seat.most = needed, tokens, most
            self._promise(needed)
            self._seats.append(seat)

    def _prefix(self, request: Request, weights: bytes) -> Prefix:
        return self.prefixes.open((), self.network, request.adapter, request.tenant, request.shared, weights)

    def _nothing(self, row: Row) -> Prefix:
        """What a row that does not run has read."""
        return self._prefix(row.request, b"")

    def _look_at_weights(self) -> bytes:
        """The network's fingerprint. If it is another one now, what was worked out from weights is not used again."""
        now = fingerprint(self.network)
        if now != self._weights:
            parts = [part for adapter in self.all_adopted() for part in adapter.parts.values() if part is not None]
            for module in (module for part in [self.network, *parts] for module in part.modules()):
                if isinstance(module, LowRank):
                    module.forget()
            self._weights = now
        return now

    # Memory: it is promised as it comes to be needed

    def _promise(self, size: int) -> None:
        """Promise so many bytes more (or fewer), some of those that prefixes are kept in if there are no others."""
        self.memory.reserved += size
        if self.memory.lent:
            self.prefixes.lend(self.memory.borrowed)

    def _grow(self) -> None:
        """Promise what the canvases that follow need, to the oldest request first; see to it that one can go on."""
        while self._seats:
            short = False
            for seat in sorted(self._seats, key=_age):
                tokens = min(len(seat.row.context) + seat.row.config.canvas_length, seat.most)
                seat.stalled = False
                if tokens <= seat.tokens:
                    continue
                needed = self._memory_for(tokens)
                if short or not self.memory.fits(needed - seat.memory):
                    short = seat.stalled = True
                    continue
                self._promise(needed - seat.memory)
                seat.memory, seat.tokens = needed, tokens
            if not all(seat.stalled for seat in self._seats):
                return
            youngest = max(self._seats, key=_age)
            if len(self._seats) > 1:
                self._give_way(youngest)
                continue
            # It is alone, and there is less memory than when it came.
            youngest.row.finish_reason = "length"
            self._alone(youngest, self._finish)

    def _give_way(self, seat: Seat) -> None:
        """Let go of what a request has read; it goes on later, from its committed tokens and where its noise stands."""
        self._leave(seat)
        seat.prefix, seat.memory, seat.tokens, seat.stalled = self._nothing(seat.row), 0, 0, False
        insort(self._paused, seat, key=_age)
        self.counts.gave_way += 1

    # Reading: prompts, and finished canvases that another one follows

    def _read(self) -> None:
        """A causal pass (of each adapter's) over some of what is unread: finished canvases whole, prompts in shares."""
        work = {seat: seat.unread for seat in self._seats if seat.unread and not (seat.reads_long or seat.stalled)}
        prompts = self._prompts()
        opened = sum(seat.soft is not None for seat in self._seats)
        # Beside canvases to denoise, reading may take a step half as long again.
        budget = max(PIECE, opened * self.network.config.canvas_length // 2)
        for seat, share in zip(prompts, shares([seat.unread for seat in prompts], budget), strict=True):
            work[seat] = uncut(seat.row.request.spans, seat.prefix.cache.length, share) if share else 0
        for group in _by_adapter([seat for seat, count in work.items() if count]):
            for seat, count in self._each(group, lambda seats: self._encode([(seat, work[seat]) for seat in seats])):
                if count is None:
                    self._not_finite(seat, f"while canvas {seat.row.canvas_index} was read" if seat.row.canvas_index
                                     else "while the prompt was read")
                    continue
                self.counts.read_tokens += 0 if seat.row.canvas_index else count
                self._alone(seat, lambda seat: seat.prefix.keep(seat.row.keys))

    def _take_over(self, seat: Seat) -> None:
        """Go on from what others have read of the same prompt by now."""
        gain = seat.prefix.extend(seat.row.keys)
        seat.cached_tokens += 0 if seat.row.canvas_index else gain  # later it is what this request has read itself

    def _encode(self, work: list[tuple[Seat, int]]) -> list[int | None]:
        """How many tokens of each were read, None where that came to numbers that are none."""
        self._mount(work[0][0].row.request.adapter)
        return [count if fine else None for (_, count), fine in zip(work, self.runner.read(work), strict=True)]

    def _prompts(self) -> list[Seat]:
        """Whose prompt is to be read now. Who would read much the same as another waits, and then takes that over."""
        chosen: list[Seat] = []
        for seat in [seat for seat in self._seats if seat.reads_long and not seat.stalled]:
            if not self._alone(seat, self._take_over):
                continue
            context, request = seat.row.keys, seat.row.request
            half = len(context) - seat.unread // 2
            others = [other.row for other in chosen if other.row.request.adapter is request.adapter
                      and (other.row.request.tenant == request.tenant or half <= request.shared)]
            if seat.unread and not any(context[:half] == other.keys[:half] for other in others):
                chosen.append(seat)
        return chosen

    # Denoising

    def _open(self) -> None:
        """Open a canvas for every request that has read all it has to, or has it from another one now."""
        for seat in [seat for seat in self._seats if seat.soft is None and not seat.stalled]:
            if seat.reads_long and not self._alone(seat, self._take_over):
                continue
            if not seat.unread:
                self._alone(seat, self._open_canvas)

    def _open_canvas(self, seat: Seat) -> None:
        row = seat.row
        if row.canvas_index == 0:
            self.counts.cached_tokens += self._told_cached(seat)
            if row.request.constraint is not None:
                seat.guide = row.request.constraint.guide(row.room)
        self._begin_canvas(seat)

    def _begin_canvas(self, seat: Seat) -> None:
        config, row = self.network.config, seat.row
        if seat.guide is not None and row.closes_thought and row.request.thoughts is not None:
            seat.guide.begin_with([row.request.thoughts.closed])
        known = None if seat.guide is None else seat.guide.template(config.canvas_length, row.room)
        self._events.append(row.start_canvas(known))
        seat.soft = torch.zeros(config.canvas_length, config.hidden_size, dtype=self.network.dtype,
                                device=self.network.device)

    def _denoise(self, seats: list[Seat]) -> list[Outcome]:
        self._mount(seats[0].row.request.adapter)
        outcomes = self.runner.denoise(seats)
        self.counts.steps += 1
        self.counts.rows += len(seats)
        return outcomes

    def _close(self, seat: Seat) -> None:
        """Hand out a finished canvas at once. If another one follows, it is read with the next step's pass."""
        row = seat.row
        if self._came_out_empty(seat):
            self.counts.redrawn += 1
            row.redraw()
            self._begin_canvas(seat)
            return
        event = row.close_canvas(0 if seat.guide is None else seat.guide.least)
        found = logprobs_of(self.network, seat, len(event.token_ids))
        if found is not None:
            event = replace(event, logprobs=found)
            seat.logprobs = [*(seat.logprobs or []), *found]
        if seat.guide is not None:
            seat.guide.commit(event.token_ids)
            if seat.guide.finished:
                row.finish_reason = "stop"
        seat.soft = seat.hidden = None
        self._events.append(event)
        self.counts.canvases += 1
        self.counts.answer_tokens += len(event.token_ids)
        if row.finish_reason is not None:
            self._finish(seat)

    def _came_out_empty(self, seat: Seat) -> bool:
        """Whether the answer would end here, with nothing said, thought or called, and may be drawn once more."""
        row = seat.row
        request = row.request
        if not request.redraw_empty or row.canvas_index or row.redrawn_steps is not None or request.canvas is not None:
            return False
        if seat.guide is not None and not seat.guide.may_be_empty:
            return False  # its form allows nothing else
        kept, _, reason = row.draft_end()
        if reason is None:
            return False
        reader = self.read(request)
        reader.feed(kept)
        answer = reader.finish()
        return not (answer.text.strip() or answer.reasoning or answer.tool_calls)

    # Leaving

    def _drop_cancelled(self) -> None:
        everything, self._stop = self._stop, False
        cancelled, self._cancelled = self._cancelled, set()

        def goes(row: Row) -> bool:
            return everything or row.request.id in cancelled

        for row in self._waiting.remove(goes):
            self._seats.append(Seat(row, self._nothing(row)))
        self._seats += [seat for seat in self._paused if goes(seat.row)]
        self._paused = [seat for seat in self._paused if not goes(seat.row)]
        for seat in [seat for seat in self._seats if goes(seat.row)]:
            seat.row.finish_reason = "cancelled"
            if seat.soft is not None and seat.row.step:
                seat.row.steps.append(seat.row.step)
            self._alone(seat, self._finish)

    def _finish(self, seat: Seat) -> None:
        self._events.append(self._finished(seat))
        self._leave(seat)

    def _fail(self, seat: Seat, error: Exception) -> None:
        """End a request because of an error of its own."""
        if not self.isolate:
            raise error
        log.error("request %d failed", seat.row.request.id, exc_info=error)
        told = str(error) if isinstance(error, DgemmaError) else None
        self._events.append(Failed(seat.row.request.id, f"{type(error).__name__}: {error}", told))
        self.counts.failed += 1
        self._leave(seat)

    def _not_finite(self, seat: Seat, when: str) -> None:
        """End a request whose numbers are none."""
        half = ", or too large for float16 (load the model in bfloat16)" if self.network.dtype is torch.float16 else ""
        self._fail(seat, NotFiniteError(
            f"the network's numbers are not finite (NaN or infinity) {when}: its weights are probably damaged{half}; "
            "dgemma inspect --check finds out which"))

    def _leave(self, seat: Seat) -> None:
        self._seats.remove(seat)
        seat.prefix.close()
        self._promise(-seat.memory)

    def _finished(self, seat: Seat) -> Finished:
        row = seat.row
        answer = row.reader.finish()
        redrawn = row.redrawn_steps or 0
        forwards, reason = sum(row.steps) + redrawn, row.finish_reason or "stop"
        self.counts.finished += reason != "cancelled"
        self.counts.cancelled += reason == "cancelled"
        return Finished(row.request.id, Generation(
            text=answer.text, reasoning=answer.reasoning, tool_calls=answer.tool_calls, token_ids=row.token_ids,
            finish_reason=reason, steps=row.steps,
            tokens_per_forward=len(row.token_ids) / forwards if forwards else 0.0,
            prompt_tokens=len(row.request.prompt_ids), seconds=row.seconds(), seed=row.request.seed,
            stop_token_id=row.stop_token_id, cached_tokens=self._told_cached(seat), logprobs=seat.logprobs,
            redrawn_steps=redrawn))

    def _told_cached(self, seat: Seat) -> int:
        page = self.prefixes.page
        return seat.cached_tokens // page * page if self.whole_pages else seat.cached_tokens

    def _alone(self, seat: Seat, work: Callable[[Seat], None]) -> bool:
        """Do something for one seat, and whether it went well; what goes wrong in it is the seat's own."""
        try:
            work(seat)
        except Exception as error:
            self._fail(seat, error)
            return False
        return True

    def _each(self, seats: list[Seat], work: Callable[[list[Seat]], Sequence[T]]) -> list[tuple[Seat, T]]:
        """What ``work`` makes of each seat, all at once; if that fails, by halves, and those that fail alone end.

        ``work`` must leave seats as they were when it raises.
        """
        if not seats:
            return []
        try:
            return list(zip(seats, work(seats), strict=True))
        except Exception as error:
            if not self.isolate:
                raise
            if len(seats) == 1:
                self._fail(seats[0], error)
                return []
            log.warning("a pass of %d requests failed (%s: %s); trying halves", len(seats), type(error).__name__, error)
            half = len(seats) // 2
            return self._each(seats[:half], work) + self._each(seats[half:], work)


def _age(seat: Seat) -> int:
    return seat.age


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:.1f} MiB"


def _by_adapter(seats: Iterable[Seat]) -> list[list[Seat]]:
    groups: dict[MountedAdapter | None, list[Seat]] = {}
    for seat in seats:
        groups.setdefault(seat.row.request.adapter, []).append(seat)
    return list(groups.values())
