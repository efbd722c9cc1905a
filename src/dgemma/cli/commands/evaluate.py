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
    loaded = load_model(model, hint=False, **local)
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


def _percentile(steps: dict[int, int], share: float) -> int:
    """The number of steps within which ``share`` of the puzzles were done."""
    import numpy as np

    return int(np.percentile(np.repeat(list(steps), list(steps.values())), 100 * share, method="inverted_cdf"))
