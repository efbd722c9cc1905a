"""A call of a tool as a card: what is called, whether it may, what it prints, what came of it.

Works on: a store's messages of tools, calls in hand. Knows nothing of: the rest of the page. What a tool says is shown
as text, what it drew as previews that were made here (`dgemma.studio.media`).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from nicegui import background_tasks, ui

from dgemma.formats import count_text
from dgemma.studio.buttons import main_button, text_button
from dgemma.studio.markdown import code_to_html
from dgemma.studio.media import is_kept
from dgemma.studio.store import Message
from dgemma.studio.turns import CallInHand
from dgemma.studio.widgets.attachments import thumbnail

LOOK = 0.1  # seconds between two looks at what a call prints
_LINES, _LETTERS = 12, 1500  # of an output that is not folded
_ICONS = {"python": "terminal", "bash": "terminal", "web_search": "travel_explore", "read_page": "article"}
_LANGUAGES = ("python", "bash")
_STATES = {"waiting": "May it run?", "running": "Running", "done": "Done", "stopped": "Not run to its end",
           "failed": "Failed"}


def show_call(message: Message, call: CallInHand | None, current: Callable[[], Message | None]) -> ui.element:
    """Make a call's card where the page is just being made; ``call`` if it is in hand, ``current`` reads it anew."""
    name = str(message.info.get("name", "a tool"))
    with ui.element("article").classes("message call") as box:
        box.props["aria-label"] = f"Call of {name}"
        with ui.row().classes("call-head"):
            ui.icon(_ICONS.get(name, "handyman"))
            ui.label(name).classes("call-name")
            state = ui.label().classes("call-state").props("role=status")
        _arguments(name, message.info.get("arguments"))
        below = ui.element("div").classes("call-below")

    def show(state_now: str, fill: Callable[[], object]) -> None:
        state.set_text(_STATES.get(state_now, state_now))
        box.classes(remove=" ".join(_STATES), add=state_now)
        below.clear()
        with below:
            fill()

    async def follow(call: CallInHand) -> None:
        shown: str | None = None
        output: ui.label | None = None
        while call.state != "over" and not box.is_deleted:
            if shown != call.state:
                shown = call.state
                output = None
                if shown == "waiting":
                    show(shown, partial(_approval, call))
                else:
                    show(shown, partial(text_button, "Stop this call", call.stop, icon="stop", small=True))
                    with below:
                        output = ui.label().classes("call-output").props("tabindex=0")
            if output is not None:
                output.set_text(call.output)
                output.set_visibility(bool(call.output))
            await call.changed()
            await asyncio.sleep(LOOK if shown == "running" else 0)
        if not box.is_deleted:
            over(current() or message)

    def over(message: Message) -> None:
        text = message.text or str(message.info.get("error", ""))
        show("stopped" if message.status == "running" else message.status, partial(_result, text, message.info))

    if call is None:
        over(message)
    else:
        background_tasks.create(follow(call), name="call")
    return box


def _arguments(name: str, arguments: Any) -> None:
    if not isinstance(arguments, dict):
        arguments = {"arguments": arguments}
    for key, value in arguments.items():
        if name in _LANGUAGES and key == "code" and isinstance(value, str):
            ui.html(code_to_html(value.rstrip(), name)).classes("prose")
        else:
            with ui.element("div").classes("call-argument"):
                ui.label(key).classes("call-key")
                ui.label(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _approval(call: CallInHand) -> None:
    with ui.row().classes("call-buttons"):
        main_button("Allow once", lambda: call.decide("yes"))
        text_button("Always in this chat", lambda: call.decide("always"))
        text_button("Refuse", lambda: call.decide("no"))


def _result(text: str, info: dict[str, Any]) -> None:
    sources = [source for source in info.get("sources", ()) if is_source(source)]
    if sources:
        with ui.element("ol").classes("call-sources"):
            for source in sources:
                with ui.element("li").props(f'value={int(source["number"])}'):
                    link = ui.link(str(source["title"]), source["url"], new_tab=True)
                    link.props('rel="noopener noreferrer nofollow"')
    files = [part for part in info.get("files", ()) if is_kept(part)]
    if files:
        with ui.row().classes("thumbnails"):
            for part in files:
                thumbnail(part)
    for lost in info.get("lost", ()):
        ui.label(str(lost)).classes("muted small")
    if text:
        output = ui.label(text).classes("call-output").props("tabindex=0")
        lines = text.count("\n") + 1
        if sources or lines > _LINES or len(text) > _LETTERS:
            _fold(output, lines, bool(sources))


def _fold(output: ui.label, lines: int, all_of_it: bool) -> None:
    """Show the beginning of a long output; ``all_of_it``: nothing, for the links above say what is in it."""
    folded = "hidden-output" if all_of_it else "folded"
    output.classes(folded)

    def toggle() -> None:
        opened = folded in output.classes
        output.classes(remove=folded if opened else "", add="" if opened else folded)
        button.set_text("Show less" if opened else label)

    label = f"Show all of it ({count_text(lines, 'line')})"
    button = text_button(label, toggle, small=True)


def is_source(source: Any) -> bool:
    """Whether something is a page that can be linked to."""
    return (isinstance(source, dict) and isinstance(source.get("number"), int) and isinstance(source.get("url"), str)
            and urlsplit(source["url"]).scheme in ("http", "https"))
