"""A service: many callers in an asyncio loop, one engine in a thread."""

import asyncio
import contextlib
import gc
import itertools
import time
from contextlib import aclosing

import psutil
import pytest

from dgemma.diffusion.events import CanvasCommitted, Denoised, Failed, Finished
from dgemma.diffusion.request import no_reader
from dgemma.engine import PrefixStore
from dgemma.engine.service import Overloaded, Service
from dgemma.nn import DiffusionTransformer
from support.reference import random_network, tiny_config

C = tiny_config().canvas_length


@pytest.fixture
def service_of(tiny_network):
    """A function that makes a service over the tiny network, whose answers nobody reads."""

    def make(network=tiny_network, prefixes=None, **options):
        return Service(network, no_reader, prefixes or PrefixStore(), memory=1 << 28, **options)

    return make


@pytest.fixture
def serving(service_of):
    """A function that runs a coroutine function on a service, which is stopped behind it."""

    def run(work, **options):
        async def main():
            service = service_of(**options)
            service.start()
            try:
                return await asyncio.wait_for(work(service), 60)
            finally:
                await service.stop(grace=0)

        return asyncio.run(main())

    return run


async def generation_of(service, request):
    async with aclosing(await service.admit(request)) as events:
        async for event in events:
            if isinstance(event, Finished):
                return event.generation
            assert not isinstance(event, Failed), event
    return None


def test_many_callers_each_get_their_own_answer(serving, ask, engine_of, answer):
    requests = [ask([1 + i, 2, 3], seed=i, max_tokens=1 + i % (2 * C)) for i in range(20)]

    async def work(service):
        return await asyncio.gather(*(generation_of(service, request) for request in requests))

    for request, generation in zip(requests, serving(work, max_num_seqs=7), strict=True):
        assert generation.token_ids == answer(engine_of(), request).token_ids


def test_closing_a_stream_stops_the_request(serving, ask):
    async def work(service):
        async with aclosing(await service.admit(ask(max_tokens=10_000))) as events:
            async for event in events:
                if isinstance(event, Denoised):
                    break
        for _ in range(200):
            await asyncio.sleep(0.01)
            if not service.engine.busy:
                break
        return service.stats()

    stats = serving(work)
    assert (stats.running, stats.waiting, stats.cancelled, stats.reserved_bytes) == (0, 0, 1, 0)


def test_a_request_is_taken_or_refused_before_anybody_waits_for_its_events(serving, ask):
    async def work(service):
        first, second = [await service.admit(ask(max_tokens=10_000)) for _ in range(2)]
        with pytest.raises(Overloaded):
            await service.admit(ask())
        await second.aclose()  # nothing of it was ever fetched
        third = await service.admit(ask(max_tokens=3))
        await first.aclose()
        kinds = [type(event) for event in [event async for event in third]]
        return kinds, [event async for event in third], [event async for event in first]

    kinds, behind, closed = serving(work, max_num_seqs=1, max_queue=1)
    assert kinds[-1] is Finished
    assert behind == closed == []


def test_hundreds_of_given_up_requests_leave_nothing_behind(serving, ask):
    async def give_up(service, i):
        """After a draft, while the prompt is read, or while it waits."""
        async def listen():
            async with aclosing(await service.admit(ask([1 + i % 40, 2], seed=i, max_tokens=10_000))) as events:
                async for event in events:
                    if isinstance(event, Denoised):
                        return

        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(listen(), None if i % 2 else 0.001 * (i % 30))

    async def work(service):
        sizes = []
        for start in range(0, 200, 20):
            await asyncio.gather(*(give_up(service, start + i) for i in range(20)))
            gc.collect()
            sizes.append(psutil.Process().memory_info().rss)
        while service.engine.busy:
            await asyncio.sleep(0.01)
        held = any(node.holders for node in service.prefixes._nodes())
        return service.stats(), len(service._mail), sizes, held

    stats, mail, sizes, held = serving(work, max_num_seqs=16)
    assert not held
    assert 100 <= stats.cancelled <= 200
    assert stats.finished == stats.failed == 0
    assert (mail, stats.reserved_bytes, stats.running) == (0, 0, 0)
    assert max(sizes[5:]) < max(sizes[:5]) + (16 << 20)


def test_a_full_queue_refuses_at_once_and_says_when_to_come_again(serving, ask):
    async def work(service):
        first = [asyncio.create_task(generation_of(service, ask(seed=i, max_tokens=50 * C))) for i in range(3)]
        await asyncio.sleep(0.05)
        with pytest.raises(Overloaded) as refused:
            await generation_of(service, ask())
        for task in first:
            task.cancel()
        await asyncio.gather(*first, return_exceptions=True)
        while service.engine.busy:
            await asyncio.sleep(0.01)
        return refused.value, await generation_of(service, ask(max_tokens=3))

    refused, later = serving(work, max_num_seqs=1, max_queue=2)
    assert refused.retry_after >= 1
    assert not refused.stopping
    assert len(later.token_ids) == 3


