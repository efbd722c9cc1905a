"""What one training run looks like in curves: its task, its losses, fewer denoising steps, its pace.

Works on a `Run`; every function gives a list of pictures, which is empty where the run recorded nothing of it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from dgemma.train.log.figures import COLOURS, Axis, Curve, draw, smoothed, spans_decades
from dgemma.train.log.formats import number_text, percent_text
from dgemma.train.log.journal import Record
from dgemma.train.log.past_run import COSTS, Run, interval_of

STEP = Axis("step")
_TIMES = 5  # of the run at which loss by noise level is shown
_WORDS = {"steps_per_canvas": "steps per canvas", "tokens_per_forward": "tokens per forward pass",
          "seconds_per_answer": "seconds per answer", "failed": "failed requests", "max_steps": "steps at most"}


def picture(name: str, curves: Sequence[Curve], x: Axis, y: Axis) -> list[Any]:
    """A list of one picture, or of none where no curve has a point."""
    from markupsafe import Markup

    curves = [curve for curve in curves if any(math.isfinite(value) for value in curve.y)]
    return [Markup(draw(name, curves, x, y))] if curves else []


def words(name: str) -> str:
    return _WORDS.get(name, name.replace("_", " "))


def value_text(run: Run, name: str, value: float) -> str:
    if name in ("steps_per_canvas", "tokens_per_forward"):
        return f"{value:.1f}" if math.isfinite(value) else "–"
    return percent_text(value) if run.is_share(name) else number_text(value)


def with_interval(run: Run, record: Record, name: str) -> str:
    text = value_text(run, name, record.values[name])
    pair = interval_of(record, name)
    if pair is None:
        return text
    low, high = (100 * bound if run.is_share(name) else bound for bound in pair)
    return f"{text} ({low:.1f}–{high:.1f})" if run.is_share(name) else f"{text} ({low:.4g}–{high:.4g})"


def task_curve(run: Run, name: str, label: str, colour: int = 0) -> Curve:
    records = [record for record in run.of("task") if name in record.values]
    pairs = [interval_of(record, name) for record in records]
    best, star = run.best(), None
    if best in records and best is not None and best.extra.get("best") and name == run.main():
        star = records.index(best)
    values = [record.values[name] for record in records]
    return Curve(label, [float(record.step) for record in records], values, colour,
                 [pair[0] if pair else value for pair, value in zip(pairs, values, strict=True)] if any(pairs) else (),
                 [pair[1] if pair else value for pair, value in zip(pairs, values, strict=True)] if any(pairs) else (),
                 star=star, star_label=f"best: {value_text(run, name, values[star])}" if star is not None else "")


def task_figures(run: Run) -> list[Any]:
    main = run.main()
    names = [name for name in run.names("task") if name not in COSTS and name != main]
    pictures = []
    if main is not None:
        kind = "percent" if run.is_share(main) else "plain"
        pictures += picture(f"{main} over steps", [task_curve(run, main, words(main))], STEP, Axis(words(main), kind))
        others = [name for name in names if run.is_share(name) == run.is_share(main)][: COLOURS - 1]
        if others:
            curves = [task_curve(run, name, words(name), index + 1) for index, name in enumerate(others)]
            pictures += picture("the other figures of the task over steps", curves, STEP, Axis("also measured", kind))
    for index, name in enumerate(("steps_per_canvas", "tokens_per_forward")):
        curve = task_curve(run, name, "", 2 + index)
        pictures += picture(f"{words(name)} over steps", [curve], STEP, Axis(words(name)))
    return pictures


def _smooth_pair(run: Run, name: str, label: str, colour: int) -> list[Curve]:
    """A noisy curve of training: faint as it is, and smoothed."""
    steps, values = run.series("train", name)
    curve = Curve(label, steps, smoothed(values), colour)
    return [curve] if len(steps) < 3 else [Curve(label, steps, values, colour, faint=True), curve]


def loss_figures(run: Run) -> list[Any]:
    curves = [*_smooth_pair(run, "loss", "training", 0)] if run.series("train", "loss")[0] else []
    for index, (name, label) in enumerate([("loss", "validation"), ("conditioned", "self-conditioned")]):
        curves.append(Curve(label, *run.series("validation", name), colour=index + 1, dashed=index > 0))
    pictures = picture("loss over steps", curves, STEP, Axis("loss (nats per token)", loss_kind(curves)))
    pictures += _levels_figure(run)
    kind, prefix = ("validation", "") if "corrupted" in run.names("validation") else ("train", "loss/")
    groups = [(name, index) for index, name in enumerate(("corrupted", "clean", "fill", "causal"))
              if run.series(kind, prefix + name)[0]]
    curves = [curve for name, index in groups for curve in (
        [Curve(name, *run.series(kind, name), colour=index)] if kind == "validation" else
        _smooth_pair(run, prefix + name, name, index))]
    where = "held-out examples" if kind == "validation" else "training"
    pictures += picture(f"loss by group of tokens, {where}", curves, STEP,
                         Axis(f"loss by group of tokens, {where}", loss_kind(curves)))
    return pictures


def _levels_figure(run: Run) -> list[Any]:
    """Held-out loss against the share of noise, at several times of the run."""
    records = [record for record in run.of("validation") if len(_levels(record)) > 1]
    if not records:
        return []
    count = min(_TIMES, len(records))
    chosen = [records[round(i * (len(records) - 1) / max(count - 1, 1))] for i in range(count)]
    curves = []
    for index, record in enumerate(chosen):
        levels = _levels(record)
        curves.append(Curve(f"step {record.step:,}", sorted(levels), [levels[t] for t in sorted(levels)],
                            strength=0.4 + 0.6 * (index + 1) / count))
    return picture("loss by noise level", curves, Axis("share of the canvas that is noise (t)"),
                    Axis("held-out loss by noise level", loss_kind(curves)))


def _levels(record: Record) -> dict[float, float]:
    found = {re.fullmatch(r"t=(\d*\.?\d+)", name): value for name, value in record.values.items()}
    return {float(match[1]): value for match, value in found.items() if match is not None}


def loss_kind(curves: Sequence[Curve]) -> str:
    return "log" if spans_decades(curves) else "plain"


def sweep_curves(run: Run, label: str | None, colour: int) -> tuple[str | None, list[Curve]]:
    """The sweep's main value against the number of steps allowed: after the first and the last sweep of the run, or
    under ``label`` after the last one only."""
    records = run.of("sweep")
    names = [name for name in run.names("sweep") if name not in COSTS]
    main = run.main() if run.main() in names else next(iter(names), None)
    if main is None:
        return None, []
    times = sorted({record.step for record in records})
    curves = []
    for time in times[-1:] if label is not None else dict.fromkeys([times[0], times[-1]]):
        rows = sorted((record for record in records if record.step == time and main in record.values),
                      key=lambda record: record.values["max_steps"])
        pairs = [interval_of(record, main) or (record.values[main],) * 2 for record in rows]
        curves.append(Curve(label or f"step {time:,}", [record.values["max_steps"] for record in rows],
                            [record.values[main] for record in rows], colour if time == times[-1] else colour + 1,
                            [pair[0] for pair in pairs], [pair[1] for pair in pairs], dashed=time != times[-1]))
    return main, curves


def sweep_picture(main: str, curves: Sequence[Curve], share: bool) -> list[Any]:
    ticks = sorted({x for curve in curves for x in curve.x})
    return picture(f"{main} by the number of denoising steps", curves,
                   Axis("denoising steps for a canvas, at most", "steps", ticks),
                   Axis(f"{words(main)} by steps allowed", "percent" if share else "plain"))


def pace_figures(run: Run) -> list[Any]:
    pictures = []
    for index, (name, label) in enumerate([("learning_rate", "learning rate"), ("gradient_norm", "gradient norm"),
                                           ("tokens_per_second", "tokens per second")]):
        steps, values = run.series("train", name)
        if len(steps) > 1:
            pictures += picture(label, [Curve("", steps, values, 3 + index)], STEP, Axis(label))
    return pictures
