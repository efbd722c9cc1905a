"""`dgemma run`: one prompt, one answer."""

from __future__ import annotations

import dataclasses
import sys
from typing import Annotated, Any

import typer

from dgemma.cli import options
from dgemma.cli.streams import has_stdin, is_terminal, need_stdout, print_json, print_text, stdin_text
from dgemma.errors import DgemmaError


@options.with_options(local=options.LOCAL,
                      settings={"reasoning_budget": options.ReasoningBudgetOption, **options.ANSWER})
def run(
    prompt: Annotated[str | None, typer.Argument(help="What to ask; from stdin when left out or '-'.",
                                                 show_default=False)] = None,
    model: options.ModelOption = None,
    json: options.JsonOption = False,
    seed: options.SeedOption = None,
    system: options.SystemOption = None,
    thinking: options.ThinkingOption = False,
    redraw_empty: options.RedrawOption = True,
    visual: options.VisualOption = True,
    pace: options.PaceOption = 0.1,
    trace: options.TraceOption = None,
    url: options.UrlOption = None,
    api_key: options.ApiKeyOption = None,
    *,
    local: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    """Answer one prompt, the canvas coming into focus on a terminal, plain text in a pipe.

    For example: dgemma run "Solve 53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
    """
    need_stdout()
    if not redraw_empty:
        settings["redraw_empty"] = False
    text = _prompt_text(prompt)

    from dgemma.cli.remote.model import RemoteModel, known, refuse_with_url
    from dgemma.cli.session import follow, open_model

    live = visual and not json and is_terminal()
    if url is not None:
        refuse_with_url(trace=trace)
    loaded = open_model(model, url=url, api_key=api_key, live=live, **local)
    events = loaded.stream(text, seed=seed, system=system, thinking=thinking, **settings)
    generation = follow(loaded, events, visual=live, trace=trace, prompt=text, pace=pace)
    if json:
        print_json(known(generation) if isinstance(loaded, RemoteModel) else dataclasses.asdict(generation))
    elif not live:
        print_text(generation.text)
    if generation.finish_reason == "cancelled":
        raise typer.Exit(130)


def _prompt_text(prompt: str | None) -> str:
    if prompt in (None, "-"):
        if prompt is None and has_stdin() and sys.stdin.isatty():
            raise DgemmaError('no prompt: give one, as in dgemma run "…", or pipe one in')
        prompt = stdin_text()
    if not prompt or not prompt.strip():
        raise DgemmaError("the prompt is empty")
    return prompt
