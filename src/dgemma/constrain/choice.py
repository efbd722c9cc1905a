"""What a request says of its tools: which may be called, whether one must be, how often, held to their schemas or not.

Every API's spelling of `tool_choice` is read here. Works on plain dictionaries. Knows nothing of automata, HTTP.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dgemma.errors import DgemmaError

_WORDS = {"auto": "auto", "none": "none", "required": "required", "any": "required"}  # any is Anthropic's
_FORMS = ('"auto"', '"none"', '"required"', '{"type": "function", "function": {"name": …}}',
          '{"type": "allowed_tools", "allowed_tools": {"mode": …, "tools": […]}}')


class ToolsError(DgemmaError):
    """Tools that cannot be called as was asked; ``field``: what is wrong, tools or tool_choice."""

    def __init__(self, message: str, field: str = "tools"):
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class ToolChoice:
    """``mode`` is "none", "auto", "required" or "function" (this one, once).

    ``allowed``: the names of the tools that may be called; None: all of them.
    """

    mode: str = "auto"
    allowed: tuple[str, ...] | None = None


@dataclass(frozen=True)
class CallableTool:
    """A tool that may be called; ``parameters`` is the JSON schema of its arguments."""

    name: str
    parameters: Any
    strict: bool


@dataclass(frozen=True)
class Calls:
    """The calls that an answer may hold. ``required``: nothing but calls; ``many``: more than one."""

    tools: tuple[CallableTool, ...]
    required: bool
    many: bool


def read_tool_choice(choice: Any) -> ToolChoice:
    """A `tool_choice` of any API; None is auto. Raises `ToolsError` when it is none.

    Words: auto, none, required (any). A tool by name: {"name"}, {"type": "function", "name"}, {"type": "function",
    "function": {"name"}}, {"type": "tool", "name"}. Some of them: {"type": "allowed_tools", "mode", "tools"}, flat or
    under "allowed_tools". {"type": word} as well.
    """
    if choice is None:
        return ToolChoice()
    if isinstance(choice, str) and choice in _WORDS:
        return ToolChoice(_WORDS[choice])
    if isinstance(choice, Mapping):
        kind = choice.get("type", "function")
        if isinstance(kind, str) and kind in _WORDS:
            return ToolChoice(_WORDS[kind])
        if kind in ("function", "tool"):
            return ToolChoice("function", (_name_of(choice, "tool_choice"),))
        if kind == "allowed_tools":
            return _allowed(choice.get("allowed_tools", choice))
    raise ToolsError(f"tool_choice must be one of {', '.join(_FORMS)}, got {choice!r}", "tool_choice")


def _allowed(said: Any) -> ToolChoice:
    where = "tool_choice.allowed_tools"
    if not isinstance(said, Mapping) or not isinstance(said.get("tools"), Sequence) or isinstance(said["tools"], str):
        raise ToolsError(f'{where} needs "mode" ("auto" or "required") and "tools": a list', "tool_choice")
    mode = said.get("mode", "auto")
    if mode not in ("auto", "required"):
        raise ToolsError(f"{where}.mode must be auto or required, got {mode!r}", "tool_choice")
    names = tuple(dict.fromkeys(_name_of(tool, f"{where}.tools[{index}]") for index, tool in enumerate(said["tools"])))
    if not names:
        raise ToolsError(f"{where}.tools is empty: name at least one tool", "tool_choice")
    return ToolChoice(mode, names)


def _name_of(said: Any, where: str) -> str:
    inner = said.get("function", said) if isinstance(said, Mapping) else None
    name = inner.get("name") if isinstance(inner, Mapping) else None
    if not isinstance(name, str) or not name:
        raise ToolsError(f'{where} must name a function: {{"type": "function", "function": {{"name": …}}}}',
                         "tool_choice")
    return name


def usable_tools(tools: Sequence[Mapping[str, Any]] | None, choice: ToolChoice) -> list[dict[str, Any]] | None:
    """Of declarations ({"type": "function", "function": …}) those that the model is told of.

    None of them where none may be called; where only some may, these alone, but all beside one that is asked for by
    name: what was called before stays declared.
    """
    if not tools or choice.mode == "none":
        return None
    some = choice.allowed is not None and choice.mode != "function"
    return [dict(tool) for tool in tools if not some or tool["function"]["name"] in (choice.allowed or ())] or None


def shown_tools(tools: Sequence[Mapping[str, Any]] | None, choice: ToolChoice) -> list[dict[str, Any]] | None:
    """`usable_tools` as the model reads them: ``strict`` is not for it."""
    return [{**tool, "function": {key: value for key, value in tool["function"].items() if key != "strict"}}
            for tool in usable_tools(tools, choice) or ()] or None


def calls_of(tools: Sequence[Mapping[str, Any]] | None, choice: ToolChoice, parallel: bool,
             formed: bool) -> Calls | None:
    """The calls that the answer is held to; None where it may hold none, or is left to call as it likes.

    ``tools``: normalised declarations; ``formed``: if the answer is no call it has a form. Raises `ToolsError`.
    """
    declared = {tool["function"]["name"]: tool["function"] for tool in tools or ()}
    for name in choice.allowed or ():
        if name not in declared:
            raise ToolsError(f"tool_choice names {name!r}, which is not among the tools{_listed(declared)}",
                             "tool_choice")
    required = choice.mode in ("required", "function")
    if required and not declared:
        raise ToolsError("tool_choice asks for a call, but there are no tools", "tool_choice")
    if choice.mode == "none" or not declared:
        return None
    usable = [function for name, function in declared.items() if choice.allowed is None or name in choice.allowed]
    made = tuple(CallableTool(function["name"], function.get("parameters"), bool(function.get("strict")))
                 for function in usable)
    if not (required or formed or any(tool.strict for tool in made)):
        return None
    return Calls(made, required, parallel and choice.mode != "function")


def _listed(names: Iterable[str]) -> str:
    known = ", ".join(map(repr, names))
    return f" ({known})" if known else ": there are none"
