"""A run's record: one JSON line per thing that was measured, in ``metrics.jsonl``, and what else is told of it.

Works on a run's events, names and numbers. Knows nothing of networks, losses or of who reads it.

A run may be killed in the middle of a line, go on from an earlier step, or meet a full disk: a torn last line is
dropped, records beyond the step that a run goes on from are dropped, and a record that cannot be written is counted,
warned of once, and costs nothing else.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from dgemma.errors import DgemmaError
from dgemma.files import atomic_write, json_bytes, make_folder
from dgemma.train.log.events import Averaged, Evaluated, Event, Swept

FILE = "metrics.jsonl"
KINDS = ("train", "validation", "task", "sweep", "samples", "note")
_SAMPLES = 16  # answers that are kept of an evaluation
_OWN = ("step", "kind", "time", "values")  # keys of a line that are not extra


@dataclass(frozen=True)
class Record:
    """One line of the journal: what was measured after ``step`` steps. A number that was not finite reads as NaN."""

    step: int
    kind: str
    values: dict[str, float]
    time: str = ""  # ISO 8601, UTC
    extra: dict[str, Any] = field(default_factory=dict)


class Writer(Protocol):
    """Somewhere else where a run's numbers go."""

    name: str

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def tagged(kind: str, values: Mapping[str, float]) -> dict[str, float]:
    """Values by names that all kinds can share (``train/loss``, ``task/exact``). A sweep's name their number of steps,
    since all of a sweep are of one training step."""
    if kind == "sweep":
        limit = values.get("max_steps", math.nan)
        return {f"sweep/{name.removeprefix('task/')}/max_steps={limit:g}": value for name, value in values.items()
                if name != "max_steps"}
    return {f"{kind}/{name.removeprefix(f'{kind}/')}": value for name, value in values.items()}


def writers_for(folder: Path, step: int, *, wandb: str | None = None, name: str = "",
                config: Mapping[str, Any] | None = None) -> list[Writer]:
    """TensorBoard, and W&B's project ``wandb`` if the recipe names one; ``name`` and ``config`` are the run's there.

    Raises DgemmaError where a package that is needed is not installed.
    """
    made: list[Writer] = [TensorBoardWriter(folder, step)]
    if wandb:
        made.append(WandbWriter(folder, wandb, name, config or {}))
    return made


def read_journal(folder: Path) -> list[Record]:
    """All records of a run, in the order of writing; a last line without its end is left out.

    Raises DgemmaError naming file, line and mistake for anything else that is wrong, and for a missing file.
    """
    path = folder / FILE
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DgemmaError(f"{path}: cannot be read ({error.strerror or error}); "
                          "dgemma train writes it into a run's folder") from error
    lines = data.split(b"\n")[:-1]  # what follows the last line end is nothing, or torn
    return [_record(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]


class Journal:
    """The record of the run in ``folder``, which is about to go on after ``step`` steps (0: a new run): one of the
    run's listeners.

    Raises DgemmaError where an earlier journal is damaged or the file cannot be written at the start; later failures
    are told to ``warn``, once for each place and again, counted, at the end.
    """

    def __init__(self, folder: Path, step: int, *, writers: Sequence[Writer] = (),
                 warn: Callable[[str], object] = warnings.warn) -> None:
        self.path = make_folder(folder) / FILE
        self.lost: dict[str, int] = {}  # records that could not be written, by place
        self._writers, self._warn = writers, warn
        if self.path.exists():
            _cut(self.path, folder, step)
        try:
            self._file = self.path.open("ab", buffering=0)
            self._size = self._file.seek(0, os.SEEK_END)
        except OSError as error:
            raise DgemmaError(f"{self.path}: cannot be written ({error.strerror or error})") from error
        self._torn = False

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, event: Event) -> None:
        """Record what was measured."""
        match event:
            case Averaged(step, values):
                self.record(step, "train", values)
            case Evaluated(step, losses, score, best):
                if losses:
                    self.record(step, "validation", losses)
                if score is not None:
                    self.record(step, "task", score.values, main=score.main, best=best, count=score.count,
                                intervals=score.intervals)
                    shown = sorted(score.samples, key=lambda sample: sample.score)[:_SAMPLES]  # the wrong ones first
                    self.record(step, "samples", {}, samples=[vars(sample) for sample in shown])
            case Swept(step, limit, score):
                self.record(step, "sweep", {"max_steps": limit, **score.values}, main=score.main, count=score.count,
                            intervals=score.intervals)

    def record(self, step: int, kind: str, values: Mapping[str, float], **extra: Any) -> None:
        """Write one record; ``extra`` is anything that JSON can hold, under names of its own."""
        if kind not in KINDS:
            raise ValueError(f"kind {kind!r} is unknown; there are {', '.join(KINDS)}")
        if taken := sorted(set(extra) & set(_OWN)):
            raise ValueError(f"extra may not be called {', '.join(taken)}")
        numbers = {name: value if isinstance(value, int) else float(value) for name, value in values.items()}
        line = {"step": step, "kind": kind, "time": datetime.now(UTC).isoformat(timespec="seconds"),
                "values": numbers, **extra}
        data = json_bytes(_without_nan(line)) + b"\n"
        try:
            self._append(data)
        except OSError as error:
            self._lose(str(self.path), error)
        for writer in self._writers:
            try:
                writer.write(step, kind, numbers)
            except Exception as error:  # whatever a mirror's own code raises, hours of training are worth more
                self._lose(writer.name, error)

    def losses(self) -> list[str]:
        """What is missing where, in plain words: one line for each place that records could not be written to."""
        return [f"{count:,} record{'' if count == 1 else 's'} could not be written to {place}"
                for place, count in self.lost.items()]

    def close(self) -> None:
        """Close everything; warns of records that are missing."""
        if self._file.closed:
            return
        if self._torn:
            with contextlib.suppress(OSError):  # the reader leaves out a torn last line
                os.ftruncate(self._file.fileno(), self._size)
        self._file.close()
        for writer in self._writers:
            try:
                writer.close()
            except Exception as error:
                self._lose(writer.name, error)
        for line in self.losses():
            self._warn(line)

    def _append(self, data: bytes) -> None:
        if self._torn:  # half a line, left by a full disk, must not be the beginning of another
            os.ftruncate(self._file.fileno(), self._size)
        self._torn = True
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) or 0 :]
        self._size += len(data)
        self._torn = False

    def _lose(self, place: str, error: Exception) -> None:
        if place not in self.lost:
            self._warn(f"a record could not be written to {place} ({type(error).__name__}: {error}); training goes on, "
                       "and says at the end how many are missing")
        self.lost[place] = self.lost.get(place, 0) + 1


