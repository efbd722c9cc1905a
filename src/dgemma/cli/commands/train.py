"""`dgemma train`: run a recipe, or show what it would train on."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dgemma.cli import options
from dgemma.cli.terminal.console import SafeConsole, say
from dgemma.errors import DgemmaError
from dgemma.machine import signals_handled

if TYPE_CHECKING:
    from dgemma.chat.tokenizer import Tokenizer
    from dgemma.train.data.examples import Example

_PREVIEW = "Preview"
_LEFT_OUT_SHOWN = 10


def train(
    recipe: Annotated[Path | None, typer.Argument(help="A YAML recipe, such as recipes/sudoku.yaml.",
                                                  show_default=False)] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for checkpoints and logs. Default: runs/NAME.",
                                             show_default=False)] = None,
    device: options.DeviceOption = None,
    preview: Annotated[bool, typer.Option("--preview", rich_help_panel=_PREVIEW, help="Train nothing: show which "
                                          "tokens of a recipe's examples, or of --data, have loss.")] = False,
    count: Annotated[int, typer.Option("--count", "-n", min=0, rich_help_panel=_PREVIEW,
                                       help="How many of the assistant's turns to show.")] = 3,
    data: Annotated[list[str] | None, typer.Option(
        rich_help_panel=_PREVIEW, show_default=False,
        help="Conversations: a JSONL, JSON or Parquet file, a folder of them, or a dataset on the hub.")] = None,
    model: Annotated[str | None, typer.Option(
        "--model", "-m", rich_help_panel=_PREVIEW, show_default=False,
        help="The model that --data is meant for: its tokenizer, template and canvas. Default: sudoku.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Train nothing: say how much memory the recipe will take, and "
                                       "what to change where that is too much.")] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", rich_help_panel=_PREVIEW,
                                           help="Count rows that cannot be used instead of stopping there.")] = False,
) -> None:
    """Train a model by a recipe; run it again to go on where it stopped (Ctrl-C saves first).

    The result is OUT/best by evaluation and OUT/last, the latest: a checkpoint for `dgemma run -m`, or an adapter for
    `dgemma run --adapter`. OUT/report.html shows the run.
    """
    if recipe is not None:
        _needs_extra()
    if preview:
        if (recipe is None) == (not data):
            raise DgemmaError("--preview shows what a recipe trains on, or conversations: give a recipe or --data")
        if recipe is not None:
            _preview_recipe(recipe, count)
        else:
            _preview_data(data or [], model or "sudoku", count, skip_bad)
        return
    if recipe is None or data:
        raise DgemmaError("give a recipe to train by, such as recipes/sudoku.yaml, or --preview with --data")
    if plan:
        _show_plan(recipe, device)
        return
    if not _run(recipe, out, device):
        raise typer.Exit(130)  # as a shell says it of what Ctrl-C ended


def _run(recipe: Path, out: Path | None, device: str | None) -> bool:
    """Train; whether it is finished. Of several processes only the main one shows how far it is."""
    from dgemma.cli.session import LOADING_PATIENCE
    from dgemma.cli.terminal.progress import ProgressBar
    from dgemma.cli.terminal.training import TrainingDisplay
    from dgemma.train.log.events import Ended, Event, Loading, Started
    from dgemma.train.parallel.distributed import joined
    from dgemma.train.recipe import read_yaml
    from dgemma.train.trainer import train as run

    folder, stop = out or Path("runs") / str(read_yaml(recipe).get("name") or recipe.stem), _Stop()
    loading = ProgressBar("loading", patience=LOADING_PATIENCE)
    with joined(device) as ranks, loading as bar, TrainingDisplay() as display, ExitStack() as signals:

        def handle_signals(event: Event) -> None:
            if isinstance(event, Started):  # before there is nothing to save
                signals.enter_context(signals_handled(stop.ask, signal.SIGINT, signal.SIGTERM))
            elif isinstance(event, Ended):
                signals.close()

        def show_loading(event: Event) -> None:
            if isinstance(event, Loading):
                bar.update(event.done, event.total)

        listeners = [handle_signals, show_loading, display] if ranks.is_main else [handle_signals]
        return run(recipe, folder, ranks, listeners, stop)


class _Stop:
    """Set by the first signal; the second one is a KeyboardInterrupt. No lock, which a signal handler might meet."""

    def __init__(self) -> None:
        self._set = False

    def is_set(self) -> bool:
        return self._set

    def ask(self, *_: object) -> None:
        if self._set:
            raise KeyboardInterrupt
        self._set = True


def _needs_extra() -> None:
    try:
        import matplotlib  # noqa: F401  (the report's plots)
        import tensorboard  # noqa: F401  (the trainer logs to it)
        import yaml  # noqa: F401  (recipes are written in it)
    except ImportError as error:
        raise DgemmaError(f"training needs its extra ({error.name} is missing): pip install 'dgemma[train]'") from error


def _show_plan(recipe: Path, device: str | None) -> None:
    from dgemma.memory import available_memory
    from dgemma.train.parallel.distributed import joined
    from dgemma.train.trainer import plans

    with joined(device) as ranks:
        for name, plan in plans(recipe, ranks).items():
            if ranks.is_main:
                say(f"{name}\n" if name else "", nl=False)
                say(plan.text(available_memory(ranks.device)))


def _preview_data(data: list[str], model: str, count: int, skip_bad: bool) -> None:
    """Print the first turns of conversations, with what each token counts, and the whole data in numbers."""
    from dgemma.model import read_parts, seeing
    from dgemma.train.data.conversations import read_conversations
    from dgemma.train.data.examples import prepare
    from dgemma.train.sights import PreparedPictures

    parts = read_parts(model)
    canvas = parts.config.canvas_length
    found = read_conversations(data, skip_bad=skip_bad)
    prepared = prepare(found.rows, parts.tokenizer, canvas, stop_ids=parts.generation_config.eos_token_id,
                       max_context=parts.config.max_position_embeddings - canvas, skip_bad=skip_bad,
                       pictures=PreparedPictures.of(seeing(parts)[0]))
    _show(prepared.examples, parts.tokenizer, count, found.bad + prepared.skipped)


def _preview_recipe(path: Path, count: int) -> None:
    """Print the first examples of a recipe's first steps; puzzles come from fewer base puzzles than in training."""
    from dgemma.train.recipe import load_recipe
    from dgemma.train.runs.state import glimpse

    name, settings = next(iter(load_recipe(path).items()))
    left_out: list[str] = []
    parts, source = glimpse(settings, left_out.append)
    examples = []
    step = 0
    while len(examples) < max(count, 1):
        examples += source.batch(step)
        step += 1
    say(f"{path}{f', variant {name}' if name else ''}: {'; '.join(left_out)}")
    _show(examples, parts.tokenizer, count, [])


def _show(examples: Sequence[Example], tokenizer: Tokenizer, count: int, left_out: list[str]) -> None:
    from rich.text import Text

    from dgemma.cli.terminal.preview import preview, summary

    console = SafeConsole(highlight=False, markup=False, soft_wrap=True)
    for text in preview(examples, tokenizer, count):
        console.print(text)
    for name, value in summary(examples):
        console.print(Text(f"{name:<20}{value}"))
    if left_out:
        console.print(Text(f"{'left out':<20}{len(left_out):,}", "red"))
        for line in left_out[:_LEFT_OUT_SHOWN]:
            console.print(Text(f"  {line}", "red"))
