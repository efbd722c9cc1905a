"""What a tool is, and the box of those that a model may call.

Works on: JSON schemas, arguments. Knows nothing of: what the tools do, who asks.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from dgemma.chat.messages import normalise_tools
from dgemma.chat.tools import is_of, tools_of
from dgemma.errors import DgemmaError

Approval = Literal["ask", "auto", "off"]  # the user is asked; it runs; the model is not told of it
Say = Callable[[str], Any]  # hears what a tool prints, while it runs


class ToolError(DgemmaError):
    """A tool that cannot do what it was asked: the model is told, and may do better."""


@dataclass(frozen=True)
class Source:
    """What an answer can cite as [number]."""

    number: int
    title: str
    url: str


@dataclass(frozen=True)
class ToolResult:
    """What came of a call. ``text``: what the model reads; ``files``: name -> bytes, for whoever looks on."""

    text: str
    files: Mapping[str, bytes] = field(default_factory=dict)
    sources: tuple[Source, ...] = ()
    failed: bool = False


@dataclass(frozen=True)
class Tool:
    """A function that a model may call. ``parameters``: the JSON schema of its arguments, an object's.

    ``run`` takes the arguments and a `Say`; cancelling it ends the work. It raises `ToolError`. ``approval``: what
    holds unless the user says otherwise. ``room`` is what it belongs to: "python", "bash", "web", or an MCP server.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    run: Callable[[dict[str, Any], Say], Awaitable[ToolResult]]
    approval: Approval = "ask"
    room: str = ""

    def declaration(self) -> dict[str, Any]:
        """As a chat template and the APIs have it."""
        return {"type": "function", "function": {"name": self.name, "description": self.description,
                                                 "parameters": dict(self.parameters)}}


class Toolbox:
    """Tools by name, and what the user decided of each."""

    def __init__(self, tools: Iterable[Tool], approvals: Mapping[str, Approval] | None = None):
        """Raises DgemmaError for two tools of one name, and for a name that no call can be written with."""
        self.tools: dict[str, Tool] = {}
        for tool in tools:
            if tool.name in self.tools:
                raise DgemmaError(f"there are two tools of the name {tool.name}")
            normalise_tools([tool.declaration()])
            self.tools[tool.name] = tool
        self._approvals: dict[str, Approval] = {}
        for name, approval in (approvals or {}).items():
            self.decide(name, approval)

    def approval(self, name: str) -> Approval:
        return self._approvals.get(name, self.tools[name].approval)

    def decide(self, name: str, approval: Approval) -> None:
        """Let a tool be asked for, run by itself or be hidden from now on. Raises DgemmaError."""
        if name not in self.tools:
            raise DgemmaError(f"there is no tool {name}; there are {', '.join(self.tools) or 'none'}")
        if approval not in get_args(Approval):
            raise DgemmaError(f"a tool is one of {', '.join(get_args(Approval))}, not {approval!r:.40}")
        self._approvals[name] = approval

    def declarations(self) -> list[dict[str, Any]]:
        """The tools that the model is told of."""
        return [tool.declaration() for name, tool in self.tools.items() if self.approval(name) != "off"]

    def fault(self, name: str, arguments: Any) -> str | None:
        """What is wrong with a call, in words for the model; None for a sound one.

        Names, required ones and JSON types at the top; the tool itself judges the rest.
        """
        if name not in self.tools or self.approval(name) == "off":
            known = ", ".join(tool["function"]["name"] for tool in self.declarations())
            return f"there is no tool {name}; there are: {known or 'none'}"
        if not isinstance(arguments, Mapping):
            return "the arguments must be an object"
        known = tools_of([self.tools[name].declaration()])[name]
        if missing := sorted(known.required - arguments.keys()):
            return f"{missing[0]} is missing"
        if known.parameters is not None and self.tools[name].parameters.get("additionalProperties") is False and (
                extra := sorted(arguments.keys() - set(known.parameters))):
            return f"there is no parameter {extra[0]}; there are: {', '.join(known.parameters)}"
        for key, value in arguments.items():
            if not is_of(value, known.types.get(key)):
                return f"{key} must be of type {' or '.join(sorted(known.types[key]))}"
        return None


def schema(required: Iterable[str] = (), **properties: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON schema of an object of these properties and no others."""
    return {"type": "object", "properties": dict(properties), "required": list(required),
            "additionalProperties": False}
