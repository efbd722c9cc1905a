"""`dgemma merge`: write a model with an adapter in it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dgemma.cli.commands.quantize import TowerType, TypeName, show
from dgemma.cli.terminal.console import say
from dgemma.errors import DgemmaError


def merge(
    model: Annotated[str, typer.Argument(help="The model that the adapter is for: a bundled name, a checkpoint folder, "
                                         "a .gguf file, or a name on the hub.")],
    adapter: Annotated[Path, typer.Argument(help="The adapter: a folder in PEFT's format, or its .safetensors file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="A new folder for a safetensors checkpoint, or a GGUF file "
                                      "to write if it ends in .gguf.", show_default=False)],
    type: Annotated[TypeName | None, typer.Option(case_sensitive=False, help="For a GGUF file, as in dgemma quantize. "
                                                  "Default: Q4_K_M.", show_default=False)] = None,
    mmproj_type: Annotated[TowerType | None, typer.Option(
        case_sensitive=False, help="For a GGUF file, as in dgemma quantize. Default: BF16.",
        show_default=False)] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it is a GGUF file that exists.")] = False,
) -> None:
    """Write a checkpoint with an adapter merged into its weights, which then runs without the adapter, everywhere.

    OUT appears when it is complete; beside a GGUF file the vision tower does, in a file of its own. The sum is rounded
    once, to the type of the weights that are written.
    """
    from dgemma.cli.terminal.progress import DownloadBar, ProgressBar
    from dgemma.formats import size_text
    from dgemma.weights.hub.locate import locate
    from dgemma.weights.merge import merge_to_folder, merge_to_gguf

    to_gguf = out.suffix.lower() == ".gguf"
    for option, value in (("--type", type), ("--mmproj-type", mmproj_type)):
        if value is not None and not to_gguf:
            raise DgemmaError(f"{option} is for a GGUF file, and {out} does not end in .gguf")
    tower = mmproj_type or TowerType.BF16
    source = locate(model, DownloadBar)
    with ProgressBar() as bar:
        if to_gguf:
            summary = merge_to_gguf(source, adapter, out, (type or TypeName.Q4_K_M).value, force=force,
                                    progress=bar.step, tower=None if tower is TowerType.none else tower.value)
        else:
            written = merge_to_folder(source, adapter, out, progress=bar.step)
    if to_gguf:
        show(summary, out)
    else:
        say(f"{out}: {size_text(written)}")
