"""An answer's tokens read: what the model thought, what it said, which tools it called.

Works on token ids, where a control token and the same characters typed as text are different things.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

from dgemma.chat.thoughts import CLOSE, OPEN, ThoughtParser
from dgemma.chat.tokenizer import Tokenizer
from dgemma.chat.tools import parse_tool_calls

_MARKERS = (OPEN, CLOSE, "<|tool_call>", "<tool_call|>", '<|"|>')
_PRIVATE = range(0xE000, 0xF8FF)


@dataclass(frozen=True)
class Answer:
    """``text`` is what a user reads; ``reasoning`` is None when there was none."""

    text: str
    reasoning: str | None
    tool_calls: list[dict[str, Any]]


def read_answer(tokenizer: Tokenizer, prompt_ids: list[int], token_ids: list[int]) -> Answer:
    """Read an answer's tokens (without the stop token); the prompt tells whether a thought was already open."""
    markers = {tokenizer.token_to_id(marker): marker for marker in _MARKERS}
    runs = [(special, list(ids)) for special, ids in groupby(token_ids, tokenizer.is_special)]
    plain = "".join(tokenizer.decode(ids) for special, ids in runs if not special)
    # Every mark begins with "<". A private character behind each "<" of ordinary text keeps it from reading as one.
    guard = next(chr(code) for code in _PRIVATE if chr(code) not in plain)
    raw = ""
    for special, ids in runs:
        if special:  # fill and the like mean nothing here
            raw += "".join(markers.get(token, "") for token in ids)
        else:
            raw += tokenizer.decode(ids).replace("<", f"<{guard}")
    parser = ThoughtParser(_inside_thought(tokenizer, prompt_ids), stops=())
    pieces = [*parser.feed(raw), *parser.finish()]
    reasoning = "".join(piece.text for piece in pieces if piece.kind == "reasoning")
    text, calls = parse_tool_calls("".join(piece.text for piece in pieces if piece.kind == "text"))
    return Answer(text.replace(guard, ""), reasoning.replace(guard, "") or None, _without(calls, guard))


def _inside_thought(tokenizer: Tokenizer, prompt_ids: list[int]) -> bool:
    """Whether the prompt leaves a thought open for the model to go on with (some templates do)."""
    opened, closed = tokenizer.token_to_id(OPEN), tokenizer.token_to_id(CLOSE)
    last = next((token for token in reversed(prompt_ids) if token in (opened, closed)), None)
    return last is not None and last == opened


def _without(value: Any, guard: str) -> Any:
    if isinstance(value, str):
        return value.replace(guard, "")
    if isinstance(value, list):
        return [_without(item, guard) for item in value]
    if isinstance(value, dict):
        return {key.replace(guard, ""): _without(item, guard) for key, item in value.items()}
    return value
