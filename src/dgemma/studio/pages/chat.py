"""The chat: conversations at the left, messages in the middle, what is written next at the bottom.

Works on: the studio's store and answers. Knows nothing of: the network, HTTP.

What is shown is always the store's: a page changes the store (or has an answer started, which does), and every page
that shows the conversation, this one among them, hears of it and shows what is different.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from nicegui import ui

from dgemma.errors import DgemmaError
from dgemma.studio.buttons import icon_button
from dgemma.studio.frame import Frame, Page, Studio
from dgemma.studio.media import kept_parts
from dgemma.studio.store import Content, Message, title_of
from dgemma.studio.toolboxes import rooms_of
from dgemma.studio.widgets.attachments import Attachments
from dgemma.studio.widgets.calls import is_source
from dgemma.studio.widgets.controls import Controls
from dgemma.studio.widgets.conversations import Conversations
from dgemma.studio.widgets.edit import equip
from dgemma.studio.widgets.message import Actions, Shown, show, show_branches
from dgemma.studio.widgets.system_prompt import SystemPrompt
from dgemma.studio.widgets.tools import ToolChoice

_PUZZLES = (
    ("An easy Sudoku", "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"),
    ("A harder one", "..9748...7.........2.1.9.....7...24..64.1.59..98...3.....8.3.2.........6...2759.."),
)
_IDEAS = (
    ("Explain", "Explain in three sentences how a text can be written by denoising all of it at once."),
    ("Write", "Write a short poem about fog that lifts from a harbour."),
    ("Code", "Write a Python function that merges two sorted lists, with a test."),
)


class Chat:
    """One browser's page."""

    def __init__(self, studio: Studio, frame: Frame, conversation: str | None):
        self._studio, self._store, self._frame = studio, studio.store, frame
        self._id = conversation
        self._shown: list[Shown] = []
        self._actions = Actions(self._edit, self._again, self._switch, self._store.message, partial(equip, studio))
        with frame.side:
            self._list = Conversations(studio, self.open, lambda: self._id)
        with frame.bar:
            self._title = ui.label().classes("bar-title")
            icon_button("tune", "Settings of the answers", lambda: panel.toggle())
        with frame.top, ui.right_drawer(value=False).props("width=340 overlay bordered").classes("panel") as panel:
            with ui.row().classes("panel-head"):
                ui.label("Settings").classes("panel-title")
                icon_button("close", "Close the settings", panel.hide)
            options, system = self._settings()
            self._system = SystemPrompt(self._store, system, lambda _: self._set())
            self._tools = ToolChoice(studio.answers.tools, options.get("tools", {}), lambda _: self._set())
            model = studio.serving().model
            self._controls = Controls(model.generation_config, options, lambda _: self._set(),
                                      sees=model.pictures is not None)
        with ui.element("div").classes("chat"):
            with ui.element("div").classes("messages follow") as self._scroll:
                self._messages = ui.element("div").classes("column-of-text").props('role="log" aria-label="Messages"')
            with ui.element("div").classes("compose column-of-text"):
                self._composer()
        studio.changed.subscribe(self._hear)
        self.refresh()

    def _composer(self) -> None:
        self._attached = Attachments(ui.element("div"))
        with ui.element("div").classes("compose-box"):
            self._attached.button()
            self._words = ui.textarea(placeholder="Write a message").props(
                'autogrow borderless dense autofocus data-key=compose aria-label="Message"')
            self._words.on("keydown", lambda event: self.send(event.args), js_handler=_SEND_ON_ENTER)
            self._send = ui.button(icon="arrow_upward", on_click=lambda: self.send(self._words.value)).props(
                'round unelevated dense aria-label="Send"').classes("send")
            self._stop = ui.button(color=None, icon="stop", on_click=self.stop).props(
                'round unelevated dense aria-label="Stop" data-key=stop').classes("send stop")
        with ui.row().classes("compose-foot"):
            self._keys = ui.label().classes("keys")
            with ui.row().classes("meter") as self._meter:
                self._meter_words = ui.label()
                self._meter_bar = ui.linear_progress(0, show_value=False, size="4px").classes("meter-bar")
                self._meter_bar.props('aria-label="Context that is used"')

    # ---- what the user does ----

    def open(self, conversation: str | None) -> None:
        """Show another conversation; None: a new one."""
        self._id = conversation
        ui.navigate.history.push("/" if conversation is None else f"/c/{conversation}")
        options, system = self._settings()
        self._controls.set(options)
        self._system.set(system)
        self._tools.set(options.get("tools", {}))
        self._clear()
        self.refresh()
        self._list.refresh()
        self._words.run_method("focus")
        ui.run_javascript("if (innerWidth < 900) document.querySelector('.q-drawer__backdrop')?.click()")

    def send(self, words: str | None) -> None:
        """Ask what was written."""
        words = (words or "").strip()
        if self._running():
            return
        if self._attached.waiting:
            ui.notify("A file is still on its way.", position="top")
            return
        content = _content(words, self._attached.take())
        if not content:
            return
        if self._id is None or self._store.conversation(self._id) is None:
            title = title_of(words or "A picture")
            made = self._store.new_conversation(title, system=self._system.words, options=self._options)
            self._id = made.id
            ui.navigate.history.push(f"/c/{made.id}")
        branch = self._store.branch(self._id)
        self._words.value = ""
        self._ask(content, branch[-1].id if branch else None)

    def stop(self) -> None:
        """Stop what is being written."""
        if self._id is not None:
            self._studio.answers.stop_all(self._id)

    def _ask(self, content: Content, parent: str | None) -> None:
        assert self._id is not None
        try:
            self._studio.answers.start(self._store.add_message(self._id, "user", content, parent=parent))
        except DgemmaError as error:
            ui.notify(str(error), type="negative", position="top")
        ui.run_javascript("document.querySelector('.follow')?.dispatchEvent(new Event('to-end'))")

    def _edit(self, message: Message, words: str) -> None:
        content = _content(words.strip(), kept_parts(message.content))
        if content and not self._running():
            self._ask(content, message.parent)

    def _again(self, message: Message) -> None:
        if self._running():
            return
        question = self._store.message(message.parent or "")
        if question is not None:
            self._studio.answers.start(question)

    def _switch(self, message: Message) -> None:
        self._store.switch(message.id)
        self._studio.changed.emit(message.conversation)

    @property
    def _options(self) -> dict[str, Any]:
        """All that is set in the panel but the system prompt."""
        return self._controls.options | ({"tools": self._tools.chosen} if self._tools.chosen else {})

    def _set(self) -> None:
        options, system = self._options, self._system.words
        if self._id is not None:
            self._store.change_conversation(self._id, options=options, system=system)
        self._store.set_setting("last_used", {"system": system, "options": {
            **options, "tools": rooms_of(options.get("tools", {}))}})
        self._tell_keys()

    def _settings(self) -> tuple[dict[str, Any], str]:
        """Options and system prompt of the conversation; of a new one those that were used last."""
        owner = self._store.conversation(self._id) if self._id else None
        if owner is not None:
            return owner.options, owner.system
        last = self._store.setting("last_used", {})
        return last.get("options", {}), last.get("system", "")

    # ---- what is shown ----

    def _hear(self, conversation: str) -> None:
        if conversation == self._id:
            self.refresh()
        self._list.refresh()

    def _running(self) -> bool:
        return self._id is not None and self._studio.answers.busy(self._id)

    def _clear(self) -> None:
        self._messages.clear()
        self._shown = []

    def refresh(self) -> None:
        """Show the branch of messages that the store has now; what is shown already stays."""
        owner = self._store.conversation(self._id) if self._id else None
        branch = [] if owner is None else self._store.branch(owner.id)
        same = 0
        while same < min(len(branch), len(self._shown)) and branch[same].id == self._shown[same].message.id:
            same += 1
        if not self._shown:
            self._messages.clear()  # the welcome
        for shown in self._shown[same:]:
            shown.box.delete()
        del self._shown[same:]
        sources: dict[int, tuple[str, str]] = {}
        answers = self._studio.answers
        with self._messages:
            for index, message in enumerate(branch):
                sources = sources | {source["number"]: (str(source["title"]), source["url"])
                                     for source in message.info.get("sources", ()) if is_source(source)}
                siblings = self._store.siblings(message)
                if index < same:
                    show_branches(self._shown[index].branches, message, siblings, self._actions)
                else:
                    self._shown.append(show(message, siblings, self._actions, answers.get(message.id),
                                            answers.call(message.id), sources))
            if not branch:
                self._welcome()
        running = self._running()
        self._send.set_visibility(not running)
        self._stop.set_visibility(running)
        self._title.set_text("New chat" if owner is None else owner.title)
        if owner is not None:
            self._tools.set(owner.options.get("tools", {}))
        self._tell_keys()
        self._tell_context(branch)

    def _tell_keys(self) -> None:
        tools = self._tools.summary
        self._keys.set_text(f"The model may use: {tools}" if tools else
                            "Enter sends · Shift+Enter is a new line · Esc stops")

    def _tell_context(self, branch: list[Message]) -> None:
        used = next((message.info["prompt_tokens"] + message.info["tokens"] for message in reversed(branch)
                     if message.info.get("prompt_tokens")), 0)
        limit = self._studio.serving().context_limit
        self._meter.set_visibility(bool(used))
        self._meter_words.set_text(f"{used:,} of {limit:,} tokens of context")
        self._meter_bar.set_value(min(used / limit, 1))
        self._meter.classes(add="full" if used > 0.8 * limit else "", remove="" if used > 0.8 * limit else "full")

    def _welcome(self) -> None:
        name = self._studio.serving().settings.served_names[0]
        sudoku = name == "sudoku"
        with ui.element("div").classes("welcome"):
            ui.html(_WELCOME_CANVAS, sanitize=False)
            ui.label("Watch a text come into focus").classes("welcome-title")
            ui.label("This is the small model that comes along: it solves Sudokus. Larger ones write and answer: "
                     "dgemma studio -m MODEL." if sudoku else
                     f"{name} writes all of a canvas at once, and looks at it again and again.").classes("muted")
            with ui.element("div").classes("ideas"):
                for title, words in _PUZZLES if sudoku else _IDEAS:
                    idea = ui.element("button").classes("idea").props('type="button"')
                    idea.on("click", partial(self.send, words))
                    with idea:
                        ui.label(title).classes("idea-title")
                        ui.label(words).classes("idea-words")


def _content(words: str, files: list[dict[str, Any]]) -> Content:
    """A message's content: words, with files before them where there are some."""
    return [*files, *([{"type": "text", "text": words}] if words else [])] if files else words


_SEND_ON_ENTER = """(event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  emit(event.target.value);
}"""
_WELCOME_CANVAS = '<div class="welcome-canvas" aria-hidden="true">' + "<span></span>" * 27 + "</div>"


async def build(studio: Studio, frame: Frame, conversation: str | None = None) -> None:
    """The page; of a conversation that is not there (any more) it is a new one."""
    known = conversation is not None and studio.store.conversation(conversation) is not None
    Chat(studio, frame, conversation if known else None)


PAGE = Page("/", "Chat", "chat_bubble_outline", build, aliases=("/c/{conversation}",))
