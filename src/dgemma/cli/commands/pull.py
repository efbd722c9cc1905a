"""`dgemma pull`: bring a model of the hub to this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dgemma.cli.terminal.console import say

if TYPE_CHECKING:
    from dgemma.weights.hub.repository import Pull


def pull(
    model: Annotated[str, typer.Argument(
        metavar="REPO[:TAG]", help="A repository on the hub (org/name); with a tag one of its GGUF files "
                                   "(org/name:Q4_K_M). Without one: the safetensors, else the Q4_K_M file.")],
    include: Annotated[list[str] | None, typer.Option(
        help='Fetch the files that match instead, as in "*Q4_K_M*"; may be given several times.',
        show_default=False)] = None,
) -> None:
    """Download a model, or what is missing of it.

    Goes on where an earlier try stopped, and checks sizes and checksums. The files go to the Hugging Face cache
    (HF_HOME), where other programs find them, too. A gated repository needs `hf auth login` or HF_TOKEN.
    """
    from dgemma.cli.terminal.progress import DownloadBar
    from dgemma.errors import CheckpointError
    from dgemma.weights.files import bundled_models, hub_name
    from dgemma.weights.hub.cache import cached_path
    from dgemma.weights.hub.repository import NotThereError, fetch, plan_pull

    if model in bundled_models():
        raise CheckpointError(f"{model}: this model ships with the package; there is nothing to pull")
    name = hub_name(model)
    if name is None:
        raise CheckpointError(f"{model}: not the name of a repository on the hub; that is written org/name, or "
                              "org/name:Q4_K_M for one GGUF file")
    repo, tag = name
    if tag and include:
        raise CheckpointError(f"{model}: give either the tag {tag!r} or --include, not both")
    try:
        planned = plan_pull(repo, tag, include or ())
    except NotThereError as error:
        path = None if include else cached_path(repo, tag, loose=True)
        if path is None:
            raise
        say(f"Complete on this machine; a newer version was not looked for: {error.reason}", err=True)
        _say_where(path, model)
        return
    _show(planned)
    with DownloadBar() as display:
        path = fetch(planned, display)
    _say_where(path, planned.model)


def _show(planned: Pull) -> None:
    from dgemma.formats import count_text, size_text

    say(f"{planned.model or planned.repo}, commit {planned.commit[:12]}")
    width = max(len(size_text(file.size)) for file in planned.files)
    for file in planned.files:
        say(f"  {size_text(file.size):>{width}}  {file.name}")
    to_fetch = planned.to_fetch
    count = f"{count_text(len(planned.files), 'file')}, {size_text(planned.size)}"
    if to_fetch == 0:
        say(f"{count}: all here already")
    elif to_fetch < planned.size:
        say(f"{count}; {size_text(to_fetch)} to download, the rest is here already")
    else:
        say(f"{count} to download")


def _say_where(path: Path, model: str | None) -> None:
    say(f"\n{path}")
    if model is not None:
        say(f'\nRun it:  dgemma run -m {model} "Why is the sky blue?"')
