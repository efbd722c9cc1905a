"""What Prometheus reads: the engine's own counts, and what only a request's events tell.

Works on: an engine's counts, and the events that it is told of. Knows nothing of: the formats.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from dgemma.diffusion.events import CanvasCommitted, CanvasStarted, Event, Failed, Finished, Generation
from dgemma.diffusion.request import Request
from dgemma.engine.service import Stats
from dgemma.serve.usage import RequestUsage, request_usage

# name, field of Stats, help.
_GAUGES = (
    ("dgemma_requests_waiting", "waiting", "Requests that wait for their turn."),
    ("dgemma_requests_running", "running", "Requests that are being answered."),
    ("dgemma_prefix_cache_bytes", "prefix_bytes", "Memory of the prefix cache."),
    ("dgemma_prefix_cache_budget_bytes", "prefix_budget", "Memory that the prefix cache may use."),
    ("dgemma_reserved_bytes", "reserved_bytes", "Memory promised to running requests."),
    ("dgemma_request_budget_bytes", "request_budget", "Memory that running requests may use."),
)
_COUNTERS = (
    ("dgemma_steps", "steps", "Denoising steps: forward passes over all open canvases."),
    ("dgemma_canvas_steps", "denoised", "Canvases denoised by these steps: several share a step."),
    ("dgemma_canvases", "canvases", "Canvases committed."),
    ("dgemma_canvases_redrawn", "redrawn", "First canvases that came out empty, and were drawn again."),
    ("dgemma_prompt_tokens", "prompt_tokens", "Tokens of prompts."),
    ("dgemma_prefix_cache_hits", "prefix_hits", "Requests that found some of their prompt in the prefix cache."),
    ("dgemma_prefix_cache_hit_tokens", "cached_tokens", "Tokens of prompts that were found in the prefix cache."),
    ("dgemma_answer_tokens", "answer_tokens", "Tokens of answers."),
    ("dgemma_requests_finished", "finished", "Requests answered."),
    ("dgemma_requests_cancelled", "cancelled", "Requests that were given up, most by their clients."),
    ("dgemma_requests_failed", "failed", "Requests that the engine could not finish."),
)
# kind, name, field of AdapterStats, help.
_OF_ADAPTERS = (
    (GaugeMetricFamily, "dgemma_adapter_bytes", "nbytes", "Memory of an adapter, until its last request is over."),
    (GaugeMetricFamily, "dgemma_adapter_requests_running", "running", "Requests of an adapter that run or wait."),
    (CounterMetricFamily, "dgemma_adapter_requests", "requests", "Requests of an adapter."),
)
_OF_PICTURES = (
    (CounterMetricFamily, "dgemma_pictures_seen", "seen", "Pictures that went through the vision tower."),
    (CounterMetricFamily, "dgemma_pictures_reused", "reused", "Pictures of requests that were known from before."),
    (GaugeMetricFamily, "dgemma_picture_cache_bytes", "nbytes", "Memory of what the tower saw."),
)
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


class Metrics:
    """A registry of its own: two servers in a process do not mix."""

    def __init__(self, stats: Callable[[], Stats], pictures: Callable[[], Any] = lambda: None):
        """``pictures``: what sees them now (`dgemma.serve.backend.SeenPictures`), None for nothing."""
        self.registry = CollectorRegistry()
        self.registry.register(_Engine(stats, pictures))  # type: ignore[arg-type]  # any object with collect()
        self.queue = self._histogram("dgemma_queue_seconds", "Time from a request's arrival to its first canvas.")
        self.first = self._histogram("dgemma_time_to_first_token_seconds",
                                     "Time from a request's arrival to its first committed canvas.")
        self.canvas = self._histogram("dgemma_canvas_seconds", "Time that a canvas took.")
        self.step = self._histogram("dgemma_step_seconds", "Time that a denoising step took, mean of each canvas.",
                                    (0.005, *_SECONDS))
        self.answer = self._histogram("dgemma_request_seconds", "Time from a request's arrival to its end.")
        self.forward = self._histogram("dgemma_tokens_per_forward", "Answer tokens per denoising step, by request.",
                                       (0.5, 1, 2, 4, 8, 12, 16, 24, 32, 64, 128, 256))
        self.calls = Counter("dgemma_tool_calls", "Tool calls; healed: those that were not well formed.", ("healed",),
                             registry=self.registry)
        self.http = Counter("dgemma_http_requests", "HTTP requests.", ("method", "path", "status"),
                            registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
        return Histogram(name, text, registry=self.registry, buckets=buckets)


class RequestListener:
    """Measures a request to the model by its events, and adds it to what its HTTP request has used.

    Made when the request arrives, and called with each of its events. ``decode`` is the tokenizer's.
    """

    def __init__(self, metrics: Metrics, request: Request, decode: Callable[[Sequence[int]], str]):
        self._metrics, self._decode, self._used = metrics, decode, request_usage.get() or RequestUsage()
        self._began = self._canvas_began = time.perf_counter()
        self._waited = self._spoke = False
        self._record: dict[str, Any] = {}
        if self._used.answers is not None:
            self._record = {"prompt": decode(request.prompt_ids), "seed": request.seed,
                            "max_tokens": request.settings.max_tokens}
            self._used.answers.append(self._record)

    def __call__(self, event: Event) -> None:
        metrics, used, now = self._metrics, self._used, time.perf_counter()
        seconds = now - self._began
        if isinstance(event, CanvasStarted):
            self._canvas_began = now
            if not self._waited:
                self._waited = True
                metrics.queue.observe(seconds)
                used.opened = seconds if used.opened is None else used.opened
        elif isinstance(event, CanvasCommitted):
            metrics.canvas.observe(now - self._canvas_began)
            if event.steps:
                metrics.step.observe((now - self._canvas_began) / event.steps)
            if not self._spoke:
                self._spoke = True
                metrics.first.observe(seconds)
                used.spoke = seconds if used.spoke is None else used.spoke
        elif isinstance(event, (Finished, Failed)):
            metrics.answer.observe(seconds)
            used.seconds = max(used.seconds, seconds)
            if isinstance(event, Failed):
                used.error = self._record["error"] = event.error
            else:
                metrics.forward.observe(event.generation.tokens_per_forward)
                self._note(event.generation)

    def _note(self, made: Generation) -> None:
        used = self._used
        used.prompt_tokens += made.prompt_tokens
        used.cached_tokens += made.cached_tokens
        used.answer_tokens += len(made.token_ids)
        used.steps += sum(made.steps) + made.redrawn_steps
        if used.answers is not None:
            self._record |= {"answer": self._decode(made.token_ids), "finish_reason": made.finish_reason,
                             "steps": made.steps, "cached_tokens": made.cached_tokens}


class _Engine:
    """The engine's counts, read when Prometheus asks."""

    def __init__(self, stats: Callable[[], Stats], pictures: Callable[[], Any]):
        self.stats, self.pictures = stats, pictures

    def describe(self) -> list[Any]:
        return []  # nothing is asked of the engine before it runs

    def collect(self) -> Iterator[Any]:
        stats, pictures = self.stats(), self.pictures()
        for name, field, text in _GAUGES:
            yield GaugeMetricFamily(name, text, getattr(stats, field))
        for name, field, text in _COUNTERS:
            yield CounterMetricFamily(name, text, getattr(stats, field))
        for kind, name, field, text in _OF_ADAPTERS:
            family = kind(name, text, labels=["adapter"])
            for adapter, numbers in stats.adapters.items():
                family.add_metric([adapter], getattr(numbers, field))
            yield family
        for kind, name, field, text in _OF_PICTURES if pictures is not None else ():
            yield kind(name, text, getattr(pictures, field))
