"""What is around every page: the sidebar with the other pages, the bar above, light and dark.

Works on: NiceGUI. Knows nothing of: what the pages are for.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI
from nicegui import Event, context, ui

from dgemma.serve.backend import Serving
from dgemma.studio.answers import Answers
from dgemma.studio.arena import Arena
from dgemma.studio.auth import Sessions
from dgemma.studio.buttons import icon_button
from dgemma.studio.jobs import Jobs
from dgemma.studio.manager import ModelManager
from dgemma.studio.markdown import code_styles
from dgemma.studio.store import Store

STATIC = Path(__file__).parent / "static"
THEMES = {"auto": None, "light": False, "dark": True}
_ICONS = {"auto": "brightness_auto", "light": "light_mode", "dark": "dark_mode"}


@dataclass(frozen=True)
class Page:
    """One of the pages.

    ``build(studio, frame, **parameters)``, a coroutine function, fills it: with the frame that is around it
    (`dgemma.studio.frame.Frame`) and the parameters of its path.
    """

    path: str
    title: str
    icon: str  # of Material Icons
    build: Callable[..., Awaitable[None]]
    aliases: tuple[str, ...] = ()  # further paths, which may have parameters: "/c/{conversation}"
    routes: Callable[[FastAPI, Studio], None] | None = None  # adds what its elements fetch


@dataclass(frozen=True)
class Studio:
    """All that a page works with."""

    store: Store
    sessions: Sessions
    answers: Answers
    arena: Arena
    serving: Callable[[], Serving]  # what answers at the moment
    changed: Event[str]  # a conversation in which something changed, by its id; "" for the list of them
    pages: tuple[Page, ...]
    models: ModelManager
    exchanged: Event[[]]  # another model answers, or is being loaded
    jobs: Jobs
    runs: tuple[Path, ...]  # folders of training runs


@dataclass(frozen=True)
class Frame:
    """The page's own places: in the sidebar (``side``), above (``bar``), at the ``top`` level, where drawers must be.

    ``session`` is the digest of the session whose page it is.
    """

    side: ui.element
    bar: ui.element
    top: ui.element
    drawer: ui.left_drawer
    session: str


@contextmanager
def frame(studio: Studio, page: Page, session: str) -> Iterator[Frame]:
    """Everything around a page; what is made within is the page."""
    ui.add_head_html(_head())
    ui.page_title(f"{page.title} · dgemma studio")
    ui.colors(primary="#4f46e5")
    dark = ui.dark_mode(THEMES[_theme(studio)])
    with ui.left_drawer(value=None, top_corner=True).props("width=288 breakpoint=900").classes("side") as drawer:
        with ui.row().classes("side-head"), ui.link(target="/").classes("brand"):
            ui.element("img").props('src="/static/icon.svg" alt="" width=26 height=26')
            ui.label("dgemma studio")
        if len(studio.pages) > 1:
            with ui.element("nav").classes("side-pages").props('aria-label="Pages"'):
                for other in studio.pages:
                    with ui.link(target=other.path).classes("side-page" + (" here" if other is page else "")):
                        ui.icon(other.icon)
                        ui.label(other.title)
        side = ui.element("div").classes("side-own")
        with ui.row().classes("side-foot"):
            model = ui.label().classes("side-model").props('title="The model"')
            _tell_model(studio, model)
            studio.exchanged.subscribe(lambda: _tell_model(studio, model))
            button = icon_button(_ICONS[_theme(studio)], "Light or dark", lambda: _next_theme(studio, dark, button))
    with ui.header(elevated=False).classes("bar"):
        icon_button("menu", "Sidebar", drawer.toggle)
        bar = ui.element("div").classes("bar-own")
    with ui.element("main").classes("page"):
        yield Frame(side, bar, context.client.content, drawer, session)


def _tell_model(studio: Studio, label: ui.label) -> None:
    name = studio.serving().settings.served_names[0]
    label.set_text(name if studio.models.loaded else f"{name} (not loaded)")


def _theme(studio: Studio) -> str:
    theme = studio.store.setting("theme", "auto")
    return theme if theme in THEMES else "auto"


def _next_theme(studio: Studio, dark: ui.dark_mode, button: ui.button) -> None:
    names = list(THEMES)
    theme = names[(names.index(_theme(studio)) + 1) % len(names)]
    studio.store.set_setting("theme", theme)
    dark.value = THEMES[theme]
    button.set_icon(_ICONS[theme])


@functools.cache
def _head() -> str:
    def address(name: str) -> str:  # a new version is another address, whatever the browser keeps
        return f"/static/{name}?{hashlib.sha256((STATIC / name).read_bytes()).hexdigest()[:12]}"

    return (f'<link rel="stylesheet" href="{address("studio.css")}"><style>{code_styles()}</style>'
            f'<script type="module" src="{address("page.js")}"></script>')
