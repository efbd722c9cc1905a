"""The studio as one ASGI application: its pages, and the API of `dgemma serve` beside them.

Works on: `serve`'s application, NiceGUI. Knows nothing of: sockets, the network.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import json
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from nicegui import Event, ui
from starlette.middleware.gzip import GZipMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

import dgemma
from dgemma.errors import DgemmaError
from dgemma.model import Model
from dgemma.studio import gate
from dgemma.studio.answers import Answers
from dgemma.studio.arena import Arena
from dgemma.studio.auth import Passwords, Sessions, has_password
from dgemma.studio.frame import STATIC, Page, Studio, frame
from dgemma.studio.jobs import Jobs
from dgemma.studio.manager import ModelManager
from dgemma.studio.media import LARGEST, PREVIEW_TYPE
from dgemma.studio.store import Store

PAGES = ("chat", "traces", "models", "arena", "training", "settings")  # of `dgemma.studio.pages`, as shown


def find_pages() -> tuple[Page, ...]:
    """The pages whose files are there and have one: each module's ``PAGE``."""
    modules = [f"dgemma.studio.pages.{name}" for name in PAGES]
    found = [importlib.import_module(name) for name in modules if importlib.util.find_spec(name) is not None]
    return tuple(module.PAGE for module in found if hasattr(module, "PAGE"))


def create_studio(api: FastAPI, store: Store, *, port: int, allowed_hosts: Collection[str] = (), closed: bool = False,
                  tell: Callable[[str], None] = lambda link: None, load: Callable[..., Model] = dgemma.load,
                  device: str | torch.device = "cpu", runs: Sequence[Path] = ()) -> tuple[ASGIApp, Studio]:
    """The whole application, once in a process (NiceGUI is one), and what its pages work with.

    ``api`` is `dgemma.serve.app.create_app`'s; ``closed``: it wants a session as the pages do, for nothing else
    protects it. ``tell`` shows a new launch link to whoever started the server. ``load`` loads other models, for a
    ``device``; ``runs`` are folders of training runs. What the server starts and stops is the studio's ``models``.
    """
    changed: Event[str] = Event()
    exchanged: Event[[]] = Event()
    served = api.state.served
    answers = Answers(served, store, changed.emit)
    arena = Arena(lambda contestant: served(), store, Event())
    models = ModelManager(served, (answers, arena), load, torch.device(device), exchanged.emit)
    studio = Studio(store, Sessions(store), answers, arena, served, changed, find_pages(), models, exchanged, Jobs(),
                    tuple(runs))
    store.mark_interrupted()
    store.forget_media()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.gather(answers.close(), arena.close())
        await asyncio.to_thread(studio.jobs.close)
        store.close()

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.mount("/static", StaticFiles(directory=STATIC))

    @app.get("/recordings/{message}")
    def recording(message: str) -> Response:
        """How an answer came to be, for the scrubber."""
        try:
            found = answers.recording(message) or arena.recording(message)
        except DgemmaError as error:
            return Response(str(error), 500)
        if found is None:
            return Response("nothing was recorded of this answer", 404)
        return Response(json.dumps(found.for_page(), separators=(",", ":")), media_type="application/json",
                        headers={"Cache-Control": "no-store"})

    serve_media(app, studio)
    for page in studio.pages:
        _add(page, studio)
        if page.routes is not None:
            page.routes(app, studio)
    # Tailwind would compile styles in the browser; ours are in static/studio.css. What is compressed is so outside of
    # the policy, which has to read pages.
    ui.run_with(app, title="dgemma studio", favicon=STATIC / "icon.svg", tailwind=False, show_welcome_message=False,
                gzip_middleware_factory=None, reconnect_timeout=10.0, dark=None, language="en-US")
    # FastAPI's page of documentation runs scripts of another server: none of these shall be a part of this origin.
    # "/" is the chat's.
    names = frozenset(map(gate.first_part, api.state.paths)) - {"docs", ""}
    inside = _ByPath(GZipMiddleware(gate.PagePolicy(app), minimum_size=1000, compresslevel=5), api, names)
    guarded = gate.Gate(inside, studio.sessions, Passwords(store), port=port, allowed_hosts=allowed_hosts, api=names,
                        closed=closed, with_password=lambda: has_password(store), tell=tell)
    return guarded, studio


def serve_media(app: FastAPI, studio: Studio) -> None:
    """Files of conversations: taken in, shown as previews, handed out."""
    folder = studio.store.media

    @app.post("/media")
    async def take(request: Request, name: str) -> Response:
        """Keep a picture or a film: the part of a message that it is."""
        try:
            if studio.serving().model.pictures is None:
                raise DgemmaError(f"{name:.120}: this model reads text only, it has no vision tower. Start the studio "
                                  "with a model that sees (-m, --mmproj)")
            data = bytearray()
            async for piece in request.stream():
                data += piece
                if len(data) > max(LARGEST.values()):
                    raise DgemmaError(f"{name:.120}: this is too large")
            return JSONResponse(await asyncio.to_thread(folder.put_seen, bytes(data), name))
        except DgemmaError as error:
            return JSONResponse({"error": str(error)}, 400)

    @app.get("/media/{name}")
    def shown(name: str) -> Response:
        return _file(lambda: folder.preview(name), PREVIEW_TYPE)

    @app.get("/media/{name}/file")
    def handed_out(name: str) -> Response:
        return _file(lambda: folder.path(name), "application/octet-stream", "attachment")


def _file(find: Callable[[], Path], kind: str, disposition: str = "inline") -> Response:
    """A kept file under a type that is ours, whatever it holds."""
    try:
        data = find().read_bytes()
    except DgemmaError as error:
        return Response(str(error), 404)
    except OSError:
        return Response("this file is not there any more", 404)
    return Response(data, media_type=kind, headers={
        "Content-Disposition": disposition, "Cache-Control": "private, max-age=86400"})


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
