"""An answer as the output items of OpenAI's Responses API, whole or as the events of a stream.

Works on: the pieces of `deltas`. Knows nothing of: HTTP, requests.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from typing import Any

from dgemma.chat.reply import Thought
from dgemma.serve.deltas import BrokenAnswerError, CutAnswerError, Delta, Done, Text, ToolCall
from dgemma.serve.respond import Made, Rendering

# What an item that grows holds, and the start of the names of the events that grow it.
_PARTS = {"reasoning": "reasoning_text", "message": "output_text"}


class ResponseRendering(Rendering):
    """One answer while it is made: `feed` takes its pieces and returns events, ``made`` is what they add up to.

    ``echo``: fields of the response that repeat what was asked for.
    """

    def __init__(self, echo: dict[str, Any]):
        self.made: dict[str, Any] = {
            "id": f"resp_{secrets.token_hex(16)}", "object": "response", "created_at": int(time.time()),
            "status": "in_progress", "error": None, "incomplete_details": None, **echo, "output": [], "usage": None}
        self._open: str | None = None  # the kind of the item that still grows
        self._sequence = 0

    def start(self) -> Iterator[Made]:
        for name in ("created", "in_progress"):
            yield self._event(f"response.{name}", response={**self.made, "output": []})

    def broken(self, error: BrokenAnswerError | CutAnswerError) -> Iterator[Made]:
        yield from self._close("incomplete")
        yield from self._finish("failed", error={"code": "server_error", "message": str(error)})

    def feed(self, index: int, delta: Delta) -> Iterator[Made]:
        if isinstance(delta, Thought):
            yield from self._grow("reasoning", delta.text, None)
        elif isinstance(delta, Text):
            yield from self._grow("message", delta.text, delta.logprobs)
        elif isinstance(delta, ToolCall):
            yield from self._close()
            yield from self._call(delta)
        elif isinstance(delta, Done):
            yield from self._end(delta)

    def _grow(self, kind: str, text: str, logprobs: list[dict[str, Any]] | None) -> Iterator[Made]:
        if self._open != kind:
            yield from self._close()
            yield from self._begin(kind)
        part = self._item["content"][0]
        part["text"] += text
        extra = {}
        if kind == "message":
            extra["logprobs"] = logprobs or []
            part["logprobs"] += extra["logprobs"]
        yield self._event(f"response.{_PARTS[kind]}.delta", **self._place, content_index=0, delta=text, **extra)

    def _begin(self, kind: str) -> Iterator[Made]:
        self._open = kind
        if kind == "message":
            item = {"id": f"msg_{secrets.token_hex(16)}", "type": kind, "role": "assistant", "status": "in_progress"}
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        else:
            item = {"id": f"rs_{secrets.token_hex(16)}", "type": kind, "summary": [], "status": "in_progress"}
            part = {"type": "reasoning_text", "text": ""}
        self.made["output"].append({**item, "content": [part]})
        yield self._event("response.output_item.added", output_index=self._place["output_index"],
                          item={**item, "content": []})
        yield self._event("response.content_part.added", **self._place, content_index=0, part=_copied(part))

    def _close(self, status: str = "completed") -> Iterator[Made]:
        if self._open is None:
            return
        part = self._item["content"][0]
        told = {key: part[key] for key in ("text", "logprobs") if key in part}
        yield self._event(f"response.{_PARTS[self._open]}.done", **self._place, content_index=0, **told)
        yield self._event("response.content_part.done", **self._place, content_index=0, part=part)
        self._open = None
        yield self._finished_item(status)

    def _call(self, call: ToolCall) -> Iterator[Made]:
        item = {"id": f"fc_{secrets.token_hex(16)}", "type": "function_call", "call_id": call.id, "name": call.name,
                "arguments": "", "status": "in_progress"}
        self.made["output"].append(item)
        yield self._event("response.output_item.added", output_index=self._place["output_index"], item=dict(item))
        item["arguments"] = call.arguments
        yield self._event("response.function_call_arguments.delta", **self._place, delta=call.arguments)
        yield self._event("response.function_call_arguments.done", **self._place, name=call.name,
                          arguments=call.arguments)
        yield self._finished_item("completed")

    def _finished_item(self, status: str) -> Made:
        self._item["status"] = status
        return self._event("response.output_item.done", output_index=self._place["output_index"], item=self._item)

    def _end(self, done: Done) -> Iterator[Made]:
        if not any(item["type"] != "reasoning" for item in self.made["output"]):
            yield from self._close()
            yield from self._begin("message")  # clients read a message, be it empty
        whole = done.finish_reason != "length"
        yield from self._close("completed" if whole else "incomplete")
        usage = done.usage
        self.made["usage"] = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens}
        if whole:
            yield from self._finish("completed", completed_at=int(time.time()))
        else:
            yield from self._finish("incomplete", incomplete_details={"reason": "max_output_tokens"})

    def _finish(self, status: str, **changes: Any) -> Iterator[Made]:
        self.made |= {"status": status, **changes}
        yield self._event(f"response.{status}", response=self.made)

    @property
    def _item(self) -> dict[str, Any]:
        return self.made["output"][-1]

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item["id"], "output_index": len(self.made["output"]) - 1}

    def _event(self, kind: str, **fields: Any) -> Made:
        self._sequence += 1
        return {"type": kind, "sequence_number": self._sequence - 1, **fields}


def _copied(part: dict[str, Any]) -> dict[str, Any]:
    """The part as it is now: what it holds goes on growing."""
    return {key: list(value) if isinstance(value, list) else value for key, value in part.items()}
