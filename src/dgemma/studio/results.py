"""What the arena's battles come to: win rates with their intervals, tables as CSV and JSON.

Works on: battles. Knows nothing of: the store, pages.

A win rate is the share of decided votes, those for one of the two; ties and "both bad" are counted beside it. Its
interval is Wilson's score interval (E. B. Wilson, "Probable inference, the law of succession, and statistical
inference", JASA 22, 1927), which holds what it says for few votes, too (L. D. Brown, T. T. Cai, A. DasGupta, "Interval
estimation for a binomial proportion", Statistical Science 16, 2001).
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dgemma.studio.battles import Battle, Contestant, Outcome

Z95 = 1.959963984540054  # the normal distribution's 97.5 % quantile


@dataclass(frozen=True)
class Share:
    """A share of votes, and the interval that it lies in with 95 % confidence; ``of`` 0: nothing is known."""

    won: int
    of: int

    @property
    def rate(self) -> float:
        return self.won / self.of if self.of else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.won, self.of)


def wilson(won: int, of: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of ``won`` in ``of`` trials; 0 to 1 without any."""
    if of == 0:
        return 0.0, 1.0
    rate, square = won / of, z * z
    middle = (rate + square / (2 * of)) / (1 + square / of)
    half = z / (1 + square / of) * math.sqrt(rate * (1 - rate) / of + square / (4 * of * of))
    # At the ends one of the bounds is 0 or 1 exactly; rounding would miss it.
    return (0.0 if won == 0 else middle - half), (1.0 if won == of else middle + half)


@dataclass(frozen=True)
class Pair:
    """Two contestants and their battles: those of the first, of the second won; ties; both bad; not voted on."""

    first: Contestant
    second: Contestant
    battles: tuple[Battle, ...]  # as if all had been between ``first`` and ``second``, in this order
    won: int
    lost: int
    ties: int
    bad: int

    @property
    def key(self) -> str:
        return pair_key(self.first, self.second)

    @property
    def open(self) -> int:
        return len(self.battles) - self.won - self.lost - self.ties - self.bad

    @property
    def share(self) -> Share:
        """The first one's, of decided votes."""
        return Share(self.won, self.won + self.lost)

    def median(self, side: int, name: str) -> float | None:
        """The median of a figure (of `figures`) over a contestant's answers; None without any."""
        known = [value for battle in self.battles
                 if (value := figures(battle.outcomes[side])[name]) is not None]
        return statistics.median(known) if known else None


def pair_key(one: Contestant, other: Contestant) -> str:
    """The same whoever is named first."""
    return "\n".join(sorted((one.key, other.key)))


def pairs(battles: Iterable[Battle]) -> list[Pair]:
    """The pairs that met, in the order of the battles. Names are those of a contestant's latest battle.

    Battles that are blind and not voted on are left out: their figures would tell who is who.
    """
    groups: dict[str, list[Battle]] = {}
    for battle in battles:
        if battle.over and not battle.hidden:
            groups.setdefault(pair_key(battle.first.contestant, battle.second.contestant), []).append(battle)
    made = []
    for group in groups.values():
        first, second = (outcome.contestant for outcome in group[0].outcomes)
        turned = tuple(battle if battle.first.contestant.key == first.key else _turned(battle) for battle in group)
        count = [battle.verdict for battle in turned].count
        made.append(Pair(first, second, turned, count("first"), count("second"), count("tie"), count("both bad")))
    return made


def _turned(battle: Battle) -> Battle:
    verdict = battle.verdict
    other = "second" if verdict == "first" else "first" if verdict == "second" else verdict
    return dataclasses.replace(battle, first=battle.second, second=battle.first, verdict=other,
                               swapped=not battle.swapped)


def figures(outcome: Outcome) -> dict[str, Any]:
    """Steps, tokens, tokens a forward pass, seconds, tokens a second; None for what is not known."""
    info = outcome.info
    steps, tokens, seconds = sum(info.get("steps", ())), info.get("tokens"), info.get("seconds")
    return {"steps": steps or None, "tokens": tokens,
            "tokens_per_forward": round(tokens / steps, 2) if steps and tokens is not None else None,
            "seconds": seconds, "tokens_per_second": round(tokens / seconds, 1) if tokens and seconds else None}


def to_csv(battles: Sequence[Battle]) -> str:
    """A line for each battle: its prompt, its verdict, who met, and the figures of both. No text of the answers."""
    rows = []
    for battle in battles:
        row = {"id": battle.id, "series": battle.series, "created": round(battle.created, 3), "prompt": battle.prompt,
               "status": battle.status, "blind": battle.blind, "in_turn": battle.in_turn,
               "verdict": battle.verdict or ""}
        for side, outcome in zip(("first", "second"), battle.outcomes, strict=True):
            row[side] = outcome.contestant.title
            row |= {f"{side}_{name}": value for name, value in figures(outcome).items()}
        rows.append({name: _cell(value) for name, value in row.items()})
    text = io.StringIO(newline="")
    if rows:
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def _cell(value: Any) -> Any:
    """Text that a spreadsheet would take for a formula is kept from it by an apostrophe."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def to_json(battles: Sequence[Battle]) -> str:
    """All that is known of the battles, but for how the answers came to be; and what they come to."""
    summary = []
    for pair in pairs(battles):
        low, high = pair.share.interval
        summary.append({"first": pair.first.title, "second": pair.second.title, "won": pair.won, "lost": pair.lost,
                        "ties": pair.ties, "both_bad": pair.bad, "not_voted": pair.open,
                        "win_rate": pair.share.rate if pair.share.of else None,
                        "wilson_95": [low, high] if pair.share.of else None})
    return json.dumps({"pairs": summary, "battles": [dataclasses.asdict(battle) for battle in battles]}, indent=1)
