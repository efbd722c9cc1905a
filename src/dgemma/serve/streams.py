"""Answers on their way to a client: several at once, over SSE or whole, given up as soon as nobody listens.

Works on: async iterators of pieces. Knows nothing of: what the pieces are.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from typing import Any, Generic, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dgemma.engine.service import Admission, admission
from dgemma.serve.errors import ApiError, as_api_error, error_body, error_response, is_anthropic, to_json
from dgemma.serve.settings import Settings
from dgemma.serve.usage import note_error, time_left

T = TypeVar("T")

# How the documentation tells of a response of server-sent events: the schema is that of a single one.
EVENT_CONTENT: dict[str, Any] = {"text/event-stream": {"schema": {
    "type": "object", "properties": {"event": {"type": "string"}, "data": {"type": "string", "description": "JSON"}},
    "required": ["data"]}}}

_REFUSAL = 0.05  # seconds within which a stream that nobody decides about has failed, if it fails at once
_FAREWELL = 1.0  # seconds that the last words to a client may take


class Merged(Generic[T]):
    """Several streams as one: pairs of a stream's index and its piece, as they come.

    A piece is fetched when it is asked for, so a client that reads slowly holds back its own streams only. To be
    closed (`contextlib.aclosing`): that closes all of them.
    """

    def __init__(self, streams: Sequence[AsyncGenerator[T, None]]):
        self._streams = streams
        self._waiting: dict[asyncio.Task[T], int] = {}
        self._idle = set(range(len(streams)))  # streams whose next piece nobody has asked for yet

    async def open(self) -> None:
        """Begin all streams; what one of them raises before its request has been taken is raised here."""
        answers = [Admission() for _ in self._streams]
        self._ask(answers)
        known = [asyncio.ensure_future(_decided(task, answers[index])) for task, index in self._waiting.items()]
        try:
            timeout: float | None = _REFUSAL
            waiting = set(known)
            while waiting:
                done, waiting = await asyncio.wait(waiting, timeout=timeout, return_when=asyncio.FIRST_EXCEPTION)
                for task in done:
                    task.result()
                # However long it takes to decide: an error in a stream that has begun is not seen by most clients.
                waiting = {task for task in waiting if answers[known.index(task)].deciding}
                timeout = None
        finally:
            for task in known:
                task.cancel()
            await asyncio.gather(*known, return_exceptions=True)

    def _ask(self, answers: Sequence[Admission] = ()) -> None:
        for index in sorted(self._idle):
            context = contextvars.copy_context()
            if answers:
                context.run(admission.set, answers[index])
            self._waiting[asyncio.create_task(_next(self._streams[index]), context=context)] = index
        self._idle.clear()

    def __aiter__(self) -> AsyncIterator[tuple[int, T]]:
        return self

    async def __anext__(self) -> tuple[int, T]:
        while True:
            self._ask()
            if not self._waiting:
                raise StopAsyncIteration
            done, _ = await asyncio.wait(self._waiting, return_when=asyncio.FIRST_COMPLETED)
            task = done.pop()
            index = self._waiting.pop(task)
            try:
                piece = task.result()
            except StopAsyncIteration:
                continue
            self._idle.add(index)
            return index, piece

    async def aclose(self) -> None:
        for task in self._waiting:
            task.cancel()
        await asyncio.gather(*self._waiting, return_exceptions=True)
        self._waiting.clear()
        for stream in self._streams:
            await stream.aclose()


async def _next(stream: AsyncGenerator[T, None]) -> T:
    return await anext(stream)


async def _decided(first: asyncio.Task[Any], answer: Admission) -> None:
    """Wait until a stream's first piece is there, or it is told that it will come; raises what the stream raises."""
    told = asyncio.ensure_future(answer.decided.wait())
    try:
        await asyncio.wait({first, told}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        told.cancel()
    if first.done() and not first.cancelled():
        error = first.exception()
        if error is not None and not isinstance(error, StopAsyncIteration):
            raise error


class ClientGoneError(Exception):
    """The client has hung up: nobody waits for this answer any more."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T], seconds: float = 0) -> T:
    """What ``work`` returns. It is cancelled when the client hangs up (`ClientGoneError`) or its time is up.

    ``seconds``: 0 is any time, else TimeoutError. The request's body must have been read.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_hung_up(receive))
    try:
        done, _ = await asyncio.wait({task, gone}, timeout=seconds or None, return_when=asyncio.FIRST_COMPLETED)
        if task in done:
            return task.result()
        if gone in done:
            raise ClientGoneError
        raise TimeoutError
    finally:
        for pending in (task, gone):
            pending.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def whole(http: HttpRequest, settings: Settings, work: Coroutine[Any, Any, Response]) -> Response:
    """The response that ``work`` makes, under the server's limit of time; nothing if the client leaves before."""
    try:
        return await while_connected(http.receive, work, time_left(settings.timeout))
    except ClientGoneError:
        return Response(status_code=499)  # nobody reads it; the log does


def event(data: Any, name: str | None = None) -> bytes:
    """One server-sent event."""
    return (f"event: {name}\n".encode() if name else b"") + b"data: " + to_json(data) + b"\n\n"


class EventStream(Response):
    """A response of server-sent events: the bytes that ``events`` makes of ``source``'s pieces.

    ``source`` is begun before the headers are sent, which wait until its requests have been taken: what it raises till
    then becomes an ordinary error. An error later on becomes a last event. ``ping`` (None: nothing) is sent when
    nothing else has been for some time.
    """

    media_type = "text/event-stream"

    def __init__(self, source: Merged[Any], events: AsyncGenerator[bytes, None], settings: Settings,
                 ping: bytes | None = b": ping\n\n"):
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.source, self.events, self.settings, self.ping = source, events, settings, ping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        limit, began = time_left(self.settings.timeout), time.monotonic()
        async with contextlib.aclosing(self.source), contextlib.aclosing(self.events):
            try:
                await while_connected(receive, self.source.open(), limit)
            except ClientGoneError:
                scope["dgemma.gone"] = True
                return
            except Exception as error:
                await error_response(as_api_error(error), scope["path"])(scope, receive, send)
                return
            try:
                left = max(limit - (time.monotonic() - began), 1e-3) if limit else 0.0
                await while_connected(receive, self._write(send), left)
            except ClientGoneError:
                scope["dgemma.gone"] = True
            except Exception as error:
                # Whoever does not read, perhaps the reason that time ran out, does not hold us up.
                with contextlib.suppress(TimeoutError, OSError):
                    async with asyncio.timeout(_FAREWELL):
                        await send(_chunk(self.last_words(as_api_error(error), scope["path"])))
                        await send(_chunk(b"", more=False))

    def last_words(self, error: ApiError, path: str) -> bytes:
        """What tells a client in the middle of its stream that something went wrong."""
        note_error(error.message)
        return event(error_body(error, path), "error" if is_anthropic(path) else None)

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        following: asyncio.Future[bytes] | None = None
        try:
            while True:
                following = following or asyncio.ensure_future(self.events.__anext__())
                done, _ = await asyncio.wait({following}, timeout=self.settings.ping)
                if not done:
                    if self.ping is not None:
                        await send(_chunk(self.ping))
                    continue
                try:
                    data = following.result()
                except StopAsyncIteration:
                    break
                following = None
                await send(_chunk(data))
            await send(_chunk(b"", more=False))
        finally:
            if following is not None and not following.done():
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)


def _chunk(data: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


class LineStream(EventStream):
    """The same with a line of JSON for each piece, as Ollama streams (NDJSON)."""

    media_type = "application/x-ndjson"

    def __init__(self, source: Merged[Any], lines: AsyncGenerator[bytes, None], settings: Settings):
        super().__init__(source, lines, settings, ping=None)

    def last_words(self, error: ApiError, path: str) -> bytes:
        note_error(error.message)
        return line(error_body(error, path))


def line(data: Any) -> bytes:
    """One line of NDJSON."""
    return to_json(data) + b"\n"
