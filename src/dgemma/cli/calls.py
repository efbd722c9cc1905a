"""Tool calls on the terminal: a few lines for each, a question before it runs, Ctrl-C to stop it.

Works on: the events of `dgemma.tools.loop`. What calls print goes to stderr: stdout has the answers and nothing else.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import tempfile
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgemma.cli.terminal.console import say
from dgemma.diffusion.events import Event, Finished, Generation
from dgemma.errors import DgemmaError
from dgemma.files import atomic_write, make_folder
from dgemma.formats import size_text
from dgemma.machine import signals_handled
from dgemma.tools.loop import (
    Call,
    CallProposed,
    CallReturned,
    CallRunning,
    Decision,
    MessageAdded,
    Speaker,
    TurnEnded,
    take_turn,
    with_answers,
)
from dgemma.tools.mcp import read_servers
from dgemma.tools.opening import open_toolbox, read_kinds
from dgemma.tools.tool import Toolbox, ToolResult

if TYPE_CHECKING:
    Messages = list[dict[str, Any]]

_LINES = 12  # of code, and of a result
_WIDTH = 300  # characters of a line
_DECISIONS: dict[str, Decision] = {"y": "yes", "yes": "yes", "a": "always", "always": "always", "": "no", "n": "no",
                                   "no": "no"}


class StoppedError(Exception):
    """The user stopped the turn at a question."""


@dataclass
class TerminalTools:
    """Tools that a conversation on the terminal may call; ``folder``: where the files that they make go."""

    runner: asyncio.Runner
    toolbox: Toolbox
    read_line: Callable[[str], str] | None = None  # asks the user; None: nobody is there to be asked
    folder: Path | None = field(default=None, init=False)

    def answer(self, ask: Callable[[Messages, list[dict[str, Any]]], Generation],
               messages: Sequence[dict[str, Any]]) -> tuple[Messages, bool]:
        """Let the model answer and call until it is done: the conversation then, and whether it was stopped.

        ``ask`` gets an answer to messages with tools declared, and shows it. What was said before a Ctrl-C stays.
        """
        said = list(messages)
        try:
            ended = self.runner.run(self._follow(_Asked(ask), said))
        except (asyncio.CancelledError, StoppedError):
            return with_answers(said), True
        if ended.why == "rounds":
            say("(no more calls in one turn: ask it to go on)", dim=True, err=True)
        return said, ended.why == "cancelled"

    async def _follow(self, speaker: Speaker, said: Messages) -> TurnEnded:
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()
        ended = None
        with signals_handled(lambda *_: loop.call_soon_threadsafe(task.cancel), signal.SIGINT):
            async for event in take_turn(speaker, list(said), self.toolbox, self._approve):
                if isinstance(event, CallProposed):
                    _show_call(event.call)
                elif isinstance(event, CallRunning):
                    say("  running … (Ctrl-C stops it)", dim=True, err=True)
                elif isinstance(event, CallReturned):
                    _show_result(event.result, self._saved(event.result))
                elif isinstance(event, MessageAdded):
                    said.append(event.message)
                elif isinstance(event, TurnEnded):
                    ended = event
        assert ended is not None
        return ended

    async def _approve(self, call: Call) -> Decision:
        """What the user says. The loop waits meanwhile: nothing else goes on."""
        if self.read_line is None:
            say(f"  not run: there is nobody to ask (/tools {call.name} auto lets it run)", fg="yellow", err=True)
            return "no"
        try:
            with signals_handled(signal.default_int_handler, signal.SIGINT):
                while True:
                    line = self.read_line("  Run it? [y]es, [n]o, [a]lways: ").strip().lower()
                    if line in _DECISIONS:
                        return _DECISIONS[line]
        except (KeyboardInterrupt, EOFError) as error:
            say(err=True)
            raise StoppedError from error

    def _saved(self, result: ToolResult) -> list[str]:
        """Put the files of a result into a folder of this conversation's: their paths and sizes, or what went wrong."""
        shown = []
        for name, data in result.files.items():
            if self.folder is None:
                self.folder = Path(tempfile.mkdtemp(prefix="dgemma-files-"))
            path = self.folder / name
            try:
                if not path.resolve().is_relative_to(self.folder.resolve()):
                    raise DgemmaError(f"{name!r:.80}: this name leads elsewhere")
                make_folder(path.parent)
                with atomic_write(path) as beside:
                    beside.write_bytes(data)
            except DgemmaError as error:
                shown.append(f"not saved: {error}")
            else:
                shown.append(f"{path} ({size_text(len(data))})")
        return shown

    def command(self, text: str) -> None:
        """`/tools`: say what there is, or decide (`/tools NAME ask|auto|off`). Raises DgemmaError."""
        name, _, approval = text.partition(" ")
        if name:
            self.toolbox.decide(name, approval.strip())  # type: ignore[arg-type]  (it is checked there)
        for tool in [self.toolbox.tools[name]] if name else self.toolbox.tools.values():
            say(f"{tool.name} ({self.toolbox.approval(tool.name)}): {_clip(tool.description.partition('. ')[0], 100)}")


class _Asked:
    """A `Speaker` that answers at once and whole, and shows it itself."""

    def __init__(self, ask: Callable[[Messages, list[dict[str, Any]]], Generation]):
        self._ask = ask

    async def stream(self, messages: Messages, tools: list[dict[str, Any]]) -> AsyncGenerator[Event, None]:
        yield Finished(0, self._ask(messages, tools))


@contextmanager
def open_tools(kinds: str | None, mcp_config: Path | None) -> Iterator[TerminalTools]:
    """The tools that the options ask for. Raises DgemmaError for what is missing or broken."""
    with asyncio.Runner() as runner:
        chosen = read_kinds(kinds, mcp_config)
        opened = open_toolbox(chosen, [] if mcp_config is None else read_servers(mcp_config))
        toolbox = runner.run(_entered(opened.__aenter__()))
        try:
            yield TerminalTools(runner, toolbox, _input if sys.stdin.isatty() else None)
        finally:
            runner.run(_entered(opened.__aexit__(None, None, None)))


async def _entered(step: Any) -> Any:
    """An awaitable as the coroutine that a runner wants."""
    return await step


def _input(prompt: str) -> str:
    say(prompt, nl=False, err=True)
    return input()


def _show_call(call: Call) -> None:
    arguments = call.arguments if isinstance(call.arguments, dict) else {"arguments": call.arguments}
    say(f"● {call.name}", fg="cyan", err=True)
    for name, value in arguments.items():
        lines = value.splitlines() if isinstance(value, str) else [repr(value)]
        if name == "code":
            _show_lines(lines)
        else:
            say(f"  {name}: {_clip(' '.join(lines))}", err=True)


def _show_result(result: ToolResult, files: list[str]) -> None:
    _show_lines(result.text.splitlines(), "│ ", fg="red" if result.failed else None)
    for file in files:
        say(f"  → {file}", fg="green", err=True)


def _show_lines(lines: list[str], before: str = "", fg: str | None = None) -> None:
    """The first and the last of many lines, on stderr."""
    head = lines if len(lines) <= _LINES else lines[: _LINES // 2]
    tail = [] if head is lines else lines[-(_LINES // 2) :]
    hidden = [f"… {len(lines) - _LINES} lines more …"] if tail else []
    for line in (*head, *hidden, *tail):
        say(f"  {before}{_clip(line)}", fg=fg, dim=None if fg else True, err=True)


def _clip(text: str, most: int = _WIDTH) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
