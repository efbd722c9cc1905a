"""Which tools the model may call in a conversation, and what is asked before: a part of the panel of settings.

Works on: `dgemma.studio.toolboxes`. Knows nothing of: conversations, calls.
"""

from __future__ import annotations

from collections.abc import Callable

from nicegui import background_tasks, events, ui

from dgemma.errors import DgemmaError
from dgemma.studio.buttons import file_field, main_button, text_button
from dgemma.studio.toolboxes import ABOUT, MCP, Choice, Toolboxes, is_chosen, with_room

_VALUES = {"off": "Off", "ask": "Ask", "auto": "Auto"}
_NAMES = {"python": "Python", "bash": "Bash", "web": "Web"}
_EXAMPLE = '{"mcpServers": {"notes": {"command": "npx", "args": ["-y", "…"]}, "company": {"url": "https://…/mcp"}}}'


class ToolChoice:
    """The part. ``changed`` is called with what is chosen, whenever that changes."""

    def __init__(self, toolboxes: Toolboxes, chosen: Choice, changed: Callable[[dict[str, str]], None]):
        self._toolboxes, self._changed = toolboxes, changed
        self.chosen = dict(chosen)
        self._missing: dict[str, str] = {}
        with ui.row().classes("group-head"):
            ui.label("Tools").classes("group-name")
            text_button("MCP servers …", self._configure, small=True)
        ui.label("Ask: you are asked before each call. Auto: it runs by itself.").classes("control-about")
        self._rows = ui.element("div").classes("tool-rows")
        self._show()
        background_tasks.create(self._look(), name="tools")

    def set(self, chosen: Choice) -> None:
        """Show another choice, as of another conversation."""
        if chosen != self.chosen:
            self.chosen = dict(chosen)
            self._show()

    @property
    def summary(self) -> str:
        """What is chosen, in a few words."""
        on = [_name(room) for room in self._toolboxes.rooms() if self.chosen.get(room) in ("ask", "auto")]
        return ", ".join(on) if is_chosen(self.chosen) else ""

    async def _look(self) -> None:
        self._missing = await self._toolboxes.missing()
        if not self._rows.is_deleted:
            self._show()

    def _show(self) -> None:
        self._rows.clear()
        with self._rows:
            for room in self._toolboxes.rooms():
                self._row(room)

    def _row(self, room: str) -> None:
        missing = self._missing.get(room)
        with ui.row().classes("control"):
            with ui.element("div").classes("control-words"):
                ui.label(_name(room)).classes("control-name")
                about = ABOUT.get(room, "An MCP server: it runs outside of any sandbox, with your rights.")
                ui.label(missing or about).classes("control-about" + (" control-missing" if missing else ""))
                if alone := [name for name in self.chosen if room == _room_of(name) and self.chosen[name] == "auto"]:
                    ui.label(f"always allowed: {', '.join(alone)}").classes("control-about")
            value = "off" if missing else self.chosen.get(room, "off")
            toggle = ui.toggle(_VALUES, value=value, on_change=lambda event: self._set(room, event.value))
            toggle.props("no-caps unelevated dense toggle-color=primary role=group")
            toggle.props["aria-label"] = _name(room)  # a name may have quotes in it
            toggle.set_enabled(not missing)

    def _set(self, room: str, value: str) -> None:
        self.chosen = with_room(self.chosen, room, value)  # type: ignore[arg-type]  (of _VALUES)
        self._changed(self.chosen)

    def _configure(self) -> None:
        async def upload(event: events.UploadEventArguments) -> None:
            words.value = (await event.file.read()).decode("utf-8", "replace")

        def save() -> None:
            try:
                self._toolboxes.configure(words.value or "")
            except DgemmaError as error:
                ui.notify(str(error), type="negative", position="top", multi_line=True)
                return
            dialog.close()
            self._show()
            background_tasks.create(self._look(), name="tools")

        with ui.dialog() as dialog, ui.card().classes("dialog dialog-wide"):
            ui.label("MCP servers").classes("dialog-title")
            ui.label("The configuration that other programs use. Servers run outside of any sandbox, with your rights: "
                     "name those that you trust.").classes("muted")
            words = ui.textarea(value=self._toolboxes.config(), placeholder=_EXAMPLE).classes("wide mono")
            words.props('outlined autogrow spellcheck=false aria-label="Configuration of MCP servers"')
            file_field("or choose its file", upload, max_file_size=1 << 20).props('accept=".json"')
            with ui.row().classes("dialog-buttons"):
                text_button("Cancel", dialog.close)
                main_button("Save", save)
        dialog.on("hide", dialog.delete)
        dialog.open()


def _name(room: str) -> str:
    return _NAMES.get(room, room.removeprefix(MCP))


def _room_of(tool: str) -> str:
    """The room of a tool that is allowed by its name."""
    return MCP + tool.partition("__")[0] if "__" in tool else "web" if tool in ("web_search", "read_page") else ""
