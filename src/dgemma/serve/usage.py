"""What one HTTP request has used: filled in wherever that shows, read when the request is over."""

from __future__ import annotations

import contextvars
from dataclasses import dataclass, field
from typing import Any


@dataclass
class RequestUsage:
    """What one HTTP request has used so far. Times are seconds since the first of its answers was asked for."""

    preparing: float = 0.0  # until its prompts were read and the forms of its answers worked out
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of these
    answer_tokens: int = 0
    steps: int = 0  # denoising steps of all its canvases
    opened: float | None = None  # until its first canvas was opened: it has waited, and its prompt was read
    spoke: float | None = None  # until its first canvas was committed
    seconds: float = 0.0  # until its last answer was over
    calls: int = 0  # of tools
    repaired_calls: int = 0  # of these, not well formed
    error: str | None = None  # what went wrong: as the client was told, or as the engine says
    answers: list[dict[str, Any]] | None = None  # what was asked of the model and came of it; None: nobody wants it
    body: bytes = field(default=b"", repr=False)  # what the client sent, where ``answers`` are wanted


# Of the HTTP request that is being worked on, so that its line in the log can say how many tokens it took.
request_usage: contextvars.ContextVar[RequestUsage | None] = contextvars.ContextVar("request_usage", default=None)


def time_left(limit: float) -> float:
    """Seconds that are left of the time that a request may take, after its preparation; 0, as ``limit``: any."""
    used = request_usage.get()
    return max(limit - (used.preparing if used is not None else 0.0), 1e-3) if limit else 0.0


def note_error(message: str) -> None:
    """Remember what the client of this HTTP request is told; nothing outside of one."""
    if (used := request_usage.get()) is not None:
        used.error = message
