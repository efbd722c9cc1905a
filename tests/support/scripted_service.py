"""A backend whose answers are written down beforehand, and a real HTTP server around an app."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from dgemma.diffusion.events import (
    CanvasCommitted,
    CanvasStarted,
    Event,
    Failed,
    Finished,
    FinishReason,
    Generation,
    TokenLogprob,
)
from dgemma.diffusion.request import Request
from dgemma.engine.registry import AdapterRegistry, UnknownAdapterError
from dgemma.engine.service import Overloaded, RequestEvents, Stats, Weights
from dgemma.errors import DgemmaError
from dgemma.model import Model


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Whether it comes true: a request is noted when it is over, which is after its client has the answer."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


class ScriptedService:
    """A `Backend` that answers every request with the next of ``answers``, the last one again and again.

    An answer is a string (control tokens as they are spelt), a list of them, one per canvas, or an exception:
    `Overloaded` is raised, any other makes the request fail. A request is admitted after ``admission`` seconds, and
    every canvas takes ``seconds``. ``requests`` are those that came, ``closed`` counts
    those whose caller went away before the end.
    """

    healthy = True

    def __init__(self, model: Model, *answers: str | Sequence[str] | Exception, finish: FinishReason = "stop",
                 seconds: float = 0, admission: float = 0, cached_tokens: int = 0):
        self.model, self.answers = model, answers
        self.finish: FinishReason = finish
        self.seconds, self.admission, self.cached_tokens = seconds, admission, cached_tokens
        self.requests: list[Request] = []
        self.closed = 0
        self.adapters = AdapterRegistry(model.network)
        self.logprobs: list[TokenLogprob] | None = None  # of all of the first canvas

    def stats(self) -> Stats:
        return Stats(finished=len(self.requests))

    def weights(self) -> Weights:
        return Weights(7_000_000, "F32", 1_700_000, on_gpu=False)

    def load_adapter(self, name: str, path: str | Path) -> bool:
        raise DgemmaError(f"{path}: adapters cannot be loaded here")

    def unload_adapter(self, name: str) -> None:
        raise UnknownAdapterError(f"there is no adapter {name!r}")

    async def admit(self, request: Request) -> RequestEvents:
        answer = self.answers[min(len(self.requests), len(self.answers) - 1)]
        self.requests.append(request)
        await asyncio.sleep(self.admission)
        if isinstance(answer, Overloaded):
            raise answer
        return Answering(self, self._events(request, answer))

    async def _events(self, request: Request, answer: str | Sequence[str] | Exception) -> AsyncGenerator[Event, None]:
        config = self.model.config
        yield CanvasStarted(0, 0, [0] * config.canvas_length, [False] * config.canvas_length, len(request.prompt_ids),
                            1)
        if isinstance(answer, Exception):
            yield Failed(0, str(answer))
            return
        canvases = [self.model.tokenizer.encode(text) for text in ([answer] if isinstance(answer, str) else answer)]
        reader = self.model.reader(request)
        for index, token_ids in enumerate(canvases):
            await asyncio.sleep(self.seconds)
            yield CanvasCommitted(0, index, token_ids, 3, 0.1, self.logprobs, reader.feed(token_ids))
        answer = reader.finish()
        token_ids = [token for canvas in canvases for token in canvas]
        yield Finished(0, Generation(
            answer.text, answer.reasoning, answer.tool_calls, token_ids, self.finish, [3] * len(canvases), 1.0,
            len(request.prompt_ids), 0.1, request.seed, cached_tokens=self.cached_tokens), answer)


class Answering:
    """The events of an answer, and whether somebody closed them before the last one."""

    def __init__(self, service: ScriptedService, events: AsyncGenerator[Event, None]):
        self.service, self.events, self.over = service, events, False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        event = await anext(self.events)
        self.over = isinstance(event, (Finished, Failed))
        return event

    async def aclose(self) -> None:
        await self.events.aclose()
        self.service.closed += not self.over
        self.over = True


@contextlib.contextmanager
def served(app: Any, **options: Any) -> Iterator[str]:
    """The app behind a real server on a free port; its URL."""
    import uvicorn

    class Server(uvicorn.Server):
        """Ends when it is told to and its requests are over: uvicorn looks for both ten times a second."""

        async def main_loop(self) -> None:
            self.loop, self.told = asyncio.get_running_loop(), asyncio.Event()
            await self.on_tick(0)
            await self.told.wait()

        async def shutdown(self, sockets: Any = None) -> None:
            for listener in self.servers:
                listener.close()
            state = self.server_state
            for connection in list(state.connections):
                connection.shutdown()
            while state.connections or state.tasks:
                await asyncio.sleep(0.002)

    server = Server(uvicorn.Config(app, port=0, log_level="warning", lifespan="off", **options))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started:
        assert time.monotonic() < deadline and thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    host, port = server.servers[0].sockets[0].getsockname()[:2]
    try:
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        server.loop.call_soon_threadsafe(server.told.set)
        thread.join(10)
