"""Adapters loaded and unloaded while the server runs, under the paths that vLLM's clients know.

Works on: names, and paths within the folder that the operator allowed. Knows nothing of: what an adapter is.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.responses import Response

from dgemma.engine.registry import UnknownAdapterError, adapter_files
from dgemma.errors import DgemmaError
from dgemma.serve.backend import Current
from dgemma.serve.bodies import RequestBody
from dgemma.serve.errors import RESPONSES, ApiError, JsonResponse
from dgemma.serve.settings import Settings, check_adapter_name

log = logging.getLogger("dgemma.serve")

Name = Annotated[str, Field(min_length=1, description="What requests will call the adapter, in `model`.")]


class LoadAdapterBody(RequestBody):
    """``lora_path`` is a folder on the server's machine, relative to the one that the operator allowed."""

    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1)]


class UnloadAdapterBody(RequestBody):
    lora_name: Name


class Loaded(BaseModel):
    """``replaced``: requests that came before still finish with the adapter that had the name before."""

    id: str
    object: Literal["model"]
    loaded: Literal[True]
    replaced: bool


class Unloaded(BaseModel):
    """Requests that came before still finish."""

    id: str
    object: Literal["model"]
    deleted: Literal[True]


def router(current: Current) -> APIRouter:
    """The routes; they answer 403 unless the operator allowed a folder."""
    routes = APIRouter(tags=["Adapters"], responses=RESPONSES)
    one_at_a_time = asyncio.Semaphore()  # of what is read: nobody fills the memory by asking often

    @routes.post("/v1/load_lora_adapter", response_model=Loaded)
    async def load_lora_adapter(body: LoadAdapterBody) -> Response:
        """Offer an adapter under a name, in place of what has that name now."""
        serving = current()
        settings = serving.settings
        folder = _allowed(settings)
        try:
            check_adapter_name(body.lora_name, settings.served_names)
        except DgemmaError as error:
            raise ApiError(400, str(error), "lora_name") from error
        path = _inside(folder, body.lora_path)
        async with one_at_a_time:
            try:
                replaced = await asyncio.to_thread(serving.backend.load_adapter, body.lora_name, path)
            except DgemmaError as error:
                raise ApiError(400, str(error), "lora_path") from error
        log.info("adapter %r is served from %s now%s", body.lora_name, path, ", in place of another" * replaced)
        return JsonResponse({"id": body.lora_name, "object": "model", "loaded": True, "replaced": replaced})

    @routes.post("/v1/unload_lora_adapter", response_model=Unloaded)
    async def unload_lora_adapter(body: UnloadAdapterBody) -> Response:
        """Offer an adapter no more."""
        serving = current()
        _allowed(serving.settings)
        try:
            serving.backend.unload_adapter(body.lora_name)
        except UnknownAdapterError as error:
            raise serving.unknown_model(body.lora_name, "lora_name") from error
        log.info("adapter %r is served no more", body.lora_name)
        return JsonResponse({"id": body.lora_name, "object": "model", "deleted": True})

    return routes


def _allowed(settings: Settings) -> Path:
    if settings.adapters_from is None:
        raise ApiError(403, "adapters cannot be loaded or unloaded on this server: its operator has to start it with "
                            "--adapters-from FOLDER", code="adapters_not_allowed")
    return settings.adapters_from


def _inside(folder: Path, path: str) -> Path:
    """The path with its links followed; what lies outside is refused in one way, whether it is there or not.

    The adapter's files may be links, too.
    """
    folder = folder.resolve()
    try:
        place = (folder / path).resolve()
        files = [file.resolve() for file in adapter_files(place)]
    except (OSError, RuntimeError, ValueError):  # a loop of links, a zero byte
        place, files = folder.parent, []
    if not all(file.is_relative_to(folder) for file in (place, *files)):
        raise ApiError(400, "lora_path must be inside the folder that this server was started with (--adapters-from)",
                       "lora_path")
    return place
