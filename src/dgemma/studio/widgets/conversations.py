"""The list of conversations in the sidebar: found, pinned, renamed, exported, deleted, brought in.

Works on: a store. Knows nothing of: messages as they are shown.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from datetime import date, datetime, timedelta
from functools import partial

from nicegui import events, ui

from dgemma.errors import DgemmaError
from dgemma.studio.buttons import file_field, icon_button, text_button
from dgemma.studio.exchange import export_json, export_markdown, import_file
from dgemma.studio.frame import Studio
from dgemma.studio.store import Conversation
from dgemma.studio.widgets.sheet import dialog_buttons

LARGEST_IMPORT = 256 << 20  # bytes; pictures are in it


class Conversations:
    """The list; ``open`` shows a conversation (None: a new one), ``current`` is the one that is shown."""

    def __init__(self, studio: Studio, open_: Callable[[str | None], None], current: Callable[[], str | None]):
        self._studio, self._open, self._current = studio, open_, current
        self._most = 60  # rows
        with ui.element("div").classes("find"):
            new = text_button("New chat", lambda: open_(None), icon="add").classes("new-chat", remove="quiet")
            new.props("align=left data-key=new")
            self._words = ui.input(placeholder="Search", on_change=self.refresh)
            self._words.props('outlined dense clearable debounce=150 data-key=search aria-label="Search conversations"')
            with self._words.add_slot("prepend"):
                ui.icon("search").classes("find-icon")
        self._apart = ui.element("div")  # for what has to outlive a row: answers end, and the list is made anew
        self._list = ui.element("nav").classes("conversations").props('aria-label="Conversations"')
        with ui.row().classes("find-foot"):
            text_button("Import", self._import, icon="upload_file", small=True)
            text_button("Export all", self._export_all, icon="download", small=True)
        self.refresh()

    def refresh(self) -> None:
        """Show what there is now."""
        self._list.clear()
        with self._list:
            words = (self._words.value or "").strip()
            if words:
                self._found(words)
                return
            conversations = self._studio.store.conversations()
            if not conversations:
                ui.label("Your conversations will be here.").classes("nothing")
            more = len(conversations) - self._most
            conversations = conversations[: self._most]
            group = ""
            for conversation in conversations:
                heading = "Pinned" if conversation.pinned else when(conversation.updated)
                if heading != group:
                    group = heading
                    ui.label(heading).classes("group-name")
                self._row(conversation)
            if more > 0:
                text_button(f"Show {more} more", self._show_more, small=True).classes("wide")

    def _show_more(self) -> None:
        self._most *= 4
        self.refresh()

    def _found(self, words: str) -> None:
        seen: set[str] = set()
        for found in self._studio.store.search(words):
            if found.conversation.id not in seen:
                seen.add(found.conversation.id)
                self._row(found.conversation, found.excerpt)
        if not seen:
            ui.label("Nothing was found.").classes("nothing")

    def _row(self, conversation: Conversation, excerpt: str = "") -> None:
        here = conversation.id == self._current()
        with ui.element("div").classes("conversation" + (" here" if here else "")):
            link = ui.element("a").props(f'href="/c/{conversation.id}"' + (' aria-current="page"' if here else ""))
            # A plain click stays on the page; with a key held the browser opens a tab as ever.
            link.on("click", lambda: self._open(conversation.id), js_handler=_PLAIN_CLICK)
            with link:
                ui.label(conversation.title).classes("conversation-title")
                if excerpt:
                    ui.label(excerpt).classes("conversation-excerpt")
            more = icon_button("more_horiz", "More", lambda: self._menu(more, conversation), small=True, hint=False)
            more.classes("more")

    def _menu(self, button: ui.button, conversation: Conversation) -> None:
        """What can be done with a conversation: made when it is wanted, for there may be hundreds of rows."""
        with self._apart, ui.menu().props(f'auto-close no-parent-event target="#{button.html_id}"') as menu:
            for label, action in (
                ("Unpin" if conversation.pinned else "Pin", self._pin), ("Rename …", self._rename),
                ("Export as Markdown", partial(self._export, "md")), ("Export as JSON", partial(self._export, "json")),
                ("Delete …", self._delete)):
                item = ui.menu_item(label, partial(action, conversation)).props("role=menuitem")
            item.classes("danger")
        menu.on("hide", menu.delete)
        menu.open()

    def _pin(self, conversation: Conversation) -> None:
        self._studio.store.change_conversation(conversation.id, pinned=not conversation.pinned)
        self._studio.changed.emit("")

    def _rename(self, conversation: Conversation) -> None:
        def rename() -> None:
            if words := (name.value or "").strip():
                self._studio.store.change_conversation(conversation.id, title=words)
                self._studio.changed.emit(conversation.id)
            dialog.close()

        with self._dialog("Rename this conversation") as dialog:
            name = ui.input(value=conversation.title).props('outlined autofocus aria-label="Name"').classes("wide")
            name.on("keydown.enter", rename)
            dialog_buttons(dialog, "Rename", rename)
        dialog.open()

    def _delete(self, conversation: Conversation) -> None:
        async def delete() -> None:
            dialog.close()
            self._studio.answers.stop_all(conversation.id)
            self._studio.store.delete_conversation(conversation.id)
            self._studio.changed.emit(conversation.id)
            await self._studio.answers.tools.close(conversation.id)

        with self._dialog("Delete this conversation?") as dialog:
            ui.label(f"“{conversation.title}” will be gone, with all of its messages.").classes("muted")
            dialog_buttons(dialog, "Delete", delete, color="negative")
        dialog.open()

    def _export(self, kind: str, conversation: Conversation) -> None:
        store = self._studio.store
        data = (export_json(store, [conversation.id]) if kind == "json"
                else export_markdown(store, conversation.id).encode("utf-8", "replace"))
        ui.download.content(data, f"{file_name(conversation.title)}.{kind}")

    def _export_all(self) -> None:
        store = self._studio.store
        ui.download.content(export_json(store, [one.id for one in store.conversations()]),
                            f"dgemma-conversations-{date.today()}.json")

    def _import(self) -> None:
        async def take(event: events.UploadEventArguments) -> None:
            try:
                made = import_file(self._studio.store, await event.file.read())
            except DgemmaError as error:
                ui.notify(str(error), type="negative", position="top", multi_line=True)
                return
            dialog.close()
            self._studio.changed.emit("")
            if made:
                self._open(made[0].id)

        with self._dialog("Bring in conversations") as dialog:
            ui.label("A file that was exported here: JSON or Markdown.").classes("muted")
            file_field("Choose a file, or drop it here", take, max_file_size=LARGEST_IMPORT).props(
                'accept=".json,.md"')
            dialog_buttons(dialog, None, dialog.close)
        dialog.open()

    def _dialog(self, title: str) -> ui.dialog:
        with self._apart, ui.dialog() as dialog, ui.card().classes("dialog"):
            ui.label(title).classes("dialog-title")
        return dialog


def when(seconds: float, now: float | None = None) -> str:
    """When something happened, as a heading of a list says it."""
    today = datetime.fromtimestamp(time.time() if now is None else now).date()
    day = datetime.fromtimestamp(seconds).date()
    headings: Iterable[tuple[int, str]] = ((0, "Today"), (1, "Yesterday"), (7, "Last week"), (30, "Last month"))
    return next((heading for days, heading in headings if day >= today - timedelta(days)), "Earlier")


def file_name(title: str) -> str:
    """A title as a file may be called everywhere."""
    kept = "".join(letter if letter.isalnum() or letter in " -_" else " " for letter in title)
    return "-".join(kept.split())[:60] or "conversation"


_PLAIN_CLICK = """(event) => {
  if (event.ctrlKey || event.metaKey || event.shiftKey || event.button) return;
  event.preventDefault();
  emit();
}"""
