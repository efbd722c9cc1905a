"""Settings of the studio itself: how it looks, who may use it, where it keeps what it keeps.

Works on: the studio's store and sessions. Knows nothing of: conversations.
"""

from __future__ import annotations

import asyncio
from datetime import datetime
from functools import partial

from nicegui import ui

from dgemma import __version__
from dgemma.errors import DgemmaError
from dgemma.studio.auth import SHORTEST, Session, has_password, set_password
from dgemma.studio.buttons import main_button, text_button
from dgemma.studio.frame import THEMES, Frame, Page, Studio
from dgemma.studio.widgets.sheet import section


async def build(studio: Studio, frame: Frame) -> None:
    """The page."""
    with frame.bar:
        ui.label("Settings").classes("bar-title")
    with ui.element("div").classes("sheet column-of-text"):
        _appearance(studio)
        _password(studio)
        _sessions(studio, frame.session)
        _about(studio)


def _appearance(studio: Studio) -> None:
    def choose(theme: str) -> None:
        studio.store.set_setting("theme", theme)
        ui.navigate.reload()

    with section("Appearance", "Light, dark, or as the system has it."):
        names = {name: name.capitalize() for name in THEMES}
        toggle = ui.toggle(names, value=studio.store.setting("theme", "auto"), on_change=lambda: choose(toggle.value))
        toggle.props("no-caps unelevated toggle-color=primary")


def _password(studio: Studio) -> None:
    known = has_password(studio.store)

    async def change() -> None:
        if first.value != second.value:
            ui.notify("The two are not the same.", type="negative", position="top")
            return
        try:
            await asyncio.to_thread(set_password, studio.store, first.value or "")
        except DgemmaError as error:
            ui.notify(str(error), type="negative", position="top")
            return
        studio.sessions.end_all()
        ui.navigate.to("/signin")

    about = (f"{SHORTEST} characters at least. It lets you sign in without a link, and other machines with --host. "
             "Setting one ends all sessions, this one too.")
    with section("Password", about), ui.row().classes("fields"):
        first = ui.input("New password", password=True).props("outlined dense autocomplete=new-password")
        second = ui.input("Once more", password=True).props("outlined dense autocomplete=new-password")
        main_button("Change it" if known else "Set it", change)


def _sessions(studio: Studio, own: str) -> None:
    def end(session: Session) -> None:
        studio.sessions.end(session.digest)
        listed.refresh()

    @ui.refreshable
    def listed() -> None:
        for session in studio.sessions.all():
            with ui.row().classes("line"):
                with ui.element("div").classes("line-words"):
                    ui.label(session.label + (" (this one)" if session.digest == own else ""))
                    seen, begun = (datetime.fromtimestamp(at) for at in (session.seen, session.created))
                    ui.label(f"last seen {seen:%d %b %H:%M}, begun {begun:%d %b %H:%M}").classes("muted small")
                if session.digest != own:
                    text_button("End", partial(end, session))

    with section("Sessions", "Browsers that are signed in. One that is ended loses its pages within seconds."):
        listed()


def _about(studio: Studio) -> None:
    serving = studio.serving()
    with section("About", f"dgemma {__version__} with {serving.settings.served_names[0]}."):
        ui.label(f"Conversations and settings are in {studio.store.path.parent}").classes("muted small")
        with ui.row().classes("small"):
            ui.label("Programs find the API at /v1;").classes("muted")
            ui.link("its description", "/openapi.json", new_tab=True)


PAGE = Page("/settings", "Settings", "settings", build)
