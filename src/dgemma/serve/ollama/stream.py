"""An answer as Ollama's lines of JSON (NDJSON), each a piece of it, or as one line that is all of it.

Works on: the pieces of `deltas`. Knows nothing of: HTTP, requests.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

from dgemma.chat.reply import Thought
from dgemma.serve.deltas import Delta, Done, Text, ToolCall, put_together
from dgemma.serve.errors import to_json
from dgemma.serve.respond import Made, Rendering
from dgemma.serve.usage import request_usage


class Lines(Rendering):
    """An answer of /api/chat, or else of /api/generate."""

    media_type = "application/x-ndjson"
    ping = None

    def __init__(self, model: str, chat: bool):
        self._model, self._chat, self._began = model, chat, time.perf_counter()

    def encode(self, made: Made) -> bytes:
        return to_json(made) + b"\n"

    def feed(self, index: int, delta: Delta) -> Iterator[Made]:
        if isinstance(delta, Done):
            yield self._line() | self._end(delta)
        elif isinstance(delta, Text):
            yield self._line(delta.text, logprobs=delta.logprobs)
        elif isinstance(delta, Thought):
            yield self._line(thinking=delta.text)
        elif isinstance(delta, ToolCall):
            yield self._line(calls=[delta])

    def whole(self, answers: Sequence[Sequence[Delta]]) -> Made:
        answer = put_together(answers[0])
        return self._line(answer.text, answer.reasoning, answer.tool_calls, answer.logprobs) | self._end(answer.done)

    def nothing(self, reason: str) -> Made:
        """The answer to no prompt."""
        return self._line() | {"done": True, "done_reason": reason}

    def _line(self, text: str = "", thinking: str = "", calls: Sequence[ToolCall] = (),
              logprobs: list[dict[str, Any]] | None = None) -> Made:
        thought = {"thinking": thinking} if thinking else {}
        if self._chat:
            said: dict[str, Any] = {"message": {"role": "assistant", "content": text, **thought}}
            if calls:
                said["message"]["tool_calls"] = [{"id": call.id, "function": {
                    "index": call.index, "name": call.name, "arguments": json.loads(call.arguments)}} for call in calls]
        else:
            said = {"response": text, **thought}
        return {"model": self._model, "created_at": timestamp(), **said, "done": False,
                **({} if logprobs is None else {"logprobs": logprobs})}

    def _end(self, done: Done) -> Made:
        total, used = time.perf_counter() - self._began, request_usage.get()
        read = total if used is None or used.opened is None else min(used.opened, total)
        return {"done": True, "done_reason": "length" if done.finish_reason == "length" else "stop",
                "total_duration": _nanoseconds(total), "load_duration": 0,
                "prompt_eval_count": done.usage.prompt_tokens, "prompt_eval_duration": _nanoseconds(read),
                "eval_count": done.usage.completion_tokens, "eval_duration": _nanoseconds(total - read)}


def timestamp() -> str:
    """Now, as this API writes it."""
    return datetime.datetime.now(datetime.UTC).isoformat().replace("+00:00", "Z")


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)
