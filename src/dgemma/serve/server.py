"""A server from its socket to its last answer: binding, signals, stopping in good order.

Works on: uvicorn. Knows nothing of: what is served.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from dgemma.engine.service import Service
from dgemma.errors import DgemmaError
from dgemma.model import Model
from dgemma.serve.app import create_app
from dgemma.serve.settings import Settings, is_loopback

log = logging.getLogger("dgemma.serve")
_SLACK = 5  # seconds for what was answered, or cut off, to reach the clients


class Stoppable(Protocol):
    """What answers, as the server sees it: a `Service`, or several of them in turn."""

    def start(self) -> None: ...

    async def stop(self, grace: float = 30.0) -> int:
        """Take nothing more; after so many seconds end what runs. How many answers were cut short."""
        ...


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to an address, not yet listening; port 0 is any free one. Raises DgemmaError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM,
                                                                flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise DgemmaError(f"--host {host!r} is no address of this machine: {error}") from error
    try:
        if sys.platform != "win32":  # there it would let two servers share a port
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        bound.close()
        raise DgemmaError(f"cannot listen at {host} port {port}: {error}; choose another --port, or stop what "
                          "listens there") from error
    return bound


def check_exposure(host: str, settings: Settings, insecure: bool) -> None:
    """Raises DgemmaError if everyone on the network could use the server without a key, unless that is wanted."""
    if not (is_loopback(host) or settings.api_keys or insecure):
        raise DgemmaError(f"--host {host} lets other machines use this server without a key: give --api-key (or set "
                          "DGEMMA_API_KEY), or say --allow-insecure if that is what you want")


def serve(model: Model, settings: Settings, listener: socket.socket, *, max_num_seqs: int, max_queue: int,
          grace: float, adapters: Mapping[str, Path]) -> int:
    """Serve until SIGTERM or Ctrl-C; returns how many answers were cut off. ``adapters``: name -> where it is.

    Then nothing more is taken, and what runs or waits has ``grace`` seconds to finish; a second Ctrl-C ends that.
    """
    service = Service(model.network, model.reader, model.prefixes, max_num_seqs=max_num_seqs, max_queue=max_queue,
                      memory=model.request_memory())
    for name, path in adapters.items():
        service.load_adapter(name, path)
    app = create_app(model, service, settings)
    limit = min(settings.max_model_len or model.config.max_position_embeddings, model.config.max_position_embeddings)
    url = url_of(listener)
    ready = (f"dgemma serves {', '.join([*settings.served_names, *adapters])} at {url} "
             f"({max_num_seqs} at a time, {max_queue} waiting, {limit} tokens each, "
             f"{'with a key' if settings.api_keys else 'no key needed'}); docs at {url}/docs, Ctrl-C stops")
    return run(app, service, listener, grace=grace, body_timeout=settings.body_timeout, ready=lambda: log.info(ready))


def url_of(listener: socket.socket) -> str:
    """Where a server that listens there is found."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(app: ASGIApp, service: Stoppable, listener: socket.socket, *, grace: float, body_timeout: float,
        ready: Callable[[], None]) -> int:
    """Run an application and the engine it stands on until SIGTERM or Ctrl-C; returns how many answers were cut off.

    ``ready`` is called when it takes requests; ``body_timeout`` are the seconds that a client has for a request's head.
    """
    _log_to_stderr()
    # The log is ours; headers that name the software say nothing a client needs.
    config = uvicorn.Config(app, http=impatient(body_timeout), log_config=None, access_log=False,
                            server_header=False, timeout_graceful_shutdown=round(grace + _SLACK))
    server = _Server(config, service, grace, ready)
    service.start()
    server.run(sockets=[listener])
    return server.cut


def impatient(seconds: float) -> type[asyncio.Protocol]:
    """uvicorn's protocol that hangs up on who does not send the head of a request within so many seconds.

    By itself it would wait for ever, and keep the connection: a thousand of these are enough to shut everybody out.
    """

    class Impatient(AutoHTTPProtocol):  # type: ignore[misc, valid-type]  # one of two classes, with the same fields
        cycle: Any  # of a request and its answer; None before the first
        transport: Any
        _patience: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait()

        def data_received(self, data: bytes) -> None:
            self._wait()
            super().data_received(data)
            if self._busy():
                self._wait_no_more()

        def connection_lost(self, exc: Exception | None) -> None:
            self._wait_no_more()
            super().connection_lost(exc)

        def handle_websocket_upgrade(self, *event: Any) -> None:
            self._wait_no_more()  # the connection is another protocol's from now on
            super().handle_websocket_upgrade(*event)  # type: ignore[misc]

        def _busy(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def _wait(self) -> None:
            if self._patience is None and not self._busy():
                self._patience = asyncio.get_running_loop().call_later(seconds, self._hang_up)

        def _wait_no_more(self) -> None:
            if self._patience is not None:
                self._patience.cancel()
                self._patience = None

        def _hang_up(self) -> None:
            self._patience = None
            if not self._busy() and not self.transport.is_closing():
                self.transport.close()

    return Impatient


class _Server(uvicorn.Server):
    """uvicorn's server that says when it is ready, and stops the engine when it stops."""

    def __init__(self, config: uvicorn.Config, service: Stoppable, grace: float, ready: Callable[[], None]):
        super().__init__(config)
        self.service, self.grace, self.ready = service, grace, ready
        self.cut = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        log.info("stopping: nothing more is taken, what runs has %g seconds to finish", self.grace)
        stopping = asyncio.ensure_future(self.service.stop(self.grace))
        await super().shutdown(sockets)
        if self.force_exit:
            stopping.cancel()
            log.info("stopped at once")
            return
        self.cut = await stopping
        log.info("stopped: %s", f"{self.cut} answers were cut off" if self.cut else "every answer was finished")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn's own raises the signal again after a graceful end, which then looks like a crash.
        self.force_exit = self.should_exit
        self.should_exit = True


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    for name, level in (("dgemma", logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