class TensorBoardWriter:
    """Writes event files to ``folder/tensorboard``; events beyond ``step``, of a run that went on from there, go."""

    name = "TensorBoard"

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise DgemmaError("training writes to TensorBoard, which is not installed: "
                              "pip install 'dgemma[train]'") from error
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        for tag, value in tagged(kind, values).items():
            self._writer.add_scalar(tag, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbWriter:
    """Sends numbers to a project of Weights & Biases (`wandb.init`, `run.log`: docs.wandb.ai/ref/python).

    The run's id is kept in ``folder/wandb-id``, so that a run that goes on is the same one there. W&B takes no step
    twice: steps that are repeated after an interruption keep their first values, which are the same.
    """

    name = "W&B"

    def __init__(self, folder: Path, project: str, name: str, config: Mapping[str, Any]) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise DgemmaError(f"the recipe logs to the W&B project {project!r}, but wandb is not installed: "
                              "pip install wandb, or take the setting out") from error
        path = folder / "wandb-id"
        if not path.exists():
            with atomic_write(path) as beside:
                beside.write_text(secrets.token_hex(8), encoding="ascii")
        self._run = wandb.init(project=project, name=name, config=dict(config), dir=str(folder),
                               id=path.read_text(encoding="ascii").strip(), resume="allow")

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        if values:
            self._run.log(tagged(kind, values), step=step)

    def close(self) -> None:
        self._run.finish()


def _cut(path: Path, folder: Path, step: int) -> None:
    """Drop a torn last line and records beyond ``step``; the file is replaced whole or not at all."""
    records = read_journal(folder)
    lines = [line for line in path.read_bytes().split(b"\n")[:-1] if line.strip()]
    kept = b"".join(line + b"\n" for line, record in zip(lines, records, strict=True) if record.step <= step)
    with atomic_write(path) as beside:
        beside.write_bytes(kept)


def _record(line: bytes, where: str) -> Record:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DgemmaError(f"{where}: not a JSON value ({error}); take the line out") from error
    if not isinstance(data, dict) or not isinstance(data.get("step"), int) or not isinstance(data.get("kind"), str):
        raise DgemmaError(f'{where}: expected {{"step": number, "kind": "…", "values": {{…}}}}; take the line out')
    values = data.get("values", {})
    if not isinstance(values, dict) or not all(value is None or isinstance(value, (int, float))
                                               for value in values.values()):
        raise DgemmaError(f"{where}: values must be numbers by name; take the line out")
    numbers = {name: math.nan if value is None else value for name, value in values.items()}
    return Record(data["step"], data["kind"], numbers, str(data.get("time", "")),
                  {name: value for name, value in data.items() if name not in _OWN})


def _without_nan(value: Any) -> Any:
    """The value with null for every number that JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _without_nan(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return value
