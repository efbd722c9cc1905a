"""An answer as Anthropic's content blocks, whole or as the events of a stream.

Works on: the pieces of `deltas`. Knows nothing of: HTTP, requests.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from typing import Any

from dgemma.chat.reply import Thought
from dgemma.serve.deltas import Delta, Done, Text, ToolCall
from dgemma.serve.respond import Made, Rendering

# The field that a block's text stands in, and the kind of delta that adds to it.
_GROWING = {"text": ("text", "text_delta"), "thinking": ("thinking", "thinking_delta")}


class MessageRendering(Rendering):
    """One answer while it is made: `feed` takes its pieces and returns events, ``made`` is what they add up to.

    ``max_tokens`` tells an answer that ended there from one that filled the model's context. Without ``thoughts``
    they are left out: their blocks come empty.
    """

    ping = b'event: ping\ndata: {"type":"ping"}\n\n'

    def __init__(self, model: str, prompt_tokens: int, max_tokens: int, thoughts: bool = True):
        self.max_tokens, self.thoughts = max_tokens, thoughts
        self.made: dict[str, Any] = {
            "id": f"msg_{secrets.token_hex(12)}", "type": "message", "role": "assistant", "model": model,
            "content": [], "stop_reason": None, "stop_sequence": None,
            "usage": {"input_tokens": prompt_tokens, "cache_read_input_tokens": 0, "cache_creation_input_tokens": 0,
                      "output_tokens": 0}}
        self._open: str | None = None  # the kind of the block that still grows

    def start(self) -> Iterator[Made]:
        yield {"type": "message_start", "message": {**self.made, "content": []}}

    def feed(self, index: int, delta: Delta) -> Iterator[Made]:
        if isinstance(delta, Thought):
            yield from self._grow("thinking", delta.text if self.thoughts else "")
        elif isinstance(delta, Text):
            yield from self._grow("text", delta.text)
        elif isinstance(delta, ToolCall):
            yield from self._call(delta)
        elif isinstance(delta, Done):
            yield from self._close()
            yield from self._end(delta)

    def _grow(self, kind: str, text: str) -> Iterator[Made]:
        field, delta = _GROWING[kind]
        if self._open != kind:
            yield from self._close()
            empty = {"type": kind, field: ""} | ({"signature": ""} if kind == "thinking" else {})
            yield self._begin(empty)
            self._open = kind
        if text:
            self.made["content"][-1][field] += text
            yield {"type": "content_block_delta", "index": self._index, "delta": {"type": delta, field: text}}

    def _call(self, call: ToolCall) -> Iterator[Made]:
        yield from self._close()
        yield self._begin({"type": "tool_use", "id": f"toolu_{call.id.removeprefix('call_')}", "name": call.name,
                           "input": {}})
        self.made["content"][-1]["input"] = json.loads(call.arguments)
        yield {"type": "content_block_delta", "index": self._index,
               "delta": {"type": "input_json_delta", "partial_json": call.arguments}}
        yield self._stop()

    def _end(self, done: Done) -> Iterator[Made]:
        usage = done.usage
        self.made["stop_reason"] = self._stop_reason(done)
        self.made["stop_sequence"] = done.stop_sequence
        # Anthropic counts what was read from the cache by itself, not among input_tokens.
        self.made["usage"] = {
            "input_tokens": usage.prompt_tokens - usage.cached_tokens, "cache_read_input_tokens": usage.cached_tokens,
            "cache_creation_input_tokens": 0, "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens}}
        yield {"type": "message_delta", "usage": self.made["usage"],
               "delta": {key: self.made[key] for key in ("stop_reason", "stop_sequence")}}
        yield {"type": "message_stop"}

    def _stop_reason(self, done: Done) -> str:
        if done.stop_sequence is not None:
            return "stop_sequence"
        if done.finish_reason == "length":
            full = done.usage.completion_tokens >= self.max_tokens
            return "max_tokens" if full else "model_context_window_exceeded"
        return {"stop": "end_turn", "tool_calls": "tool_use"}[done.finish_reason]

    @property
    def _index(self) -> int:
        return len(self.made["content"]) - 1

    def _begin(self, block: dict[str, Any]) -> Made:
        self.made["content"].append(dict(block))
        return {"type": "content_block_start", "index": self._index, "content_block": block}

    def _close(self) -> Iterator[Made]:
        if self._open is not None:
            self._open = None
            yield self._stop()

    def _stop(self) -> Made:
        return {"type": "content_block_stop", "index": self._index}
