"""The form that makes a recipe: choices at the left, the recipe that they are at the right, which can be edited.

Works on: `dgemma.studio.training`. Knows nothing of: runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

from nicegui import events, ui

from dgemma.errors import DgemmaError
from dgemma.studio.buttons import file_field, main_button, text_button
from dgemma.studio.training.ask import as_html, ask
from dgemma.studio.training.data import new_folder, safe_name, source_in
from dgemma.studio.training.recipes import (
    KINDS,
    Ready,
    bases_of,
    changed,
    choices_for,
    goals,
    ready_recipes,
    write_recipe,
)


class RecipeForm:
    """Choices and their recipe; ``begin(text, film prompt)`` is called with what shall be trained.

    ``place`` is where uploads and the recipe that is tried are kept.
    """

    def __init__(self, place: Path, model: str, begin: Callable[[str, str], Awaitable[None]]):
        self._place, self._begin = place, begin
        self._choices = choices_for(model)
        self._folder: Path | None = None  # of this page's uploads
        self._ready()
        with ui.element("div").classes("train-two"):
            with ui.element("div").classes("train-card"):
                self._data()
                self._model()
            with ui.element("div").classes("train-card"):
                ui.html("<h2>The recipe</h2>", sanitize=False)
                ui.label("What is trained is what stands here. Change it as you like; a choice at the left writes it "
                         "anew.").classes("muted small")
                self._text = ui.textarea(value=self._choices.text).props(
                    'outlined aria-label="Recipe" spellcheck=false').classes("train-yaml wide")
        with ui.element("div").classes("train-card"):
            with ui.row().classes("fields"):
                text_button("What is learnt", self.preview, icon="visibility")
                text_button("Memory plan", self.plan, icon="memory")
                main_button("Start training", self.start)
            self._prompt = ui.input("Film this prompt at every better checkpoint (may be empty)").props(
                "outlined dense").classes("wide")
            self._shown = ui.element("div").classes("wide")

    def _ready(self) -> None:
        found = ready_recipes()
        if found:
            with ui.element("div").classes("ideas"):
                for ready in found:
                    idea = ui.element("button").classes("idea").props('type="button"')
                    idea.on("click", partial(self._take, ready))
                    with idea:
                        ui.label(ready.title).classes("idea-title")
                        ui.label(ready.about).classes("idea-words")

    def _take(self, ready: Ready) -> None:
        self._text.value = ready.path.read_text(encoding="utf-8")

    def _data(self) -> None:
        ui.html("<h2>Data</h2>", sanitize=False)
        self._select("kind", "What is learnt from", KINDS)
        file_field("JSONL, JSON, Parquet, CSV, and pictures that they name: choose, or drop them here",
                   self._take_file, multiple=True)
        self._source = ui.input("or a file or folder here, or a dataset on the hub (org/name)").props(
            "outlined dense").classes("wide")
        self._source.on("change", lambda: self._set(train=tuple(filter(None, [(self._source.value or "").strip()]))))
        with ui.element("div").classes("train-fields"):
            self._number("held_out_share", "Kept apart to judge by", 0.05)
            self._number("epochs", "Times through the data", 0.5)
            self._number("steps", "Steps (of endless data)", 50)

    def _model(self) -> None:
        ui.html("<h2>Model and goal</h2>", sanitize=False)
        base = ui.input("Base: a name, a folder, a .gguf file, org/name", value=self._choices.model)
        base.props("outlined dense").classes("wide").on("change", lambda: self._set(model=(base.value or "").strip()))
        with ui.element("div").classes("train-fields"):
            ui.switch("Train an adapter only", value=self._choices.adapter,
                      on_change=lambda event: self._set(adapter=bool(event.value)))
            ui.switch("Save memory (checkpointing)", value=self._choices.checkpointing,
                      on_change=lambda event: self._set(checkpointing=bool(event.value)))
        self._select("goal", "What is better", goals())
        with ui.element("div").classes("train-fields"):
            name = ui.input("Name of the run", value=self._choices.name).props("outlined dense")
            name.on("change", lambda: self._set(name=(name.value or "").strip()))
            self._number("rank", "Rank of the adapter", 8)
            self._number("lr", "Learning rate", 1e-5)
            self._number("batch_size", "Canvases a step", 1)
            self._number("micro_batch", "In memory at a time", 1)
            self._number("every", "Steps between evaluations", 5)
            self._number("count", "Questions asked then", 4)

    def _select(self, field: str, label: str, options: dict[str, str]) -> None:
        ui.select(options, label=label, value=getattr(self._choices, field), on_change=lambda event: self._set(
            **{field: event.value})).props("outlined dense").classes("wide")

    def _number(self, field: str, label: str, step: float) -> None:
        value = getattr(self._choices, field)

        def take(given: float | None) -> None:
            self._set(**{field: None if given is None else type(value)(given)})

        ui.number(label, value=value, step=step, min=0, on_change=lambda event: take(event.value)).props(
            "outlined dense")

    def _set(self, **values: Any) -> None:
        self._choices = changed(self._choices, **values)
        self._text.value = self._choices.text

    async def _take_file(self, event: events.UploadEventArguments) -> None:
        try:
            name = safe_name(event.file.name)
            if self._folder is None:
                self._folder = new_folder(self._place / "data", name)
            await event.file.save(self._folder / name)
            source = await asyncio.to_thread(source_in, self._folder)
        except DgemmaError as error:
            ui.notify(str(error), type="warning", position="top")
            return
        self._source.value = source
        self._set(train=(source,))

    # ---- what is asked before starting ----

    def _written(self) -> str:
        """The recipe in a file, checked; raises DgemmaError."""
        return str(write_recipe(self._place / "tried", self._text.value or "", bases_of(self._text.value or "")))

    async def _ask(self, about: str, *arguments: str, colours: bool = False) -> None:
        self._shown.clear()
        with self._shown:
            ui.label(about).classes("muted")
        try:
            text = await ask("train", self._written(), *arguments, colours=colours)
        except DgemmaError as error:
            self._shown.clear()
            with self._shown, ui.row().classes("failure").props('role="alert"'):
                ui.icon("error_outline")
                ui.label(str(error)).style("white-space: pre-wrap")
            return
        self._shown.clear()
        with self._shown:  # escaped by `as_html`
            ui.html(f'<pre class="train-shown" tabindex="0">{as_html(text)}</pre>', sanitize=False).classes("wide")

    async def preview(self) -> None:
        """Show which tokens have loss."""
        await self._ask("Reading the data …", "--preview", colours=True)

    async def plan(self) -> None:
        """Show how much memory the run will take."""
        await self._ask("Counting …", "--plan")

    async def start(self) -> None:
        """Begin the run."""
        try:
            await self._begin(self._text.value or "", (self._prompt.value or "").strip())
        except DgemmaError as error:
            ui.notify(str(error), type="negative", position="top", multi_line=True)
