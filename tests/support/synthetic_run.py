"""A training run that never was: a folder as `dgemma train` leaves it, made of formulas."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from dgemma.train.log.journal import Journal

SOLUTION = "534678912\n672195348\n198342567\n859761423\n426853791\n713924856\n961537284\n287419635\n345286179"
RECIPE = """name: sudoku-lora
model: sudoku            # < & >
adapter: {rank: 16, alpha: 32}
objective:
  passes: 2
evaluation: {every: 200, metric: sudoku}
"""


def synthetic_run(folder: Path, *, steps: int = 4000, pace: float = 900.0, name: str = "sudoku-lora",
                  seed: int = 0) -> Path:
    """Write a run of ``steps`` steps that is evaluated every 200 and gets better by a factor e in ``pace`` steps."""
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "best").mkdir(exist_ok=True)
    (folder / "best" / "adapter_config.json").write_text("{}")
    (folder / "recipe.yaml").write_text(RECIPE)
    _write(folder / "run.json", {
        "name": name, "model": "google/diffusiongemma-26B-A4B-it", "parameters": 25_800_000_000,
        "trainable": 41_300_000, "machine": {"GPU": "one of 24 GB", "cores": 16},
        "versions": {"dgemma": "0.1", "torch": "2.13.0"}, "examples": 12_000, "validation_examples": 256,
        "seconds": steps * 0.9, "tokens": steps * 8192, "peak_bytes": 21_300_000_000, "finished": True})
    _write(folder / "plan.json", {"total": 20_600_000_000, "lines": [
        {"name": "weights", "nbytes": 16_800_000_000, "reason": "packed, Q4_K_M"},
        {"name": "adapters", "nbytes": 660_000_000, "reason": "float32, with gradients and two moments"},
        {"name": "activations", "nbytes": 3_140_000_000, "reason": "one micro-batch, checkpointed"}]})
    _write(folder / "preflight.json", [
        {"name": "canvas is used", "passed": True, "measured": "0 of 2048 tokens changed on the way", "meaning": ""},
        {"name": "no target leaks", "passed": True, "measured": "the largest difference was 0", "meaning": ""}])
    with Journal(folder, 0) as journal:
        best = -1.0
        for step in range(0, steps + 1, 10):
            left = math.exp(-step / pace)
            loss = 0.35 + 3.2 * left
            if step:
                journal.record(step, "train", {
                    "loss": loss * (1 + 0.15 * draw.gauss(0, 1)), "learning_rate": 1e-4 * min(step / 200, 1.0)
                    * (0.5 + 0.5 * math.cos(math.pi * step / steps)), "tokens_per_second": 9000 + draw.gauss(0, 80)})
            if step % 200 == 0:
                journal.record(step, "validation", {
                    "validation/loss": loss, "validation/conditioned": 0.8 * loss, "validation/causal": 0.5 + left,
                    **{f"validation/t={t}": loss * (0.15 + 1.7 * t * t) for t in (0.1, 0.3, 0.5, 0.7, 0.9, 1.0)},
                    "validation/corrupted": 1.6 * loss, "validation/clean": 0.3 * left, "validation/fill": 0.1 * left})
                right = max(0.0, 0.97 * (1 - left) + 0.015 * draw.gauss(0, 1) * (1 - left))
                width = 1.96 * math.sqrt(right * (1 - right) / 256 + 1e-5)
                journal.record(step, "task", {
                    "task/exact": right, "task/givens_kept": min(1.0, right + 0.02), "task/steps_per_canvas":
                    12 + 30 * left, "task/tokens_per_forward": 90 / (12 + 30 * left), "task/seconds_per_answer": 0.4},
                    main="task/exact", count=256, partial=False, best=right > best,
                    intervals={"task/exact": [max(0.0, right - width), min(1.0, right + width)],
                               "task/givens_kept": [max(0.0, right - width), min(1.0, right + 0.03)]})
                best = max(best, right)
            if step in (0, steps):
                for limit in (1, 2, 4, 8, 16, 48):
                    right = 0.97 * (1 - left) * (1 - math.exp(-limit / 4))
                    journal.record(step, "sweep", {"max_steps": limit, "task/exact": right, "task/steps_per_canvas":
                                                   min(limit, 12.4)}, intervals={"task/exact": [
                                                       max(0.0, right - 0.04), min(1.0, right + 0.04)]})
        journal.record(steps, "note", {}, text="preflight passed in 3.1 s")
        samples = [{"prompt": SOLUTION.replace("5", ".").replace("7", "."), "reference": SOLUTION,
                    "answer": SOLUTION if index % 3 else SOLUTION.replace("42", "24"),
                    "score": float(index % 3 > 0), "where": f"held-out.jsonl, line {index}"} for index in range(24)]
        samples.append({"prompt": "<script>alert('x')</script>", "reference": "a & b",
                        "answer": "\x1b[31m</pre>\x00\ud800", "score": None, "error": "the request <failed>"})
        journal.record(steps, "samples", {}, samples=samples)
    return folder


def _write(path: Path, data: object) -> None:
    path.write_text(json.dumps(data))
