"""`dgemma models`: what is on this machine, whether it fits its memory, and removing it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dgemma.cli.options import JsonOption
from dgemma.cli.streams import need_stdout, print_json
from dgemma.cli.terminal.console import SafeConsole, say
from dgemma.formats import count_text, size_text
from dgemma.memory import machine_memory

if TYPE_CHECKING:
    from dgemma.weights.hub.cache import LocalModel

_LEFT_SHOWN = 5  # names
models_app = typer.Typer(invoke_without_command=True)


@models_app.callback()
def models(context: typer.Context, json: JsonOption = False) -> None:
    """List the models on this machine: the bundled ones and those of the Hugging Face cache; or remove one.

    Names are as -m takes them. "fits" compares the memory that a model needs with this machine's, not with a GPU's.
    """
    if context.invoked_subcommand is not None:
        return
    need_stdout()
    from dgemma.weights.hub.cache import cache_folder, local_models

    found = local_models()
    available, total = machine_memory()
    if json:
        print_json({"models": [_as_json(model, available) for model in found], "memory_available": available,
                    "memory_total": total, "cache": str(cache_folder())})
    else:
        _show(found, available, total)


@models_app.command()
def remove(
    name: Annotated[str, typer.Argument(help="The model, as `dgemma models` names it.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete a model from the Hugging Face cache, also one that has come only partly; and nothing else.

    Other quantisations, vision towers and models of other kinds in the same repository stay.
    """
    from dgemma.errors import DgemmaError
    from dgemma.weights.hub.cache import files_beside, find_local, remove_model

    model = find_local(name)
    if not model.bundled and not yes:
        if not _can_ask():
            raise DgemmaError(f"{model.name}: nothing was removed: add --yes, as there is nobody to ask")
        if not typer.confirm(f"Delete {model.name} ({size_text(model.size)}) from this machine?"):
            say("Nothing was removed.")
            raise typer.Exit(1)
    freed = remove_model(model)
    say(f"Removed {model.name}: {size_text(freed)} freed")
    if freed < model.size:
        say("The rest is shared with other files of the cache; `hf cache prune` deletes what none uses.")
    if left := files_beside(model):
        names = ", ".join(list(left)[:_LEFT_SHOWN]) + (" …" if len(left) > _LEFT_SHOWN else "")
        repo = model.name.split(":")[0]
        say(f"Left where they are: {count_text(len(left), 'other file')} of {repo}, "
            f"{size_text(sum(left.values()))} ({names}); `hf cache rm model/{repo}` deletes all that is there.")


def _can_ask() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _show(found: list[LocalModel], available: int | None, total: int | None) -> None:
    from rich.table import Table
    from rich.text import Text

    from dgemma.memory.local import fits, memory_needed
    from dgemma.weights.hub.cache import cache_folder

    console = SafeConsole(highlight=False)
    titles, rows = ("model", "kind", "size", "needs", "fits", ""), []
    for model in found:
        needed = memory_needed(model)
        of = "" if model.complete else f" of {'?' if model.full_size is None else size_text(model.full_size)}"
        rows.append((model.name, model.kind, size_text(model.size) + of, "?" if needed is None else size_text(needed),
                     fits(needed, available, total),
                     "bundled" if model.bundled else "" if model.complete else "partial"))
    widths = [max(map(len, column)) + 2 for column in zip(titles, *rows, strict=True)]
    if not console.is_terminal:  # nobody wants a name cut in two in a pipe
        console.width = max(console.width, sum(widths))
    if sum(widths) <= console.width:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        for title in titles:
            table.add_column(title, justify="right" if title in ("size", "needs") else "left", no_wrap=True)
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)
    else:
        for name, kind, size, needs, fits, state in rows:
            console.print(Text(name), soft_wrap=True)
            details = f"  {kind}, {size}, needs {needs}, fits: {fits}{state and f', {state}'}"
            console.print(Text(details, "dim"), soft_wrap=True)
    console.print()
    memory = "" if available is None or total is None else (f"Memory: {size_text(available)} of {size_text(total)} "
                                                            "available. ")
    console.print(Text(f"{memory}Cache: {cache_folder()}", "dim"), soft_wrap=True)
    if all(model.bundled for model in found):
        console.print(Text("Nothing from the hub yet; `dgemma pull org/name` fetches a model.", "dim"))
    for model in found:
        if not model.complete:
            console.print(Text(f"`dgemma pull {model.name}` goes on with the partial one, `dgemma models remove "
                               f"{model.name}` deletes it.", "dim"), soft_wrap=True)


def _as_json(model: LocalModel, available: int | None) -> dict[str, Any]:
    from dgemma.memory.local import memory_needed

    needed = memory_needed(model)
    return {"name": model.name, "kind": model.kind, "quantisation": model.quantisation, "size": model.size,
            "full_size": model.full_size, "memory_needed": needed,
            "fits": None if needed is None or available is None else needed <= available,
            "complete": model.complete, "bundled": model.bundled, "path": str(model.path)}
