"""A turn in which a model may call tools: it speaks, calls, reads what came of it, and speaks again.

Works on: messages, the events of an answer, a `Toolbox`. Knows nothing of: terminals, pages, where the model is. What
happens comes as events, which a terminal and a page both can show; whether a call may run is asked of a function.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from dgemma.diffusion.events import Event, Finished, Generation
from dgemma.errors import DgemmaError
from dgemma.tools.sandbox import clipped
from dgemma.tools.tool import Toolbox, ToolError, ToolResult

ROUNDS = 8  # model turns with calls; then it must answer with what it has
_MOST_TEXT = 20_000  # characters of a result that the model reads
NOT_ALLOWED = "The user did not allow this call."
STOPPED = "The user stopped this call."


@dataclass(frozen=True)
class Call:
    """A call that the model made, mended if need be (`dgemma.chat.repair`)."""

    id: str
    name: str
    arguments: Any


@dataclass(frozen=True)
class CallProposed:
    """The model wants this. ``fault``: why it cannot be run (the model is told)."""

    call: Call
    fault: str | None = None


@dataclass(frozen=True)
class ApprovalNeeded:
    """The user is asked now whether it may run."""

    call: Call


@dataclass(frozen=True)
class CallRunning:
    call: Call


@dataclass(frozen=True)
class CallOutput:
    """Something that a running call printed."""

    call: Call
    text: str


@dataclass(frozen=True)
class CallReturned:
    """A call is over: run, failed, or not allowed."""

    call: Call
    result: ToolResult


@dataclass(frozen=True)
class MessageAdded:
    """The conversation has one message more: what the model said and called, or what came of a call."""

    message: dict[str, Any]


@dataclass(frozen=True)
class TurnEnded:
    """The model has answered. ``why``: its last answer's finish reason, or "rounds" where it had no calls left."""

    generation: Generation
    why: Literal["stop", "length", "cancelled", "rounds"]


ToolEvent = CallProposed | ApprovalNeeded | CallRunning | CallOutput | CallReturned | MessageAdded | TurnEnded
Decision = Literal["yes", "no", "always"]
Approve = Callable[[Call], Awaitable[Decision]]


class Speaker(Protocol):
    """A model as the loop sees it: the events of its answer, `Finished` the last of them."""

    def stream(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> AsyncGenerator[Event, None]: ...


async def take_turn(speaker: Speaker, messages: Sequence[Mapping[str, Any]], toolbox: Toolbox, approve: Approve, *,
                    rounds: int = ROUNDS) -> AsyncGenerator[Event | ToolEvent, None]:
    """Answer the last of ``messages``, with as many as ``rounds`` rounds of calls, as events.

    Closing or cancelling it ends the running call. Every call is answered by a tool's message; where it is left early,
    `with_answers` does that for those which were not. Raises DgemmaError when the model cannot answer.
    """
    said = [dict(message) for message in messages]
    for turn in range(rounds + 1):
        declared = toolbox.declarations() if turn < rounds else []
        generation = None
        async with aclosing(speaker.stream(said, declared)) as events:
            async for event in events:
                yield event
                if isinstance(event, Finished):
                    generation = event.generation
        if generation is None:
            raise DgemmaError("the model stopped without finishing its answer")
        calls = [Call(f"call_{secrets.token_hex(6)}", call["name"], call["arguments"])
                 for call in (generation.tool_calls if declared else ())]
        if generation.finish_reason == "cancelled":
            calls = []  # whoever stops the model does not want what it was about to do
        said.append(_spoken(generation, calls))
        yield MessageAdded(said[-1])
        if not calls:
            yield TurnEnded(generation, "rounds" if turn == rounds > 0 else generation.finish_reason)
            return
        for call in calls:
            result = None
            async with aclosing(_handled(call, toolbox, approve)) as happening:
                async for event in happening:
                    yield event
                    if isinstance(event, CallReturned):
                        result = event.result
            assert result is not None
            said.append(_answer(call, result.text))
            yield MessageAdded(said[-1])


async def _handled(call: Call, toolbox: Toolbox, approve: Approve) -> AsyncGenerator[ToolEvent, None]:
    """One call: checked, allowed, run. `CallReturned` comes last."""
    fault = toolbox.fault(call.name, call.arguments)
    yield CallProposed(call, fault)
    if fault is not None:
        yield CallReturned(call, ToolResult(f"Error: {fault}", failed=True))
        return
    if toolbox.approval(call.name) == "ask":
        yield ApprovalNeeded(call)
        decision = await approve(call)
        if decision == "always":
            toolbox.decide(call.name, "auto")
        if decision not in ("yes", "always"):
            yield CallReturned(call, ToolResult(NOT_ALLOWED, failed=True))
            return
    yield CallRunning(call)
    printed: asyncio.Queue[str | None] = asyncio.Queue()
    running = asyncio.ensure_future(_run(call, toolbox, printed.put_nowait))
    running.add_done_callback(lambda _: printed.put_nowait(None))
    try:
        while (text := await printed.get()) is not None:
            yield CallOutput(call, text)
        result = running.result()
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
    yield CallReturned(call, result)


async def _run(call: Call, toolbox: Toolbox, say: Callable[[str], None]) -> ToolResult:
    """What a tool gives; whatever goes wrong in it is a result, too."""
    try:
        result = await toolbox.tools[call.name].run(dict(call.arguments), say)
    except ToolError as error:
        return ToolResult(f"Error: {error}", failed=True)
    except Exception as error:  # it is somebody else's program, which may fail in any way
        return ToolResult(f"Error: the tool failed ({type(error).__name__}: {error})", failed=True)
    return ToolResult(clipped(result.text, _MOST_TEXT), result.files, result.sources, result.failed)


def _spoken(generation: Generation, calls: Sequence[Call]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": generation.text}
    if generation.reasoning:
        message["reasoning"] = generation.reasoning
    if calls:
        message["tool_calls"] = [{"id": call.id, "type": "function",
                                  "function": {"name": call.name, "arguments": call.arguments}} for call in calls]
    return message


def _answer(call: Call, text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": text}


def with_answers(messages: Sequence[dict[str, Any]], text: str = STOPPED) -> list[dict[str, Any]]:
    """A conversation in which every call of the last turn has an answer, ``text`` where it had none."""
    answered = {message.get("tool_call_id") for message in messages if message["role"] == "tool"}
    last = next((message for message in reversed(messages) if message["role"] == "assistant"), {})
    missing = [Call(call["id"], call["function"]["name"], None) for call in last.get("tool_calls", ())
               if call["id"] not in answered]
    return [*messages, *(_answer(call, text) for call in missing)]
