"""`dgemma serve`: the model over HTTP, as OpenAI's, Anthropic's and Ollama's clients know it."""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dgemma.cli import options
from dgemma.errors import DgemmaError

if TYPE_CHECKING:
    from dgemma.serve.settings import Settings

_LIMITS = "Limits"
_ACCESS = "Access"
_ADAPTERS = "Adapters"


@options.with_options(local=options.LOADING | options.TOWER)
def serve(
    model: options.ModelOption = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for every one of this machine.",
                                      rich_help_panel=_ACCESS)] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 for any free one.",
                                      rich_help_panel=_ACCESS)] = 8000,
    api_key: Annotated[list[str] | None, typer.Option(
        help="A key that clients must send; may be given several times.", envvar="DGEMMA_API_KEY",
        rich_help_panel=_ACCESS, show_default=False)] = None,
    allow_insecure: Annotated[bool, typer.Option(
        "--allow-insecure", help="Let other machines use the server without a key.", rich_help_panel=_ACCESS)] = False,
    allowed_origins: Annotated[list[str] | None, typer.Option(
        help="A web page's origin (https://example.com) that browsers may call from, * for all; may be given several "
             "times.", rich_help_panel=_ACCESS, show_default=False)] = None,
    allowed_hosts: Annotated[list[str] | None, typer.Option(
        help="A name that clients may reach a server without a key by, beside this machine's own, * for all; may be "
             "given several times.", rich_help_panel=_ACCESS, show_default=False)] = None,
    served_model_name: Annotated[list[str] | None, typer.Option(
        help="What clients call the model; further ones are aliases. Default: its name.", show_default=False)] = None,
    max_model_len: Annotated[int | None, typer.Option(
        min=2, help="Most tokens of a prompt and its answer together. Default: what the model takes.",
        rich_help_panel=_LIMITS, show_default=False)] = None,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Most requests answered at a time.",
                                              rich_help_panel=_LIMITS)] = 32,
    max_queue: Annotated[int, typer.Option(min=0, help="Most requests that wait; more are told to come back.",
                                           rich_help_panel=_LIMITS)] = 256,
    timeout: Annotated[float, typer.Option(min=0, help="Seconds that a request may take, 0 for any.",
                                           rich_help_panel=_LIMITS)] = 600,
    rate_limit: Annotated[float, typer.Option(min=0, help="Requests a minute that one client may make, 0 for any.",
                                              rich_help_panel=_LIMITS)] = 0,
    max_body_mb: Annotated[float, typer.Option(min=0.001, help="Largest request, in megabytes.",
                                               rich_help_panel=_LIMITS)] = 16,
    strict_fields: Annotated[bool, typer.Option(
        "--strict-fields", help="Refuse requests with fields that are unknown or have no effect here, such as "
        "penalties, instead of telling of them in a header.", rich_help_panel=_LIMITS)] = False,
    grace: Annotated[float, typer.Option(min=0, help="Seconds that running answers have to finish when the server is "
                                                     "stopped.", rich_help_panel=_LIMITS)] = 30,
    share_system_prompts: Annotated[bool, typer.Option(
        "--share-system-prompts", help="Let all API keys and cache salts find each other's system prompts in the "
        "prefix cache, whole pages of 256 tokens. How fast an answer comes then tells who guesses one that it is used.",
        rich_help_panel=_ACCESS)] = False,
    media_domains: Annotated[str | None, typer.Option(
        metavar="DOMAIN,…", help="Domains that pictures and videos of requests may be fetched from, * for all of the "
        "public internet. Default: none; clients send them inside the request.", rich_help_panel=_ACCESS,
        show_default=False)] = None,
    redraw_empty: options.RedrawOption = True,
    access_log: Annotated[bool, typer.Option(help="A line on stderr for every request.")] = True,
    debug_requests: Annotated[Path | None, typer.Option(
        metavar="FILE", help="Add every request to this file, a line of JSON each: as it came, the prompt it was "
        "rendered to, the answer. It holds all that users write.", show_default=False)] = None,
    adapter: Annotated[list[str] | None, typer.Option(
        metavar="[NAME=]PATH", help="A LoRA or DoRA adapter, its folder in PEFT's format. With a name requests choose "
        "it as their model, and there may be several; without, it is always on.", rich_help_panel=_ADAPTERS,
        show_default=False)] = None,
    adapters_from: Annotated[Path | None, typer.Option(
        help="Let clients load adapters from this folder, and unload them, while the server runs.",
        rich_help_panel=_ADAPTERS, show_default=False)] = None,
    *,
    local: dict[str, Any],
) -> None:
    """Serve a model over HTTP, to any program that speaks OpenAI's, Anthropic's or Ollama's API.

    For example: dgemma serve, and then in the program base_url="http://127.0.0.1:8000/v1"
    """
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if importlib.util.find_spec(name) is None]
    if missing:
        raise DgemmaError(f'the server needs {", ".join(missing)}: pip install "dgemma[serve]"')

    from dgemma.cli.session import BUNDLED, load_model
    from dgemma.fetch import FetchRules
    from dgemma.serve.server import bind, check_exposure
    from dgemma.serve.server import serve as serve_model
    from dgemma.serve.settings import Settings

    # What is wrong with the command is said before a large model is loaded.
    settings = Settings(
        tuple(served_model_name or [model or BUNDLED]), tuple(api_key or ()), max_model_len,
        round(max_body_mb * 1e6), timeout, rate_limit=rate_limit, allowed_origins=tuple(allowed_origins or ()),
        allowed_hosts=(*(allowed_hosts or ()), host, socket.gethostname()), access_log=access_log,
        debug_requests=debug_requests, redraw_empty=redraw_empty, share_system_prompts=share_system_prompts,
        strict_fields=strict_fields, adapters_from=adapters_from,
        media=FetchRules(tuple(name.strip().lower() for name in (media_domains or "").split(",") if name.strip())))
    fixed, named = _adapters(adapter or (), settings)
    check_exposure(host, settings, allow_insecure)
    with bind(host, port) as listener:
        loaded = load_model(model, hint=False, adapter=fixed, **local)
        serve_model(loaded, settings, listener, max_num_seqs=max_num_seqs, max_queue=max_queue, grace=grace,
                    adapters=named)


def _adapters(given: Sequence[str], settings: Settings) -> tuple[Path | None, dict[str, Path]]:
    """The adapter that is always on, and those that have names; raises DgemmaError for what cannot be served."""
    from dgemma.serve.settings import check_adapter_name

    fixed: list[Path] = []
    named: dict[str, Path] = {}
    for text in given:
        name, equals, place = text.partition("=")
        # A path may have an equals sign in it, and a name slashes.
        if not equals or Path(text).exists() or ("/" in name and not Path(place).exists()):
            fixed.append(Path(text))
            continue
        check_adapter_name(name, settings.served_names)
        if name in named:
            raise DgemmaError(f"--adapter: there are two adapters called {name!r}")
        if not place or not Path(place).exists():
            raise DgemmaError(f"--adapter {text}: there is no {place or 'path'}")
        named[name] = Path(place)
    if len(fixed) > 1:
        raise DgemmaError(f"--adapter: {fixed[0]} and {fixed[1]} cannot both be always on: give them names, as in "
                          f"--adapter sql={fixed[0]}, and let requests choose")
    if fixed and (named or settings.adapters_from):
        raise DgemmaError(f"--adapter {fixed[0]} would be always on, which leaves no model for other adapters: give it "
                          f"a name, as in --adapter sql={fixed[0]}")
    return (fixed[0] if fixed else None), named
