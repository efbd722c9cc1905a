"""Numbers as people read them: sizes, counts, durations, rates. Standard library only."""

from __future__ import annotations


def size_text(nbytes: int) -> str:
    """A size as people say it: 16.8 GB."""
    for unit, letters in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if nbytes >= unit:
            return f"{nbytes / unit:.1f} {letters}"
    return f"{nbytes} B"


def count_text(number: int, noun: str, plural: str = "s") -> str:
    """So many of something: 1 step, 3 steps, 1,024 tokens; ``plural`` is what more than one add to the noun."""
    return f"{number:,} {noun}{'' if number == 1 else plural}"


def short_count(number: int) -> str:
    """A large number in three digits: 25.2B, 7.04M."""
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{letter}"
    return str(number)


def duration_text(seconds: float) -> str:
    """How long something took: 7.3 s, 1:05 min."""
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds // 60)}:{int(seconds % 60):02} min"


def rate_text(count: float, seconds: float) -> str:
    """How many a second, without a unit: 0.4, 12."""
    rate = count / seconds if seconds else 0.0
    return f"{rate:.0f}" if rate >= 10 else f"{rate:.1f}"
