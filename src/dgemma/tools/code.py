"""Python and Bash as tools: what was printed, how it ended, the files that were made.

Works on: `sandbox`. Files that one call leaves are there for the next: both tools share one scratch folder.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from dgemma.formats import size_text
from dgemma.tools.sandbox import LANGUAGES, Limits, Ran, run_code
from dgemma.tools.tool import Say, Tool, ToolResult, schema

_ABOUT = {
    "python": "Run a Python program and read what it prints (print what you want to know). numpy and matplotlib may be "
              "there; save pictures as files: plt.savefig('plot.png').",
    "bash": "Run a Bash script and read what it prints.",
}
_PLACE = ("It runs in a sandbox{network}, in a scratch folder whose files are kept from call to call and shown to the "
          "user; it ends after {seconds:g} seconds.")

# What runs code: `run_code`, or a stand-in for it.
Run = Callable[..., Awaitable[Ran]]


def code_tools(languages: Iterable[str] = LANGUAGES, *, limits: Limits = Limits(), network: bool = False,  # noqa: B008
               run: Run = run_code) -> list[Tool]:
    """A tool for each language, all with one scratch folder."""
    kept: dict[str, bytes] = {}

    def tool(language: str) -> Tool:
        async def call(arguments: dict[str, Any], say: Say) -> ToolResult:
            before = dict(kept)
            ran = await run(language, arguments["code"], limits=limits, network=network, files=before, say=say)
            if ran.code is not None:  # else nothing is known of its files
                kept.clear()
                kept.update(ran.files)
            made = {name: data for name, data in ran.files.items() if before.get(name) != data}
            return ToolResult(_told(ran, made, limits), made, failed=ran.code != 0)

        place = _PLACE.format(network="" if network else " without network", seconds=limits.seconds)
        return Tool(language, f"{_ABOUT[language]} {place}",
                    schema(["code"], code={"type": "string", "description": f"The {language.title()} source."}), call,
                    room=language)

    return [tool(language) for language in languages]


def _told(ran: Ran, made: dict[str, bytes], limits: Limits) -> str:
    """What the model reads of a run."""
    lines = [ran.output.rstrip()] if ran.output.strip() else []
    if ran.ended == "time":
        lines.append(f"[stopped: it took longer than {limits.seconds:g} seconds]")
    elif ran.ended == "memory":
        lines.append(f"[stopped: it took more than {size_text(limits.memory)} of memory, or too many files]")
    elif ran.ended == "killed":
        lines.append("[it was killed]")
    elif ran.code:
        lines.append(f"[exit code {ran.code}]")
    elif not lines:
        lines.append("[it printed nothing]")
    if made:
        lines.append("[files, shown to the user: "
                     + ", ".join(f"{name} ({size_text(len(data))})" for name, data in made.items()) + "]")
    if ran.left_out:
        lines.append(f"[not kept, too many or too large: {', '.join(ran.left_out)}]")
    return "\n".join(lines)