def test_a_slow_reader_gets_the_last_draft_only_but_every_canvas(serving, ask):
    async def work(service):
        async with aclosing(await service.admit(ask(max_tokens=5 * C, max_denoising_steps=20))) as events:
            seen = [await anext(events)]
            while service.engine.busy:
                await asyncio.sleep(0.01)
            return seen + [event async for event in events]

    seen = serving(work)
    assert sum(isinstance(event, CanvasCommitted) for event in seen) == 5
    assert sum(isinstance(event, Denoised) for event in seen) <= 5 + 1  # one may have been the first event
    assert isinstance(seen[-1], Finished)


def test_stopping_waits_for_what_runs(serving, ask):
    async def work(service):
        running = [asyncio.create_task(generation_of(service, ask(seed=i, max_tokens=3 * C))) for i in range(4)]
        while (stats := service.stats()).running + stats.waiting + stats.finished < len(running):
            await asyncio.sleep(0.002)
        cut = await service.stop(grace=30)
        with pytest.raises(Overloaded) as refused:
            await generation_of(service, ask())
        return cut, await asyncio.gather(*running), refused.value.stopping

    cut, generations, stopping = serving(work)
    assert (cut, stopping) == (0, True)
    assert [len(generation.token_ids) for generation in generations] == [3 * C] * 4


def test_stopping_ends_what_takes_too_long_and_says_how_many(serving, ask):
    async def work(service):
        running = [asyncio.create_task(generation_of(service, ask(seed=i, max_tokens=100_000))) for i in range(3)]
        await asyncio.sleep(0.2)
        cut = await service.stop(grace=0.1)
        return cut, await asyncio.gather(*running), service.healthy

    cut, generations, healthy = serving(work)
    assert (cut, healthy) == (3, False)
    assert {generation.finish_reason for generation in generations} == {"cancelled"}


def test_a_request_that_comes_with_the_last_step_is_ended_too(serving, ask):
    class Slow(DiffusionTransformer):
        def denoise(self, *given):
            time.sleep(0.1)
            return super().denoise(*given)

    async def work(service):
        running = [asyncio.create_task(generation_of(service, ask(max_tokens=100_000)))]
        await asyncio.sleep(0.15)
        running.append(asyncio.create_task(generation_of(service, ask([1, 2], max_tokens=100_000))))
        await asyncio.sleep(0.01)
        cut = await service.stop(grace=0)
        return cut, await asyncio.wait_for(asyncio.gather(*running), 5)

    cut, generations = serving(work, network=random_network(tiny_config(), kind=Slow))
    assert cut == 2
    assert [generation.finish_reason for generation in generations] == ["cancelled"] * 2


def test_one_client_does_not_take_the_whole_queue(serving, ask):
    async def work(service):
        running = [asyncio.create_task(generation_of(service, ask(seed=i, max_tokens=9 * C, client="greedy")))
                   for i in range(8)]
        await asyncio.sleep(0.02)
        other = await generation_of(service, ask(client="other", max_tokens=2))
        done = await asyncio.gather(*running, return_exceptions=True)
        return other, [type(one) for one in done]

    other, kinds = serving(work, max_num_seqs=1, max_queue=7)
    assert len(other.token_ids) == 2
    assert kinds.count(Overloaded) == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_an_engine_that_is_gone(serving, ask):
    class Ending(PrefixStore):
        def open(self, *given):
            raise SystemExit

    async def work(service):
        events = [event async for event in await service.admit(ask())]
        with pytest.raises(Overloaded):
            await generation_of(service, ask())
        await asyncio.to_thread(service._thread.join)
        return events, service.healthy

    events, healthy = serving(work, prefixes=Ending())
    assert [type(event) for event in events] == [Failed]
    assert not healthy


def test_an_engine_that_fails_ends_its_requests_and_goes_on(serving, ask):
    class FailingOnce(PrefixStore):
        calls = itertools.count()

        def open(self, *given):
            return super().open(*given) if next(self.calls) else 1 / 0

    async def work(service):
        events = [event async for event in await service.admit(ask())]
        return events, await generation_of(service, ask(max_tokens=3))

    events, later = serving(work, prefixes=FailingOnce())
    assert isinstance(events[-1], Failed)
    assert "ZeroDivisionError" in events[-1].error
    assert len(later.token_ids) == 3


def test_an_impossible_request_is_refused_before_it_waits(serving, ask):
    async def work(service):
        with pytest.raises(ValueError, match="vocabulary"):
            await generation_of(service, ask([999]))
        return service.stats()

    assert serving(work).waiting == 0


def test_adapters_that_are_gone_are_not_counted_by_name_without_end(service_of):
    service = service_of()
    for number in range(400):
        service._count_request(f"adapter-{number}")
        service._count_request("adapter-0")
    counts = {name: stats.requests for name, stats in service.stats().adapters.items()}
    assert len(counts) <= 102 and sum(counts.values()) == 800 and counts["adapter-0"] == 401
