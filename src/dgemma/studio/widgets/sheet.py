"""What pages of sections are made of: a section, and a dialog that asks.

Works on: NiceGUI. Knows nothing of: what is in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nicegui import ui

from dgemma.studio.buttons import main_button, text_button


@contextmanager
def section(title: str, about: str = "") -> Iterator[ui.element]:
    """A part of a page under a heading."""
    with ui.element("section").classes("section") as made:
        ui.label(title).classes("section-title").props("role=heading aria-level=2")
        if about:
            ui.label(about).classes("muted section-about")
        yield made


@contextmanager
def dialog(title: str) -> Iterator[ui.dialog]:
    """A dialog that is open when its contents are there, and gone when it is closed."""
    with ui.dialog() as made, ui.card().classes("dialog"):
        ui.label(title).classes("dialog-title")
        yield made
    made.on("hide", made.delete)
    made.open()


def dialog_buttons(made: ui.dialog, label: str | None, action: Callable[[], object], color: str = "primary") -> None:
    """What a dialog ends with: the way out, and what it is for, if it asks anything."""
    with ui.row().classes("dialog-buttons"):
        text_button("Cancel" if label else "Close", made.close)
        if label:
            main_button(label, action, color=color)
