"""Several streams as one, and work that is given up as soon as nobody waits for it.

Works on: async iterators of pieces. Knows nothing of: what the pieces are, how they are shown.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Sequence
from typing import Any, Generic, TypeVar

from starlette.types import Receive

T = TypeVar("T")


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
                self._waiting[asyncio.create_task(_next(self._streams[index]))] = index
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


async def _next(stream: AsyncGenerator[T, None]) -> T:
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
