"""The studio as one ASGI application: its pages, and the API of `dgemma serve` beside them.

Works on: `serve`'s application, NiceGUI. Knows nothing of: sockets, the network.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import Response
from fastapi.staticfiles import StaticFiles
from nicegui import Event, ui
from starlette.middleware.gzip import GZipMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from dgemma.errors import DgemmaError
from dgemma.studio import gate
from dgemma.studio.answers import Answers
from dgemma.studio.auth import Passwords, Sessions, has_password
from dgemma.studio.frame import STATIC, Page, Studio, frame
from dgemma.studio.store import Store

PAGES = ("chat", "models", "arena", "training", "settings")  # modules of `dgemma.studio.pages`, in the order shown


def find_pages() -> tuple[Page, ...]:
    """The pages whose files are there and have one: each module's ``PAGE``."""
    modules = [f"dgemma.studio.pages.{name}" for name in PAGES]
    found = [importlib.import_module(name) for name in modules if importlib.util.find_spec(name) is not None]
    return tuple(module.PAGE for module in found if hasattr(module, "PAGE"))


def create_studio(api: FastAPI, store: Store, *, port: int, allowed_hosts: Collection[str] = (), closed: bool = False,
                  tell: Callable[[str], None] = lambda link: None) -> tuple[ASGIApp, Studio]:
    """The whole application, once in a process (NiceGUI is one), and what its pages work with.

    ``api`` is `dgemma.serve.app.create_app`'s; ``closed``: it wants a session as the pages do, for nothing else
    protects it. ``tell`` shows a new launch link to whoever started the server.
    """
    changed: Event[str] = Event()
    serving = api.state.serving
    answers = Answers(lambda: serving, store, changed.emit)
    studio = Studio(store, Sessions(store), answers, lambda: serving, changed, find_pages())
    store.mark_interrupted()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await answers.close()
        store.close()

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.mount("/static", StaticFiles(directory=STATIC))

    @app.get("/recordings/{message}")
    def recording(message: str) -> Response:
        """How an answer came to be, for the scrubber."""
        try:
            found = answers.recording(message)
        except DgemmaError as error:
            return Response(str(error), 500)
        if found is None:
            return Response("nothing was recorded of this answer", 404)
        return Response(json.dumps(found.for_page(), separators=(",", ":")), media_type="application/json",
                        headers={"Cache-Control": "no-store"})

    for page in studio.pages:
        _add(page, studio)
        if page.routes is not None:
            page.routes(app, studio)
    # Tailwind would compile styles in the browser; ours are in static/studio.css. What is compressed is so outside of
    # the policy, which has to read pages.
    ui.run_with(app, title="dgemma studio", favicon=STATIC / "icon.svg", tailwind=False, show_welcome_message=False,
                gzip_middleware_factory=None, reconnect_timeout=10.0, dark=None, language="en-US")
    # FastAPI's page of documentation runs scripts of another server: none of these shall be a part of this origin.
    names = frozenset(gate.first_part(path) for route in api.routes if (path := getattr(route, "path", ""))) - {"docs"}
    inside = _ByPath(GZipMiddleware(gate.PagePolicy(app), minimum_size=1000, compresslevel=5), api, names)
    guarded = gate.Gate(inside, studio.sessions, Passwords(store), port=port, allowed_hosts=allowed_hosts, api=names,
                        closed=closed, with_password=lambda: has_password(store), tell=tell)
    return guarded, studio


def _add(page: Page, studio: Studio) -> None:
    async def shown(request: Request) -> None:
        with frame(studio, page, request.scope.get("dgemma.session", "")) as around:
            await page.build(studio, around, **request.path_params)

    for path in (page.path, *page.aliases):
        ui.page(path)(shown)


class _ByPath:
    """The API for its paths, the pages for all others."""

    def __init__(self, app: ASGIApp, api: ASGIApp, names: Collection[str]):
        self.app, self.api, self.names = app, api, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        of_api = scope["type"] == "http" and gate.first_part(scope["path"]) in self.names
        await (self.api if of_api else self.app)(scope, receive, send)
