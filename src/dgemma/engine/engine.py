"""The denoising loop: requests in different states, one batch.

Every `step` seats what waits, reads some of what is unread (prompts, finished canvases that another one follows), runs
one denoising step for every open canvas, and closes the canvases that are done. Knows nothing of HTTP or of text, but
for two functions that turn an answer's tokens into it.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from dgemma.diffusion.events import Event, Failed, Finished, Generation
from dgemma.diffusion.row import FindStop, Request, Row
from dgemma.diffusion.sampler import EntropyBoundSampler, Sampler
from dgemma.engine.batch import Outcome, Seat, denoise, logprobs_of
from dgemma.engine.prefixes import PrefixStore
from dgemma.engine.scheduler import FairQueue, Memory, shares
from dgemma.errors import ContextLengthError
from dgemma.nn import DiffusionTransformer
from dgemma.nn.mounts import MountedAdapter
from dgemma.nn.rows import row_bytes
from dgemma.weights.inspect import working_bytes

# A prompt's and an answer's token ids, the stop strings -> the answer's (text, reasoning, tool calls)
Decode = Callable[[list[int], list[int], tuple[str, ...]], tuple[str, str | None, list[dict[str, Any]]]]

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
    prompt_tokens: int = 0  # asked for
    cached_tokens: int = 0  # of these, read before by somebody
    read_tokens: int = 0  # of these, read here (the rest was cancelled before)
    answer_tokens: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0


class Engine:
    """Runs requests on a network, up to ``max_batch`` at a time, and as many as ``memory`` bytes are enough for.

    A request's randomness is its own, so its tokens do not depend on who shares the batch (up to rounding, which in
    bfloat16 can tip a choice). ``prefixes`` may outlive the engine. With ``isolate``, whatever goes wrong inside a
    request ends that one with a Failed event; without, it is raised. ``between`` is called between the passes of a
    step; it may `submit`, `cancel` and `retire`.

    Requests of different adapters share steps, but not passes: a pass is of one adapter's requests, which is put on the
    network for it. Between two steps the network is as it was found.
    """

    def __init__(self, network: DiffusionTransformer, decode: Decode, max_batch: int = 32,
                 prefixes: PrefixStore | None = None, sampler: Sampler | None = None, *,
                 find_stop: FindStop | None = None, memory: int | None = None, isolate: bool = False,
                 between: Callable[[], None] | None = None):
        self.network, self.decode, self.find_stop, self.max_batch = network, decode, find_stop, max_batch
        self.prefixes = prefixes or PrefixStore()
        self.sampler = sampler or EntropyBoundSampler()
        self.isolate, self.between = isolate, between
        self.memory = Memory(memory)
        self.counts = Counts()
        self._waiting = FairQueue()
        self._seats: list[Seat] = []
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
        return bool(self._seats or self._waiting)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._seats)

    def submit(self, request: Request) -> None:
        """Queue a request; raises ValueError as `check` does."""
        self.check(request)
        self.enqueue(request)

    def enqueue(self, request: Request) -> None:
        """Queue a request that `check` has found nothing wrong with."""
        self._waiting.push(Row(request, self.network.config))

    def check(self, request: Request) -> None:
        """Raises ValueError when the network cannot run a request, or not in the memory there is."""
        request.check(self.network.config)
        needed = self.memory_of(request)
        if self.memory.limit is not None and needed > self.memory.limit:
            raise ContextLengthError(
                f"the prompt of {len(request.prompt_ids)} tokens and up to {request.settings.max_tokens} more need "
                f"{needed >> 20} MiB of memory; there are {self.memory.limit >> 20} MiB")

    def memory_of(self, request: Request) -> int:
        """The most memory that a request can come to need, bytes: keys and values, and its part of a pass."""
        config = self.network.config
        canvases = -(-request.settings.max_tokens // config.canvas_length)
        tokens = len(request.prompt_ids) + (canvases - 1) * config.canvas_length
        return self._memory_for(min(tokens, config.max_position_embeddings))

    def _memory_for(self, tokens: int) -> int:
        config, item = self.network.config, self.network.dtype.itemsize
        return (row_bytes(config, tokens, self.network.cache_type or item)
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
            if self.memory.limit is not None and self.adopted[adapter] == 1:
                self.memory.limit -= adapter.nbytes

    def retire(self, adapter: MountedAdapter) -> None:
        """Undo an `adopt`: no more requests come because of it. What the adapter holds is let go after the last one."""
        self.retired.append(adapter)
        self._let_go()

    def _let_go(self) -> None:
        if not self.retired:
            return
        rows = [*(seat.row for seat in self._seats), *self._waiting]
        used = {row.request.adapter for row in rows}
        for adapter in [adapter for adapter in self.retired if adapter not in used]:
            self.retired.remove(adapter)
            with self._adopting:
                self.adopted[adapter] -= 1
                if self.adopted[adapter]:
                    continue  # adopted again: another request comes
                del self.adopted[adapter]
                if self.memory.limit is not None:
                    self.memory.limit += adapter.nbytes
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
        rows = [seat.row for seat in self._seats] + self._waiting.remove(lambda _: True)
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
        """Seat what waits, in order, while there are seats and memory."""
        while len(self._seats) < self.max_batch and (row := self._waiting.peek()) is not None:
            needed = self.memory_of(row.request)
            if not self.memory.fits(needed):
                return
            self._seats.append(Seat(row, self.prefixes.open((), self.network, row.request.adapter), needed))
            self._waiting.pop()
            self.memory.reserved += needed
            self.counts.prompt_tokens += len(row.context)

    # Reading: prompts, and finished canvases that another one follows

    def _read(self) -> None:
        """A causal pass (of each adapter's) over some of what is unread: finished canvases whole, prompts in shares."""
        work = {seat: seat.unread for seat in self._seats if seat.unread and seat.row.canvas_index}
        prompts = self._prompts()
        opened = sum(seat.soft is not None for seat in self._seats)
        # Beside canvases to denoise, reading may take a step half as long again.
        budget = max(PIECE, opened * self.network.config.canvas_length // 2)
        work.update(zip(prompts, shares([seat.unread for seat in prompts], budget), strict=True))
        for group in _by_adapter([seat for seat, count in work.items() if count]):
            for seat, count in self._each(group, lambda seats: self._encode([(seat, work[seat]) for seat in seats])):
                self.counts.read_tokens += 0 if seat.row.canvas_index else count
                self._alone(seat, lambda seat: seat.prefix.keep(seat.row.context))

    def _take_over(self, seat: Seat) -> None:
        """Go on from what others have read of the same prompt by now."""
        seat.cached_tokens += seat.prefix.extend(seat.row.context)

    def _encode(self, work: list[tuple[Seat, int]]) -> list[int]:
        self._mount(work[0][0].row.request.adapter)
        self.network.encode_rows([(seat.row.context[seat.prefix.cache.length :][:count], seat.prefix.cache)
                                  for seat, count in work])
        return [count for _, count in work]

    def _prompts(self) -> list[Seat]:
        """Whose prompt is to be read now. Who would read much the same as another waits, and then takes that over."""
        chosen: list[Seat] = []
        for seat in [seat for seat in self._seats if seat.unread and not seat.row.canvas_index]:
            if not self._alone(seat, self._take_over):
                continue
            context = seat.row.context
            half = len(context) - seat.unread // 2
            if seat.unread and not any(context[:half] == other.row.context[:half] for other in chosen
                                       if other.row.request.adapter is seat.row.request.adapter):
                chosen.append(seat)
        return chosen

    # Denoising

    def _open(self) -> None:
        """Open a canvas for every request that has read all it has to, or has it from another one now."""
        for seat in [seat for seat in self._seats if seat.soft is None]:
            if seat.unread and not seat.row.canvas_index and not self._alone(seat, self._take_over):
                continue
            if not seat.unread:
                self._alone(seat, self._open_canvas)

    def _open_canvas(self, seat: Seat) -> None:
        config, row = self.network.config, seat.row
        if row.canvas_index == 0:
            self.counts.cached_tokens += seat.cached_tokens
            if row.request.constraint is not None:
                seat.guide = row.request.constraint.guide(row.room)
        known = None if seat.guide is None else seat.guide.template(config.canvas_length, row.room)
        self._events.append(row.start_canvas(known))
        seat.soft = torch.zeros(config.canvas_length, config.hidden_size, dtype=self.network.dtype,
                                device=self.network.device)

    def _denoise(self, seats: list[Seat]) -> list[Outcome]:
        self._mount(seats[0].row.request.adapter)
        outcomes = denoise(self.network, self.sampler, seats)
        self.counts.steps += 1
        self.counts.rows += len(seats)
        return outcomes

    def _close(self, seat: Seat) -> None:
        """Hand out a finished canvas at once. If another one follows, it is read with the next step's pass."""
        row = seat.row
        event = row.close_canvas(self.find_stop)
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

    # Leaving

    def _drop_cancelled(self) -> None:
        everything, self._stop = self._stop, False
        cancelled, self._cancelled = self._cancelled, set()

        def goes(row: Row) -> bool:
            return everything or row.request.id in cancelled

        for row in self._waiting.remove(goes):
            self._seats.append(Seat(row, self.prefixes.open((), self.network), 0))
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
        self._events.append(Failed(seat.row.request.id, f"{type(error).__name__}: {error}"))
        self.counts.failed += 1
        self._leave(seat)

    def _leave(self, seat: Seat) -> None:
        self._seats.remove(seat)
        seat.prefix.close()
        self.memory.reserved -= seat.memory

    def _finished(self, seat: Seat) -> Finished:
        row = seat.row
        text, reasoning, tool_calls = self.decode(row.request.prompt_ids, row.token_ids, row.request.stop)
        forwards, reason = sum(row.steps), row.finish_reason or "stop"
        self.counts.finished += reason != "cancelled"
        self.counts.cancelled += reason == "cancelled"
        return Finished(row.request.id, Generation(
            text=text, reasoning=reasoning, tool_calls=tool_calls, token_ids=row.token_ids, finish_reason=reason,
            steps=row.steps, tokens_per_forward=len(row.token_ids) / forwards if forwards else 0.0,
            prompt_tokens=len(row.request.prompt_ids), seconds=row.seconds(), seed=row.request.seed,
            stop_token_id=row.stop_token_id, cached_tokens=seat.cached_tokens, logprobs=seat.logprobs))

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


def _by_adapter(seats: Iterable[Seat]) -> list[list[Seat]]:
    groups: dict[MountedAdapter | None, list[Seat]] = {}
    for seat in seats:
        groups.setdefault(seat.row.request.adapter, []).append(seat)
    return list(groups.values())
