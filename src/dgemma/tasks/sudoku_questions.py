"""What is asked about pictures of Sudoku puzzles, and what is to be answered: what they say, or their solution.

Works on puzzles and pictures of them; knows nothing of tokens, training and models.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from dgemma.tasks import sudoku
from dgemma.tasks.sudoku_data import EVALUATION_SEED
from dgemma.tasks.sudoku_pictures import picture

READ = "What does it say?"
SOLVE = "Solve this"
_READ = (READ, "What does it say", "what does this say?", "Read this Sudoku", "Read it", "read this",
         "Read the puzzle.", "Transcribe this", "Write down what it says", "Which digits are in this picture?",
         "What is written here?", "Type this puzzle as text", "Give me the grid as text",
         "Please read the puzzle in the picture", "What is in this picture?",
         "Copy the grid, with dots for blanks", "Was steht da?", "Lies das")
_SOLVE = (SOLVE, "Solve this.", "solve", "Solve it", "Solve this Sudoku", "solve this puzzle", "Please solve this",
          "Please solve the puzzle in the picture", "Can you solve this?", "Can you finish this Sudoku for me?",
          "What is the solution?", "Solution please", "Fill in the blanks", "Complete the grid", "Finish this puzzle",
          "Sudoku", "Help me with this puzzle", "Löse das", "Bitte löse dieses Sudoku", "")
_TURNED = 0.1  # share of rounds in which the picture has been asked about before


@dataclass(frozen=True, eq=False)
class PictureQuestion:
    """A picture, what the user says about it in turn, and what is answered each time."""

    image: Image.Image
    said: tuple[str, ...]
    answers: tuple[str, ...]

    def messages(self, image: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """The conversation up to the user's last words. ``image`` is the part that is the picture (None: itself)."""
        first = image or {"type": "image", "image": self.image}
        found: list[dict[str, Any]] = []
        for words, answer in zip(self.said, self.answers, strict=True):
            content = words if found else [first, *([{"type": "text", "text": words}] if words else [])]
            found += [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        return found[:-1]


@dataclass(frozen=True)
class PictureQuestions:
    """Questions about pictures: a share of ``photos`` photographed, a share of ``reading`` asked what they say, the
    others to be solved. In a share of ``scribbled`` of those that are read stand random digits, so that the picture
    alone says which. ``held_out``: in fonts that no other picture shows."""

    photos: float
    reading: float
    held_out: bool = False
    scribbled: float = 0.0

    def about(self, puzzles: np.ndarray, solutions: np.ndarray, rng: np.random.Generator) -> list[PictureQuestion]:
        """A question about each puzzle [N, 81], now and then all of them such as come after another."""
        turned = rng.random() < _TURNED
        found = []
        for puzzle, solution in zip(puzzles, solutions, strict=True):
            reads = [bool(rng.random() < self.reading) for _ in range(1 + turned)]
            if all(reads) and rng.random() < self.scribbled:
                puzzle = random_digits(rng)
            image = picture(puzzle, rng, photo=bool(rng.random() < self.photos), held_out=self.held_out).image
            found.append(PictureQuestion(
                image, tuple(str(rng.choice(_READ if read else _SOLVE)) for read in reads),
                tuple(sudoku.format_grid(puzzle if read else solution) for read in reads)))
        return found


def random_digits(rng: np.random.Generator) -> np.ndarray:
    """A grid [81] of random digits, between a fifth of it and nearly all: no rule of Sudoku helps to read it."""
    return np.where(rng.random(81) < rng.uniform(0.2, 0.95), rng.integers(1, 10, 81), 0)


def held_out_questions(count: int, seed: int = 0) -> dict[str, list[list[dict[str, Any]]]]:
    """Conversations about ``count`` pictures of each band, every second a photo, in fonts that training does not show:
    each is read, and each is solved. By band; the pictures are PNG files, called a photo or a screenshot."""
    found: dict[str, list[list[dict[str, Any]]]] = {}
    for place, (band, givens) in enumerate(sudoku.BANDS.items()):
        puzzles, solutions = sudoku.generate(count, givens, seed=EVALUATION_SEED + seed)
        rng = np.random.default_rng([EVALUATION_SEED, seed, place])
        found[band] = []
        for number, (puzzle, solution) in enumerate(zip(puzzles, solutions, strict=True)):
            photo = number % 2 == 1
            image = picture(puzzle, rng, photo=photo, held_out=True).image
            part = {"type": "image", "image": _png(image), "name": "photo" if photo else "screenshot"}
            for words, answer in ((READ, puzzle), (SOLVE, solution)):
                asked = PictureQuestion(image, (words,), (sudoku.format_grid(answer),))
                found[band].append([*asked.messages(part), {"role": "assistant", "content": asked.answers[-1]}])
    return found


def _png(image: Image.Image) -> bytes:
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
