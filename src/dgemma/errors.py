"""Errors that are the user's to mend: shown as one clear message, never as a traceback."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

_LISTED = 20  # how many items of one kind of problem a message spells out


class DgemmaError(Exception):
    """Something the user can put right; the message says what was wrong, where, and what to do."""


class ContextLengthError(DgemmaError, ValueError):
    """A prompt, with the answer it needs, that is longer than what there is room for.

    ``prompt_tokens``: how long it is, at least; ``most``: how long it may be. Both None where tokens are not the
    measure (memory).
    """

    def __init__(self, message: str, prompt_tokens: int | None = None, most: int | None = None):
        super().__init__(message)
        self.prompt_tokens, self.most = prompt_tokens, most


class CheckpointError(DgemmaError):
    """A checkpoint that cannot be used: the message names the file and the cause."""


class NotFiniteError(DgemmaError):
    """The network computes numbers that are none: its weights are damaged, or too large for its dtype."""


@dataclass(frozen=True)
class Problem:
    """One kind of thing that is wrong with a checkpoint, and every instance of it."""

    kind: str
    items: tuple[str, ...]


def problems_of(found: Mapping[str, Iterable[str]]) -> list[Problem]:
    """The kinds of problems of which something was found."""
    return [Problem(kind, tuple(items)) for kind, items in found.items() if items]


def refuse(problems: Sequence[Problem], what: str) -> None:
    """Raises CheckpointError that says ``what`` and all of the problems, if there are any."""
    if problems:
        raise CheckpointError(f"{what}\n{describe(problems)}")


def describe(problems: Iterable[Problem]) -> str:
    """The problems as indented lines, at most twenty of each kind."""
    lines = []
    for problem in problems:
        lines.append(f"  {problem.kind} ({len(problem.items)}):")
        lines.extend(f"    {item}" for item in problem.items[:_LISTED])
        if len(problem.items) > _LISTED:
            lines.append(f"    and {len(problem.items) - _LISTED} more")
    return "\n".join(lines)
