"""A clock of a test's own, handed in where `time` is used otherwise."""


class Clock:
    """Stands still unless somebody sleeps by it, or goes on by ``tick`` seconds whenever it is looked at."""

    def __init__(self, tick: float = 0.0):
        self.now, self._tick = 0.0, tick

    def monotonic(self) -> float:
        self.now += self._tick
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
