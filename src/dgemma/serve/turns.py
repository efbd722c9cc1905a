"""Building a conversation out of a format's smaller pieces, for formats that do not send whole messages.

Knows nothing of: bodies, templates.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def stray_result(content: str | dict[str, str], name: str | None = None) -> str:
    """A tool's answer as the user might tell it.

    Its call was trimmed from the conversation, and templates drop an answer that follows no call.
    """
    text = content if isinstance(content, str) else "\n".join(f"{key}: {value}" for key, value in content.items())
    return f"Result of {name or 'a tool'}, which was called earlier:\n{text}"


class Turns:
    """A conversation while it is put together; ``messages`` are as `dgemma.chat` reads them.

    What one role adds in a row is one message.
    """

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self._calls: set[str] = set()  # ids of tool calls

    def say(self, role: str, texts: Iterable[str] = ()) -> dict[str, Any]:
        """Adds text to the last message if it is this role's, to a new one if not; returns the message."""
        if not self.messages or self.messages[-1]["role"] != role:
            self.messages.append({"role": role, "content": []})
        self.messages[-1]["content"] += [{"type": "text", "text": text} for text in texts]
        return self.messages[-1]

    def think(self, text: str) -> None:
        """Adds a thought to the assistant's present message."""
        message = self.say("assistant")
        message["reasoning"] = "\n\n".join(filter(None, [message.get("reasoning"), text]))

    def call(self, call_id: str, name: str, arguments: dict[str, Any]) -> None:
        """Adds a tool call to the assistant's present message."""
        calls = self.say("assistant").setdefault("tool_calls", [])
        calls.append({"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}})
        self._calls.add(call_id)

    def answer(self, call_id: str, content: str | dict[str, str]) -> None:
        """Adds a tool's answer; as something that the user says when no call before it has that id."""
        if call_id in self._calls:
            self.messages.append({"role": "tool", "tool_call_id": call_id, "content": content})
        else:
            self.say("user", [stray_result(content)])
