"""A contestant of the arena as a card, and the panel in which it is put together.

Works on: contestants, what serves. Knows nothing of: battles that go on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nicegui import ui

from dgemma.config import GenerationConfig
from dgemma.serve.backend import Serving
from dgemma.studio.battles import Contestant, about
from dgemma.studio.buttons import icon_button, main_button, text_button
from dgemma.studio.presets import PRESETS
from dgemma.studio.widgets.controls import Controls

_ALONE = "the model alone"


class ContestantCard:
    """One of the two. ``starts`` are settings to begin with, by name; ``changed`` is called with every change."""

    def __init__(self, number: int, contestant: Contestant, serving: Callable[[], Serving],
                 starts: Mapping[str, Contestant], changed: Callable[[Contestant], None]):
        self.contestant, self._changed, self._starts = contestant, changed, starts
        self._serving, self._number = serving, number
        with ui.element("section").classes("card").props(f'aria-label="Contestant {number}"') as self.box:
            with ui.row().classes("card-head"):
                self._name = ui.label().classes("name")
                icon_button("tune", f"Change contestant {number}", self._edit)
            self._about = ui.label().classes("muted small")
        self._show()

    def _show(self) -> None:
        self._name.set_text(self.contestant.title)
        self._about.set_text(about(self.contestant))

    def set(self, contestant: Contestant) -> None:
        self.contestant = contestant
        self._show()
        self._changed(contestant)

    def _edit(self) -> None:
        given = self.contestant
        with self.box, ui.dialog() as dialog, ui.card().classes("dialog panel contestant-panel"):
            with ui.row().classes("panel-head"):
                ui.label(f"Contestant {self._number}").classes("panel-title")
                start = ui.select(list(self._starts), label="Start from", on_change=lambda: put(start.value))
                start.props("outlined dense options-dense").classes("start-from")
            name = ui.input("Name", value=given.name, placeholder="made from its settings if empty").classes("wide")
            name.props("outlined dense maxlength=80")
            adapters = {_ALONE: None} | {known: known for known in self._serving().backend.adapters.paths()}
            adapter = ui.select(list(adapters), label="Adapter", value=given.adapter or _ALONE if (
                given.adapter in (None, *adapters)) else _ALONE).props("outlined dense").classes("wide")
            adapter.set_visibility(len(adapters) > 1)
            system = ui.textarea("System prompt", value=given.system, placeholder="How it should answer, in general")
            system.props("autogrow outlined").classes("wide")
            controls = Controls(self._serving().model.generation_config, dict(given.options), lambda options: None)

            def put(start: str) -> None:
                chosen = self._starts[start]
                name.value, adapter.value = chosen.name, chosen.adapter if chosen.adapter in adapters else _ALONE
                system.value = chosen.system
                controls.set(dict(chosen.options))

            def take() -> None:
                self.set(Contestant((name.value or "").strip(), given.model, adapters[adapter.value],
                                    system.value or "", controls.options))
                dialog.close()

            with ui.row().classes("dialog-buttons"):
                text_button("Cancel", dialog.close)
                main_button("Take", take)
        dialog.on("hide", dialog.delete)
        dialog.open()


def usual_contestants(defaults: GenerationConfig) -> tuple[Contestant, Contestant]:
    """Whom the arena begins with: the checkpoint's own settings, and half of its steps."""
    half = max(1, defaults.max_denoising_steps // 2)
    return Contestant("The model's own settings"), Contestant("Half the steps", options={"max_denoising_steps": half})


def starting_points(defaults: GenerationConfig, chat: Mapping[str, Any],
                    met: Mapping[str, Contestant]) -> dict[str, Contestant]:
    """What a contestant may start from: the usual ones, the chat's settings, the presets, those who met before."""
    in_chat = Contestant("As in the chat", system=chat.get("system", ""), options={
        name: value for name, value in chat.get("options", {}).items() if name != "tools"})
    presets = [Contestant(name, options=options) for name, options in PRESETS.items() if options]
    bolder = Contestant("Bolder", options={"entropy_bound": round(3 * defaults.entropy_bound, 4)})
    own = {one.title: one for one in (*usual_contestants(defaults), in_chat, *presets, bolder)}
    return own | {name: one for name, one in met.items() if name not in own}
