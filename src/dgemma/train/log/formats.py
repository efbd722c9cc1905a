"""How a run's numbers are written, on its page and elsewhere."""

from __future__ import annotations

import math


def duration_text(seconds: float) -> str:
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


def count_text(value: float) -> str:
    """How many of something, in three digits: 41.3 M."""
    return next((f"{value / unit:.3g} {letter}" for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k"))
                 if value >= unit), f"{value:,}")


def percent_text(value: float) -> str:
    """A share as a percentage."""
    return f"{100 * value:.1f} %" if math.isfinite(value) else "–"
