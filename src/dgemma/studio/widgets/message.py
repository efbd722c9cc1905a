"""Messages of a conversation as they are shown, with what can be done to them.

Works on: a store's messages, answers. Knows nothing of: the rest of the page, which is asked to do things.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nicegui import background_tasks, ui

from dgemma.studio.answers import Answer
from dgemma.studio.buttons import icon_button, main_button, text_button
from dgemma.studio.markdown import plain_to_html, to_html
from dgemma.studio.store import Message
from dgemma.studio.widgets.canvas import Canvas, summary


@dataclass(frozen=True)
class Actions:
    """What the page does when a message asks for it."""

    edit: Callable[[Message, str], None]  # a question, to be asked in other words
    again: Callable[[Message], None]  # an answer, to be made once more
    switch: Callable[[Message], None]  # show this one's branch
    equip: Callable[[Canvas, Message], None]  # an answer's canvas, with what else can be done with it


@dataclass
class Shown:
    """A message that is on the page, and where; ``siblings`` are how many there were."""

    message: Message
    box: ui.element
    branches: ui.element


def show(message: Message, siblings: list[Message], actions: Actions, answer: Answer | None) -> Shown:
    """Make a message where the page is just being made; ``answer`` if it is being written now, or was lately."""
    return (_question if message.role == "user" else _answer)(message, siblings, actions, answer)


def show_branches(place: ui.element, message: Message, siblings: list[Message], actions: Actions) -> None:
    """The arrows between a message and its alternatives; nothing where there are none."""
    place.clear()
    if len(siblings) < 2:
        return
    at = next(index for index, sibling in enumerate(siblings) if sibling.id == message.id)
    with place:
        _arrow("chevron_left", "The version before", None if at == 0 else siblings[at - 1], actions)
        ui.label(f"{at + 1} / {len(siblings)}")
        _arrow("chevron_right", "The next version", None if at + 1 == len(siblings) else siblings[at + 1], actions)


def _arrow(icon: str, label: str, to: Message | None, actions: Actions) -> None:
    button = icon_button(icon, label, lambda: to is not None and actions.switch(to), small=True)
    button.set_enabled(to is not None)


def _copy(text: str) -> None:
    ui.clipboard.write(text)
    ui.notify("Copied", position="top", timeout=900)


def _question(message: Message, siblings: list[Message], actions: Actions, answer: Answer | None) -> Shown:
    with ui.element("article").classes("message question").props('aria-label="You"') as box:
        with ui.element("div").classes("bubble") as bubble:
            ui.html(plain_to_html(message.text)).classes("prose")
        with ui.row().classes("tools") as tools:
            branches = ui.row().classes("branches")
            icon_button("content_copy", "Copy", lambda: _copy(message.text), small=True)
            icon_button("edit", "Edit, and ask again", lambda: open_editor(), small=True)
        with ui.element("div").classes("editor") as editor:
            words = ui.textarea(value=message.text).props('autogrow borderless aria-label="Edit the message"')
            with ui.row().classes("editor-buttons"):
                text_button("Cancel", lambda: close_editor())
                main_button("Ask again", lambda: actions.edit(message, words.value or ""))
        editor.set_visibility(False)

    def open_editor() -> None:
        words.value = message.text
        for element, visible in ((bubble, False), (tools, False), (editor, True)):
            element.set_visibility(visible)
        words.run_method("focus")

    def close_editor() -> None:
        for element, visible in ((bubble, True), (tools, True), (editor, False)):
            element.set_visibility(visible)

    show_branches(branches, message, siblings, actions)
    return Shown(message, box, branches)


def _answer(message: Message, siblings: list[Message], actions: Actions, answer: Answer | None) -> Shown:
    running = answer is not None and answer.running
    with ui.element("article").classes("message answer").props('aria-label="Model"') as box:
        thought = ui.expansion("Thinking").classes("thought").props("dense dense-toggle")
        with thought:
            thinking = ui.html(to_html(message.reasoning)).classes("prose")
        text = ui.html(to_html(message.text)).classes("prose")
        with ui.row().classes("failure") as failure:
            ui.icon("error_outline")
            why = ui.label()
        canvas = Canvas(f"/recordings/{message.id}", running=running, summary=summary(message.info),
                        recorded="steps" in message.info or bool(message.info.get("tokens")))
        actions.equip(canvas, message)
        with ui.row().classes("tools") as tools:
            branches = ui.row().classes("branches")
            icon_button("content_copy", "Copy", lambda: _copy(text_of()), small=True)
            icon_button("refresh", "Make this answer again", lambda: actions.again(message), small=True)

    def text_of() -> str:
        return answer.text if answer is not None else message.text

    def tell(said: str, thoughts: str, error: str | None, over: bool) -> None:
        text.set_content(to_html(said))
        thinking.set_content(to_html(thoughts))
        thought.set_visibility(bool(thoughts))
        failure.set_visibility(error is not None)
        why.set_text(error or "")
        tools.set_visibility(over)
        canvas.set_visibility(not over or canvas_is_worth_it())

    def canvas_is_worth_it() -> bool:
        return bool(message.info.get("canvases")) or (answer is not None and bool(answer.recording.canvases))

    async def follow_text(answer: Answer) -> None:
        said = None
        while answer.running and not box.is_deleted:
            if said != (answer.text, answer.reasoning):
                said = (answer.text, answer.reasoning)
                tell(*said, None, over=False)
            await answer.changed()
        if not box.is_deleted:
            tell(answer.text, answer.reasoning, answer.error, over=True)

    tell(message.text, message.reasoning, message.info.get("error"), over=not running)
    if answer is not None and running:
        background_tasks.create(canvas.follow(answer), name="canvas")
        background_tasks.create(follow_text(answer), name="text")
    show_branches(branches, message, siblings, actions)
    return Shown(message, box, branches)
