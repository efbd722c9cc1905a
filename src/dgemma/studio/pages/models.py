"""Models: which one answers and what it takes, what is on this machine, what the hub has, adapters.

Works on: the studio's model manager, jobs, library. Knows nothing of: conversations.
"""

from __future__ import annotations

from nicegui import ui

from dgemma.errors import DgemmaError
from dgemma.formats import count_text, short_count, size_text
from dgemma.machine import resident_memory
from dgemma.memory import machine_memory
from dgemma.studio.buttons import icon_button, text_button
from dgemma.studio.frame import Frame, Page, Studio
from dgemma.studio.widgets.adapters import AdapterList
from dgemma.studio.widgets.hub import Hub
from dgemma.studio.widgets.sheet import section
from dgemma.studio.widgets.shelf import Shelf
from dgemma.studio.widgets.work import Work

_LOOK_EVERY = 0.5  # seconds


class Models:
    """One browser's page."""

    def __init__(self, studio: Studio):
        self._studio = studio
        with section("Answers now"):
            self._current = Current(studio)
        with section("At work") as self._work_box:
            self._work = Work(studio.jobs)
        with section("On this machine", "Whether a model fits is reckoned with its weights, the keys and values of a "
                     "conversation, and what works on them."):
            self._shelf = Shelf(studio)
        with section("Adapters", "Small additions to the model that answers, each under a name of its own."):
            self._adapters = AdapterList(studio)
        with section("On the hub", "Models are kept in the Hugging Face cache, where other programs find them, too. "
                     "What was broken off goes on where it stopped."):
            self._hub = Hub(studio.jobs)
        self._work_box.set_visibility(bool(studio.jobs.all()))
        studio.exchanged.subscribe(self._exchanged)
        ui.timer(_LOOK_EVERY, self._look)

    async def show(self) -> None:
        """Fill in what takes a moment."""
        await self._shelf.refresh()

    async def _exchanged(self) -> None:
        self._current.refresh()
        self._adapters.refresh()
        if self._studio.models.loading is None:
            await self._shelf.refresh()

    async def _look(self) -> None:
        self._current.look()
        if self._work.refresh():
            self._work_box.set_visibility(bool(self._studio.jobs.all()))
            await self._shelf.refresh()


class Current:
    """The model that answers, what is being loaded, and the memory that all takes."""

    def __init__(self, studio: Studio):
        self._studio = studio
        with ui.row().classes("line"):
            with ui.element("div").classes("line-words grow"):
                self._name = ui.label().classes("current-name")
                self._facts = ui.label().classes("muted small")
            self._unload = text_button("Unload", self._put_away, icon="eject")
        with ui.element("div").classes("wide") as self._loading:
            with ui.row().classes("line"):
                self._stage = ui.label().classes("muted small figures").props("role=status")
                self._cancel = icon_button("close", "Stop loading", studio.models.cancel)
            self._bar = ui.linear_progress(0, show_value=False).props('rounded aria-label="Loading"')
        with ui.row().classes("failure") as self._failure:
            ui.icon("error_outline")
            self._error = ui.label().classes("pre").props("role=alert")
        with ui.element("div").classes("gauges"):
            self._gauges = {name: Gauge(label) for name, label in (
                ("process", "This program"), ("machine", "Machine"), ("requests", "Keys and values in use"),
                ("kept", "Kept to be read again"))}
        self.refresh()

    def refresh(self) -> None:
        """Show the model that answers now."""
        studio, models = self._studio, self._studio.models
        serving = studio.serving()
        name, config = serving.settings.served_names[0], serving.model.config
        self._name.set_text(name if models.loaded else "No model is in memory")
        if models.loaded:
            weights = serving.backend.weights()
            self._facts.set_text(", ".join(filter(None, (
                f"{short_count(weights.parameters)} parameters, {weights.type}, {size_text(weights.nbytes)}",
                f"{serving.context_limit:,} tokens of context, {config.canvas_length} at a time",
                "sees pictures" if serving.model.pictures is not None else "",
                "on the GPU" if weights.on_gpu else ""))))
        else:
            self._facts.set_text("Nothing can be asked until one is loaded.")
        self._failure.set_visibility(bool(models.error))
        self._error.set_text(models.error)
        self.look()

    def look(self) -> None:
        """Show how much memory is taken now, and how far something is that is being loaded."""
        models, loading = self._studio.models, self._studio.models.loading
        self._unload.set_visibility(models.loaded and loading is None)
        self._loading.set_visibility(loading is not None or models.leaving > 0)
        if loading is not None:
            so_far = f" {size_text(loading.done)} of {size_text(loading.total)}" if loading.total else ""
            self._stage.set_text(f"{loading.title}: {loading.stage}{so_far}")
            self._bar.set_value(loading.done / loading.total if loading.total else 0)
        elif models.leaving:
            self._stage.set_text(f"{count_text(models.leaving, 'model')} still in memory, for what was begun with "
                                 "it to be finished.")
        for part in (self._bar, self._cancel):
            part.set_visibility(loading is not None)
        self._memory()

    def _memory(self) -> None:
        stats, (available, total) = self._studio.serving().backend.stats(), machine_memory()
        held = resident_memory()
        self._gauges["process"].show(held, total)
        self._gauges["machine"].show(None if available is None or total is None else total - available, total)
        self._gauges["requests"].show(stats.reserved_bytes, stats.request_budget)
        self._gauges["kept"].show(stats.prefix_bytes, stats.prefix_budget)

    async def _put_away(self) -> None:
        try:
            await self._studio.models.unload()
        except DgemmaError as error:
            ui.notify(str(error), type="negative", position="top")


class Gauge:
    """So much of something, in words and as a bar."""

    def __init__(self, label: str):
        with ui.element("div").classes("gauge"):
            ui.label(label).classes("muted small")
            self._words = ui.label().classes("figures")
            self._bar = ui.linear_progress(0, show_value=False).props(f'rounded aria-label="{label}"')

    def show(self, used: int | None, total: int | None) -> None:
        """None for what cannot be told."""
        words = "?" if used is None else size_text(used)
        self._words.set_text(f"{words} of {size_text(total)}" if total else words)
        self._bar.set_value(round(min((used or 0) / total, 1.0), 3) if total else 0)


async def build(studio: Studio, frame: Frame) -> None:
    """The page."""
    with frame.bar:
        ui.label("Models").classes("bar-title")
    with ui.element("div").classes("sheet column-of-text"):
        page = Models(studio)
    await page.show()


PAGE = Page("/models", "Models", "view_in_ar", build)
