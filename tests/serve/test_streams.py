"""Several answers at once, and giving up on those that nobody waits for."""

import asyncio

import pytest

from dgemma.serve.respond import ClientGoneError, Merged, while_connected


class Source:
    """A stream of numbers; it notes what was fetched and whether it was closed."""

    def __init__(self, count, seconds=0.0, error=None):
        self.count, self.seconds, self.error = count, seconds, error
        self.fetched, self.closed = 0, False

    async def stream(self):
        try:
            if self.error is not None:
                raise self.error
            for number in range(self.count):
                await asyncio.sleep(self.seconds)
                self.fetched += 1
                yield number
        finally:
            self.closed = True


async def never():
    await asyncio.Event().wait()
    return {"type": "http.disconnect"}


def test_all_pieces_come_each_stream_in_its_order():
    async def run():
        merged = Merged([Source(3).stream(), Source(0).stream(), Source(2, 0.01).stream()])
        return [pair async for pair in merged]

    pairs = asyncio.run(run())
    assert [piece for index, piece in pairs if index == 0] == [0, 1, 2]
    assert [piece for index, piece in pairs if index == 2] == [0, 1]
    assert len(pairs) == 5


def test_an_error_of_one_stream_is_raised_and_closing_ends_the_others():
    async def run():
        sources = [Source(3, 1.0), Source(3, error=OSError("full"))]
        merged = Merged([source.stream() for source in sources])
        with pytest.raises(OSError, match="full"):
            await anext(merged)
        await merged.aclose()
        return sources

    assert all(source.closed for source in asyncio.run(run()))


def test_nothing_is_fetched_before_somebody_asks():
    async def run():
        source = Source(100)
        merged = Merged([source.stream()])
        for _ in range(3):
            await anext(merged)
            await asyncio.sleep(0.01)
        await merged.aclose()
        return source

    source = asyncio.run(run())
    assert source.fetched == 3 and source.closed


def test_work_ends_when_the_client_hangs_up():
    async def run():
        ended = asyncio.Event()

        async def work():
            try:
                await asyncio.sleep(10)
            finally:
                ended.set()

        async def receive():
            await asyncio.sleep(0.01)
            return {"type": "http.disconnect"}

        with pytest.raises(ClientGoneError):
            await while_connected(receive, work())
        return ended.is_set()

    assert asyncio.run(run())


def test_work_ends_when_its_time_is_up_and_counts_when_it_is_done():
    async def run():
        with pytest.raises(TimeoutError):
            await while_connected(never, asyncio.sleep(10), seconds=0.01)
        assert await while_connected(never, asyncio.sleep(0, "done"), seconds=5) == "done"
        with pytest.raises(KeyError):
            await while_connected(never, _fail())

    asyncio.run(run())


async def _fail():
    raise KeyError
