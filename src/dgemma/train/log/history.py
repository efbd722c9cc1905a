"""What a run left in its folder, read again: its numbers by step, and what was written beside them.

Works on run folders; knows nothing of pages. What a run did not record is left out. Names of values lose what repeats
the kind of their record: ``task/exact`` is ``exact`` here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dgemma.errors import DgemmaError
from dgemma.fields import parse_json_value
from dgemma.formats import number_text, percent_text
from dgemma.train.log.journal import Record, read_journal

# Values of a task that say what answers cost, not how good they are.
COSTS = ("steps_per_canvas", "tokens_per_forward", "seconds_per_answer", "failed", "max_steps")


@dataclass(frozen=True)
class Run:
    """One run. ``records`` are in order of steps; of two with the same step and kind (and of a sweep the same number of
    denoising steps) the later one holds."""

    folder: Path
    records: list[Record]
    info: dict[str, Any] = field(default_factory=dict)  # run.json
    recipe: str = ""
    plan: dict[str, Any] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)  # preflight.json

    @property
    def name(self) -> str:
        return str(self.info.get("name") or self.folder.resolve().name)

    @property
    def last_step(self) -> int:
        return max(record.step for record in self.records)

    def of(self, kind: str, name: str | None = None) -> list[Record]:
        """The records of a kind, or those that have a value of that name."""
        return [record for record in self.records if record.kind == kind and (name is None or name in record.values)]

    def names(self, kind: str) -> list[str]:
        """The values that records of a kind hold, in the order of their first appearance."""
        return list(dict.fromkeys(name for record in self.of(kind) for name in record.values))

    def series(self, kind: str, name: str) -> tuple[list[float], list[float]]:
        """Steps, and the value after each."""
        found = self.of(kind, name)
        return [float(record.step) for record in found], [record.values[name] for record in found]

    def main(self) -> str | None:
        """The task's value that the best checkpoint is chosen by."""
        for record in reversed(self.of("task")):
            if record.extra.get("main") in record.values:
                return record.extra["main"]
        return next((name for name in self.names("task") if name not in COSTS), None)

    def best(self) -> Record | None:
        """The task record of the best checkpoint: the last one that was called the best, or else the last."""
        records = self.of("task")
        called = [record for record in records if record.extra.get("best") is True]
        return (called or records or [None])[-1]

    def is_share(self, name: str) -> bool:
        """Whether a task's value is a share of answers: those, and only those, have intervals within 0 and 1."""
        bounds = [pair for record in (*self.of("task"), *self.of("sweep")) if (pair := interval(record, name))]
        return bool(bounds) and all(0 <= value <= 1 for pair in bounds for value in pair)

    def text(self, name: str, value: float) -> str:
        """A task's value as it is written."""
        if name in ("steps_per_canvas", "tokens_per_forward"):
            return f"{value:.1f}" if math.isfinite(value) else "–"
        return percent_text(value) if self.is_share(name) else number_text(value)

    def withinterval(self, record: Record, name: str) -> str:
        """A record's value and its interval; "–" where it has none."""
        if name not in record.values:
            return "–"
        text, pair = self.text(name, record.values[name]), interval(record, name)
        if pair is None:
            return text
        return f"{text} ({bounds_text(pair)})" if self.is_share(name) else f"{text} ({pair[0]:.4g}–{pair[1]:.4g})"


def read_run(folder: Path) -> Run:
    """Read a run's folder. Only the journal must be there.

    Raises DgemmaError naming the file that is missing, damaged or empty.
    """
    latest: dict[tuple[int, str, float], Record] = {}
    for record in read_journal(folder):
        prefix, extra = "task/" if record.kind == "sweep" else f"{record.kind}/", dict(record.extra)
        if isinstance(extra.get("main"), str):
            extra["main"] = extra["main"].removeprefix("task/")
        intervals = extra.get("intervals")
        extra["intervals"] = _short(prefix, intervals) if isinstance(intervals, dict) else {}
        record = replace(record, values=_short(prefix, record.values), extra=extra)
        key = (record.step, record.kind, record.values.get("max_steps", 0.0))
        if record.kind == "note":
            key = (record.step, f"note {len(latest)}", 0.0)  # all of them
        latest.pop(key, None)
        latest[key] = record
    if not latest:
        raise DgemmaError(f"{folder / 'metrics.jsonl'}: holds no records yet; there is nothing to report")
    records = sorted(latest.values(), key=lambda record: record.step)
    return Run(folder, records, _json(folder / "run.json", dict), _text(folder / "recipe.yaml"),
               _json(folder / "plan.json", dict), _json(folder / "preflight.json", list))


def _short(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in values.items()}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    except OSError as error:
        raise DgemmaError(f"{path}: cannot be read ({error.strerror or error})") from error


def _json(path: Path, kind: type) -> Any:
    """A JSON file's value, which must be of a kind; an empty one where there is no file."""
    text = _text(path)
    if not text:
        return kind()
    try:
        data = parse_json_value(text, str(path), DgemmaError, halves=True)
    except DgemmaError as error:
        raise DgemmaError(f"{path}: not a JSON value ({error.__cause__ or error}); take the file away to report "
                          "without it") from error
    if not isinstance(data, kind):
        raise DgemmaError(f"{path}: expected a JSON {'object' if kind is dict else 'array'}; take the file away to "
                          "report without it")
    return data


def interval(record: Record, name: str) -> tuple[float, float] | None:
    """The interval of a record's value, if it has one."""
    pair = record.extra.get("intervals", {}).get(name)
    if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(x, (int, float)) for x in pair):
        return None
    return float(pair[0]), float(pair[1])


def bounds_text(pair: tuple[float, float]) -> str:
    return f"{100 * pair[0]:.1f}–{100 * pair[1]:.1f}"
