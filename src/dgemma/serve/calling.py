"""What a body says of calls and thoughts, the same on every route: which tools, whether one must be called, how long
a thought may be.

Works on: JSON bodies. Knows nothing of: HTTP, the engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from dgemma.constrain.choice import ToolChoice, ToolsError, read_tool_choice, shown_tools
from dgemma.serve.bodies import Body
from dgemma.serve.errors import ApiError

Words = Literal["none", "auto", "required", "any"]

# Names of one thing; the first one that is given counts. -1 is no limit, as in llama.cpp.
BUDGETS = ("reasoning_budget_tokens", "reasoning_budget", "thinking_budget_tokens", "thinking_token_budget",
            "thinking_budget")
_INNER_BUDGETS = ("budget_tokens", "max_tokens")  # of thinking and reasoning


class ChosenTools(Body):
    """A function by name, or some of the tools: {"type": "function", "function": {"name"}}, {"type": "function",
    "name"}, {"type": "tool", "name"}, {"type": "allowed_tools", "allowed_tools": {"mode", "tools"}}, or the same flat.
    """

    type: Literal["function", "tool", "allowed_tools", "none", "auto", "required", "any"]
    disable_parallel_tool_use: bool | None = None


def told_tools(tools: Sequence[Mapping[str, Any]] | None, said: Any) -> list[dict[str, Any]] | None:
    """Of declarations those that the model is told of, for whoever only counts a prompt's tokens.

    Raises nothing for a choice that cannot be: `Model.request` does.
    """
    try:
        choice = read_tool_choice(said)
    except ToolsError:
        choice = ToolChoice()
    return shown_tools(tools, choice)


def reasoning_budget(body: Body) -> int | None:
    """The most tokens to think; None where nothing is said. Raises `ApiError`."""
    for name in BUDGETS:
        if (value := _field(body, name)) is not None:
            return _budget(value, name)
    for outer in ("reasoning", "thinking", "chat_template_kwargs"):
        for name in (*_INNER_BUDGETS, *BUDGETS):
            if (value := _field(_field(body, outer), name)) is not None:
                return _budget(value, f"{outer}.{name}")
    return None


def _field(said: Any, name: str) -> Any:
    if isinstance(said, Body):
        return getattr(said, name, None)  # what no field is declared for is kept, too
    return said.get(name) if isinstance(said, Mapping) else None


def _budget(value: Any, name: str) -> int | None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int or value < -1:
        raise ApiError(400, f"{name} must be a whole number of tokens (0: no thinking, -1: no limit), got {value!r}",
                       name)
    return None if value < 0 else value
