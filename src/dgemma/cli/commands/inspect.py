"""`dgemma inspect`: what a checkpoint holds, what running it takes, and whether it would load."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dgemma.cli.streams import need_stdout, print_json
from dgemma.config import SLIDING
from dgemma.errors import DgemmaError
from dgemma.formats import short_count, size_text

if TYPE_CHECKING:
    from rich.console import Console

    from dgemma.inspect import CheckpointReport

_WIDTH = 80
_FILES_SHOWN = 8


def inspect(
    model: Annotated[str, typer.Argument(help="A bundled name, a checkpoint folder, a .gguf file, or a name on the "
                                              "hub: org/name, org/name:Q4_K_M.")],
    check: Annotated[bool, typer.Option("--check", help="Read all weights, too, and name the tensors with numbers "
                                                        "that are infinite or no numbers (NaN).")] = False,
    mmproj: Annotated[Path | None, typer.Option(
        help="The vision tower: a GGUF file. Default: the checkpoint's own, or mmproj*.gguf beside a .gguf file.",
        show_default=False)] = None,
    image: Annotated[Path | None, typer.Option(
        metavar="FILE", help="Tell, too, what becomes of this picture: its size and tokens by the most it may have.",
        show_default=False)] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Show a checkpoint's shape, parameters, files, types and memory needs, and check that it would load.

    Reads no weights, only their headers, but for --check. Exits with 1 when something is wrong with the checkpoint.
    """
    from dgemma.cli.terminal.progress import DownloadBar, ProgressBar
    from dgemma.inspect import inspect_checkpoint
    from dgemma.weights.hub.locate import locate

    need_stdout()
    opened = None
    if image is not None:
        from dgemma.chat.pictures import open_picture

        opened = open_picture(image)
    source = locate(model, DownloadBar)
    with ProgressBar("checking", patience=0.5) as bar:
        report = inspect_checkpoint(source, check=check, mmproj=mmproj, progress=bar.update)
    fits = [] if opened is None else _fits(report, *opened.size)
    if json:
        picture = None if opened is None else {"path": str(image), "width": opened.width, "height": opened.height,
                                               "fits": fits}
        print_json({"model": model, **report.to_dict(), **({"picture": picture} if picture else {})})
    else:
        from dgemma.cli.terminal.console import SafeConsole

        console = SafeConsole(highlight=False)
        console.width = min(console.width, _WIDTH) if console.is_terminal else _WIDTH
        show(report, model, console)
        if opened is not None and image is not None:
            _print(console, f"{image.name}, {opened.width:,} × {opened.height:,} pixels",
                   [">most tokens", ">tokens", ">resized to"],
                   [(f"{fit['budget']:,}", f"{fit['tokens']:,}", f"{fit['width']:,} × {fit['height']:,}")
                    for fit in fits])
    if report.problems:
        raise typer.Exit(1)


def _fits(report: CheckpointReport, width: int, height: int) -> list[dict[str, int]]:
    """What becomes of a picture of this size by the most tokens it may have. Raises DgemmaError without a tower."""
    from dgemma.chat.pictures import fitted
    from dgemma.config import VisionConfig

    if report.tower is None:
        raise DgemmaError(f"{report.folder}: this model sees no pictures: it has no vision tower")
    config = VisionConfig(patch_size=report.tower.patch_size, pooling_kernel_size=report.tower.pooling_kernel_size)
    return [{"budget": budget, **asdict(fitted(width, height, budget, config))} for budget in report.tower.budgets]


