"""The page that a training run ends with, and the one that sets several runs beside each other.

Works on what runs left in their folders (`history`). Knows nothing of networks. A page is one static file that needs no
network and follows the reader's light or dark; the same folder gives the same bytes.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dgemma.errors import DgemmaError
from dgemma.files import atomic_write
from dgemma.formats import long_duration_text, number_text, short_count, size_text
from dgemma.train.log.curves import (
    Picture,
    comparison_pictures,
    kind_of,
    loss_pictures,
    pace_pictures,
    sweep_curve,
    sweep_pictures,
    swept,
    task_pictures,
    words,
)
from dgemma.train.log.figures import draw
from dgemma.train.log.history import Run, bounds_text, interval, read_run

FILE = "report.html"
SAMPLES = 12
_RIGHT_SAMPLES = 3  # of these, where there are any
_SAMPLE_CHARACTERS = 3000
_DIFFERENCE_CHARACTERS = 1500  # longer texts are not compared letter by letter
_RECIPE_CHARACTERS = 60_000
_NOTES = 200
# Control characters that HTML cannot hold, as their pictures.
_CONTROLS = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}


def write_report(folder: Path, *, title: str | None = None) -> Path:
    """Write ``report.html`` into a run's folder and return its path.

    Raises DgemmaError where there is no journal, a file is damaged or the page cannot be written.
    """
    run = read_run(folder)
    name = run.main()
    notes = [(record.step, str(record.extra["text"])) for record in run.of("note") if record.extra.get("text")]
    checks = [{name: check.get(name, "") for name in ("name", "passed", "measured", "meaning")} for check in run.checks]
    return _write(folder / FILE, "report.html.jinja", {
        "title": title or run.name, "run": run, "about": _about(run), "tiles": _tiles(run), "use": _use(run),
        "task": _drawn(task_pictures(run)), "band": name is not None and run.is_share(name), "sweep": _sweep(run),
        "losses": _drawn(loss_pictures(run)), "samples": _samples(run), "checks": checks, "facts": _facts(run),
        "plan": [line for line in run.plan.get("lines", []) if isinstance(line, dict)],
        "run_figures": _drawn(pace_pictures(run)), "recipe": run.recipe[:_RECIPE_CHARACTERS], "notes": notes[-_NOTES:]})


def write_comparison(folder: Path, runs: Mapping[str, Path], *, title: str) -> Path:
    """Write ``report.html`` into ``folder``: the runs, by name, in one table and in the same pictures.

    Raises DgemmaError as `write_report` does, and when there are no runs.
    """
    if not runs:
        raise DgemmaError(f"{folder}: there are no runs to compare")
    read = {name: read_run(path) for name, path in runs.items()}
    mains = list(dict.fromkeys(main for run in read.values() if (main := run.main())))
    columns = comparison_columns(read)
    rows = [{"name": name, "link": quote(Path(os.path.relpath(run.folder / FILE, folder)).as_posix()),
             "cells": [cells[index] for cells in columns.values()]} for index, (name, run) in enumerate(read.items())]
    return _write(folder / FILE, "comparison.html.jinja", {
        "title": title, "about": f"{len(read)} run{'' if len(read) == 1 else 's'}. " + _common(list(read.values())),
        "header": list(columns), "rows": rows,
        "note": mains and "In brackets: the 95 % interval. What answers cost is that of each run's best checkpoint.",
        "figures": _drawn(comparison_pictures(read))})


def _write(path: Path, template: str, page: Mapping[str, Any]) -> Path:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True,
                              undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["size"] = lambda nbytes: size_text(int(nbytes or 0))
    text = environment.get_template(template).render(page).translate(_CONTROLS)
    with atomic_write(path) as beside:
        beside.write_bytes(text.encode("utf-8", "replace"))
    return path


# ---- in words ----------------------------------------------------------------------------------------


def _about(run: Run) -> str:
    parts = [str(run.info.get("model") or ""), f"{run.last_step:,} steps"]
    parts += [f"{run.info['examples']:,} examples"] if run.info.get("examples") else []
    parts += [long_duration_text(run.info["seconds"])] if run.info.get("seconds") else []
    with contextlib.suppress(ValueError):  # a record without its time
        parts.append(f"{datetime.fromisoformat(run.records[-1].time):%d %B %Y, %H:%M} UTC")
    return " · ".join(filter(None, parts))


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """The figures at the top: name, value, detail."""
    tiles = []
    best, main = run.best(), run.main()
    first = next(iter(run.of("task")), None)
    before = {} if first is best or first is None else first.values
    if best is not None and main in best.values:
        pair = interval(best, main)
        detail = [f"{bounds_text(pair)} %"] if pair and run.is_share(main) else []
        detail.append(f"{'best, ' if best.extra.get('best') else ''}step {best.step:,}")
        if first is not None and main in before:
            detail.append(f"from {run.text(main, before[main])} at step {first.step:,}")
        tiles.append((words(main), run.text(main, best.values[main]), "; ".join(detail)))
    for name in ("steps_per_canvas", "tokens_per_forward"):
        if best is not None and name in best.values:
            was = before.get(name, math.nan)
            tiles.append((words(name), run.text(name, best.values[name]),
                          f"from {run.text(name, was)}" if math.isfinite(was) else ""))
    steps, losses = run.series("validation", "loss")
    if steps:
        low = min(losses, key=lambda loss: loss if math.isfinite(loss) else math.inf)
        tiles.append(("validation loss", number_text(low),
                      f"least, step {steps[losses.index(low)]:,.0f}; from {number_text(losses[0])}"
                      if len(steps) > 1 else f"step {steps[0]:,.0f}"))
    if seconds := run.info.get("seconds"):
        tokens = run.info.get("tokens")
        tiles.append(("time", long_duration_text(seconds), f"{tokens / seconds:,.0f} tokens/s" if tokens else ""))
    if peak := run.info.get("peak_bytes"):
        planned = run.plan.get("total")
        tiles.append(("peak memory", size_text(peak), f"planned {size_text(planned)}" if planned else ""))
    return tiles


def _use(run: Run) -> str:
    """Commands that run the result, as far as it is there."""
    found = next((run.folder / name for name in ("best", "last") if (run.folder / name).is_dir()), None)
    if found is None:
        return ""
    place = shlex.quote(str(found))
    if not (found / "adapter_config.json").exists():
        return f'dgemma run -m {place} "…"\ndgemma serve -m {place}'
    model = shlex.quote(str(run.info.get("model") or "MODEL"))
    return (f'dgemma run -m {model} --adapter {place} "…"\ndgemma serve -m {model} --adapter {place}\n'
            f"dgemma merge {model} {place} --out merged    # one model that needs no adapter")


def _samples(run: Run) -> dict[str, Any] | None:
    records = [record for record in run.of("samples") if record.extra.get("samples")]
    if not records:
        return None
    ranked = sorted(records[-1].extra["samples"], key=_score)
    wrong = [sample for sample in ranked if _score(sample) < 1]
    right = [sample for sample in ranked if _score(sample) >= 1]
    shown = wrong[: SAMPLES - min(_RIGHT_SAMPLES, len(right))]
    shown += right[: SAMPLES - len(shown)]
    return {"step": records[-1].step, "kept": len(ranked), "shown": [_sample(sample) for sample in shown]}


def _score(sample: Mapping[str, Any]) -> float:
    score = sample.get("score")
    return float(score) if isinstance(score, (int, float)) else -math.inf


def _sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    prompt, reference, answer = (_cut(str(sample.get(name) or "")) for name in ("prompt", "reference", "answer"))
    detail = [] if _score(sample) in (0, 1, -math.inf) else [f"score {number_text(_score(sample))}"]
    detail += [str(sample[name]) for name in ("error", "where") if sample.get(name)]
    return {"prompt": prompt, "reference": reference, "answer": _differences(reference, answer),
            "right": _score(sample) >= 1, "detail": " · ".join(detail)}


def _cut(text: str) -> str:
    rest = len(text) - _SAMPLE_CHARACTERS
    return text if rest <= 0 else f"{text[:_SAMPLE_CHARACTERS]}… ({rest:,} more characters)"


def _differences(reference: str, answer: str) -> list[tuple[str, bool]]:
    """The answer in pieces, each with whether it differs from the reference; whole where a comparison says nothing."""
    matcher = difflib.SequenceMatcher(None, reference, answer, autojunk=False)
    if not reference or max(len(reference), len(answer)) > _DIFFERENCE_CHARACTERS or matcher.ratio() < 0.5:
        return [(answer, False)]
    return [(answer[start:end], kind != "equal") for kind, _, _, start, end in matcher.get_opcodes() if end > start]


def _facts(run: Run) -> list[tuple[str, str]]:
    info, planned = run.info, run.plan.get("total")
    trainable, parameters, peak = info.get("trainable"), info.get("parameters"), info.get("peak_bytes")
    share = f" ({100 * trainable / parameters:.3g} %)" if trainable and parameters else ""
    ratio = f", {peak / planned:.2f} × the {size_text(planned)} planned" if peak and planned else ""
    facts = [("model", _listed(info.get("model"))), ("parameters", _number(parameters)),
             ("trained", _number(trainable) + share), ("examples", _number(info.get("examples"))),
             ("held-out examples", _number(info.get("validation_examples"))),
             ("tokens trained on", _number(info.get("tokens"))),
             ("time", long_duration_text(info["seconds"]) if info.get("seconds") else ""),
             ("peak memory", size_text(peak) + ratio if peak else ""), ("machine", _listed(info.get("machine"))),
             ("versions", _listed(info.get("versions")))]
    return [(name, value) for name, value in facts if value]


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, (int, float)) and value else ""


def _listed(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value or "")


def comparison_columns(runs: Mapping[str, Run]) -> dict[str, list[str]]:
    """By heading, what is said of each run; what is said of none is left out."""
    mains = list(dict.fromkeys(main for run in runs.values() if (main := run.main())))
    columns = {heading: [cell(run) for run in runs.values()] for heading, cell in _columns(mains).items()}
    return {heading: cells for heading, cells in columns.items() if set(cells) != {"–"}}


def _columns(mains: Sequence[str]) -> dict[str, Callable[[Run], str]]:
    """By heading, what is said of a run: "–" for nothing."""
    def main(run: Run) -> str:
        best, name = run.best(), run.main()
        if best is None or name is None or name not in best.values:
            return "–"
        return run.withinterval(best, name) + (f" {name}" if len(mains) > 1 else "")

    def of_best(name: str) -> Callable[[Run], str]:
        return lambda run: run.text(name, best.values[name]) if (best := run.best()) and name in best.values else "–"

    def of_info(name: str, text: Callable[[Any], str]) -> Callable[[Run], str]:
        return lambda run: text(run.info[name]) if run.info.get(name) else "–"

    def loss(run: Run) -> str:
        return number_text(min(filter(math.isfinite, run.series("validation", "loss")[1]), default=math.nan))

    return {words(mains[0]) if len(mains) == 1 else "task": main,
            "steps / canvas": of_best("steps_per_canvas"), "tokens / forward": of_best("tokens_per_forward"),
            "least validation loss": loss, "trained tokens": of_info("tokens", short_count),
            "time": of_info("seconds", long_duration_text), "trained parameters": of_info("trainable", short_count),
            "peak memory": of_info("peak_bytes", size_text)}


def _common(runs: Sequence[Run]) -> str:
    """What all runs share, so that it need not be said of each."""
    shared = {name: {_listed(run.info.get(name)) for run in runs} for name in ("model", "machine")}
    return " · ".join(f"{name}: {values.pop()}" for name, values in shared.items() if len(values) == 1 and all(values))


def _drawn(pictures: Sequence[Picture]) -> list[Any]:
    from markupsafe import Markup

    return [Markup(draw(picture.name, picture.curves, picture.x, picture.y)) for picture in pictures]


def _sweep(run: Run) -> dict[str, Any] | None:
    main, sweeps = swept(run)
    if main is None:
        return None
    last = max(sweeps)
    curves = [sweep_curve(records, main, f"step {time:,}", colour=int(time != last), dashed=time != last)
              for time, records in sweeps.items()]
    there = {name for record in sweeps[last] for name in record.values} - {"max_steps"}
    names = sorted(filter(there.__contains__, run.names("sweep")), key=lambda name: name != main)
    rows = [[number_text(record.values.get("max_steps", math.nan)),
             *(run.withinterval(record, name) for name in names)] for record in sweeps[last]]
    return {"step": last, "figures": _drawn(sweep_pictures(main, curves, kind_of(run, main))),
            "header": [words("max_steps"), *map(words, names)], "rows": rows}
