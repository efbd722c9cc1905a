"""A model that says what it is told to, for the loop of tool calls."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from dgemma.diffusion.events import Event, Finished, Generation
from dgemma.tools.loop import Decision
from dgemma.tools.tool import Say, Tool, ToolResult, schema


def generation(text: str = "", *calls: tuple[str, Any], reason: Any = "stop",
               reasoning: str | None = None) -> Generation:
    made = [{"name": name, "arguments": arguments} for name, arguments in calls]
    return Generation(text, reasoning, made, [], reason, [1], 1.0, 1, 0.0)


class ScriptedSpeaker:
    """Gives its ``turns`` one after another; ``heard``: the messages and tools of each request."""

    def __init__(self, *turns: Generation):
        self._turns = list(turns)
        self.heard: list[tuple[list[dict[str, Any]], list[str]]] = []

    async def stream(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> AsyncGenerator[Event, None]:
        self.heard.append((list(messages), [tool["function"]["name"] for tool in tools]))
        yield Finished(0, self._turns.pop(0))


async def allow(_: Any) -> Decision:
    return "yes"


async def refuse(_: Any) -> Decision:
    return "no"


async def ask_nobody(_: Any) -> Decision:
    raise AssertionError("nobody was to be asked")


def echo(name: str = "echo", **options: Any) -> Tool:
    """A tool that says its text twice: while it runs, and as its result."""
    async def run(arguments: dict[str, Any], say: Say) -> ToolResult:
        say(arguments["text"])
        return ToolResult(f"said {arguments['text']}", {"text.txt": arguments["text"].encode()})

    return Tool(name, "Says it.", schema(["text"], text={"type": "string"}, times={"type": "integer"}), run, **options)
