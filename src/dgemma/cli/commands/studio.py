"""`dgemma studio`: a page in the browser where one chats with the model and watches it denoise."""

from __future__ import annotations

import functools
import importlib.util
import socket
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dgemma.cli import options
from dgemma.errors import DgemmaError

_ACCESS = "Access"
_NEEDED = ("fastapi", "uvicorn", "prometheus_client", "nicegui", "argon2", "markdown_it", "mdit_py_plugins", "nh3",
           "pygments", "latex2mathml", "yaml")


@options.with_options(local=options.LOCAL)
def studio(
    model: options.ModelOption = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 for any free one.",
                                      rich_help_panel=_ACCESS)] = 8888,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for every one of this machine, which needs "
                                           "a password.", rich_help_panel=_ACCESS)] = "127.0.0.1",
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in the browser.")] = True,
    set_password: Annotated[bool, typer.Option(
        "--set-password", help="Ask for a new password, keep it, and end: all sessions are over then.",
        rich_help_panel=_ACCESS)] = False,
    allowed_hosts: Annotated[list[str] | None, typer.Option(
        help="A name that browsers may reach the studio by, beside this machine's own; may be given several times.",
        rich_help_panel=_ACCESS, show_default=False)] = None,
    api_key: Annotated[list[str] | None, typer.Option(
        help="A key that programs must send to the API; may be given several times.", envvar="DGEMMA_API_KEY",
        rich_help_panel=_ACCESS, show_default=False)] = None,
    data: Annotated[Path | None, typer.Option(
        help="The folder that conversations and settings are kept in. Default: dgemma/studio in XDG_DATA_HOME.",
        show_default=False)] = None,
    *,
    local: dict[str, Any],
) -> None:
    """Chat with the model in the browser, and watch it denoise.

    For example: dgemma studio, or dgemma studio -m model.gguf. Programs find the API of `dgemma serve` beside the page,
    at http://127.0.0.1:8888/v1
    """
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise DgemmaError(f'the studio needs {", ".join(missing)}: pip install "dgemma[studio]"')

    from dgemma.serve.server import bind
    from dgemma.serve.settings import is_loopback
    from dgemma.studio import auth
    from dgemma.studio.store import Store, data_folder

    store = Store(data_folder(data))
    if set_password:
        auth.set_password(store, _asked_password())
        store.close()
        typer.echo("The password is set.")
        return
    if not is_loopback(host) and not auth.has_password(store):
        raise DgemmaError(f"--host {host} lets other machines reach the studio: set a password first, with "
                          "dgemma studio --set-password")

    import dgemma
    from dgemma.cli.session import BUNDLED, load_model
    from dgemma.serve.settings import Settings
    from dgemma.studio.library import last_model, run_folders, title_of
    from dgemma.studio.server import alone, run_studio

    last = None if model else last_model(store, run_folders(store))
    name = model or last or BUNDLED
    settings = Settings((title_of(name) if last else name,), tuple(api_key or ()), timeout=0,
                        allowed_hosts=(*(allowed_hosts or ()), host, socket.gethostname()), access_log=False)
    # What is for the first model alone is not for those that are loaded later.
    load = functools.partial(dgemma.load, **{name: value for name, value in local.items() if name in options.LOADING})
    with alone(store), bind(host, port) as listener:
        run_studio(load_model(name, hint=False, **local), settings, store, listener, browser=browser,
                   closed=not (is_loopback(host) or settings.api_keys), load=load)


def _asked_password() -> str:
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\r\n")
    return typer.prompt("New password", hide_input=True, confirmation_prompt=True)
