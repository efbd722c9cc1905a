"""The models that are on this machine: what they are, whether they fit, and what can be done with them.

Works on: the studio's library and manager. Knows nothing of: files.
"""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

from nicegui import ui

from dgemma.errors import DgemmaError
from dgemma.formats import count_text, size_text
from dgemma.studio.apart import convert_apart
from dgemma.studio.buttons import icon_button, main_button, text_button
from dgemma.studio.frame import Studio
from dgemma.studio.jobs import Job
from dgemma.studio.library import Fit, Here, add_path, fit_of, forget_path, models_here, note_last
from dgemma.studio.widgets.hub import download_title, go_on
from dgemma.studio.widgets.sheet import dialog, dialog_buttons
from dgemma.weights.files import TOWER_TYPES
from dgemma.weights.hub.cache import GGUF, files_beside, remove_model
from dgemma.weights.quantize import MIXTURES

_ORIGINS = {"bundled": "comes along", "hub": "from the hub", "yours": "added by you", "run": "trained here"}
_VERDICTS = {"yes": "fits", "no": "does not fit", "if other programs close": "tight", "?": "unknown"}
_TYPES = {"Q4_K_M": "Q4_K_M: the smallest", "Q5_K_M": "Q5_K_M", "Q6_K": "Q6_K", "Q8_0": "Q8_0: nearly exact",
          "BF16": "BF16: what weights are trained in"}


class Shelf:
    """The list, and a form to add to it."""

    def __init__(self, studio: Studio):
        self._studio = studio
        self._apart = ui.element("div")  # dialogs outlive the rows
        self._rows = ui.element("div").classes("wide")
        with ui.row().classes("fields wide"):
            self._path = ui.input(placeholder="/path/to/a/folder or model.gguf").classes("grow")
            self._path.props('outlined dense aria-label="A folder or GGUF file"')
            self._path.on("keydown.enter", self._add)
            text_button("Add", self._add, icon="add")

    async def refresh(self) -> None:
        """Show what there is now."""
        found = await asyncio.to_thread(self._look)
        self._rows.clear()
        with self._rows:
            for here, fit in found:
                self._row(here, fit)

    def _look(self) -> list[tuple[Here, Fit]]:
        device = self._studio.models.device
        return [(here, fit_of(here.model, device)) for here in models_here(self._studio.store, self._studio.runs)]

    def _row(self, here: Here, fit: Fit) -> None:
        studio, model, models = self._studio, here.model, self._studio.models
        current = model.name == models.name and models.loaded
        with ui.element("div").classes("model" + (" here" if current else "")), ui.row().classes("line"):
            with ui.element("div").classes("line-words grow"):
                with ui.row().classes("model-name"):
                    ui.label(here.title).classes("line-name").props(f'title="{model.path}"')
                    for tag in filter(None, (model.quantisation or (model.kind if model.kind != GGUF else ""),
                                             size_text(model.size), _ORIGINS[here.origin])):
                        ui.label(tag).classes("tag")
                    verdict = "damaged" if fit.problem else _VERDICTS[fit.verdict]
                    ui.label(verdict).classes(f"tag {_tone(fit)}")
                ui.label(fit.facts or fit.why).classes("muted small")
                if fit.facts:
                    ui.label(fit.why[:1].upper() + fit.why[1:]).classes("muted small")
                if fit.problem:
                    ui.label(fit.problem).classes("small danger pre")
            if current:
                ui.label("answers now").classes("tag good")
            elif not model.complete and studio.jobs.runs(download_title(model.name)):
                ui.label("is coming").classes("tag")
            elif not model.complete:
                text_button("Go on", partial(go_on, studio.jobs, model.name), icon="download").props(
                    f'aria-label="Go on with {here.title}"')
            elif not fit.problem:
                text_button("Load", partial(self.load, here, fit), icon="play_arrow").props(
                    f'aria-label="Load {here.title}"')
            if not model.bundled or model.complete:
                more = icon_button("more_horiz", f"More for {here.title}", lambda: self._menu(more, here), small=True,
                                   hint=False)

    def _menu(self, button: ui.button, here: Here) -> None:
        with self._apart, ui.menu().props(f'auto-close no-parent-event target="#{button.html_id}"') as menu:
            if here.model.complete:
                ui.menu_item("Convert to GGUF …", partial(self._convert, here)).props("role=menuitem")
            if here.origin == "hub":
                ui.menu_item("Delete …", partial(self._delete, here)).props("role=menuitem").classes("danger")
            if here.origin == "yours":
                ui.menu_item("Show no more", partial(self._forget, here)).props("role=menuitem")
        menu.on("hide", menu.delete)
        menu.open()

    async def load(self, here: Here, fit: Fit) -> None:
        """Let a model answer; ask first where something runs, or there is not room for both."""
        models = self._studio.models
        running = models.running() if models.loaded else 0
        beside = models.fits_beside(fit.needed)
        if not running and not (models.loaded and beside is False) and fit.verdict != "no":
            await self._load(here, fit, 0.0)
            return
        with self._apart, dialog(f"Load {here.title}?") as asked:
            for words in _before(models.running(), beside is False and models.loaded, fit,
                                 self._studio.serving().settings.served_names[0]):
                ui.label(words).classes("muted")
            with ui.row().classes("dialog-buttons"):
                text_button("Cancel", asked.close)
                if running:
                    text_button("Stop them", lambda: self._after(asked, here, fit, 0.0))
                    main_button("Let them finish", lambda: self._after(asked, here, fit, None))
                else:
                    main_button("Load it", lambda: self._after(asked, here, fit, 0.0))

    async def _after(self, asked: ui.dialog, here: Here, fit: Fit, patience: float | None) -> None:
        asked.close()
        await self._load(here, fit, patience)

    async def _load(self, here: Here, fit: Fit, patience: float | None) -> None:
        options = {} if patience is None else {"patience": patience}
        try:
            if await self._studio.models.load(here.model.name, fit.needed, **options):
                note_last(self._studio.store, here.model.name)
        except DgemmaError as error:
            ui.notify(str(error), type="negative", position="top")

    async def _add(self) -> None:
        try:
            found = await asyncio.to_thread(add_path, self._studio.store, self._path.value or "")
        except DgemmaError as error:
            ui.notify(str(error), type="negative", position="top", multi_line=True)
            return
        self._path.value = ""
        ui.notify(f"{count_text(len(found), 'model')} found", type="positive", position="top")
        await self.refresh()

    async def _forget(self, here: Here) -> None:
        forget_path(self._studio.store, here.model.path)
        await self.refresh()

    def _delete(self, here: Here) -> None:
        if here.model.name == self._studio.models.name and self._studio.models.loaded:
            ui.notify("This model answers now: load another one, or unload it, first.", type="negative",
                      position="top")
            return

        async def delete() -> None:
            asked.close()
            try:
                freed = await asyncio.to_thread(remove_model, here.model)
            except DgemmaError as error:
                ui.notify(str(error), type="negative", position="top", multi_line=True)
            else:
                ui.notify(f"{size_text(freed)} are free now", type="positive", position="top")
            await self.refresh()

        with self._apart, dialog(f"Delete {here.title}?") as asked:
            ui.label(f"{size_text(here.model.size)} will be gone from this machine; they can be downloaded again. "
                     "Other models of the repository stay.").classes("muted")
            if beside := files_beside(here.model):
                ui.label(f"So do {count_text(len(beside), 'other file')} beside it: {', '.join(list(beside)[:5])}."
                         ).classes("muted")
            dialog_buttons(asked, "Delete", delete, color="negative")

    def _convert(self, here: Here) -> None:
        source = here.model.path
        stem = here.title.replace("/", "-").replace(":", "-").replace(" ", "-")

        def begin() -> None:
            asked.close()
            out = Path((where.value or "").strip()).expanduser()
            convert_in_background(self._studio, source, out, kind.value,
                                  tower.value if tower.value in TOWER_TYPES else None)

        def name_it() -> None:
            where.value = str(self._studio.store.path.parent / "models" / f"{stem}-{kind.value}.gguf")

        with self._apart, dialog(f"Convert {here.title}") as asked:
            ui.label("A GGUF file with packed weights takes less memory and less time to read. It is written by a "
                     "process of its own.").classes("muted")
            kind = ui.select({name: _TYPES.get(name, name) for name in MIXTURES}, value="Q4_K_M", label="Weights",
                             on_change=name_it).props("outlined").classes("wide")
            tower = ui.select({**{name: name for name in TOWER_TYPES}, "": "left out"}, value="BF16",
                              label="Vision tower, if there is one").props("outlined").classes("wide")
            where = ui.input("File to write").props("outlined").classes("wide")
            name_it()
            dialog_buttons(asked, "Convert", begin)


