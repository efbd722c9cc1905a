"""The page that a training run ends with, and the one that sets several runs beside each other.

Works on run folders. Knows nothing of networks. A page is one static file that needs no network and follows the
reader's light or dark; the same folder gives the same bytes. What a run did not record is left out.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dgemma.errors import DgemmaError
from dgemma.files import atomic_write, size_text
from dgemma.train.log.figures import Axis, Curve
from dgemma.train.log.formats import duration_text, number_text
from dgemma.train.log.past_run import Run, interval_of, read_run
from dgemma.train.log.run_figures import (
    STEP,
    loss_figures,
    loss_kind,
    pace_figures,
    picture,
    sweep_curves,
    sweep_picture,
    task_curve,
    task_figures,
    value_text,
    with_interval,
    words,
)

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
    page = {
        "title": title or run.name, "about": _about(run), "warning": _warning(run), "tiles": _tiles(run),
        "use": _use(run), "task": task_figures(run), "band": name is not None and run.is_share(name),
        "sweep": _sweep(run), "losses": loss_figures(run), "loss_text": _loss_text(run), "samples": _samples(run),
        "checks": [_check(check) for check in run.checks], "facts": _facts(run), "plan": _plan(run),
        "run_figures": pace_figures(run), "recipe": run.recipe[:_RECIPE_CHARACTERS], "notes": _notes(run),
    }
    return _write(folder / FILE, "report.html.jinja", page)


def write_comparison(folder: Path, runs: Mapping[str, Path], *, title: str) -> Path:
    """Write ``report.html`` into ``folder``: the runs, by name, in one table and in the same pictures.

    Raises DgemmaError as `write_report` does, and when there are no runs.
    """
    if not runs:
        raise DgemmaError(f"{folder}: there are no runs to compare")
    read = {name: read_run(path) for name, path in runs.items()}
    mains = list(dict.fromkeys(main for run in read.values() if (main := run.main())))
    columns = [(heading, cell) for heading, cell in _columns(mains)
               if any(cell(run) != "–" for run in read.values())]
    rows = [{"name": name, "link": quote(Path(os.path.relpath(run.folder / FILE, folder)).as_posix()),
             "cells": [cell(run) for _, cell in columns]} for name, run in read.items()]
    share = bool(mains) and all(run.is_share(main) for run in read.values() if (main := run.main()))
    page = {
        "title": title, "about": f"{len(read)} run{'' if len(read) == 1 else 's'}. " + _common(list(read.values())),
        "header": [heading for heading, _ in columns], "rows": rows,
        "note": mains and "In brackets: the 95 % interval. What answers cost is that of each run's best checkpoint.",
        "figures": _comparison_figures(read, mains, share),
    }
    return _write(folder / FILE, "comparison.html.jinja", page)


def _write(path: Path, template: str, page: Mapping[str, Any]) -> Path:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True,
                              undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = environment.get_template(template).render(page).translate(_CONTROLS)
    with atomic_write(path) as beside:
        beside.write_bytes(text.encode("utf-8", "replace"))
    return path


def _about(run: Run) -> str:
    parts = [str(run.info["model"])] if run.info.get("model") else []
    parts.append(f"{run.last_step():,} steps")
    if run.info.get("examples"):
        parts.append(f"{run.info['examples']:,} examples")
    if seconds := run.info.get("seconds"):
        parts.append(duration_text(seconds))
    with contextlib.suppress(ValueError):  # a record without its time
        parts.append(f"{datetime.fromisoformat(run.records[-1].time):%d %B %Y, %H:%M} UTC")
    return " · ".join(parts)


def _warning(run: Run) -> str:
    failed = [str(check.get("name")) for check in run.checks if not check.get("passed")]
    said = [f"Preflight failed: {', '.join(failed)}."] if failed else []
    if run.info.get("finished") is False:
        said.append(f"This run is not finished: it stands at step {run.last_step():,}.")
    return " ".join(said)


def _tiles(run: Run) -> list[dict[str, str]]:
    tiles = []
    best, main = run.best(), run.main()
    first = next(iter(run.of("task")), None)
    if best is not None and main in best.values:
        before = "" if first is best or first is None or main not in first.values else (
            f"from {value_text(run, main, first.values[main])} at step {first.step:,}")
        pair = interval_of(best, main)
        detail = [f"{'best, ' if best.extra.get('best') else ''}step {best.step:,}", before]
        if pair and run.is_share(main):
            detail.insert(0, f"{100 * pair[0]:.1f}–{100 * pair[1]:.1f} %")
        tiles.append(_tile(words(main), value_text(run, main, best.values[main]), "; ".join(filter(None, detail))))
    for name in ("steps_per_canvas", "tokens_per_forward"):
        if best is not None and name in best.values:
            before = math.nan if first is None or first is best else first.values.get(name, math.nan)
            tiles.append(_tile(words(name), value_text(run, name, best.values[name]),
                               f"from {value_text(run, name, before)}" if math.isfinite(before) else ""))
    steps, losses = run.series("validation", "loss")
    if steps:
        low = min(losses, key=lambda loss: loss if math.isfinite(loss) else math.inf)
        tiles.append(_tile("validation loss", number_text(low),
                           f"least, step {steps[losses.index(low)]:,.0f}; from {number_text(losses[0])}"
                           if len(steps) > 1 else f"step {steps[0]:,.0f}"))
    if seconds := run.info.get("seconds"):
        tokens = run.info.get("tokens") or 0
        tiles.append(_tile("time", duration_text(seconds), f"{tokens / seconds:,.0f} tokens/s" if tokens else ""))
    if peak := run.info.get("peak_bytes"):
        planned = run.plan.get("total")
        tiles.append(_tile("peak memory", size_text(peak), f"planned {size_text(planned)}" if planned else ""))
    return tiles


def _tile(name: str, value: str, detail: str) -> dict[str, str]:
    return {"name": name, "value": value, "detail": detail}


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


def _loss_text(run: Run) -> str:
    text = []
    if run.series("validation", "loss")[0]:
        text.append("Validation: plain denoising of held-out examples with the same noise every time.")
    if len(run.series("train", "loss")[0]) >= 3:
        text.append("Training: each record faint, smoothed in full colour.")
    return " ".join(text)


def _sweep(run: Run) -> dict[str, Any] | None:
    main, curves = sweep_curves(run, None, 0)
    if main is None or not curves:
        return None
    last = max(record.step for record in run.of("sweep"))
    records = sorted((record for record in run.of("sweep") if record.step == last),
                     key=lambda record: record.values.get("max_steps", 0))
    names = [name for name in run.names("sweep") if name != "max_steps" and any(name in r.values for r in records)]
    names.sort(key=lambda name: name != main)
    rows = [[number_text(record.values.get("max_steps", math.nan)),
             *(with_interval(run, record, name) if name in record.values else "–" for name in names)]
            for record in records]
    return {"step": f"{last:,}", "figures": sweep_picture(main, curves, run.is_share(main)),
            "header": [words("max_steps"), *map(words, names)], "rows": rows}


def _samples(run: Run) -> dict[str, Any] | None:
    records = [record for record in run.of("samples") if record.extra.get("samples")]
    if not records:
        return None
    ranked = sorted(records[-1].extra["samples"], key=_score)
    wrong = [sample for sample in ranked if _score(sample) < 1]
    right = [sample for sample in ranked if _score(sample) >= 1]
    shown_wrong = wrong[: SAMPLES - min(_RIGHT_SAMPLES, len(right))]
    shown = shown_wrong + right[: SAMPLES - len(shown_wrong)]
    text = (f"{len(shown)} of {len(ranked)} that were kept after {records[-1].step:,} steps, the worst first. "
            "Marked: where an answer differs from its reference.")
    return {"text": text, "entries": [_sample(sample) for sample in shown]}


def _score(sample: Mapping[str, Any]) -> float:
    score = sample.get("score")
    return float(score) if isinstance(score, (int, float)) else -math.inf


def _sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    reference, answer = (_cut(str(sample.get(name) or "")) for name in ("reference", "answer"))
    detail = [] if _score(sample) in (0, 1, -math.inf) else [f"score {number_text(_score(sample))}"]
    detail += [str(sample[name]) for name in ("error", "where") if sample.get(name)]
    return {"prompt": _cut(str(sample.get("prompt") or "")), "reference": reference,
            "answer": _differences(reference, answer), "right": _score(sample) >= 1, "detail": " · ".join(detail)}


def _cut(text: str) -> str:
    rest = len(text) - _SAMPLE_CHARACTERS
    return text if rest <= 0 else f"{text[:_SAMPLE_CHARACTERS]}… ({rest:,} more characters)"


def _differences(reference: str, answer: str) -> list[tuple[str, bool]]:
    """The answer in pieces, each with whether it differs from the reference; whole where a comparison says nothing."""
    if not reference or max(len(reference), len(answer)) > _DIFFERENCE_CHARACTERS:
        return [(answer, False)]
    matcher = difflib.SequenceMatcher(None, reference, answer, autojunk=False)
    if matcher.ratio() < 0.5:  # another text altogether
        return [(answer, False)]
    return [(answer[start:end], kind != "equal") for kind, _, _, start, end in matcher.get_opcodes() if end > start]


def _check(check: Mapping[str, Any]) -> dict[str, Any]:
    return {name: check.get(name, "") for name in ("name", "passed", "measured", "meaning")}


def _facts(run: Run) -> list[tuple[str, str]]:
    info = run.info
    facts = [("model", str(info.get("model") or "")), ("parameters", _count(info.get("parameters")))]
    if info.get("trainable"):
        share = info["trainable"] / info["parameters"] if info.get("parameters") else None
        facts.append(("trained", f"{info['trainable']:,}" + (f" ({100 * share:.3g} %)" if share else "")))
    facts += [("examples", _count(info.get("examples"))),
              ("held-out examples", _count(info.get("validation_examples"))),
              ("tokens trained on", _count(info.get("tokens"))),
              ("time", duration_text(info["seconds"]) if info.get("seconds") else "")]
    if peak := info.get("peak_bytes"):
        planned = run.plan.get("total")
        facts.append(("peak memory", size_text(peak) + (
            f", {peak / planned:.2f} × the {size_text(planned)} planned" if planned else "")))
    facts += [("machine", _listed(info.get("machine"))), ("versions", _listed(info.get("versions")))]
    return [(name, value) for name, value in facts if value]


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, (int, float)) and value else ""


def _short_count(value: float) -> str:
    return next((f"{value / unit:.3g} {letter}" for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k"))
                 if value >= unit), f"{value:,}")


def _listed(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value or "")


def _plan(run: Run) -> list[dict[str, str]]:
    lines = [line for line in run.plan.get("lines", []) if isinstance(line, dict)]
    rows = [{"name": str(line.get("name", "")), "size": size_text(int(line.get("nbytes") or 0)),
             "reason": str(line.get("reason") or "")} for line in lines]
    if rows and run.plan.get("total"):
        rows.append({"name": "total, as planned", "size": size_text(int(run.plan["total"])), "reason": ""})
    return rows


def _notes(run: Run) -> list[tuple[str, str]]:
    notes = [(f"{record.step:,}", str(record.extra["text"])) for record in run.records
             if record.kind == "note" and record.extra.get("text")]
    return notes[-_NOTES:]


def _columns(mains: Sequence[str]) -> list[tuple[str, Any]]:
    """Headings, and what each says of a run: "–" for nothing."""
    def main(run: Run) -> str:
        best, name = run.best(), run.main()
        if best is None or name is None or name not in best.values:
            return "–"
        return with_interval(run, best, name) + (f" {name}" if len(mains) > 1 else "")

    def of_best(name: str) -> Any:
        return lambda run: (value_text(run, name, best.values[name]) if (best := run.best()) and name in best.values
                            else "–")

    def of_info(name: str, text: Any) -> Any:
        return lambda run: text(run.info[name]) if run.info.get(name) else "–"

    def loss(run: Run) -> str:
        values = [value for value in run.series("validation", "loss")[1] if math.isfinite(value)]
        return number_text(min(values)) if values else "–"

    return [(words(mains[0]) if len(mains) == 1 else "task", main),
            ("steps / canvas", of_best("steps_per_canvas")), ("tokens / forward", of_best("tokens_per_forward")),
            ("least validation loss", loss), ("trained tokens", of_info("tokens", _short_count)),
            ("time", of_info("seconds", duration_text)), ("trained parameters", of_info("trainable", _short_count)),
            ("peak memory", of_info("peak_bytes", size_text))]


def _common(runs: Sequence[Run]) -> str:
    """What all runs share, so that it need not be said of each."""
    said = []
    for name, label in (("model", "model"), ("machine", "machine")):
        values = {_listed(run.info.get(name)) for run in runs}
        if len(values) == 1 and "" not in values:
            said.append(f"{label}: {values.pop()}")
    return " · ".join(said)


def _comparison_figures(runs: Mapping[str, Run], mains: Sequence[str], share: bool) -> list[Any]:
    pictures, sweeps, sweep_main = [], [], None
    heading = mains[0] if len(mains) == 1 else "task"
    tasks = [replace(task_curve(run, main, name, index), star_label="")
             for index, (name, run) in enumerate(runs.items()) if (main := run.main())]
    pictures += picture(f"{heading} over steps", tasks, STEP, Axis(heading, "percent" if share else "plain"))
    curves = [Curve(name, *run.series("validation", "loss"), colour=index)
              for index, (name, run) in enumerate(runs.items())]
    pictures += picture("validation loss over steps", curves, STEP, Axis("validation loss", loss_kind(curves)))
    for index, (name, run) in enumerate(runs.items()):
        main, found = sweep_curves(run, name, index)
        sweep_main, sweeps = sweep_main or main, sweeps + found
    if sweep_main is not None:
        pictures += sweep_picture(sweep_main, sweeps, share)
    return pictures
