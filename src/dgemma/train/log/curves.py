"""What there is to see of a run, as curves: whoever shows them (the report, a page) draws them.

Works on runs that were read (`history`). Knows nothing of drawing. Each function gives a list of pictures, which is
empty where the run recorded nothing of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dgemma.train.log.figures import COLOURS, Axis, Curve, scale_of, smoothed
from dgemma.train.log.history import COSTS, Run, interval
from dgemma.train.log.journal import Record

_TIMES = 5  # of the run at which loss by noise level is shown
_WORDS = {"tokens_per_forward": "tokens per forward pass", "failed": "failed requests", "max_steps": "steps at most",
          "memory_bytes": "peak memory (GB)"}
_STEP = Axis("step")


@dataclass(frozen=True)
class Picture:
    """Curves over the same axes; ``name`` says what they show."""

    name: str
    curves: tuple[Curve, ...]
    x: Axis
    y: Axis


def words(name: str) -> str:
    """A value's name as people say it."""
    return _WORDS.get(name, name.replace("_", " "))


def _picture(name: str, curves: Sequence[Curve], x: Axis, y: Axis) -> list[Picture]:
    """A list of one picture, or of none where no curve has a point."""
    seen = tuple(curve for curve in curves if any(math.isfinite(value) for value in curve.y))
    return [Picture(name, seen, x, y)] if seen else []


def kind_of(run: Run, name: str) -> str:
    """The kind of axis for a task's value."""
    return "percent" if run.is_share(name) else "plain"


def _banded(records: Sequence[Record], name: str, x: Sequence[float], label: str, **look: Any) -> Curve:
    """A value of some records, with its intervals where there are any."""
    values, pairs = [record.values[name] for record in records], [interval(record, name) for record in records]
    low, high = ([pair[side] if pair else value for pair, value in zip(pairs, values, strict=True)] if any(pairs)
                 else () for side in (0, 1))
    return Curve(label, x, values, low=low, high=high, **look)


def _task_curve(run: Run, name: str, label: str, colour: int = 0) -> Curve:
    records, best = run.of("task", name), run.best()
    curve = _banded(records, name, run.series("task", name)[0], label, colour=colour)
    if best is None or best not in records or not best.extra.get("best") or name != run.main():
        return curve
    star = records.index(best)
    return replace(curve, star=star, star_label=f"best: {run.text(name, curve.y[star])}")


def task_pictures(run: Run) -> list[Picture]:
    """What the task says of answers."""
    main, pictures = run.main(), []
    if main is not None:
        kind = kind_of(run, main)
        pictures += _picture(f"{main} over steps", [_task_curve(run, main, words(main))], _STEP,
                             Axis(words(main), kind))
        others = [name for name in run.names("task") if name not in (*COSTS, main) and kind_of(run, name) == kind]
        curves = [_task_curve(run, name, words(name), index) for index, name in enumerate(others[: COLOURS - 1], 1)]
        pictures += _picture("the other figures of the task over steps", curves, _STEP, Axis("also measured", kind))
    for colour, name in enumerate(("steps_per_canvas", "tokens_per_forward"), start=2):
        pictures += _picture(f"{words(name)} over steps", [_task_curve(run, name, "", colour)], _STEP,
                             Axis(words(name)))
    return pictures


def _train_curves(run: Run, name: str, label: str, colour: int) -> list[Curve]:
    """A noisy curve of training: faint as it is, and smoothed."""
    steps, values = run.series("train", name)
    curve = Curve(label, steps, smoothed(values), colour)
    return [curve] if len(steps) < 3 else [Curve(label, steps, values, colour, faint=True), curve]


def loss_pictures(run: Run) -> list[Picture]:
    """Losses, of training and of held-out examples, in all and by noise level and group of tokens."""
    curves = _train_curves(run, "loss", "training", 0)
    curves += [Curve("validation", *run.series("validation", "loss"), 1),
               Curve("self-conditioned", *run.series("validation", "conditioned"), 2, dashed=True)]
    pictures = _picture("loss over steps", curves, _STEP, Axis("loss (nats per token)", scale_of(curves)))
    pictures += _levels_picture(run)
    groups = ("corrupted", "clean", "fill", "causal")
    if "corrupted" in run.names("validation"):
        where = "held-out examples"
        curves = [Curve(name, *run.series("validation", name), colour) for colour, name in enumerate(groups)]
    else:
        where = "training"
        curves = [curve for colour, name in enumerate(groups)
                  for curve in _train_curves(run, f"loss/{name}", name, colour)]
    title = f"loss by group of tokens, {where}"
    return pictures + _picture(title, curves, _STEP, Axis(title, scale_of(curves)))