def convert_in_background(studio: Studio, source: Path, out: Path, mixture: str, tower: str | None) -> Job:
    """Convert a model in a process of its own; what it becomes is added to the list."""
    def work(job: Job) -> str:
        out.parent.mkdir(parents=True, exist_ok=True)
        last = ""

        def tell(name: str, done: int, total: int) -> None:
            nonlocal last
            if not last:
                job.begin("converting", 0, total)
            last = name
            job.advance(done)

        summary = convert_apart(source, out, mixture, tower, tell=tell, stopping=lambda: job.stopping)
        add_path(studio.store, str(out))
        words = f"{out}: {size_text(summary.nbytes)}, {summary.bits_per_weight:.2f} bits per weight"
        if summary.requantized:
            words += ". It was quantised already, and rounding twice loses quality: convert the original if you can."
        return words

    return studio.jobs.start(f"Converting to {out.name}", work)


def _before(running: int, alone: bool, fit: Fit, current: str) -> list[str]:
    """What to know before another model is loaded."""
    told = []
    if running:
        told.append(f"{current} is answering {count_text(running, 'request')} now.")
    if alone:
        told.append(f"There is not memory for both: {current} goes first, and is loaded again if this one cannot be.")
    if fit.verdict == "no":
        told.append(f"It does not fit this machine: it {fit.why}. It may run all the same, but slowly, from the disk.")
    return told


def _tone(fit: Fit) -> str:
    if fit.problem or fit.verdict == "no":
        return "bad"
    return {"yes": "good", "if other programs close": "warn"}.get(fit.verdict, "")
