"""What the sampler needs of whoever reads an answer's tokens as text: where it ends, and what it says.

Knows nothing of tokenizers or of the form of replies (`dgemma.chat.reply` does): what is read of a canvas is handed on
in the events as it comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


class ReadText(Protocol):
    """What an answer's tokens say."""

    @property
    def text(self) -> str: ...

    @property
    def reasoning(self) -> str | None: ...

    @property
    def tool_calls(self) -> list[dict[str, Any]]: ...


class TextReader(Protocol):
    """Reads one answer, each token once."""

    @property
    def stop_place(self) -> int | None:
        """How many of the tokens fed it took to complete the first stop string; None when none was met."""
        ...

    def feed(self, token_ids: Sequence[int]) -> Sequence[object]:
        """What is sure after a committed canvas' tokens, which come without the stop token."""
        ...

    def finish(self) -> ReadText:
        """What was said in all, now that nothing follows; called once."""
        ...


@dataclass
class NoReader:
    """Reads nothing, where only tokens are wanted: an answer without text, which no stop string ends."""

    text: str = ""
    reasoning: str | None = None
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    stop_place: int | None = None

    def feed(self, token_ids: Sequence[int]) -> Sequence[object]:
        return ()

    def finish(self) -> NoReader:
        return self
