"""A turn with tools as messages of a conversation: what the model says, each call with what came of it.

It goes on here, on the server, whoever looks at it: a page that is reloaded finds a call that waits for an approval by
its message. Works on: the loop of `dgemma.tools`, a store. Knows nothing of: pages, how an answer is made.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, replace
from typing import Any, Literal

from dgemma.diffusion.events import Event, Finished
from dgemma.errors import DgemmaError
from dgemma.studio.media import MediaFolder, Part
from dgemma.studio.news import Watched
from dgemma.studio.store import Message, Status, Store
from dgemma.tools.loop import (
    NOT_ALLOWED,
    STOPPED,
    ApprovalNeeded,
    Call,
    CallOutput,
    CallProposed,
    CallReturned,
    CallRunning,
    Decision,
    MessageAdded,
    take_turn,
)
from dgemma.tools.sandbox import Clipped
from dgemma.tools.tool import Say, Tool, Toolbox, ToolResult

_MOST_OUTPUT = 16_000  # characters that are kept of what a call prints while it runs

# Has the model answer messages, behind a message of the store: the new message's id, and the answer; None if it failed.
Speak = Callable[[str, list[dict[str, Any]], list[dict[str, Any]]], Awaitable[tuple[str, Finished | None]]]


class CallInHand(Watched):
    """A call that is being made: it waits for an approval, runs, or is over. ``id``: its message's."""

    def __init__(self, id: str):
        super().__init__()
        self.id = id
        self.state: Literal["waiting", "running", "over"] = "running"
        self.files: list[Part] = []
        self.lost: list[str] = []  # what is said of files that could not be kept
        self._printed = Clipped(_MOST_OUTPUT)
        self._decided: asyncio.Future[Decision] = asyncio.get_running_loop().create_future()
        self._task: asyncio.Task[ToolResult] | None = None

    @property
    def output(self) -> str:
        """What it printed, so far."""
        return self._printed.text()

    def decide(self, decision: Decision) -> None:
        """Say whether it may run; what is said first, holds."""
        if not self._decided.done():
            self._decided.set_result(decision)

    def stop(self) -> None:
        """End the call alone: the model is told, and goes on."""
        if self._task is not None:
            self._task.cancel()

    async def decision(self) -> Decision:
        return await self._decided

    async def run(self, work: Awaitable[ToolResult]) -> ToolResult:
        """Run the tool as something that `stop` ends."""
        self._task = asyncio.ensure_future(work)
        try:
            await asyncio.wait({self._task})
        except asyncio.CancelledError:  # the turn is stopped
            self._task.cancel()
            await asyncio.wait({self._task})
            raise
        return ToolResult(STOPPED, failed=True) if self._task.cancelled() else self._task.result()

    def become(self, state: Literal["waiting", "running", "over"]) -> None:
        self.state = state
        self._tell()

    def printed(self, text: str) -> None:
        self._printed.add(text)
        self._tell()


class Turn:
    """One turn: `run` it, or cancel that. ``calls`` are those in hand, by their messages."""

    def __init__(self, store: Store, question: Message, messages: Sequence[Mapping[str, Any]], toolbox: Toolbox,
                 speak: Speak, calls: dict[str, CallInHand], changed: Callable[[], None],
                 always: Callable[[str], None]):
        """``changed`` is told of every message that came or changed, ``always`` of a tool that needs no question."""
        self._store, self._question, self._messages, self._speak = store, question, list(messages), speak
        self._toolbox = Toolbox([replace(tool, run=self._in_hand(tool)) for tool in toolbox.tools.values()],
                                {name: toolbox.approval(name) for name in toolbox.tools})
        self._calls, self._changed, self._always = calls, changed, always
        self._head = question.id  # the last message, behind which the next one goes
        self._spoken = ""  # the model's last message
        self._names: dict[str, str] = {}  # the loop's id of a call -> the store's
        self._now: CallInHand | None = None

    async def run(self) -> None:
        """All of it. Raises DgemmaError when the conversation is gone; what else goes wrong, the messages say."""
        try:
            async with aclosing(take_turn(self, self._messages, self._toolbox, self._approve)) as events:
                async for event in events:
                    self._apply(event)
        except _SilentError:
            return
        finally:
            if self._now is not None:
                self._return(self._now, ToolResult(STOPPED, failed=True), "stopped")

    async def stream(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> AsyncGenerator[Event, None]:
        """The model's next answer, as the loop wants it."""
        self._spoken, finished = await self._speak(self._head, messages, tools)
        self._head = self._spoken
        if finished is None:
            raise _SilentError
        yield finished

    def _apply(self, event: Any) -> None:
        if isinstance(event, MessageAdded):
            self._names |= {call["id"]: f"{self._spoken}-{number}"
                            for number, call in enumerate(event.message.get("tool_calls", ()))}
        elif isinstance(event, CallProposed):
            self._begin(event)
        elif self._now is None:
            return
        elif isinstance(event, ApprovalNeeded):
            self._now.become("waiting")
        elif isinstance(event, CallRunning):
            self._now.become("running")
        elif isinstance(event, CallOutput):
            self._now.printed(event.text)
        elif isinstance(event, CallReturned):
            self._return(self._now, event.result, "failed" if event.result.failed else "done")

    def _begin(self, proposed: CallProposed) -> None:
        call = proposed.call
        info = {"name": call.name, "tool_call_id": self._names[call.id], "arguments": call.arguments}
        message = self._store.add_message(
            self._question.conversation, "tool", "", parent=self._head, status="running",
            info=info | ({"fault": proposed.fault} if proposed.fault else {}))
        self._head = message.id
        self._now = self._calls[message.id] = CallInHand(message.id)
        self._changed()

    async def _approve(self, call: Call) -> Decision:
        assert self._now is not None
        decision = await self._now.decision()
        if decision == "always":
            self._always(call.name)
        return decision

    def _in_hand(self, tool: Tool) -> Callable[[dict[str, Any], Say], Awaitable[ToolResult]]:
        async def run(arguments: dict[str, Any], say: Say) -> ToolResult:
            call = self._now
            assert call is not None
            result = await call.run(tool.run(arguments, say))
            call.files, call.lost = await asyncio.to_thread(_kept, self._store.media, result.files)
            return result

        return run

    def _return(self, call: CallInHand, result: ToolResult, status: Status) -> None:
        """Write down what came of a call."""
        self._now = None
        if (message := self._store.message(call.id)) is not None:
            more = {"files": call.files, "lost": call.lost, "sources": [asdict(source) for source in result.sources]}
            if result.text in (STOPPED, NOT_ALLOWED):
                status = "stopped"
            self._store.change_message(call.id, content=result.text, status=status, info={
                **message.info, **{name: value for name, value in more.items() if value}})
        call.become("over")
        del self._calls[call.id]
        self._changed()


class _SilentError(Exception):
    """The model's answer was stopped, or failed: its message says so."""


def _kept(folder: MediaFolder, files: Mapping[str, bytes]) -> tuple[list[Part], list[str]]:
    """Files that a tool made as they are kept, and what is said of those which cannot be."""
    kept, lost = [], []
    for name, data in files.items():
        try:
            kept.append(folder.put_made(data, name))
        except DgemmaError as error:
            lost.append(str(error))
    return kept, lost
