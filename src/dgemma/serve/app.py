"""The HTTP application: routes, limits and metrics around a model and its backend.

Knows nothing of: sockets and signals (`server`), the network.
"""

from __future__ import annotations

import functools
from typing import Any

from fastapi import FastAPI, Security
from fastapi.security import HTTPBearer
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from pydantic import BaseModel
from starlette.datastructures import MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dgemma import __version__
from dgemma.serve import adapters, errors
from dgemma.serve.access_log import AccessLog, RequestLog
from dgemma.serve.anthropic import routes as messages
from dgemma.serve.auth import AuthMiddleware
from dgemma.serve.backend import Backend, Served, ServedModel, Serving
from dgemma.serve.errors import JsonResponse
from dgemma.serve.fields import IGNORED_HEADER
from dgemma.serve.metrics import Metrics
from dgemma.serve.ollama import routes as ollama
from dgemma.serve.openai import routes as openai
from dgemma.serve.settings import Settings

_ABOUT = """DiffusionGemma over HTTP, in the forms that clients of OpenAI, Anthropic and Ollama speak.

Text comes a canvas at a time. With `stream_options: {"include_drafts": true}` chunks without choices show the open
canvas while it is denoised. Fields that cannot be honoured are refused by name; others that are not listed here are
ignored."""


class Health(BaseModel):
    """``status`` is "ok", or "unavailable" (with status 503) when the engine has stopped."""

    status: str
    version: str


def create_app(model: ServedModel, backend: Backend, settings: Settings) -> FastAPI:
    """The application over a backend that runs, or will when the first request comes; its state has ``served``
    (`Served`), by which another model can answer, and the ``paths`` of all routes.
    """
    metrics = Metrics(lambda: served().backend.stats(), lambda: served().model.pictures)
    request_log = None if settings.debug_requests is None else RequestLog(settings.debug_requests)
    served = Served(Serving(model, backend, settings, metrics))
    app = FastAPI(title="dgemma", version=__version__, description=_ABOUT, redoc_url=None)
    app.state.served = served
    errors.install(app)

    @app.get("/health", tags=["Server"], response_model=Health,
             responses={503: {"model": Health, "description": "The engine has stopped."}})
    async def health() -> Response:
        """Whether the server can answer."""
        ok = served().backend.healthy
        return JsonResponse({"status": "ok" if ok else "unavailable", "version": __version__}, 200 if ok else 503)

    # The dependency checks nothing (`AuthMiddleware` does): it tells the documentation that keys are wanted.
    keyed = [Security(HTTPBearer(auto_error=False))] if settings.api_keys else []

    @app.get("/metrics", tags=["Server"], response_class=Response, dependencies=keyed, responses={
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, 401: errors.RESPONSES[401]})
    async def read_metrics() -> Response:
        """Counts and latencies, for Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    # Not asked of the application: what it makes of included routers is FastAPI's own business.
    app.state.paths = [route.path for route in app.routes if isinstance(route, Route)]
    for module in (openai, messages, ollama, adapters):
        router = module.router(served)
        app.state.paths += [route.path for route in router.routes if isinstance(route, Route)]
        app.include_router(router, dependencies=keyed)

    # The last one added is the outermost.
    app.add_middleware(Outgoing)
    app.add_middleware(AuthMiddleware, settings=settings)
    if settings.allowed_origins:
        app.add_middleware(CORSMiddleware, allow_origins=settings.allowed_origins, allow_methods=["*"],
                           allow_headers=["*"])
    app.add_middleware(AccessLog, settings=settings, metrics=metrics, request_log=request_log)
    app.openapi = functools.partial(_openapi, app, app.openapi, bool(settings.api_keys))
    return app


def _openapi(app: FastAPI, generate: Any, keyed: bool) -> dict[str, Any]:
    """FastAPI's document without its 422: a body that does not fit is a 400 here, as in OpenAI's API.

    Without keys nothing is a 401 either.
    """
    if app.openapi_schema is None:
        schema = generate()
        for path in schema["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
                if not keyed:
                    operation["responses"].pop("401", None)
        for name in ("HTTPValidationError", "ValidationError"):
            schema["components"]["schemas"].pop(name, None)
    assert app.openapi_schema is not None
    return app.openapi_schema


class Outgoing:
    """Answers HEAD as GET without its body, and puts the fields that had no effect into a header."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        head = scope["method"] == "HEAD"
        # A scope of its own: the server looks at its own method again when it sends, the log when it writes.
        inner = {**scope, "method": "GET"} if head else scope

        async def outgoing(message: Message) -> None:
            if message["type"] == "http.response.start" and (ignored := inner.get("dgemma.ignored")):
                MutableHeaders(raw=message["headers"])[IGNORED_HEADER] = ignored
            if head and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        await self.app(inner, receive, outgoing)
