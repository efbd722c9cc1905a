"""What a run tells while it goes on: to a terminal, to its journal, to a page, all of which listen alike.

Works on names and numbers; knows nothing of who listens. A listener is called in the run's own thread, in the order of
what happens, and an error that it raises ends the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dgemma.train.eval.tasks import TaskScore


@dataclass(frozen=True)
class Loading:
    """Weights are read: so many bytes of all."""

    done: int
    total: int


@dataclass(frozen=True)
class Noted:
    """Something that a person should know."""

    text: str


@dataclass(frozen=True)
class Started:
    """Steps are about to be taken, after the ``step`` that were taken before. From here on the run can be stopped."""

    name: str
    step: int
    max_steps: int


@dataclass(frozen=True)
class Stepped:
    """``step`` steps are done. ``values`` are the last one's, with ``loss`` and ``learning_rate``; the rest means of
    late."""

    step: int
    values: Mapping[str, float]
    seconds_per_step: float
    tokens_per_second: float
    memory_bytes: int  # the most that was held so far


@dataclass(frozen=True)
class Averaged:
    """The means of the steps since the last of these."""

    step: int
    values: Mapping[str, float]


@dataclass(frozen=True)
class Working:
    """Something other than a training step goes on, and how far it is; over with whatever comes next."""

    what: str
    done: int
    total: int


@dataclass(frozen=True)
class Evaluated:
    """The model after ``step`` steps: its validation losses and its score, as far as it has such; ``best`` if no
    earlier one of this run was better."""

    step: int
    losses: Mapping[str, float]
    score: TaskScore | None
    best: bool

    @property
    def values(self) -> dict[str, float]:
        """All numbers by name."""
        return {**self.losses, **(self.score.values if self.score is not None else {})}


@dataclass(frozen=True)
class Swept:
    """The best model's score with at most ``limit`` denoising steps a canvas."""

    step: int
    limit: int
    score: TaskScore


@dataclass(frozen=True)
class Saved:
    """All that a resumed run needs is on the disk."""

    step: int


@dataclass(frozen=True)
class Ended:
    """The run is over, or (not ``complete``) was stopped. ``report`` is its page, None for the ``problem`` with it."""

    step: int
    complete: bool
    folder: Path
    report: Path | None
    problem: str = ""


Event = Loading | Noted | Started | Stepped | Averaged | Working | Evaluated | Swept | Saved | Ended
Listener = Callable[[Event], object]
