"""The adapters of the model that answers: loaded by a path or from the hub, and unloaded.

Works on: a backend's adapters, `dgemma.weights.hub`. Knows nothing of: what an adapter is.
"""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

from nicegui import ui

from dgemma.errors import DgemmaError
from dgemma.formats import size_text
from dgemma.serve.settings import check_adapter_name
from dgemma.studio.buttons import text_button
from dgemma.studio.frame import Studio
from dgemma.studio.library import adapters_here, title_of
from dgemma.weights.files import hub_name
from dgemma.weights.hub.repository import fetch, plan_pull
from dgemma.weights.hub.transfer import Listener

_FILES = ("adapter_config.json", "adapter_model.safetensors")


class AdapterList:
    """The list, and a form for another one."""

    def __init__(self, studio: Studio):
        self._studio = studio
        self._rows = ui.element("div").classes("wide")
        with ui.row().classes("fields wide"):
            known = [str(path) for path in adapters_here(studio.runs)]
            self._where = ui.input(placeholder="/path/to/an/adapter or org/name", autocomplete=known).classes("grow")
            self._where.props('outlined dense aria-label="Where the adapter is"')
            self._name = ui.input(placeholder="its name here").props('outlined dense aria-label="The adapter\'s name"')
            text_button("Load", self._load, icon="add").props('aria-label="Load the adapter"')
        if known:
            with ui.row().classes("fields"):
                ui.label("Trained here:").classes("muted small")
                for path in known:
                    text_button(title_of(path), partial(self._fill, path), small=True)
        self.refresh()

    def refresh(self) -> None:
        """Show what there is now."""
        backend = self._studio.serving().backend
        sizes = backend.stats().adapters
        self._rows.clear()
        with self._rows:
            for name, path in backend.adapters.paths().items():
                with ui.row().classes("line"):
                    with ui.element("div").classes("line-words grow"):
                        with ui.row().classes("model-name"):
                            ui.label(name).classes("line-name")
                            if name in sizes:
                                ui.label(size_text(sizes[name].nbytes)).classes("tag")
                        ui.label(path).classes("muted small")
                    text_button("Unload", partial(self._unload, name)).props(f'aria-label="Unload {name}"')

    def _fill(self, path: str) -> None:
        self._where.value = path
        self._name.value = Path(path).parent.name

    async def _load(self) -> None:
        where = (self._where.value or "").strip()
        name = (self._name.value or "").strip() or Path(where).name
        serving = self._studio.serving()
        try:
            if not where:
                raise DgemmaError("where is the adapter?")
            check_adapter_name(name, serving.settings.served_names)
            path = await asyncio.to_thread(located, where)
            await asyncio.to_thread(serving.backend.load_adapter, name, path)
        except DgemmaError as error:
            ui.notify(str(error), type="negative", position="top", multi_line=True)
            return
        self._where.value = self._name.value = ""
        ui.notify(f"{name} can be asked for now, over the API as the model {name!r}", type="positive", position="top")
        self.refresh()

    def _unload(self, name: str) -> None:
        try:
            self._studio.serving().backend.unload_adapter(name)
        except DgemmaError as error:
            ui.notify(str(error), type="negative", position="top")
        self.refresh()


def located(where: str) -> Path:
    """The folder, or file, of an adapter that a path or a name on the hub means; from there it is fetched.

    Raises DgemmaError where there is none.
    """
    path = Path(where).expanduser()
    if path.exists():
        return path
    on_hub = hub_name(where)
    if on_hub is None:
        raise DgemmaError(f"{where}: no such file or folder, and no name on the hub (org/name)")
    return fetch(plan_pull(on_hub[0], include=_FILES), Listener())
