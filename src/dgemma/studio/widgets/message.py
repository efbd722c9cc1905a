"""Messages of a conversation as they are shown, with what can be done to them.

Works on: a store's messages, answers. Knows nothing of: the rest of the page, which is asked to do things.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from nicegui import background_tasks, ui

from dgemma.studio.answers import Answer
from dgemma.studio.buttons import icon_button, main_button, text_button
from dgemma.studio.markdown import plain_to_html, to_html
from dgemma.studio.media import kept_parts
from dgemma.studio.store import Message
from dgemma.studio.turns import CallInHand
from dgemma.studio.widgets.attachments import thumbnail
from dgemma.studio.widgets.calls import show_call
from dgemma.studio.widgets.canvas import Canvas, summary

Sources = Mapping[int, tuple[str, str]]  # title and address of what is cited as [number]


@dataclass(frozen=True)
class Actions:
    """What the page does when a message asks for it."""

    edit: Callable[[Message, str], None]  # a question, to be asked in other words
    again: Callable[[Message], None]  # an answer, to be made once more
    switch: Callable[[Message], None]  # show this one's branch
    current: Callable[[str], Message | None]  # a message as it is now
    equip: Callable[[Canvas, Message], None]  # an answer's canvas, with what else can be done with it


@dataclass
class Shown:
    """A message that is on the page, and where; ``siblings`` are how many there were."""

    message: Message
    box: ui.element
    branches: ui.element


def show(message: Message, siblings: list[Message], actions: Actions, answer: Answer | None = None,
         call: CallInHand | None = None, sources: Sources | None = None) -> Shown:
    """Make a message where the page is just being made.

    ``answer`` if it is one that is being written now, or was lately, ``call`` if it is one that is in hand;
    ``sources``: what it may cite.
    """
    if message.role == "user":
        return _question(message, siblings, actions)
    if message.role == "tool":
        box = show_call(message, call, partial(actions.current, message.id))
        with box:
            return Shown(message, box, ui.row().classes("branches"))
    return _answer(message, siblings, actions, answer, sources)


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


def _question(message: Message, siblings: list[Message], actions: Actions) -> Shown:
    with ui.element("article").classes("message question").props('aria-label="You"') as box:
        if files := kept_parts(message.content):
            with ui.row().classes("thumbnails"):
                for part in files:
                    thumbnail(part)
        with ui.element("div").classes("bubble") as bubble:
            ui.html(plain_to_html(message.text)).classes("prose")
        if not message.text:
            bubble.classes("hidden")
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


def _answer(message: Message, siblings: list[Message], actions: Actions, answer: Answer | None,
            sources: Sources | None) -> Shown:
    running = answer is not None and answer.running
    with ui.element("article").classes("message answer").props('aria-label="Model"') as box:
        thought = ui.expansion("Thinking").classes("thought").props("dense dense-toggle")
        with thought:
            thinking = ui.html(to_html(message.reasoning)).classes("prose")
        text = ui.html(to_html(message.text, sources)).classes("prose")
        with ui.row().classes("failure").props("role=alert") as failure:
            ui.icon("error_outline")
            with ui.element("div").classes("failure-words"):
                why = ui.label()
                advice = ui.label().classes("failure-advice")
            text_button("Try again", lambda: actions.again(message), icon="refresh", small=True)
        canvas = Canvas(f"/recordings/{message.id}", running=running, summary=summary(message.info),
                        recorded="steps" in message.info or bool(message.info.get("tokens")))
        actions.equip(canvas, message)
        with ui.row().classes("tools") as tools:
            branches = ui.row().classes("branches")
            icon_button("content_copy", "Copy", lambda: _copy(text_of()), small=True)
            icon_button("refresh", "Make this answer again", lambda: actions.again(message), small=True)

    def text_of() -> str:
        return answer.text if answer is not None else message.text

    def tell(said: str, thoughts: str, info: Mapping[str, Any], over: bool) -> None:
        text.set_content(to_html(said, sources))
        thinking.set_content(to_html(thoughts))
        text.set_visibility(bool(said))
        thought.set_visibility(bool(thoughts))
        failure.set_visibility("error" in info)
        why.set_text(info.get("error", ""))
        advice.set_text(info.get("advice", ""))
        tools.set_visibility(over and bool(said or len(siblings) > 1 or not info.get("tool_calls")))
        canvas.set_visibility(not over or canvas_is_worth_it())

    def canvas_is_worth_it() -> bool:
        return bool(message.info.get("canvases")) or (answer is not None and bool(answer.recording.canvases))

    async def follow_text(answer: Answer) -> None:
        said = None
        while answer.running and not box.is_deleted:
            if said != (answer.text, answer.reasoning):
                said = (answer.text, answer.reasoning)
                tell(*said, {}, over=False)
            await answer.changed()
        if not box.is_deleted:
            tell(answer.text, answer.reasoning, answer.info, over=True)

    tell(message.text, message.reasoning, message.info, over=not running)
    if answer is not None and running:
        background_tasks.create(canvas.follow(answer), name="canvas")
        background_tasks.create(follow_text(answer), name="text")
    show_branches(branches, message, siblings, actions)
    return Shown(message, box, branches)
