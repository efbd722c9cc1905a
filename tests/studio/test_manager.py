"""Exchanging the model while the studio runs: what answers, what becomes of running answers, failures, memory."""

import asyncio
import gc
import weakref

import httpx2 as httpx
import pytest
import torch
from nicegui import Event

import dgemma
from dgemma.errors import CheckpointError, DgemmaError
from dgemma.serve.app import create_app
from dgemma.serve.settings import Settings
from dgemma.studio.answers import Answers
from dgemma.studio.arena import Arena
from dgemma.studio.battles import Contestant
from dgemma.studio.manager import LEFT, ModelManager, start_service
from dgemma.weights.files import bundled_path
from support.studio import PUZZLE

OTHER = str(bundled_path("sudoku"))  # the same model, by another name


def sudoku(name, progress=None):
    if name == "broken":
        raise CheckpointError("broken: no such model")
    return dgemma.load(name, progress=progress)


class Desk:
    """A manager over the bundled model, with what it stands on."""

    def __init__(self, store):
        model = sudoku("sudoku")
        self.network = weakref.ref(model.network)
        self.api = create_app(model, start_service(model), Settings(("sudoku",)))
        self.served = self.api.state.served
        self.answers = Answers(self.served, store)
        self.arena = Arena(lambda contestant: self.served(), store, Event())
        self.cancelling = False
        self.manager = ModelManager(self.served, (self.answers, self.arena), sudoku, torch.device("cpu"), self.changed)
        self.manager.start()

    def changed(self):
        if self.cancelling and self.manager.loading:
            self.manager.cancel()

    @property
    def name(self):
        return self.served().settings.served_names[0]


@pytest.fixture
def desk(store):
    return Desk(store)


def ask(store, desk, **options):
    conversation = store.new_conversation("A puzzle", options=options)
    return desk.answers.start(store.add_message(conversation.id, "user", PUZZLE))


def client_of(desk):
    return httpx.AsyncClient(transport=httpx.ASGITransport(desk.api), base_url="http://127.0.0.1")


async def settled(desk):
    while desk.manager.leaving:
        await asyncio.sleep(0.02)


def test_another_model_answers_pages_and_the_api(desk, store):
    async def main():
        assert await desk.manager.load(OTHER)
        assert desk.name == "sudoku" and desk.manager.name == OTHER
        async with client_of(desk) as client:
            models = (await client.get("/v1/models")).json()
            answer = await client.post("/v1/chat/completions", json={
                "model": "sudoku", "messages": [{"role": "user", "content": PUZZLE}]})
        assert models["data"][0]["root"] == OTHER
        assert "534678912" in answer.json()["choices"][0]["message"]["content"]
        made = ask(store, desk)
        await made.finished()
        assert made.serving is desk.served()
        await settled(desk)
        await desk.manager.stop(1)

    asyncio.run(main())


def test_the_old_model_finishes_its_answers_and_is_let_go(desk, store):
    async def main():
        old = ask(store, desk)
        await desk.manager.load(OTHER)
        await old.finished()
        await settled(desk)
        assert old.status == "done" and "534678912" in old.text
        await asyncio.sleep(0)
        gc.collect()
        assert desk.network() is None
        await desk.manager.stop(1)

    asyncio.run(main())


def test_the_arena_lets_an_old_model_go_too(desk):
    async def main():
        desk.arena.start([PUZZLE], Contestant(), Contestant())
        while desk.arena.active():
            await asyncio.sleep(0.02)
        await desk.manager.load(OTHER)
        await settled(desk)
        await asyncio.sleep(0)
        gc.collect()
        assert desk.network() is None
        await desk.arena.close()
        await desk.manager.stop(1)

    asyncio.run(main())


def test_without_patience_running_answers_are_stopped_and_say_why(desk, store):
    async def main():
        old = ask(store, desk, max_denoising_steps=48, entropy_bound=1e-6, confidence_threshold=1e-9)
        await old.changed()
        await desk.manager.load(OTHER, patience=0)
        await settled(desk)
        assert (old.status, old.error) == ("stopped", LEFT)
        await desk.manager.stop(1)

    asyncio.run(main())


def test_what_cannot_be_loaded_leaves_the_old_model(desk):
    async def main():
        assert not await desk.manager.load("broken")
        assert desk.name == "sudoku" and desk.manager.loaded
        assert "no such model" in desk.manager.error
        await desk.manager.stop(1)

    asyncio.run(main())


def test_where_there_is_no_room_for_both_the_old_one_goes_first_and_comes_back(desk):
    async def main():
        assert not await desk.manager.load("broken", needed=1 << 60)
        assert desk.manager.loaded and desk.name == "sudoku"
        assert "sudoku was loaded again" in desk.manager.error
        gc.collect()
        assert desk.network() is None  # it is another one
        assert await desk.manager.load(OTHER, needed=1 << 60)
        await desk.manager.stop(1)

    asyncio.run(main())


def test_without_a_model_everybody_is_told_so(desk, store):
    async def main():
        await desk.manager.unload()
        assert not desk.manager.loaded
        gc.collect()
        assert desk.network() is None
        async with client_of(desk) as client:
            refused = await client.post("/v1/chat/completions", json={
                "model": "sudoku", "messages": [{"role": "user", "content": "Hi"}]})
            assert refused.status_code == 503 and "no model is in memory" in refused.json()["error"]["message"]
            for path in ("/v1/models", "/api/tags", "/metrics"):
                assert (await client.get(path)).status_code == 200
            assert (await client.get("/health")).status_code == 503
        answer = ask(store, desk)
        await answer.finished()
        assert answer.status == "failed" and "no model is in memory" in answer.error
        assert await desk.manager.load("sudoku")
        again = ask(store, desk)
        await again.finished()
        assert again.status == "done"
        await desk.manager.stop(1)

    asyncio.run(main())


def test_loading_can_be_given_up(desk):
    async def main():
        desk.cancelling = True
        assert not await desk.manager.load(OTHER)
        assert desk.name == "sudoku" and desk.manager.name == "sudoku" and "you stopped it" in desk.manager.error
        desk.cancelling = False
        assert await desk.manager.load(OTHER)
        await settled(desk)
        await desk.manager.stop(1)

    asyncio.run(main())


def test_one_model_is_loaded_at_a_time(desk):
    async def main():
        first = asyncio.ensure_future(desk.manager.load(OTHER))
        await asyncio.sleep(0)
        with pytest.raises(DgemmaError, match="being loaded"):
            await desk.manager.load(OTHER)
        assert await first
        await settled(desk)
        await desk.manager.stop(1)

    asyncio.run(main())
