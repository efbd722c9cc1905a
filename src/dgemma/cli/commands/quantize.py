"""`dgemma quantize`: pack a checkpoint's weights into a GGUF file."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dgemma.cli.terminal.console import say, say_warning
from dgemma.formats import duration_text, size_text

if TYPE_CHECKING:
    from dgemma.weights.quantize import Summary


class TypeName(StrEnum):
    """What there is to choose from; `weights.quantize.MIXTURES` says what is in them."""

    Q4_K_M = "Q4_K_M"
    Q5_K_M = "Q5_K_M"
    Q6_K = "Q6_K"
    Q8_0 = "Q8_0"
    BF16 = "BF16"


class TowerType(StrEnum):
    """What a vision tower may become; `weights.files.TOWER_TYPES` and none."""

    BF16 = "BF16"
    F16 = "F16"
    F32 = "F32"
    Q8_0 = "Q8_0"
    none = "none"


def quantize(
    model: Annotated[str, typer.Argument(metavar="IN", help="A bundled name, a checkpoint folder, a .gguf file, or a "
                                         "name on the hub.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The GGUF file to write.")],
    type: Annotated[TypeName, typer.Option(case_sensitive=False, help="Q4_K_M is the smallest, Q8_0 nearly exact, BF16 "
                                           "what the weights were trained in.")] = TypeName.Q4_K_M,
    mmproj_type: Annotated[TowerType, typer.Option(
        case_sensitive=False, help="What the vision tower becomes, in a file of its own beside OUT: mmproj-NAME.gguf "
                                   "for NAME.gguf. none: it is left out.")] = TowerType.BF16,
    force: Annotated[bool, typer.Option("--force", help="Replace what exists.")] = False,
) -> None:
    """Write a checkpoint as a GGUF file with packed weights, which take less memory and less time to read.

    Takes the memory of a few tensors, whatever the model's size. OUT appears when it is complete.
    """
    from dgemma.cli.terminal.progress import DownloadBar, ProgressBar
    from dgemma.weights.hub.locate import locate
    from dgemma.weights.quantize import convert

    source = locate(model, DownloadBar)
    with ProgressBar() as bar:
        summary = convert(source, out, type.value, force=force, progress=bar.step,
                          tower=None if mmproj_type is TowerType.none else mmproj_type.value)
    show(summary, out)


def show(summary: Summary, out: Path) -> None:
    """Say what was written, on stdout, and what to mind, on stderr."""
    rows = [(name, f"{total.tensors:,} tensors", f"{total.weights / 1e6:,.1f} M weights",
             f"{total.nbytes / 1e6:,.1f} MB") for name, total in summary.types.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        say("  ".join(text.rjust(width) if column else text.ljust(width)
                             for column, (text, width) in enumerate(zip(row, widths, strict=True))))
    say(f"{out}: {size_text(summary.nbytes)}, {summary.bits_per_weight:.2f} bits per weight, "
               f"{duration_text(summary.seconds)}")
    if summary.tower is not None:
        say(f"{summary.tower}: the vision tower, {size_text(summary.tower_bytes)}; it is found by itself beside "
            f"{out.name}")
    if summary.left_out:
        say_warning(f"The vision tower ({summary.left_out} tensors) was left out.")
    if summary.requantized:
        say_warning(f"The source was quantised already ({', '.join(summary.requantized)}), and rounding twice loses "
                    "quality: convert the original checkpoint if you can.")
