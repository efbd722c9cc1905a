"""Building a conversation out of a format's smaller pieces, for formats that do not send whole messages.

Knows nothing of: bodies, templates.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class Turns:
    """A conversation while it is put together; ``messages`` are as `dgemma.chat` reads them.

    What one role adds in a row is one message.
    """

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []

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

    def call(self, call_id: str, name: str, arguments: Any) -> None:
        """Adds a tool call to the assistant's present message; the arguments may be broken."""
        calls = self.say("assistant").setdefault("tool_calls", [])
        calls.append({"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}})

    def answer(self, call_id: str, content: str | dict[str, str]) -> None:
        """Adds a tool's answer; its call may have been trimmed from the conversation."""
        self.messages.append({"role": "tool", "tool_call_id": call_id, "content": content})
