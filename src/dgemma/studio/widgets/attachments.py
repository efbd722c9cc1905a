"""Pictures and films that are put to a message: a button, and what was chosen so far, in small.

Works on: parts of messages (`dgemma.studio.media`). Knows nothing of: conversations.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from nicegui import events, ui

from dgemma.studio.buttons import icon_button
from dgemma.studio.media import Part, is_kept

MOST = 16  # of a message
_SCRIPT = Path(__file__).parents[1] / "static" / "attach.js"


class AttachButton(ui.element, component=_SCRIPT):
    """Chooses files; takes those that are dropped on the chat around it, or pasted there, too."""


class Attachments:
    """What is put to the next message; shown in ``place``, `button` made where the page is just being made."""

    def __init__(self, place: ui.element):
        self._place = place.classes("attached")
        self._parts: list[Part] = []
        self._coming = 0

    def button(self) -> None:
        made = AttachButton()
        made.on("coming", self._begin)
        made.on("come", self._take)

    def take(self) -> list[Part]:
        """What was put there, which is gone then."""
        parts, self._parts = self._parts, []
        self._show()
        return parts

    @property
    def waiting(self) -> bool:
        """Whether a file is on its way."""
        return self._coming > 0

    def _begin(self) -> None:
        self._coming += 1
        self._show()

    def _take(self, event: events.GenericEventArguments) -> None:
        told: Any = event.args
        self._coming = max(self._coming - 1, 0)
        if not is_kept(told):
            told = told.get("error") if isinstance(told, dict) else None
            ui.notify(str(told or "this file could not be taken"), type="negative", position="top", multi_line=True)
        elif len(self._parts) >= MOST:
            ui.notify(f"a message has {MOST} pictures and films at most", type="negative", position="top")
        elif told not in self._parts:
            self._parts.append({name: told[name] for name in ("type", "media", "name")})
        self._show()

    def _remove(self, part: Part) -> None:
        self._parts.remove(part)
        self._show()

    def _show(self) -> None:
        self._place.clear()
        with self._place:
            for part in self._parts:
                with ui.element("div").classes("attached-one"):
                    thumbnail(part)
                    away = icon_button("close", "Take it away", partial(self._remove, part), small=True, hint=False)
                    away.classes("attached-remove").props["aria-label"] = f"Take {part['name']} away"
            if self._coming:
                ui.spinner(size="1.5rem").props('aria-label="A file is on its way"')


def thumbnail(part: Part) -> ui.element:
    """A picture, or a film's first frame, in small; a click opens its preview. Other files are links."""
    with ui.element("a").classes("thumbnail") as made:
        if part["type"] == "file":
            made.props["href"], made.props["download"] = f"/media/{part['media']}/file", part["name"]
            made.classes("thumbnail-file")
            ui.icon("description")
            ui.label(part["name"])
            return made
        made.props["href"], made.props["target"] = f"/media/{part['media']}", "_blank"
        picture = ui.element("img")
        picture.props["src"], picture.props["alt"] = f"/media/{part['media']}", part.get("name") or part["type"]
        if part["type"] == "video":
            ui.icon("play_circle").classes("thumbnail-film")
    return made


