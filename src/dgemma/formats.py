"""Numbers as people read them: sizes, counts, durations, rates. Standard library only."""

from __future__ import annotations

import math


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


def long_duration_text(seconds: float) -> str:
    """A duration as people say it, in the two largest units: 45 s, 12 min, 3 h 20 min, 2 d 4 h."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def number_text(value: float) -> str:
    """A number in about four digits."""
    if not math.isfinite(value):
        return "–"
    if isinstance(value, int) or (value == round(value) and abs(value) < 1e15):
        return f"{value:,.0f}"
    if abs(value) >= 100:
        return f"{value:,.1f}"
    return f"{value:.3g}" if abs(value) < 0.1 else f"{value:.4g}"


def percent_text(value: float) -> str:
    """A share as a percentage."""
    return f"{100 * value:.1f} %" if math.isfinite(value) else "–"
