"""The model that answers: loaded, unloaded, exchanged for another one while the studio runs.

Pages and API ask `dgemma.serve.backend.Served` for what answers; this puts another one there. Works on: the library's
`load`, an engine's service. Knows nothing of: pages.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch

from dgemma.engine.service import Service
from dgemma.errors import DgemmaError
from dgemma.memory import available_memory, release_freed
from dgemma.model import Model
from dgemma.serve.backend import Backend, Served, Serving
from dgemma.studio.jobs import StoppedError
from dgemma.studio.library import title_of
from dgemma.studio.unloaded import NoEngine, without_model

log = logging.getLogger("dgemma.studio")

MOST_AT_A_TIME, MOST_WAITING = 32, 256
PATIENCE = 600.0  # seconds that answers of a model that goes may still take
LEFT = "Another model was loaded, or this one unloaded, before this answer was finished."
_LOOK = 0.1  # seconds between two looks whether answers are over


class Engine(Backend, Protocol):
    """A backend that can be started, once, and stopped."""

    def start(self) -> None: ...

    async def stop(self, grace: float = 30.0) -> int: ...


class Answering(Protocol):
    """Who keeps answers of a model."""

    def stop_those_of(self, serving: Serving, why: str) -> None:
        """Stop what a model makes that is about to go; ``why`` is told of these answers."""

    def let_go(self, gone: Serving, now: Serving) -> None:
        """Keep nothing of a model that has gone: answers that are over are as good as those of another one."""


@dataclass(frozen=True)
class Loading:
    """What is being loaded, and how much of it has been read; ``stage`` says what happens in a few words."""

    title: str
    stage: str
    done: int = 0
    total: int = 0


def start_service(model: Model) -> Service:
    """The engine that answers with a model in the studio; it has yet to be started."""
    return Service(model.network, model.reader, model.prefixes, max_num_seqs=MOST_AT_A_TIME, max_queue=MOST_WAITING,
                   memory=model.request_memory())


class ModelManager:
    """Exchanges models. For the event loop's thread; it is also what the server starts and stops.

    ``load`` is `dgemma.load`, or that with some options; ``changed`` is told when what there is to show is different.
    """

    def __init__(self, served: Served, answering: Sequence[Answering], load: Callable[..., Model], device: torch.device,
                 changed: Callable[[], None] = lambda: None,
                 engine: Callable[[Model], Engine] = start_service):
        self.device = device
        self.loading: Loading | None = None
        self.error = ""  # why the last try failed
        self.news = ""  # what is worth telling of the last change
        self._served, self._answering, self._load, self._changed = served, answering, load, changed
        self._engine = engine
        self._busy = asyncio.Lock()
        self._leaving: dict[asyncio.Task[None], Engine] = {}
        self._cancelled = self._closing = False

    @property
    def loaded(self) -> bool:
        """Whether there is a model in memory that answers."""
        return not isinstance(self._served().backend, NoEngine)

    @property
    def name(self) -> str:
        """What loads the model that answers, or that answered last."""
        return self._served().model.name

    @property
    def leaving(self) -> int:
        """Models that are not asked any more, and are in memory until their last answers are over."""
        return len(self._leaving)

    # ---- for the server ----

    def start(self) -> None:
        _engine_of(self._served()).start()

    async def stop(self, grace: float = 30.0) -> int:
        """Stop whatever answers, and what is being loaded; how many answers were cut short."""
        self._closing = True
        engines = [_engine_of(self._served()), *self._leaving.values()]
        return sum(await asyncio.gather(*(engine.stop(grace) for engine in engines)))

    # ---- for the page ----

    async def load(self, name: str, needed: int | None = None, *, patience: float = PATIENCE) -> bool:
        """Let another model answer; whether that succeeded. If not, ``error`` says why, and the old one answers on.

        What the old one has begun it finishes, for ``patience`` seconds at most. ``needed`` are the bytes that the new
        one takes: where they are free only without the old one that goes first, and is loaded again if the new one
        cannot be. Raises DgemmaError while another one is being loaded.
        """
        if self._busy.locked():
            raise DgemmaError("another model is being loaded just now")
        async with self._busy:
            title, was_loaded = title_of(name), self.loaded
            name_before, title_before = self.name, self._served().settings.served_names[0]
            self.error = self.news = ""
            alone = was_loaded and self.fits_beside(needed) is False
            try:
                if alone:
                    self._tell(Loading(title, f"waiting for what {title_before} has begun"))
                    await self._put_away(f"{title} is being loaded: try again in a moment", patience)
                try:
                    serving = await self._read(name, title)
                except Exception as error:
                    self._failed(title, error)
                    if alone:
                        await self._again(name_before, title_before)
                    return False
                before = self._answer_with(serving)
                if was_loaded and not alone:
                    self._let_go(before, patience)
                return True
            finally:
                self._tell(None)

    def cancel(self) -> None:
        """Give up what is being loaded."""
        self._cancelled = True

    async def unload(self, *, patience: float = PATIENCE) -> None:
        """Take the model out of memory, when what it has begun is finished, for so many seconds at most."""
        if self._busy.locked():
            raise DgemmaError("a model is being loaded just now")
        async with self._busy:
            if self.loaded:
                self.error = ""
                title = self._served().settings.served_names[0]
                self._tell(Loading(title, "unloading: waiting for what it has begun"))
                try:
                    await self._put_away("no model is in memory: load one on the page Models", patience)
                    self.news = f"{title} was unloaded."
                finally:
                    self._tell(None)

    def fits_beside(self, needed: int | None) -> bool | None:
        """Whether so many bytes are free beside the model that is loaded; None if nobody knows."""
        free = available_memory(self.device)
        return None if needed is None or free is None else needed <= free

    def running(self) -> int:
        """Requests that the model answers now, or that wait for it."""
        stats = self._served().backend.stats()
        return stats.running + stats.waiting

    def _tell(self, loading: Loading | None) -> None:
        self.loading = loading
        self._changed()

    def _failed(self, title: str, error: Exception) -> None:
        if not isinstance(error, DgemmaError):
            log.exception("%s cannot be loaded", title, exc_info=error)
        told = str(error) if isinstance(error, DgemmaError) else f"{type(error).__name__}: {error}"
        self.error = (f"{title} was not loaded: you stopped it." if isinstance(error, StoppedError)
                      else f"{title} could not be loaded: {told}")

    async def _again(self, name: str, title: str) -> None:
        """The model that had to make room answers again."""
        try:
            self._answer_with(await self._read(name, title))
            self.error += f"\n{title} was loaded again."
        except Exception as error:
            log.exception("%s cannot be loaded again", name, exc_info=error)
            self.error += f"\n{title} had to make room for it, and could not be loaded again: {error}"

    async def _read(self, name: str, title: str) -> Serving:
        """Load a model in another thread and make it ready to answer."""
        self._cancelled = False
        self._tell(Loading(title, "loading"))

        def progress(done: int, total: int) -> None:  # in that thread
            if self._cancelled or self._closing:
                raise StoppedError("stopped")
            self.loading = Loading(title, "loading", done, total)

        def load() -> tuple[Model, Engine]:
            progress(0, 0)
            model = self._load(name, progress=progress)
            return model, self._engine(model)

        model, engine = await asyncio.to_thread(load)
        engine.start()
        now = self._served()
        settings = dataclasses.replace(now.settings, served_names=(title,))
        return dataclasses.replace(now, model=model, backend=engine, settings=settings)

    def _answer_with(self, serving: Serving) -> Serving:
        """Let a model answer from now on; what answered before."""
        self.news = f"{serving.settings.served_names[0]} answers now."
        return self._served.replace(serving)

    def _let_go(self, old: Serving, patience: float) -> None:
        """Let a model go when its answers are over; nobody waits for that."""
        leaving = asyncio.get_running_loop().create_task(self._end(old, patience))
        self._leaving[leaving] = _engine_of(old)
        leaving.add_done_callback(self._gone)

    def _gone(self, task: asyncio.Task[None]) -> None:
        del self._leaving[task]
        gc.collect()  # engine and network hold each other
        release_freed()
        self._changed()

    async def _put_away(self, why: str, patience: float) -> None:
        """Take the model out of memory before anything else is done."""
        self._served.replace(without_model(old := self._served(), why))
        self._changed()
        await self._end(old, patience)
        del old
        gc.collect()
        release_freed()

    async def _end(self, old: Serving, patience: float) -> None:
        """Wait until a model has finished what it began, and stop it."""
        engine = _engine_of(old)
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and engine.stats().running + engine.stats().waiting:
            await asyncio.sleep(_LOOK)
        for keeper in self._answering:
            keeper.stop_those_of(old, LEFT)
        await engine.stop(_LOOK)
        for keeper in self._answering:
            keeper.let_go(old, self._served())


def _engine_of(serving: Serving) -> Engine:
    """The backend of a serving of the studio's: these can all be started and stopped."""
    return cast(Engine, serving.backend)
