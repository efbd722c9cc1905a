"""Answers on their way to a client, in any format: whole, or as a stream, given up as soon as nobody listens.

Works on: requests, and a format's rendering of their answers. Knows nothing of: what the formats are.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterable, Sequence
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dgemma.diffusion.request import Request
from dgemma.engine.service import RequestEvents
from dgemma.errors import DgemmaError
from dgemma.serve.backend import Backend, Serving
from dgemma.serve.deltas import BrokenAnswerError, CutAnswerError, Delta, deltas, first_call_only
from dgemma.serve.errors import JsonResponse, as_api_error, error_body, error_response, to_json
from dgemma.serve.metrics import RequestListener
from dgemma.serve.usage import note_error, time_left

T = TypeVar("T")
Made = dict[str, Any]  # what a format makes of a piece: the JSON of an event

_FAREWELL = 1.0  # seconds that the last words to a client may take


class Rendering(ABC):
    """How a format shows the answers to one HTTP request. Streams are server-sent events unless it says otherwise."""

    media_type: ClassVar[str] = "text/event-stream"
    ping: ClassVar[bytes | None] = b": ping\n\n"  # sent when nothing else has been for some time
    ending: ClassVar[bytes] = b""  # what a complete stream ends with
    made: Made

    def start(self) -> Iterable[Made]:
        """What a stream begins with."""
        return ()

    @abstractmethod
    def feed(self, index: int, delta: Delta) -> Iterable[Made]:
        """What a stream says of a piece of an answer, by the answer's index."""

    def end(self) -> Iterable[Made]:
        """What a stream ends with, when all answers are complete."""
        return ()

    def broken(self, error: BrokenAnswerError | CutAnswerError) -> Iterable[Made]:
        """What a stream ends with when an answer broke off; raises the error where the format has no word for it."""
        raise error

    def whole(self, answers: Sequence[Sequence[Delta]]) -> Made:
        """The body of a response that does not stream, from all pieces of every answer.

        Of a single answer: what ``made`` has become when all of its pieces were fed.
        """
        for delta in answers[0]:
            collections.deque(self.feed(0, delta), maxlen=0)
        return self.made

    def encode(self, made: Made) -> bytes:
        """The bytes on the wire: an event, which is named if it has a type."""
        name = made.get("type")
        return (f"event: {name}\n".encode() if name else b"") + b"data: " + to_json(made) + b"\n\n"


def answer_docs(model: type[BaseModel], what: str = "events") -> dict[int | str, dict[str, Any]]:
    """What the documentation says of a route that answers whole or, if it is asked to, in server-sent events."""
    schema = {"type": "object", "required": ["data"], "properties": {
        "event": {"type": "string"}, "data": {"type": "string", "description": "JSON"}}}  # of a single event
    return {200: {"model": model, "description": f"The answer; with `stream: true` its {what}.",
                  "content": {"text/event-stream": {"schema": schema}}}}


async def respond(serving: Serving, http: HttpRequest, rendering: Rendering, requests: Sequence[Request], *,
                  stream: bool, one_call: bool = False, drafts_per_second: float = 0) -> Response:
    """The answers to requests, as a format shows them. Without ``stream`` it is made before this returns.

    ``one_call``: of tool calls the first only. At most so many drafts come in a second (0: none).
    """
    answers = _answering(serving, requests, one_call, drafts_per_second)
    if stream:
        return _Stream(serving, answers, rendering)

    async def whole() -> Response:
        pieces: list[list[Delta]] = [[] for _ in requests]
        async with answers as source:
            async for index, delta in source:
                pieces[index].append(delta)
        return JsonResponse(rendering.whole(pieces))

    try:
        return await while_connected(http.receive, whole(), time_left(serving.settings.timeout))
    except ClientGoneError:
        return Response(status_code=499)  # nobody reads it; the log does


@contextlib.asynccontextmanager
async def _answering(serving: Serving, requests: Sequence[Request], one_call: bool,
                     drafts_per_second: float) -> AsyncIterator[Merged[Delta]]:
    """The pieces of all requests' answers. Entered when all of them have been taken; left, they are given up."""
    tokenizer = serving.model.tokenizer
    requests = [dataclasses.replace(request, drafts=drafts_per_second > 0) for request in requests]
    listeners = [RequestListener(serving.metrics, request, tokenizer.decode) for request in requests]
    async with contextlib.AsyncExitStack() as stack:
        taken = await _admit_all(serving.backend, requests)
        for events in taken:
            stack.push_async_callback(events.aclose)
        streams = [deltas(events, request, tokenizer, heard=heard, drafts_per_second=drafts_per_second)
                   for events, request, heard in zip(taken, requests, listeners, strict=True)]
        streams = [first_call_only(pieces) for pieces in streams] if one_call else streams
        yield await stack.enter_async_context(contextlib.aclosing(Merged(streams)))


