"""A whole answer's tokens read: what the model thought, what it said, which tools it called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dgemma.chat.reply import ReplyReader, Said, Thought
from dgemma.chat.tokenizer import Tokenizer
from dgemma.chat.tools import Called


@dataclass(frozen=True)
class Answer:
    """``text`` is what a user reads; ``reasoning`` is None when there was none."""

    text: str
    reasoning: str | None
    tool_calls: list[dict[str, Any]]  # {"name": str, "arguments": dict} each
    stopped: str | None = None  # the stop string that it ended before


def read_answer(tokenizer: Tokenizer, prompt_ids: list[int], token_ids: list[int],
                tools: Sequence[str] | None = None, stop: Sequence[str] = (),
                held: bool = False) -> Answer:
    """Read an answer's tokens (without the stop token); the arguments are those of `ReplyReader`."""
    reader = ReplyReader(tokenizer, prompt_ids, tools, stop, held)
    pieces = [*reader.feed(token_ids), *reader.finish()]
    return Answer(
        "".join(piece.text for piece in pieces if isinstance(piece, Said)),
        "".join(piece.text for piece in pieces if isinstance(piece, Thought)) or None,
        [{"name": piece.name, "arguments": piece.arguments} for piece in pieces if isinstance(piece, Called)],
        reader.stopped,
    )
