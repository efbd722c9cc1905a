"""`dgemma run`: one prompt, one answer."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dgemma.cli import options
from dgemma.cli.media import STDIN, media_part, said_of, stdin_part
from dgemma.cli.streams import has_stdin, is_terminal, need_stdout, print_json, print_text, stdin_text
from dgemma.errors import DgemmaError


@options.with_options(local=options.LOCAL,
                      settings={"reasoning_budget": options.ReasoningBudgetOption, **options.ANSWER})
def run(
    prompt: Annotated[str | None, typer.Argument(help="What to ask; from stdin when left out or '-'.",
                                                 show_default=False)] = None,
    model: options.ModelOption = None,
    image: Annotated[list[Path] | None, typer.Option(
        metavar="FILE", help="A picture to show, '-' for one on stdin; may be given several times.",
        show_default=False)] = None,
    video: Annotated[Path | None, typer.Option(metavar="FILE", help="A film to show, at most 60 of its frames.",
                                               show_default=False)] = None,
    fps: Annotated[float | None, typer.Option(
        help="Frames a second of the film. Default: one, or 60 over all of it.", show_default=False)] = None,
    image_tokens: Annotated[int | None, typer.Option(
        metavar="N", help="Most tokens of a picture: 70, 140, 280, 560 or 1120. Default: as what is asked needs.",
        show_default=False)] = None,
    json: options.JsonOption = False,
    seed: options.SeedOption = None,
    system: options.SystemOption = None,
    thinking: options.ThinkingOption = False,
    redraw_empty: options.RedrawOption = True,
    visual: options.VisualOption = True,
    preview: options.PreviewOption = options.PreviewKind.AUTO,
    pace: options.PaceOption = 0.1,
    trace: options.TraceOption = None,
    candidates: options.CandidatesOption = None,
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
    shown = _shown(prompt, image or [], video, fps, image_tokens)
    if candidates is not None and trace is None:
        raise DgemmaError("--candidates are for a trace: name its file with --trace")
    text = _prompt_text(prompt)
    if url is None and image:
        from dgemma.chat.pictures import open_picture

        for part in shown[: len(image)]:  # before a model is loaded for nothing
            open_picture(part["image"] if "image" in part else part["path"], part.get("name"))

    from dgemma.cli.remote.model import RemoteModel, known, refuse_with_url
    from dgemma.cli.session import follow, open_model

    live = visual and not json and is_terminal()
    if url is not None:
        refuse_with_url(trace=trace, fps=fps, image_tokens=image_tokens)
    if shown and live:
        from dgemma.cli.terminal import pictures

        pictures.preview(shown, preview)
    loaded = open_model(model, url=url, api_key=api_key, live=live, **local)
    if candidates is not None:
        settings["candidates"] = candidates
    events = loaded.stream([said_of(shown, text)] if shown else text, seed=seed, system=system, thinking=thinking,
                           **settings)
    generation = follow(loaded, events, visual=live, trace=trace, prompt=text, pace=pace)
    if json:
        print_json(known(generation) if isinstance(loaded, RemoteModel) else dataclasses.asdict(generation))
    elif not live:
        print_text(generation.text)
    if generation.finish_reason == "cancelled":
        raise typer.Exit(130)


def _shown(prompt: str | None, images: list[Path], video: Path | None, fps: float | None,
           image_tokens: int | None) -> list[dict[str, Any]]:
    """The parts of the message that show something, pictures first. Raises DgemmaError."""
    if fps is not None and video is None:
        raise DgemmaError("--fps is for a film: give one with --video")
    if image_tokens is not None:
        if not images:
            raise DgemmaError("--image-tokens is for pictures: give one with --image")

        from dgemma.chat.pictures import fitted

        fitted(1, 1, image_tokens)
    if video == STDIN or images.count(STDIN) > 1 or (STDIN in images and prompt in (None, "-")):
        raise DgemmaError('stdin holds one picture: give the prompt itself, as in dgemma run --image - "…", and '
                          "everything else in files")
    return [*(stdin_part(tokens=image_tokens) if path == STDIN else media_part("image", path, tokens=image_tokens)
              for path in images),
            *([media_part("video", video, fps=fps)] if video is not None else [])]


def _prompt_text(prompt: str | None) -> str:
    if prompt in (None, "-"):
        if prompt is None and has_stdin() and sys.stdin.isatty():
            raise DgemmaError('no prompt: give one, as in dgemma run "…", or pipe one in')
        prompt = stdin_text()
    if not prompt or not prompt.strip():
        raise DgemmaError("the prompt is empty")
    return prompt
