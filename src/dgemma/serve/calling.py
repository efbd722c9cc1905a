"""What a body says of calls and thoughts, the same on every route: which tools, whether one must be called, how long
a thought may be.

Works on: JSON bodies. Knows nothing of: HTTP, the engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from dgemma.constrain.choice import ToolChoice, ToolsError, read_tool_choice, usable_tools
from dgemma.serve.bodies import Body
from dgemma.serve.errors import ApiError

Words = Literal["none", "auto", "required", "any"]

# Names of one thing; the first one that is given counts. -1 is no limit, as in llama.cpp.
_BUDGETS = ("reasoning_budget_tokens", "reasoning_budget", "thinking_budget_tokens", "thinking_token_budget",
            "thinking_budget")
_INNER_BUDGETS = ("budget_tokens", "reasoning_budget_tokens", "max_tokens")  # of thinking and reasoning


class ChosenTools(Body):
    """A function by name, or some of the tools: {"type": "function", "function": {"name"}}, {"type": "function",
    "name"}, {"type": "allowed_tools", "allowed_tools": {"mode", "tools"}}, or the same flat.
    """

    type: Literal["function", "tool", "allowed_tools", "none", "auto", "required", "any"]


def choice_of(said: Any) -> Any:
    """A body's tool_choice as `read_tool_choice` reads it."""
    return said.model_dump(exclude_unset=True) if isinstance(said, Body) else said


def told_tools(tools: Sequence[Mapping[str, Any]], said: Any) -> list[dict[str, Any]] | None:
    """The declarations, in chat's form, of the tools that the model is told of: none when it must not call any.

    Raises nothing for a choice that cannot be: whoever counts tokens does not care, and `Model.request` does.
    """
    try:
        choice = read_tool_choice(choice_of(said))
    except ToolsError:
        choice = ToolChoice()
    return usable_tools(tools, choice)


def reasoning_budget(body: Body) -> int | None:
    """The most tokens to think; None where nothing is said. Raises `ApiError`."""
    for name in _BUDGETS:
        if (value := _field(body, name)) is not None:
            return _budget(value, name)
    for outer in ("reasoning", "thinking"):
        for name in _INNER_BUDGETS:
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
    if type(value) is not int or not -1 <= value < 2**31:
        raise ApiError(400, f"{name} must be a whole number of tokens (0: no thinking, -1: no limit), got {value!r}",
                       name)
    return None if value < 0 else value
