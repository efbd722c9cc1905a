"""`dgemma train`: run a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dgemma.cli import options
from dgemma.errors import DgemmaError


def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML recipe, such as recipes/sudoku.yaml.")],
    out: Annotated[Path | None, typer.Option(help="Folder for checkpoints and logs. Default: runs/NAME.",
                                             show_default=False)] = None,
    device: options.DeviceOption = None,
) -> None:
    """Train a model by a recipe; run it again to go on where it stopped (Ctrl-C saves first).

    The result is a checkpoint folder for `dgemma run -m`: OUT/best by evaluation, OUT/checkpoint the latest.
    """
    try:
        import tensorboard  # noqa: F401  (the trainer logs to it)
        import yaml  # noqa: F401  (recipes are written in it)
    except ImportError as error:
        raise DgemmaError(f"training needs its extra ({error.name} is missing): pip install 'dgemma[train]'") from error
    from dgemma.train.recipe import load_recipe

    settings = load_recipe(recipe)
    from dgemma.train.trainer import Trainer

    Trainer(settings, out or Path("runs") / settings.name, typer.echo, device).train()