async def _admit_all(backend: Backend, requests: Sequence[Request]) -> list[RequestEvents]:
    """The events of all requests; if one cannot be taken none is, and what the backend refuses is an error of ours."""
    tasks = [asyncio.ensure_future(backend.admit(request)) for request in requests]
    try:
        return await asyncio.gather(*tasks)
    except BaseException as error:
        for task in tasks:
            task.cancel()
        for events in await asyncio.gather(*tasks, return_exceptions=True):
            if not isinstance(events, BaseException):
                await events.aclose()
        if isinstance(error, ValueError) and not isinstance(error, DgemmaError):
            raise DgemmaError(str(error)) from error  # it is the client's to mend
        raise


class _Stream(Response):
    """A response that says what its answers say, as they are made.

    Its headers wait until the requests have been taken: what is raised till then becomes an ordinary error. An error
    later on becomes a last event.
    """

    def __init__(self, serving: Serving, answers: contextlib.AbstractAsyncContextManager[Merged[Delta]],
                 rendering: Rendering):
        self.media_type = rendering.media_type
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._settings, self._answers, self._rendering = serving.settings, answers, rendering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        limit, began = time_left(self._settings.timeout), time.monotonic()
        async with contextlib.AsyncExitStack() as stack:
            try:
                source = await while_connected(receive, stack.enter_async_context(self._answers), limit)
            except ClientGoneError:
                scope["dgemma.gone"] = True
                return
            except Exception as error:
                await error_response(as_api_error(error), scope["path"])(scope, receive, send)
                return
            try:
                left = max(limit - (time.monotonic() - began), 1e-3) if limit else 0.0
                await while_connected(receive, self._write(send, source), left)
            except ClientGoneError:
                scope["dgemma.gone"] = True
            except Exception as error:
                # Whoever does not read, perhaps the reason that time ran out, does not hold us up.
                with contextlib.suppress(TimeoutError, OSError):
                    async with asyncio.timeout(_FAREWELL):
                        await send(_chunk(self._last_words(error, scope["path"])))
                        await send(_chunk(b"", more=False))

    def _last_words(self, error: Exception, path: str) -> bytes:
        """What tells a client in the middle of its stream that something went wrong."""
        told = as_api_error(error)
        if not isinstance(error, BrokenAnswerError):  # of that the engine has said why
            note_error(told.message)
        return self._rendering.encode(error_body(told, path))

    async def _write(self, send: Send, source: Merged[Delta]) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        rendering = self._rendering

        async def tell(made: Iterable[Made]) -> None:
            for one in made:
                await send(_chunk(rendering.encode(one)))

        await tell(rendering.start())
        try:
            while (piece := await self._next(source, send)) is not None:
                await tell(rendering.feed(*piece))
        except (BrokenAnswerError, CutAnswerError) as error:
            await tell(rendering.broken(error))
        else:
            await tell(rendering.end())
        await send(_chunk(rendering.ending, more=False))

    async def _next(self, source: Merged[Delta], send: Send) -> tuple[int, Delta] | None:
        """The next piece, None behind the last one; while it is waited for, a ping now and then."""
        following = asyncio.ensure_future(anext(source, None))
        try:
            while not (await asyncio.wait({following}, timeout=self._settings.ping))[0]:
                if self._rendering.ping is not None:
                    await send(_chunk(self._rendering.ping))
            return following.result()
        finally:
            if not following.done():
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)


def _chunk(data: bytes, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


class Merged(Generic[T]):
    """Several streams as one: pairs of a stream's index and its piece, as they come.

    A piece is fetched when it is asked for, so a client that reads slowly holds back its own streams only. To be
    closed (`contextlib.aclosing`): that closes all of them.
    """

    def __init__(self, streams: Sequence[AsyncGenerator[T, None]]):
        self._streams = streams
        self._waiting: dict[asyncio.Task[T], int] = {}
        self._idle = set(range(len(streams)))  # streams whose next piece nobody has asked for yet

    def __aiter__(self) -> AsyncIterator[tuple[int, T]]:
        return self

    async def __anext__(self) -> tuple[int, T]:
        while True:
            for index in sorted(self._idle):
                self._waiting[asyncio.create_task(_following(self._streams[index]))] = index
            self._idle.clear()
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


async def _following(stream: AsyncGenerator[T, None]) -> T:
    return await anext(stream)


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
