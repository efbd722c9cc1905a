"""Buttons that take the colour of what is around them, and fields for files."""

from __future__ import annotations

import html
from collections.abc import Callable
from typing import Any

from nicegui import ui


def icon_button(icon: str, label: str, action: Callable[..., Any] | None = None, *, small: bool = False,
                hint: bool = True) -> ui.button:
    """A round button; ``label`` is what is read out and, as a ``hint``, shown after a while."""
    button = ui.button(color=None, icon=icon, on_click=action).classes("quiet")
    button.props(f'flat round dense{" size=sm" if small else ""} aria-label="{label}"')
    if hint:
        with button:
            ui.tooltip(label).props("delay=600")
    return button


def text_button(text: str, action: Callable[..., Any], *, icon: str | None = None, small: bool = False) -> ui.button:
    """A button that does not call for attention."""
    button = ui.button(text, color=None, icon=icon, on_click=action).classes("quiet")
    return button.props(f'flat no-caps{" dense size=sm" if small else ""}')


def main_button(text: str, action: Callable[..., Any], *, color: str = "primary") -> ui.button:
    """The button that does what a page, or a dialog, is for."""
    return ui.button(text, color=color, on_click=action).props("unelevated no-caps")


def file_field(words: str, take: Callable[..., Any], **options: Any) -> ui.upload:
    """Where files are chosen, or dropped, and are taken at once; ``options`` are `ui.upload`'s.

    Its head is ours: Quasar's own has no name that is read out, and keys do not find it.
    """
    field = ui.upload(on_upload=take, auto_upload=True, **options).props("flat bordered").classes("wide")
    field.add_slot("header", '<button type="button" class="file-head" @click="props.pickFiles">'
                   f'{html.escape(words)}</button><span class="hidden"><q-uploader-add-trigger /></span>')
    return field
