"""The denoising loop: requests in different states, one batch.

Every `step` slots what waits, reads some of what is unread (prompts, finished canvases that another one follows), runs
one denoising step for every open canvas, and closes the canvases that are done. Knows nothing of HTTP or of text, but
for `make_reader`, which makes what reads a request's answer.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from dgemma.diffusion.events import Event, Failed, Finished, Generation
from dgemma.diffusion.prompt import uncut
from dgemma.diffusion.request import MakeReader, Request, no_reader
from dgemma.diffusion.sampler import Sampler
from dgemma.diffusion.sequence import SequenceState
from dgemma.engine.fingerprint import fingerprint
from dgemma.engine.prefixes import Prefix, PrefixStore
from dgemma.engine.runner import Outcome, Runner, Slot, logprobs_of
from dgemma.engine.scheduler import Memory, Scheduler, shares
from dgemma.errors import DgemmaError, NotFiniteError
from dgemma.nn import DiffusionTransformer
from dgemma.nn.adapters import LowRank
from dgemma.nn.loaded import LoadedAdapter

# Numbers of hidden states that a CPU works on at a time. More sequences in a pass reuse weights better, but beyond
# about so many its matrices leave the caches: at the 26B's width 4 canvases cost 1.6 s each, 8 cost 1.9 (1 alone: 1.8).
CACHED = 3 << 20
PIECE = 512  # tokens of prompts that one step may always read; a stop is heard between two pieces

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass
class Counts:
    """What an engine has done so far."""

    steps: int = 0  # forward passes over canvases
    denoised: int = 0  # canvases in these, all together
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

    ``make_reader`` makes what reads a request's answer (by default nothing does: answers are tokens without text). A
    request's randomness is its own, so its tokens do not depend on who shares the batch (up to rounding, which in
    bfloat16 can tip a choice). ``prefixes`` may outlive the engine. With ``isolate``, whatever goes wrong inside a
    request ends that one with a Failed event; without, it is raised. ``between`` is called between the passes of a
    step; it may `submit`, `cancel` and `retire`. With ``whole_pages`` only these are told of what was read before.
    ``runner`` takes sequences through the network, by default one with ``sampler``; ``piece`` and ``cached`` bound what
    a step reads and what a pass on a CPU works on.

    Who runs, and in what memory, the `Scheduler` says; ``lent`` bytes of that are the prefixes' as long as nobody needs
    them. An answer ends where the memory of all would end.

    Requests of different adapters share steps, but not passes: a pass is of one adapter's requests, which is put on the
    network for it. Between two steps the network is as it was found.
    """

    def __init__(self, network: DiffusionTransformer, make_reader: MakeReader = no_reader, max_batch: int = 32,
                 prefixes: PrefixStore | None = None, sampler: Sampler | None = None, *,
                 memory: int | None = None, lent: int = 0, isolate: bool = False,
                 whole_pages: bool = False, between: Callable[[], None] | None = None,
                 runner: Runner | None = None, piece: int = PIECE, cached: int = CACHED):
        self.network, self.make_reader, self.max_batch = network, make_reader, max_batch
        self.prefixes = prefixes or PrefixStore()
        self.runner = runner or Runner(network, sampler)
        self.isolate, self.whole_pages, self.between = isolate, whole_pages, between
        self.piece, self.cached = piece, cached
        self.memory = Memory(memory, lent)
        self.scheduler = Scheduler(network, self.prefixes, self.memory, max_batch)
        self.counts = Counts()
        self._weights: bytes | None = None  # the network's fingerprint, when it was last looked at
        self._events: list[Event] = []  # of the step that runs
        self._cancelled: set[int] = set()
        self._active: LoadedAdapter | None = None
        self.adopted: Counter[LoadedAdapter] = Counter()  # how often each was, less how often let go
        self.retired: list[LoadedAdapter] = []  # adapters that only wait for their last requests
        self._adopting = threading.Lock()
        self._stop = False  # cancel everything; a plain flag, since signal handlers must not meet a lock

    @property
    def busy(self) -> bool:
        """Whether any request is running or waiting."""
        return self.scheduler.busy

    @property
    def running(self) -> int:
        return len(self.scheduler.slots)

    def submit(self, request: Request) -> None:
        """Queue a request; raises ValueError as `check` does."""
        self.check(request)
        self.enqueue(request)

    def enqueue(self, request: Request) -> None:
        """Queue a request that `check` has found nothing wrong with."""
        self.scheduler.push(SequenceState(self.scheduler.bounded(request), self.network.config, self.make_reader))

    def check(self, request: Request) -> None:
        """Raises ValueError when the network cannot run a request, or not in the memory there is."""
        request.check(self.network.config)
        self.scheduler.check(request)

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
        return None if self.memory.limit is None else max(self.memory.limit - self.scheduler.memory_for(1), 0)

    def adopt(self, adapter: LoadedAdapter) -> None:
        """Take an adapter's memory off what there is for requests, once however often; from any thread."""
        with self._adopting:
            self.adopted[adapter] += 1
            if self.adopted[adapter] == 1:
                self.memory.take(adapter.nbytes)

    def all_adopted(self) -> list[LoadedAdapter]:
        """The adapters that take memory now; from any thread."""
        with self._adopting:
            return list(self.adopted)

    def retire(self, adapter: LoadedAdapter) -> None:
        """Undo an `adopt`: no more requests come because of it. What the adapter holds is let go after the last one."""
        self.retired.append(adapter)
        self._let_go()

    def _let_go(self) -> None:
        if not self.retired:
            return
        used = {sequence.request.adapter for sequence in self.scheduler.sequences()}
        for adapter in [adapter for adapter in self.retired if adapter not in used]:
            self.retired.remove(adapter)
            with self._adopting:
                self.adopted[adapter] -= 1
                if self.adopted[adapter]:
                    continue  # adopted again: another request comes
                del self.adopted[adapter]
                self.memory.take(-adapter.nbytes)
            self.prefixes.forget(adapter)

    def _activate(self, adapter: LoadedAdapter | None) -> None:
        """Put an adapter on the network; None takes off the one that is on it."""
        before, self._active = self._active, adapter
        if adapter is not None and adapter is not before:
            adapter.activate()
        elif adapter is None and before is not None:
            before.deactivate()

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
        sequences = self.scheduler.clear()
        self._let_go()
        return [sequence.request.id for sequence in sequences]

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
            self._activate(None)
        self._let_go()
        return self._events

    def _denoise_all(self) -> None:
        """One denoising step of every open canvas."""
        opened = [slot for slot in self.scheduler.slots if slot.soft is not None]
        for number, group in enumerate(self._passes(opened)):
            if number and self.between is not None:
                self.between()
            going_on = [slot for slot in group if not (self._stop or slot.sequence.request.id in self._cancelled)]
            for slot, outcome in self._each(going_on, self._denoise):
                if not outcome.finite:
                    sequence = slot.sequence
                    self._not_finite(slot, f"while step {sequence.step + 1} of canvas {sequence.canvas_index + 1} was "
                                           "computed")
                    continue
                if outcome.event is not None:
                    self._events.append(outcome.event)
                if outcome.done:
                    self._alone(slot, self._close)

    def _passes(self, slots: list[Slot]) -> list[list[Slot]]:
        """The slots that share a forward pass: all of an adapter's, but on a CPU no more than its caches can hold."""
        config, together = self.network.config, len(slots)
        if self.network.device.type == "cpu":
            together = max(self.cached // (config.canvas_length * config.hidden_size), 1)
        return [group[start : start + together] for group in _by_adapter(slots)
                for start in range(0, len(group), together)]

    def _admit(self) -> None:
        """Slot what waits, in order, while there are slots and memory; those that run already come first."""
        weights: bytes | None = None
        while (sequence := self.scheduler.following()) is not None:
            # Looking takes some ms: whoever joins others finds the network that they run on.
            weights = weights or (self._weights if self.scheduler.slots else None) or self._look_at_weights()
            if not self.scheduler.paused:
                self.counts.prompt_tokens += len(sequence.context)
            self.scheduler.admit(self._prefix(sequence.request, weights))

    def _prefix(self, request: Request, weights: bytes) -> Prefix:
        return self.prefixes.open((), self.network, request.adapter, request.tenant, request.shared, weights)

    def _nothing(self, sequence: SequenceState) -> Prefix:
        """What a sequence that does not run has read."""
        return self._prefix(sequence.request, b"")

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

    def _grow(self) -> None:
        """See to it that at least one request has the memory to go on."""
        while (youngest := self.scheduler.grow()) is not None:
            if self.running > 1:
                self.scheduler.pause(youngest, self._nothing(youngest.sequence))
                self.counts.gave_way += 1
                continue
            # It is alone, and there is less memory than when it came.
            youngest.sequence.end("length")
            self._alone(youngest, self._finish)

    # Reading: prompts, and finished canvases that another one follows

    def _read(self) -> None:
        """A causal pass (of each adapter's) over some of what is unread: finished canvases whole, prompts in shares."""
        work = {slot: slot.unread for slot in self.scheduler.slots
                if slot.unread and not (slot.reads_long or slot.stalled)}
        prompts = self._prompts()
        opened = sum(slot.soft is not None for slot in self.scheduler.slots)
        # Beside canvases to denoise, reading may take a step half as long again.
        budget = max(self.piece, opened * self.network.config.canvas_length // 2)
        for slot, share in zip(prompts, shares([slot.unread for slot in prompts], budget), strict=True):
            work[slot] = uncut(slot.sequence.request.spans, slot.prefix.cache.length, share) if share else 0
        for group in _by_adapter([slot for slot, count in work.items() if count]):
            for slot, count in self._each(group, lambda slots: self._encode([(slot, work[slot]) for slot in slots])):
                if count is None:
                    canvas = slot.sequence.canvas_index
                    self._not_finite(slot, f"while canvas {canvas} was read" if canvas else "while the prompt was read")
                    continue
                self.counts.read_tokens += 0 if slot.sequence.canvas_index else count
                self._alone(slot, lambda slot: slot.prefix.keep(slot.sequence.keys))

    def _take_over(self, slot: Slot) -> None:
        """Go on from what others have read of the same prompt by now."""
        gain = slot.prefix.extend(slot.sequence.keys)
        slot.cached_tokens += 0 if slot.sequence.canvas_index else gain  # later it is what this request has read itself

    def _encode(self, work: list[tuple[Slot, int]]) -> list[int | None]:
        """How many tokens of each were read, None where that came to numbers that are none."""
        self._activate(work[0][0].sequence.request.adapter)
        return [count if fine else None for (_, count), fine in zip(work, self.runner.read(work), strict=True)]

    def _prompts(self) -> list[Slot]:
        """Whose prompt is to be read now. Who would read much the same as another waits, and then takes that over."""
        chosen: list[Slot] = []
        for slot in [slot for slot in self.scheduler.slots if slot.reads_long and not slot.stalled]:
            if not self._alone(slot, self._take_over):
                continue
            context, request = slot.sequence.keys, slot.sequence.request
            half = len(context) - slot.unread // 2
            others = [other.sequence for other in chosen if other.sequence.request.adapter is request.adapter
                      and (other.sequence.request.tenant == request.tenant or half <= request.shared)]
            if slot.unread and not any(context[:half] == other.keys[:half] for other in others):
                chosen.append(slot)
        return chosen

    # Denoising

    def _open(self) -> None:
        """Open a canvas for every request that has read all it has to, or has it from another one now."""
        for slot in [slot for slot in self.scheduler.slots if slot.soft is None and not slot.stalled]:
            if slot.reads_long and not self._alone(slot, self._take_over):
                continue
            if not slot.unread:
                self._alone(slot, self._open_canvas)

    def _open_canvas(self, slot: Slot) -> None:
        sequence = slot.sequence
        if sequence.canvas_index == 0:
            self.counts.cached_tokens += self._told_cached(slot)
            if sequence.request.constraint is not None:
                slot.guide = sequence.request.constraint.guide(sequence.room)
        self._begin_canvas(slot)

    def _begin_canvas(self, slot: Slot) -> None:
        config, sequence = self.network.config, slot.sequence
        if slot.guide is not None and sequence.closes_thought and sequence.request.thoughts is not None:
            slot.guide.begin_with([sequence.request.thoughts.closed])
        known = None if slot.guide is None else slot.guide.template(config.canvas_length, sequence.room)
        self._events.append(sequence.start_canvas(known))
        given = sequence.request.soft if sequence.canvas_index == 0 else None
        if given is None:
            given = torch.zeros(config.canvas_length, config.hidden_size)
        slot.soft = given.to(self.network.device, self.network.dtype)

    def _denoise(self, slots: list[Slot]) -> list[Outcome]:
        self._activate(slots[0].sequence.request.adapter)
        outcomes = self.runner.denoise(slots)
        self.counts.steps += 1
        self.counts.denoised += len(slots)
        return outcomes

    def _close(self, slot: Slot) -> None:
        """Hand out a finished canvas at once. If another one follows, it is read with the next step's pass."""
        sequence = slot.sequence
        event = sequence.close_canvas(0 if slot.guide is None else slot.guide.least)
        if self._came_out_empty(slot):
            self.counts.redrawn += 1
            sequence.redraw()
            self._begin_canvas(slot)
            return
        found = logprobs_of(self.network, slot, len(event.token_ids))
        if found is not None:
            event = replace(event, logprobs=found)
            slot.logprobs = [*(slot.logprobs or []), *found]
        if slot.guide is not None:
            slot.guide.commit(event.token_ids)
            if slot.guide.finished:
                sequence.end("stop")
        slot.soft = slot.hidden = None
        self._events.append(event)
        self.counts.canvases += 1
        self.counts.answer_tokens += len(event.token_ids)
        if sequence.finish_reason is not None:
            self._finish(slot)

    def _came_out_empty(self, slot: Slot) -> bool:
        """Whether the answer ends with its first canvas, with nothing said, thought or called, and may be redrawn."""
        sequence = slot.sequence
        request = sequence.request
        if sequence.finish_reason is None or sequence.canvas_index > 1 or sequence.redrawn_steps is not None:
            return False
        if not request.redraw_empty or request.canvas is not None:
            return False
        if slot.guide is not None and not slot.guide.may_be_empty:
            return False  # its form allows nothing else
        answer = sequence.answer
        return not (answer.text.strip() or answer.reasoning or answer.tool_calls)

    # Leaving

    def _drop_cancelled(self) -> None:
        everything, self._stop = self._stop, False
        cancelled, self._cancelled = self._cancelled, set()
        if not (everything or cancelled):
            return
        for slot in self.scheduler.recall(lambda sequence: everything or sequence.request.id in cancelled,
                                          self._nothing):
            slot.sequence.end("cancelled", counted=slot.soft is not None)
            self._alone(slot, self._finish)

    def _finish(self, slot: Slot) -> None:
        self._events.append(self._finished(slot))
        self.scheduler.leave(slot)

    def _fail(self, slot: Slot, error: Exception) -> None:
        """End a request because of an error of its own."""
        if not self.isolate:
            raise error
        log.error("request %d failed", slot.sequence.request.id, exc_info=error)
        told = str(error) if isinstance(error, DgemmaError) else None
        self._events.append(Failed(slot.sequence.request.id, f"{type(error).__name__}: {error}", told))
        self.counts.failed += 1
        self.scheduler.leave(slot)

    def _not_finite(self, slot: Slot, when: str) -> None:
        """End a request whose numbers are none."""
        half = ", or too large for float16 (load the model in bfloat16)" if self.network.dtype is torch.float16 else ""
        self._fail(slot, NotFiniteError(
            f"the network's numbers are not finite (NaN or infinity) {when}: its weights are probably damaged{half}; "
            "dgemma inspect --check finds out which"))

    def _finished(self, slot: Slot) -> Finished:
        sequence = slot.sequence
        answer = sequence.answer
        redrawn = sequence.redrawn_steps or 0
        forwards, reason = sum(sequence.steps) + redrawn, sequence.finish_reason or "stop"
        self.counts.finished += reason != "cancelled"
        self.counts.cancelled += reason == "cancelled"
        return Finished(sequence.request.id, Generation(
            text=answer.text, reasoning=answer.reasoning, tool_calls=answer.tool_calls, token_ids=sequence.token_ids,
            finish_reason=reason, steps=sequence.steps,
            tokens_per_forward=len(sequence.token_ids) / forwards if forwards else 0.0,
            prompt_tokens=len(sequence.request.prompt_ids), seconds=sequence.seconds(), seed=sequence.request.seed,
            stop_token_id=sequence.stop_token_id, cached_tokens=self._told_cached(slot), logprobs=slot.logprobs,
            redrawn_steps=redrawn), answer)

    def _told_cached(self, slot: Slot) -> int:
        page = self.prefixes.page
        return slot.cached_tokens // page * page if self.whole_pages else slot.cached_tokens

    def _alone(self, slot: Slot, work: Callable[[Slot], None]) -> bool:
        """Do something for one slot, and whether it went well; what goes wrong in it is the slot's own."""
        try:
            work(slot)
        except Exception as error:
            self._fail(slot, error)
            return False
        return True

    def _each(self, slots: list[Slot], work: Callable[[list[Slot]], Sequence[T]]) -> list[tuple[Slot, T]]:
        """What ``work`` makes of each slot, all at once; if that fails, by halves, and those that fail alone end.

        ``work`` must leave slots as they were when it raises.
        """
        if not slots:
            return []
        try:
            return list(zip(slots, work(slots), strict=True))
        except Exception as error:
            if not self.isolate:
                raise
            if len(slots) == 1:
                self._fail(slots[0], error)
                return []
            log.warning("a pass of %d requests failed (%s: %s); trying halves", len(slots), type(error).__name__, error)
            half = len(slots) // 2
            return self._each(slots[:half], work) + self._each(slots[half:], work)


def _by_adapter(slots: Iterable[Slot]) -> list[list[Slot]]:
    groups: dict[LoadedAdapter | None, list[Slot]] = {}
    for slot in slots:
        groups.setdefault(slot.sequence.request.adapter, []).append(slot)
    return list(groups.values())
