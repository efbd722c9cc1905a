"""`dgemma doctor`: what is here, what is missing, and the line that mends it."""

from __future__ import annotations

import dataclasses

import typer

from dgemma.cli import options
from dgemma.cli.streams import need_stdout, print_json
from dgemma.cli.terminal.console import SafeConsole

_MARKS = {"ok": ("ok", "green"), "missing": ("--", "yellow"), "broken": ("!!", "bold red")}


def doctor(json: options.JsonOption = False) -> None:
    """Look at all that dgemma uses: kernels, compiler, GPU, memory, disk, the hub, optional parts.

    Beside what is missing stands the line that mends it. Exits with 0 when models can be run here, whatever else is
    missing (a GPU, the network, an optional part), and with 1 when not.
    """
    from dgemma.cli.doctor import checks, works

    need_stdout()
    if json:
        found = list(checks())
        print_json({"works": works(found), "checks": [dataclasses.asdict(check) for check in found]})
    else:
        from rich.text import Text

        console = SafeConsole(highlight=False)
        found = []
        for check in checks():
            found.append(check)
            mark, style = _MARKS[check.state]
            console.print(Text.assemble((mark, style), f"  {check.name:<10}{check.found}"), soft_wrap=True)
            if check.mend:
                console.print(Text.assemble((f"{'':14}-> ", "dim"), check.mend), soft_wrap=True)
        console.print()
        console.print(Text("Models run here.", "green") if works(found) else
                      Text("Models cannot be run here: mend what is marked !! first.", "bold red"))
    if not works(found):
        raise typer.Exit(1)