def show(report: CheckpointReport, name: str, console: Console) -> None:
    """Print the report; colour and rules on a terminal, plain columns elsewhere."""
    from rich.text import Text

    config = report.config
    console.print(Text(name, "bold"), Text(f"DiffusionGemma, {short_count(report.text_parameters)} text parameters"
                                           f" ({short_count(report.active_parameters)} active per token)"))
    if str(report.folder) != name:
        console.print(Text(str(report.folder), "dim"), soft_wrap=True)
    _print(console, "Shape", [], [
        ("hidden size", f"{config.hidden_size:,}"),
        ("vocabulary", f"{config.vocab_size:,} tokens"),
        ("canvas", f"{config.canvas_length:,} tokens"),
        ("context", f"{config.max_position_embeddings:,} tokens"),
        ("experts", f"{config.num_experts} of width {config.moe_intermediate_size:,}, {config.top_k_experts} chosen"
                    " per token"),
        ("dense MLP", f"width {config.intermediate_size:,}, beside the experts"),
        ("tokenizer", _tokenizer(report)),
        *([("vision tower", f"{report.tower.layers} layers of width {report.tower.width:,}, "
                            f"{short_count(report.tower.parameters)} parameters, {size_text(report.tower.nbytes)} in "
                            f"{report.tower.path.name}")] if report.tower else []),
    ])
    _print(console, "Layers", ["kind", ">count", ">query heads", ">KV heads", ">head dim", ">window", ">RoPE θ"], [
        (group.geometry.kind.replace("_attention", ""), str(len(group.layers)), str(config.num_attention_heads),
         str(group.geometry.num_key_value_heads), str(group.geometry.head_dim),
         f"{config.sliding_window:,}" if group.geometry.kind == SLIDING else "all", f"{group.geometry.rope_theta:,.0f}")
        for group in report.layers])
    total = sum(report.parameters.values())
    bar = "█" * 30 if console.is_terminal else ""
    _print(console, "Parameters", ["part", ">parameters", ">share", ""], [
        (part, f"{count:,}", f"{count / total:.1%}", bar[: round(len(bar) * count / total)])
        for part, count in report.parameters.items() if count])
    files = list(report.files.items())
    rest = files[_FILES_SHOWN:]
    _print(console, "Files", ["file", ">size"], [
        *((file, size_text(size)) for file, size in files[:_FILES_SHOWN]),
        *([(f"and {len(rest)} more", size_text(sum(size for _, size in rest)))] if rest else []),
        *((f"stored as {s.dtype}: {s.tensors:,} tensors", size_text(s.nbytes)) for s in report.stored)])
    if report.parts:
        _print(console, "Types", ["part", "type", ">tensors", ">size"], [
            (part.part, part.dtype, f"{part.tensors:,}", size_text(part.nbytes)) for part in report.parts])
    seeing = report.tower is not None
    _print(console, f"Memory to run {'with pictures' if seeing else 'the text network'} (one conversation)",
           [">context", "dtype", ">weights", ">KV cache", ">working", ">program", *[">vision"] * seeing, ">total"], [
               (f"{need.context:,}", need.dtype,
                *map(size_text, (need.weights, need.kv_cache, need.working, need.program, *[need.vision] * seeing,
                                 need.total)))
               for need in sorted(report.memory, key=lambda need: need.context)])
    if any(need.dtype == "packed" for need in report.memory):
        console.print(Text("packed: on the CPU, weights as they are in the file; bfloat16: on a GPU", "dim"))
    if seeing:
        console.print(Text("vision: the tower and a picture of 1,120 tokens in it; it comes with the first picture",
                           "dim"))
    defaults = report.generation
    _print(console, "Generation defaults", [], [
        ("max_denoising_steps", str(defaults.max_denoising_steps)),
        ("entropy_bound", f"{defaults.entropy_bound:g}"),
        ("t_min, t_max", f"{defaults.t_min:g}, {defaults.t_max:g}"),
        ("stability_threshold", str(defaults.stability_threshold)),
        ("confidence_threshold", f"{defaults.confidence_threshold:g}"),
        ("max_tokens", f"{defaults.max_tokens:,} (not applied: answers may go on to the end of the context)"),
        ("eos_token_id", ", ".join(map(str, defaults.eos_token_id))),
    ])
    console.print()
    for note in report.notes:
        console.print(Text(f"Note: {note}", "yellow"), soft_wrap=True)
    if report.unread:
        console.print(Text(f"Not read: tensors of type {', '.join(report.unread)}", "yellow"), soft_wrap=True)
    if not report.problems and report.checked:
        console.print(Text("No problems found: every tensor is there, in the expected shape, and every number that was "
                           "read is finite.", "green"))
    elif not report.problems:
        console.print(Text("No problems found in the headers: every tensor is there, in the expected shape. The "
                           "numbers were not read: --check does.", "green"))
    if not report.problems:
        return
    from dgemma.errors import describe
    from dgemma.inspect import NOT_FINITE

    loads = all(problem.kind == NOT_FINITE for problem in report.problems)
    console.print(Text(f"Problems: this checkpoint cannot be {'used' if loads else 'loaded'}", "bold red"))
    console.print(Text(describe(report.problems)), soft_wrap=True)


def _print(console: Console, title: str, columns: list[str], rows: Iterable[tuple[str, ...]]) -> None:
    """A titled table; a column's name starts with ">" where it is aligned to the right."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    style: dict[str, Any] = {"box": None, "pad_edge": False, "padding": (0, 2, 0, 0)}
    if columns and console.is_terminal:
        style = {"box": box.SIMPLE_HEAD, "show_edge": False, "pad_edge": False, "border_style": "dim"}
    table = Table(show_header=bool(columns), header_style="dim", **style)
    for column in columns or ("", ""):
        table.add_column(column.removeprefix(">"), justify="right" if column.startswith(">") else "left",
                         overflow="fold", style="" if columns or table.columns else "dim")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print()
    console.print(Text(title, "bold cyan"))
    console.print(table)


def _tokenizer(report: CheckpointReport) -> str:
    if report.tokenizer is None:
        return "none that can be read"
    template = "with a chat template" if report.tokenizer.has_chat_template else "without a chat template"
    return f"{report.tokenizer.vocab_size:,} tokens, {template}"
