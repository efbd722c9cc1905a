"""The denoising loop: requests in different states, one batch.

Every `step` admits what waits, runs one denoising step for every row, and closes the canvases that are done. Knows
nothing of HTTP or of text, but for the function that turns an answer's tokens into it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from dgemma.diffusion.events import Event, Finished, FinishReason, Generation
from dgemma.diffusion.row import Request, Row
from dgemma.diffusion.sampler import EntropyBoundSampler, Sampler
from dgemma.engine.prefixes import PrefixStore
from dgemma.nn import DiffusionTransformer, KVCache
from dgemma.nn.transformer import ENCODE_CHUNK

# A prompt's and an answer's token ids -> the answer's (text, reasoning, tool calls)
Decode = Callable[[list[int], list[int]], tuple[str, str | None, list[dict[str, Any]]]]


class Engine:
    """Runs requests on a network, up to ``max_batch`` at a time.

    A request's randomness is its own, so its tokens do not depend on who shares the batch (up to rounding, which in
    bfloat16 can tip a choice). ``prefixes`` may outlive the engine.
    ``prefilled_tokens`` counts the prompt tokens that were really read.
    """

    def __init__(self, network: DiffusionTransformer, decode: Decode, max_batch: int = 32,
                 prefixes: PrefixStore | None = None, sampler: Sampler | None = None):
        self.network, self.decode, self.max_batch = network, decode, max_batch
        self.prefixes = prefixes or PrefixStore()
        self.sampler = sampler or EntropyBoundSampler()
        self._waiting: deque[Row] = deque()
        self._rows: list[Row] = []
        self._cache: KVCache | None = None  # row i of the batch is _rows[i]
        self._soft: Tensor | None = None  # [B, C, D] self-conditioning; zeros for a canvas' first step
        self._cancelled: set[int] = set()
        self._stop = False  # cancel everything; a plain flag, since signal handlers must not meet a lock
        self.prefilled_tokens = 0

    @property
    def busy(self) -> bool:
        """Whether any request is running or waiting."""
        return bool(self._rows or self._waiting)

    def submit(self, request: Request) -> None:
        """Queue a request; raises ValueError when the network cannot run it."""
        request.check(self.network.config)
        self._waiting.append(Row(request, self.network.config))

    def cancel(self, request_id: int) -> None:
        """End a request before its next denoising step; what it committed stays."""
        self._cancelled.add(request_id)

    def cancel_all(self) -> None:
        """End every request before its next denoising step, or the next piece of its prompt; from any thread."""
        self._stop = True

    def run(self, requests: Iterable[Request]) -> Iterator[Event]:
        """Submit the requests and yield their events until all are finished."""
        for request in requests:
            self.submit(request)
        while self.busy:
            yield from self.step()

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One denoising step of everything that runs."""
        events: list[Event] = self._drop_cancelled()
        events += self._admit()
        if not self._rows or self._cache is None or self._stop:
            return events + self._drop_cancelled()
        rows, device = self._rows, self.network.device
        drawn = [row.draw_noise() for row in rows]
        noise = torch.stack([uniform for uniform, _ in drawn]).to(device)
        fresh = torch.stack([tokens for _, tokens in drawn]).to(device)
        canvas = torch.stack([row.canvas for row in rows]).to(device)
        temperature = torch.tensor([row.temperature for row in rows], device=device)

        hidden = self.network.denoise(canvas, self._cache, self._soft)
        stats = self.network.head(hidden, temperature, noise)
        pins = [row.pinned for row in rows]
        if any(pin is not None for pin in pins):
            none = torch.zeros(canvas.shape[1], dtype=torch.bool)
            pinned = torch.stack([none if pin is None else pin for pin in pins]).to(device)
            # A pinned position is known: its own token, no entropy, its own embedding as self-conditioning.
            stats.argmax = torch.where(pinned, canvas, stats.argmax)
            stats.sample = torch.where(pinned, canvas, stats.sample)
            stats.entropy = stats.entropy.masked_fill(pinned, 0.0)
            stats.soft = torch.where(pinned.unsqueeze(-1), self.network.embed(canvas), stats.soft)
            fresh = torch.where(pinned, canvas, fresh)
        self._soft = stats.soft
        settings = [row.request.settings for row in rows]
        next_canvas, accepted = self.sampler.advance(stats, fresh, settings)
        done = self.sampler.done(stats, [row.history for row in rows], settings)

        columns = [t.cpu() for t in (stats.argmax, next_canvas, stats.entropy, accepted)]
        closing = []
        for index, row in enumerate(rows):
            events.append(row.advance(*(column[index] for column in columns)))
            if done[index] or row.step == row.request.settings.max_denoising_steps:
                closing.append(index)
        return events + self._close(closing)

    def _admit(self) -> list[Event]:
        """Prefill waiting requests into free rows of the batch; those of one length together, without padding."""
        free = min(len(self._waiting), self.max_batch - len(self._rows))
        waiting = sorted((self._waiting.popleft() for _ in range(free)), key=lambda row: len(row.context))
        new, caches, unread = [], [], []
        for _, group in groupby(waiting, key=lambda row: len(row.context)):
            rows = list(group)
            if not self._stop:
                cache = self._prefill(rows)
                if cache is not None:
                    new += rows
                    caches.append(cache)
                    continue
            unread += rows
        self._waiting.extendleft(reversed(unread))  # stopped in the middle: they are dropped from the queue
        if not new:
            return []
        self._cache = KVCache.concat(caches if self._cache is None else [self._cache, *caches])
        self._rows += new
        canvas, width = self.network.config.canvas_length, self.network.config.hidden_size
        zeros = torch.zeros(len(new), canvas, width, dtype=self.network.dtype, device=self.network.device)
        self._soft = zeros if self._soft is None else torch.cat([self._soft, zeros])
        return [row.start_canvas() for row in new]

    def _prefill(self, rows: list[Row]) -> KVCache | None:
        """A cache of these rows' prompts, all of one length; None when everything was cancelled meanwhile.

        One row alone starts from the longest kept context that its prompt continues.
        """
        known, cache = self.prefixes.longest(rows[0].context) if len(rows) == 1 else (0, None)
        cache = self.network.new_cache(len(rows)) if cache is None else cache
        rest = torch.tensor([row.context[known:] for row in rows], dtype=torch.long, device=self.network.device)
        for piece in rest.split(ENCODE_CHUNK, dim=1):
            if self._stop:
                return None
            self.network.encode(piece, cache)
        self.prefilled_tokens += rest.numel()
        if len(rows) == 1:
            self.prefixes.keep_prompt(rows[0].context, cache)
        return cache

    def _close(self, closing: list[int]) -> list[Event]:
        """Commit the canvases of these rows; rows whose answer is complete leave the batch."""
        if not closing:
            return []
        events: list[Event] = [self._rows[index].close_canvas() for index in closing]
        going_on = [index for index in closing if self._rows[index].finish_reason is None]
        if going_on and self._cache is not None and self._soft is not None:
            # The commit pass: the finished canvas becomes context, because another one follows.
            canvases = torch.stack([self._rows[index].draft for index in going_on]).to(self.network.device)
            part = self._cache.select(going_on) if len(self._rows) > 1 else self._cache
            self.network.encode(canvases, part)
            if len(self._rows) > 1:
                self._cache = self._cache.replace(going_on, part)
            else:
                self.prefixes.keep_continuation(self._rows[0].context, part)
            self._soft[going_on] = 0
            events += [self._rows[index].start_canvas() for index in going_on]
        return events + self._leave([index for index in closing if index not in going_on])

    def _drop_cancelled(self) -> list[Event]:
        everything, self._stop = self._stop, False
        cancelled, self._cancelled = self._cancelled, set()
        events: list[Event] = []
        for row in [row for row in self._waiting if everything or row.request.id in cancelled]:
            self._waiting.remove(row)
            events.append(self._finished(row, "cancelled"))
        running = [i for i, row in enumerate(self._rows) if everything or row.request.id in cancelled]
        for index in running:
            self._rows[index].finish_reason = "cancelled"
            self._rows[index].steps.append(self._rows[index].step)
        return events + self._leave(running)

    def _leave(self, leaving: list[int]) -> list[Event]:
        if not leaving:
            return []
        events: list[Event] = [self._finished(self._rows[i], self._rows[i].finish_reason or "stop") for i in leaving]
        stay = [index for index in range(len(self._rows)) if index not in leaving]
        self._rows = [self._rows[index] for index in stay]
        if stay and self._cache is not None and self._soft is not None:
            self._cache, self._soft = self._cache.select(stay), self._soft[stay]
        else:
            self._cache = self._soft = None
        return events

    def _finished(self, row: Row, reason: FinishReason) -> Finished:
        text, reasoning, tool_calls = self.decode(row.request.prompt_ids, row.token_ids)
        forwards = sum(row.steps)
        return Finished(row.request.id, Generation(
            text=text, reasoning=reasoning, tool_calls=tool_calls, token_ids=row.token_ids, finish_reason=reason,
            steps=row.steps, tokens_per_forward=len(row.token_ids) / forwards if forwards else 0.0,
            prompt_tokens=len(row.request.prompt_ids), seconds=row.seconds(), seed=row.request.seed,
            stop_token_id=row.stop_token_id))
