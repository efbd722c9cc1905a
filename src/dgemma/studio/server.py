"""The studio's process: its pages and the API before one engine, the browser that is opened when they are ready.

Works on: `serve`'s server. Knows nothing of: the pages.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
import webbrowser
from collections.abc import Callable, Iterator

from filelock import FileLock, Timeout

from dgemma.errors import DgemmaError
from dgemma.model import Model
from dgemma.serve.app import create_app
from dgemma.serve.server import run, url_of
from dgemma.serve.settings import Settings
from dgemma.studio.app import create_studio
from dgemma.studio.gate import LAUNCH
from dgemma.studio.library import run_folders
from dgemma.studio.manager import start_service
from dgemma.studio.store import Store

log = logging.getLogger("dgemma.studio")

GRACE = 2.0  # seconds that running answers have when the studio is stopped: what they said is kept


@contextlib.contextmanager
def alone(store: Store) -> Iterator[None]:
    """No other studio works with the same data; raises DgemmaError if one does."""
    lock = FileLock(store.path.with_name("studio.lock"), blocking=False)
    try:
        lock.acquire()
    except Timeout as error:
        raise DgemmaError(f"a studio works with {store.path.parent} already: use that one, or give this one another "
                          "folder with --data") from error
    with lock:
        yield


def run_studio(model: Model, settings: Settings, store: Store, listener: socket.socket, *, browser: bool,
               closed: bool, load: Callable[..., Model]) -> None:
    """Run until SIGTERM or Ctrl-C. ``closed``: the API wants a session, too; ``load`` loads other models."""
    url = url_of(listener)
    api = create_app(model, start_service(model), settings)
    device = model.network.device
    del model  # the studio lets it go when another one is loaded
    app, studio = create_studio(api, store, port=listener.getsockname()[1], allowed_hosts=settings.allowed_hosts,
                                closed=closed, tell=lambda link: log.info("a new link: %s", link), load=load,
                                device=device, runs=run_folders(store))

    def ready() -> None:
        link = f"{_reachable(url)}{LAUNCH}?token={studio.sessions.new_token()}"
        log.info("dgemma studio with %s: open %s (it works once); the API is at %s/v1, Ctrl-C stops",
                 settings.served_names[0], link, _reachable(url))
        if browser and has_screen():
            threading.Thread(target=webbrowser.open, args=(link,), daemon=True).start()

    run(app, studio.models, listener, grace=GRACE, body_timeout=settings.body_timeout, ready=ready)


def has_screen() -> bool:
    """Whether a browser with a window can be opened; one in the terminal would get in the way."""
    return sys.platform in ("win32", "darwin") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _reachable(url: str) -> str:
    """An address that means every one of this machine's is no place to go to."""
    return url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