def _levels_picture(run: Run) -> list[Picture]:
    """Held-out loss against the share of noise, at several times of the run."""
    found = [(record.step, {float(match[1]): value for name, value in record.values.items()
                            if (match := re.fullmatch(r"t=(\d*\.?\d+)", name))}) for record in run.of("validation")]
    found = [(step, levels) for step, levels in found if len(levels) > 1]
    count = min(_TIMES, len(found))
    chosen = [found[round(i * (len(found) - 1) / max(count - 1, 1))] for i in range(count)]
    curves = [Curve(f"step {step:,}", sorted(levels), [levels[t] for t in sorted(levels)],
                    strength=0.4 + 0.6 * index / count) for index, (step, levels) in enumerate(chosen, start=1)]
    return _picture("loss by noise level", curves, Axis("share of the canvas that is noise (t)"),
                    Axis("held-out loss by noise level", scale_of(curves)))


def swept(run: Run) -> tuple[str | None, dict[int, list[Record]]]:
    """The main value of the run's sweeps, and the first and the last of them by the step that they were made after."""
    names = [name for name in run.names("sweep") if name not in COSTS]
    main = run.main() if run.main() in names else next(iter(names), None)
    times = sorted({record.step for record in run.of("sweep")})
    return main, {time: sorted((record for record in run.of("sweep") if record.step == time),
                               key=lambda record: record.values.get("max_steps", 0)) for time in times[:1] + times[-1:]}


def sweep_curve(records: Sequence[Record], main: str, label: str, **look: Any) -> Curve:
    """A sweep's main value by the number of steps."""
    rows = [record for record in records if main in record.values]
    return _banded(rows, main, [record.values["max_steps"] for record in rows], label, **look)


def sweep_pictures(main: str, curves: Sequence[Curve], kind: str) -> list[Picture]:
    """Such curves in one picture."""
    ticks = sorted({x for curve in curves for x in curve.x})
    return _picture(f"{main} by the number of denoising steps", curves,
                    Axis("denoising steps for a canvas, at most", "steps", ticks),
                    Axis(f"{words(main)} by steps allowed", kind))


def pace_pictures(run: Run) -> list[Picture]:
    """How fast it went, and what it took."""
    pictures = []
    for colour, name in enumerate(("learning_rate", "gradient_norm", "tokens_per_second", "memory_bytes"), start=3):
        steps, values = run.series("train", name)
        if name == "memory_bytes":
            values = [value / 1e9 for value in values]
        if len(steps) > 1:
            pictures += _picture(words(name), [Curve("", steps, values, colour)], _STEP, Axis(words(name)))
    return pictures


def comparison_pictures(runs: Mapping[str, Run]) -> list[Picture]:
    """Several runs, by name, over the same axes."""
    mains = list(dict.fromkeys(main for run in runs.values() if (main := run.main())))
    heading = mains[0] if len(mains) == 1 else "task"
    own = [(run, name, main, index) for index, (name, run) in enumerate(runs.items()) if (main := run.main())]
    kind = "percent" if own and all(run.is_share(main) for run, _, main, _ in own) else "plain"
    tasks = [replace(_task_curve(run, main, name, index), star_label="") for run, name, main, index in own]
    losses = [Curve(name, *run.series("validation", "loss"), index) for index, (name, run) in enumerate(runs.items())]
    pictures = _picture(f"{heading} over steps", tasks, _STEP, Axis(heading, kind))
    pictures += _picture("validation loss over steps", losses, _STEP, Axis("validation loss", scale_of(losses)))
    sweeps_of = [(name, *swept(run)) for name, run in runs.items()]
    curves = [sweep_curve(sweeps[max(sweeps)], main, name, colour=index)
              for index, (name, main, sweeps) in enumerate(sweeps_of) if main is not None]
    main = next((main for _, main, _ in sweeps_of if main is not None), None)
    return pictures + (sweep_pictures(main, curves, kind) if main is not None else [])
