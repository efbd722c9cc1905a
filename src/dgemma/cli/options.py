"""Options that several commands share, declared once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

_SERVER = "A server instead of this machine"
ModelOption = Annotated[str | None, typer.Option(
    "--model", "-m", help="A bundled name, a checkpoint folder, a .gguf file, or a name on the hub: org/name, "
                          "org/name:Q4_K_M. Default: the bundled Sudoku model.",
    show_default=False)]
UrlOption = Annotated[str | None, typer.Option(
    help="Use the model on this OpenAI-compatible server, as in http://localhost:8000. -m is its name there (default: "
         "the first).", rich_help_panel=_SERVER, show_default=False)]
ApiKeyOption = Annotated[str | None, typer.Option(
    help="The key that the server wants.", envvar=["DGEMMA_API_KEY", "OPENAI_API_KEY"], rich_help_panel=_SERVER,
    show_default=False)]
SeedOption = Annotated[int | None, typer.Option(help="Fix all randomness: same seed, same text.", show_default=False)]
SystemOption = Annotated[str | None, typer.Option(help="A system message.", show_default=False)]
ThinkingOption = Annotated[bool, typer.Option("--thinking/--no-thinking", help="Let the model think first.")]
ReasoningBudgetOption = Annotated[int | None, typer.Option(
    "--reasoning-budget", min=0, help="Most tokens to think; then the thought is closed and the answer follows.",
    show_default=False)]
RedrawOption = Annotated[bool, typer.Option(
    "--redraw-empty/--no-redraw-empty", help="Draw an answer that comes out empty once more.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
VisualOption = Annotated[bool, typer.Option("--visual/--no-visual", help="Show the canvas live (on a terminal).")]


class PreviewKind(StrEnum):
    """How what is shown to the model is shown on the terminal, too."""

    AUTO = "auto"
    OFF = "off"
    KITTY = "kitty"
    ITERM = "iterm"
    SIXEL = "sixel"


PreviewOption = Annotated[PreviewKind, typer.Option(
    help="Show pictures on the terminal, too: off, or by one protocol. auto: what the terminal is known to understand.",
    envvar="DGEMMA_PREVIEW")]
PaceOption = Annotated[float, typer.Option(min=0.0, max=10.0, help="Show every step for at least so many seconds; the "
                                           "model does not wait for it.")]
ToolsOption = Annotated[str | None, typer.Option(
    metavar="KINDS", help="Tools that the model may call: python and bash (in a sandbox), web, mcp; with commas, "
                          "or all. You are asked before each call.", show_default=False)]
McpConfigOption = Annotated[Path | None, typer.Option(
    metavar="FILE", help='MCP servers whose tools the model may call, too: {"mcpServers": {…}}.', show_default=False)]
TraceOption = Annotated[Path | None, typer.Option(
    help="Save every denoising step to this file, for `dgemma replay`.", show_default=False)]
CandidatesOption = Annotated[int | None, typer.Option(
    metavar="N", help="Save the N most probable tokens at every place with --trace. Takes time at every step.",
    show_default=False)]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 … Default: a GPU if there is one.",
                                                  show_default=False)]

# How a model is loaded here, by the names that `dgemma.load` knows; `with_options` gives a command the whole group.
LOADING = {
    "device": DeviceOption,
    "dtype": Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. Default: the checkpoint's.",
                                                show_default=False)],
    "cache_type": Annotated[str | None, typer.Option(
        help="What keys and values are kept in: f32, f16, bf16 or q8_0. Default: what they are computed in, bf16 for "
             "packed weights.", show_default=False)],
}
TOWER = {
    "mmproj": Annotated[Path | None, typer.Option(
        help="The vision tower: a GGUF file. Default: the checkpoint's own, or mmproj*.gguf beside a .gguf file.",
        show_default=False)],
    "vision": Annotated[str | None, typer.Option(
        metavar="FROM", help="Take the vision tower, and nothing else, from this checkpoint folder or hub repository.",
        show_default=False)],
}
LOCAL = {**LOADING, **TOWER, "adapter": Annotated[Path | None, typer.Option(
    help="A LoRA or DoRA adapter for the model: its folder in PEFT's format.", show_default=False)]}


def _sampler_option(kind: Any, help: str) -> Any:
    return Annotated[kind | None, typer.Option(help=help, rich_help_panel="Sampler (defaults: the checkpoint's)",
                                               show_default=False)]


SAMPLER = {
    "max_denoising_steps": _sampler_option(int, "Most denoising steps per canvas."),
    "entropy_bound": _sampler_option(float, "How much to believe in one step, nats."),
    "t_min": _sampler_option(float, "Last temperature."),
    "t_max": _sampler_option(float, "First temperature."),
    "stability_threshold": _sampler_option(int, "Earlier drafts that must agree before stopping."),
    "confidence_threshold": _sampler_option(float, "Mean entropy below which to stop, nats."),
}
ANSWER = {"max_tokens": Annotated[int | None, typer.Option(
    help="Most tokens to answer with. Default: up to the end of the context.", show_default=False)], **SAMPLER}


def with_options(**groups: Mapping[str, Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command with all options of each group, behind its own; it takes of each a dictionary of those that were given.

    ``groups``: the dictionary's name among the command's parameters -> the group's options by name.
    """
    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        parameters = [parameter.replace(annotation=hints[parameter.name])
                      for parameter in inspect.signature(command).parameters.values() if parameter.name not in groups]
        parameters += [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=option)
                       for options in groups.values() for name, option in options.items()]

        @functools.wraps(command)
        def wrapped(**given: Any) -> None:
            values = {group: {name: given.pop(name) for name in options} for group, options in groups.items()}
            command(**given, **{group: {name: value for name, value in of_group.items() if value is not None}
                                for group, of_group in values.items()})

        setattr(wrapped, "__signature__", inspect.Signature(parameters))  # noqa: B010  (what Typer reads)
        wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return wrapped

    return decorate
