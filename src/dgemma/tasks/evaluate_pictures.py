"""How well a model reads pictures of Sudoku puzzles, and solves them from these, beside the same puzzles as text.

The pictures are in fonts that training never shows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from dgemma.model import Model
from dgemma.tasks import sudoku
from dgemma.tasks.evaluate import grade, is_read, wilson_interval
from dgemma.tasks.sudoku_data import EVALUATION_SEED
from dgemma.tasks.sudoku_pictures import picture
from dgemma.tasks.sudoku_questions import READ, SOLVE

KINDS = ("clean", "photo")


@dataclass(frozen=True)
class PictureScore:
    """The score of pictures of one kind and band. ``read``: all 81 cells right; ``solved``: all 81 digits right;
    ``text_solved``: of the same puzzles as text; ``solved_if_read``: of those that were read right."""

    count: int
    read: float
    read_interval: tuple[float, float]  # Wilson score intervals, 95 %
    solved: float
    solved_interval: tuple[float, float]
    solved_if_read: float | None  # None: none was read
    text_solved: float
    text_interval: tuple[float, float]
    seconds_per_picture: float  # to read it and to solve it


def evaluate_pictures(model: Model, count: int, kinds: Sequence[str] = KINDS, bands: Sequence[str] | None = None, *,
                      seed: int = 0, batch: int = 32, progress: Callable[[str, int, int], None] | None = None,
                      **settings: Any) -> dict[str, dict[str, PictureScore]]:
    """Scores on pictures of ``count`` fresh puzzles per band, those that `evaluate_bands` asks for: by kind, and within
    by band and of "all" bands.

    ``settings`` are sampler settings and max_tokens, as in `evaluate_sudoku`; ``progress(what, done, count)`` is called
    after each batch. Raises DgemmaError for a model that sees no pictures.
    """
    if (generation := getattr(model, "generation_config", None)) is not None:
        settings.setdefault("max_tokens", generation.max_tokens)
    found: dict[str, dict[str, _Answered]] = {kind: {} for kind in kinds}
    for band in bands or sudoku.BANDS:
        puzzles, solutions = sudoku.generate(count, sudoku.BANDS[band], seed=EVALUATION_SEED + seed)
        texts = [sudoku.to_line(puzzle) for puzzle in puzzles]

        def answered(what: str, prompts: Sequence[Any], band: str = band) -> list[str]:
            return _answers(model, prompts, seed, batch, progress and partial(progress, f"{band}, {what}"), settings)

        as_text = _solved(puzzles, solutions, answered("text", texts))
        for kind in kinds:
            images = pictures_of(puzzles, kind, seed)
            began = time.perf_counter()
            read = np.array([is_read(puzzle, said) for puzzle, said in
                             zip(puzzles, answered(f"{kind} read", _asked(images, READ)), strict=True)])
            solved = _solved(puzzles, solutions, answered(f"{kind} solved", _asked(images, SOLVE)))
            found[kind][band] = _Answered(read, solved, as_text, time.perf_counter() - began)
    return {kind: {band: one.score() for band, one in {**by_band, "all": _together([*by_band.values()])}.items()}
            for kind, by_band in found.items()}


@dataclass(frozen=True)
class _Answered:
    """Which pictures were read, and solved, and which of their puzzles as text, bool [N] each; and in how many
    seconds."""

    read: np.ndarray
    solved: np.ndarray
    as_text: np.ndarray
    seconds: float

    def score(self) -> PictureScore:
        count = len(self.read)
        of_read = float(self.solved[self.read].mean()) if self.read.any() else None
        return PictureScore(count, *_share(self.read), *_share(self.solved), of_read, *_share(self.as_text),
                            self.seconds / count)


def _together(parts: Sequence[_Answered]) -> _Answered:
    read, solved, as_text = (np.concatenate([getattr(part, name) for part in parts])
                             for name in ("read", "solved", "as_text"))
    return _Answered(read, solved, as_text, sum(part.seconds for part in parts))


def _share(right: np.ndarray) -> tuple[float, tuple[float, float]]:
    """The share of what is right, and its interval."""
    return float(right.mean()), wilson_interval(int(right.sum()), len(right))


def pictures_of(puzzles: np.ndarray, kind: str, seed: int = 0) -> list[Image.Image]:
    """A picture of each puzzle [N, 81], of one of `KINDS`, which follows from the puzzle's place, kind and seed."""
    return [picture(puzzle, np.random.default_rng([EVALUATION_SEED, seed, KINDS.index(kind), number]),
                    photo=kind == "photo", held_out=True).image for number, puzzle in enumerate(puzzles)]


def _asked(images: Sequence[Image.Image], words: str) -> list[list[dict[str, Any]]]:
    """The same words about each picture, as prompts."""
    return [[{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": words}]}]
            for image in images]


def _solved(puzzles: np.ndarray, solutions: np.ndarray, texts: Sequence[str]) -> np.ndarray:
    return np.array([grade(*one)[0] for one in zip(puzzles, solutions, texts, strict=True)])


def _answers(model: Model, prompts: Sequence[Any], seed: int, batch: int, progress: Callable[[int, int], None] | None,
             settings: dict[str, Any]) -> list[str]:
    """The texts of the answers, the i-th with seed ``seed + i``."""
    found: list[str] = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        answers = model.generate_batch(part, seeds=[seed + start + place for place in range(len(part))], **settings)
        found += [answer.text for answer in answers]
        if progress:
            progress(len(found), len(prompts))
    return found
