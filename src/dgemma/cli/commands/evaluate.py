"""`dgemma eval`: measure a model with the sampler that it ships with."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dgemma.cli import options
from dgemma.cli.streams import need_stdout, print_json
from dgemma.cli.terminal.console import SafeConsole
from dgemma.errors import DgemmaError

if TYPE_CHECKING:
    from dgemma.tasks.evaluate import BandScore
    from dgemma.tasks.evaluate_pictures import PictureScore

evaluate_app = typer.Typer(no_args_is_help=True, help="Measure a model on a task.")


@evaluate_app.callback()
def _tasks() -> None:
    """Measure a model on a task."""


@evaluate_app.command()
@options.with_options(local=options.LOCAL, settings=options.SAMPLER)
def sudoku(
    count: Annotated[int | None, typer.Option(min=1, help="Puzzles per band. Default: 100.",
                                              show_default=False)] = None,
    band: Annotated[str | None, typer.Option(help="easy (40-45 givens), medium (30-39) or hard (24-29). Default: all.",
                                             show_default=False)] = None,
    seed: Annotated[int, typer.Option(min=0, help="Which puzzles, and the sampler's randomness.")] = 0,
    puzzles: Annotated[Path | None, typer.Option(
        help='Puzzles to use instead: {"puzzle": 81 characters, "solution": 81 digits} per line.',
        show_default=False)] = None,
    images: Annotated[bool, typer.Option("--images", help="Pictures of the puzzles, in fonts that training does not "
                                         "show: read, and solved, beside the same puzzles as text.")] = False,
    clean: Annotated[bool, typer.Option("--clean", help="With --images: only those as on a screen.")] = False,
    photos: Annotated[bool, typer.Option("--photos", help="With --images: only photos.")] = False,
    model: options.ModelOption = None,
    json: options.JsonOption = False,
    *,
    local: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    """Unseen Sudoku puzzles: how many are solved exactly, in how many steps."""
    need_stdout()

    from dgemma.cli.session import load_model
    from dgemma.cli.terminal.progress import ProgressBar
    from dgemma.tasks.evaluate import evaluate_bands, evaluate_file
    from dgemma.tasks.sudoku import BANDS

    if band is not None and band not in BANDS:
        raise DgemmaError(f"band must be one of {', '.join(BANDS)}, got {band!r}")
    for name, value in (("--band", band), ("--count", count)):
        if value is not None and puzzles is not None:
            raise DgemmaError(f"{name} is about generated puzzles; it cannot be used with --puzzles")
    for name, given in (("--clean", clean), ("--photos", photos)):
        if given and not images:
            raise DgemmaError(f"{name} is about pictures: use it with --images")
    if images and puzzles is not None:
        raise DgemmaError("--images draws puzzles of its own; it cannot be used with --puzzles")
    loaded = load_model(model, hint=False, **local)
    if images:
        from dgemma.tasks.evaluate_pictures import evaluate_pictures

        kinds = [kind for kind, given in (("clean", clean), ("photo", photos)) if given or clean == photos]
        with ProgressBar(of_bytes=False) as bar:
            pictured = evaluate_pictures(loaded, count or 100, kinds, None if band is None else [band], seed=seed,
                                         progress=bar.step, **settings)
        if json:
            print_json({kind: {name: dataclasses.asdict(score) for name, score in by_band.items()}
                        for kind, by_band in pictured.items()})
        else:
            _print_pictures(pictured)
        return
    with ProgressBar(of_bytes=False) as bar:
        if puzzles is not None:
            scores = evaluate_file(loaded, puzzles, seed=seed, progress=bar.step, **settings)
        else:
            bands = None if band is None else [band]
            scores = evaluate_bands(loaded, count or 100, bands, seed=seed, progress=bar.step, **settings)
    if json:
        print_json({name: dataclasses.asdict(score) for name, score in scores.items()})
    else:
        _print_table(scores)


def _print_table(scores: dict[str, BandScore]) -> None:
    from rich import box
    from rich.table import Table

    table = Table(caption="exact: all 81 digits right, with its 95 % interval; kept: no given changed",
                  caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("band", no_wrap=True)
    for name in ("puzzles", "exact", "(95 %)", "kept", "mean steps", "p50/p90", "s/puzzle"):
        table.add_column(name, justify="right", no_wrap=True)
    for band, score in scores.items():
        low, high = score.exact_interval
        table.add_row(band, str(score.count), f"{score.exact:.1%}", f"{low:.1%}-{high:.1%}", f"{score.givens_kept:.1%}",
                      f"{score.mean_steps:.1f}", f"{_percentile(score.steps, 0.5)}/{_percentile(score.steps, 0.9)}",
                      f"{score.seconds_per_puzzle:.3f}")
    SafeConsole().print(table)


def _print_pictures(scores: dict[str, dict[str, PictureScore]]) -> None:
    from rich import box
    from rich.table import Table

    table = Table(caption="read: all 81 cells right; solved: all 81 digits, from the picture, of those that were read, "
                  "and as text", caption_justify="left", box=box.SIMPLE_HEAD,
                  padding=(0, 1, 0, 0))
    for name in ("kind", "band"):
        table.add_column(name, no_wrap=True)
    for name in ("count", "read", "(95 %)", "solved", "of read", "as text", "s/each"):
        table.add_column(name, justify="right", no_wrap=True)
    for kind, by_band in scores.items():
        for band, score in by_band.items():
            low, high = score.read_interval
            of_read = "-" if score.solved_if_read is None else f"{score.solved_if_read:.1%}"
            table.add_row(kind, band, str(score.count), f"{score.read:.1%}", f"{low:.1%}-{high:.1%}",
                          f"{score.solved:.1%}", of_read, f"{score.text_solved:.1%}",
                          f"{score.seconds_per_picture:.3f}")
    SafeConsole().print(table)


def _percentile(steps: dict[int, int], share: float) -> int:
    """The number of steps within which ``share`` of the puzzles were done."""
    import numpy as np

    return int(np.percentile(np.repeat(list(steps), list(steps.values())), 100 * share, method="inverted_cdf"))
