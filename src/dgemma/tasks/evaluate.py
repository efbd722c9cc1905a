"""How well a model solves Sudoku, measured with the sampler that it ships with."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dgemma.errors import DgemmaError
from dgemma.fields import read_text
from dgemma.model import Model
from dgemma.tasks import sudoku
from dgemma.tasks.sudoku_data import EVALUATION_SEED


@dataclass(frozen=True)
class BandScore:
    """The score of one band of puzzles. ``exact``: all 81 digits right; ``givens_kept``: no given was changed."""

    count: int
    exact: float
    exact_interval: tuple[float, float]  # Wilson score interval, 95 %
    givens_kept: float
    mean_steps: float
    steps: dict[int, int]  # denoising steps -> how many puzzles took that many
    seconds_per_puzzle: float


def wilson_interval(successes: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson (1927) score interval of a proportion."""
    if count == 0:
        return (0.0, 1.0)
    share = successes / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return (max(0.0, centre - half), min(1.0, centre + half))


def grade(puzzle: np.ndarray, solution: np.ndarray, text: str) -> tuple[bool, bool]:
    """Of an answer to a puzzle [81]: whether all 81 digits are right, and whether the givens are kept."""
    digits = "".join(text.split())
    if len(digits) != 81 or not (digits.isascii() and digits.isdigit()):
        return False, False
    cells = np.frombuffer(digits.encode(), np.uint8) - ord("0")
    return bool((cells == solution).all()), bool((cells[puzzle > 0] == puzzle[puzzle > 0]).all())


def is_read(puzzle: np.ndarray, text: str) -> bool:
    """Whether an answer is nine lines that say a puzzle [81], blanks written as `sudoku.format_grid` writes them."""
    return "".join(text.split()) == sudoku.to_line(puzzle)


def band_of(puzzle: np.ndarray) -> str:
    """The band of a puzzle [81] by its givens; "other" outside every band."""
    givens = int((puzzle > 0).sum())
    return next((band for band, (low, high) in sudoku.BANDS.items() if low <= givens <= high), "other")


def evaluate_sudoku(model: Model, puzzles: np.ndarray, solutions: np.ndarray, *, seed: int = 0, batch: int = 32,
                    progress: Callable[[int, int], None] | None = None, **settings: Any) -> BandScore:
    """Ask the model for every puzzle [N, 81] and compare with the solutions [N, 81].

    ``settings`` are sampler settings, and max_tokens (the checkpoint's own if left out: a network that has not learnt
    yet may find no end); ``progress(done, count)`` is called after each batch.
    """
    if (generation := getattr(model, "generation_config", None)) is not None:
        settings.setdefault("max_tokens", generation.max_tokens)
    exact = kept = 0
    steps: Counter[int] = Counter()
    began = time.perf_counter()
    for start in range(0, len(puzzles), batch):
        part = puzzles[start : start + batch]
        answers = model.generate_batch([sudoku.to_line(p) for p in part],
                                       seeds=[seed + start + i for i in range(len(part))], **settings)
        for puzzle, solution, answer in zip(part, solutions[start : start + batch], answers, strict=True):
            steps[sum(answer.steps)] += 1
            right, keeps = grade(puzzle, solution, answer.text)
            exact += right
            kept += keeps
        if progress:
            progress(min(start + batch, len(puzzles)), len(puzzles))
    count = len(puzzles)
    return BandScore(count, exact / count, wilson_interval(exact, count), kept / count,
                     sum(n * times for n, times in steps.items()) / count, dict(sorted(steps.items())),
                     (time.perf_counter() - began) / count)


def evaluate_bands(model: Model, count: int, bands: list[str] | None = None, *, seed: int = 0,
                   progress: Callable[[str, int, int], None] | None = None, **settings: Any) -> dict[str, BandScore]:
    """Scores on ``count`` fresh puzzles per band, each from its own random grid, fixed by ``seed``."""
    parts = ((band, *sudoku.generate(count, sudoku.BANDS[band], seed=EVALUATION_SEED + seed))
             for band in bands or sudoku.BANDS)
    return _scores(model, parts, seed, progress, settings)


def read_puzzles(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read a file of ``{"puzzle": 81 characters, "solution": 81 digits}`` lines -> puzzles and solutions [N, 81].

    Raises DgemmaError naming file, line and mistake.
    """
    puzzles, solutions = [], []
    for number, line in enumerate(read_text(path, DgemmaError).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            puzzle, solution = sudoku.parse(entry["puzzle"]), sudoku.parse(entry["solution"])
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise DgemmaError(f'{path}, line {number}: expected {{"puzzle": "…", "solution": "…"}} '
                              f"({error})") from error
        if puzzle is None or solution is None or not sudoku.is_solved(solution, puzzle):
            raise DgemmaError(f"{path}, line {number}: puzzle must be 81 cells and solution a valid grid of 81 digits "
                              "that keeps its givens")
        puzzles.append(puzzle)
        solutions.append(solution)
    if not puzzles:
        raise DgemmaError(f"{path}: holds no puzzles")
    return np.stack(puzzles), np.stack(solutions)


def evaluate_file(model: Model, path: Path, *, seed: int = 0,
                  progress: Callable[[str, int, int], None] | None = None, **settings: Any) -> dict[str, BandScore]:
    """Scores on the puzzles of a file, by band; those outside every band are called "other"."""
    puzzles, solutions = read_puzzles(path)
    names = np.array([band_of(puzzle) for puzzle in puzzles])
    parts = ((band, puzzles[names == band], solutions[names == band]) for band in (*sudoku.BANDS, "other"))
    return _scores(model, (part for part in parts if len(part[1])), seed, progress, settings)


def _scores(model: Model, parts: Iterable[tuple[str, np.ndarray, np.ndarray]], seed: int,
            progress: Callable[[str, int, int], None] | None, settings: dict[str, Any]) -> dict[str, BandScore]:
    """The scores of puzzles and their solutions, by band."""
    return {band: evaluate_sudoku(model, puzzles, solutions, seed=seed, **settings,
                                  progress=None if progress is None else partial(progress, band))
            for band, puzzles, solutions in parts}
