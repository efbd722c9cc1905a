"""A whole answer's tokens read: what the model thought, what it said, which tools it called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dgemma.chat.reply import DeclaredTools, Piece, ReplyReader, Said, Thought
from dgemma.chat.tokenizer import Tokenizer
from dgemma.chat.tools import Called


@dataclass(frozen=True)
class Answer:
    """``text`` is what a user reads; ``reasoning`` is None when there was none."""

    text: str
    reasoning: str | None
    tool_calls: list[dict[str, Any]]  # {"name": str, "arguments": dict} each
    stopped: str | None = None  # the stop string that it ended before


class AnswerReader:
    """Reads an answer's tokens as they are committed: `feed` each canvas, then `finish`, once."""

    def __init__(self, tokenizer: Tokenizer, prompt_ids: list[int], tools: DeclaredTools | None = None,
                 stop: Sequence[str] = (), form: bool = False, held: bool = False):
        """The arguments are those of `ReplyReader`."""
        self._reader = ReplyReader(tokenizer, prompt_ids, tools, stop, form, held)
        self._pieces: list[Piece] = []

    @property
    def stop_place(self) -> int | None:
        """How many of the tokens it took to complete the first stop string; None when none was met."""
        return self._reader.stop_place

    def feed(self, token_ids: Sequence[int]) -> None:
        """A canvas' tokens, without the stop token."""
        self._pieces += self._reader.feed(token_ids)

    def finish(self) -> Answer:
        """All of it, now that nothing follows."""
        pieces = [*self._pieces, *self._reader.finish()]
        return Answer(
            "".join(piece.text for piece in pieces if isinstance(piece, Said)),
            "".join(piece.text for piece in pieces if isinstance(piece, Thought)) or None,
            [{"name": piece.name, "arguments": piece.arguments} for piece in pieces if isinstance(piece, Called)],
            self._reader.stopped)


def read_answer(tokenizer: Tokenizer, prompt_ids: list[int], token_ids: list[int],
                tools: DeclaredTools | None = None, stop: Sequence[str] = (), form: bool = False,
                held: bool = False) -> Answer:
    """Read all of an answer's tokens (without the stop token); the arguments are those of `ReplyReader`."""
    reader = AnswerReader(tokenizer, prompt_ids, tools, stop, form, held)
    reader.feed(token_ids)
    return reader.finish()
