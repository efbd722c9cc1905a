"""A listener that keeps what a run tells."""

from __future__ import annotations

from dataclasses import dataclass, field

from dgemma.train.log.events import Event, Noted, Stepped, Working


@dataclass
class Told:
    """Everything that was told, in order: a listener for those who look at it afterwards."""

    events: list[Event] = field(default_factory=list)

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    @property
    def notes(self) -> str:
        """What was noted, a line each."""
        return "\n".join(event.text for event in self.events if isinstance(event, Noted))


class StopAt:
    """What stops a run, and listens: from the ``at``-th event (from 0) on that ``when`` is true of."""

    def __init__(self, when, at=0):
        self._when, self._left, self._stopped = when, at, False

    def __call__(self, event: Event) -> None:
        if self._when(event):
            self._stopped = self._stopped or self._left == 0
            self._left -= 1

    def is_set(self) -> bool:
        return self._stopped


def stepped(step):
    """Whether an event is that so many steps are done."""
    return lambda event: isinstance(event, Stepped) and event.step == step


def working(what):
    """Whether an event is that this goes on."""
    return lambda event: isinstance(event, Working) and event.what == what
