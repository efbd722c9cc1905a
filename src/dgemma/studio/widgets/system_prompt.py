"""The system prompt of a conversation, and those that were kept under a name.

Works on: a store's settings. Knows nothing of: conversations.
"""

from __future__ import annotations

from collections.abc import Callable

from nicegui import ui

from dgemma.studio.buttons import icon_button, main_button, text_button
from dgemma.studio.presets import keep_system_prompt, system_prompts
from dgemma.studio.store import Store


class SystemPrompt:
    """The part of the panel. ``changed`` is called with the words, whenever they change."""

    def __init__(self, store: Store, words: str, changed: Callable[[str], None]):
        self._store, self._changed = store, changed
        self._quiet = False
        self._words = ui.textarea("System prompt", value=words, placeholder="How it should answer, in general",
                                  on_change=self._tell).props("autogrow outlined debounce=400").classes("wide")
        with ui.row().classes("prompts"):
            self._names = ui.select([], label="Saved prompts", on_change=self._choose).classes("prompts-names")
            self._names.props("outlined dense")
            icon_button("bookmark_add", "Save this prompt", self._keep, small=True)
            self._forget_button = icon_button("delete", "Delete this saved prompt", self._forget, small=True)
        self._list()

    @property
    def words(self) -> str:
        return self._words.value or ""

    def set(self, words: str) -> None:
        """Show another one, as of another conversation."""
        self._quiet = True
        try:
            self._words.value = words
        finally:
            self._quiet = False
        self._list()

    def _tell(self) -> None:
        if not self._quiet:
            self._list()
            self._changed(self.words)

    def _list(self) -> None:
        """Offer what is kept; the name of the words that stand here is chosen."""
        kept = system_prompts(self._store)
        here = next((name for name, words in kept.items() if words == self.words), None)
        quiet, self._quiet = self._quiet, True
        self._names.set_options(list(kept), value=here)
        self._quiet = quiet
        self._names.set_visibility(bool(kept))
        self._forget_button.set_visibility(here is not None)

    def _choose(self) -> None:
        words = system_prompts(self._store).get(self._names.value or "")
        if not self._quiet and words is not None:
            self._words.value = words

    def _keep(self) -> None:
        def keep() -> None:
            if title := (name.value or "").strip():
                keep_system_prompt(self._store, title, self.words)
                self._list()
                dialog.close()

        if not self.words.strip():
            ui.notify("Write a system prompt first.", position="top")
            return
        with ui.dialog() as dialog, ui.card().classes("dialog"):
            ui.label("Save this system prompt").classes("dialog-title")
            name = ui.input(placeholder="A name for it").props('outlined autofocus aria-label="Name"').classes("wide")
            name.on("keydown.enter", keep)
            with ui.row().classes("dialog-buttons"):
                text_button("Cancel", dialog.close)
                main_button("Save", keep)
        dialog.on("hide", dialog.delete)
        dialog.open()

    def _forget(self) -> None:
        if self._names.value:
            keep_system_prompt(self._store, self._names.value, None)
            self._list()
