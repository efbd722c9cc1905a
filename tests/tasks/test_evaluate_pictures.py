"""The score of pictures counts what it says."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dgemma.tasks import sudoku
from dgemma.tasks.evaluate_pictures import evaluate_pictures, pictures_of
from dgemma.tasks.sudoku_data import EVALUATION_SEED
from dgemma.tasks.sudoku_questions import READ, SOLVE


class Reader:
    """Stands for a model that knows the pictures of easy puzzles; what stands in ``misread`` it reads wrongly, and so
    solves wrongly."""

    def __init__(self, count, misread=()):
        self.puzzles, self.solutions = sudoku.generate(count, sudoku.BANDS["easy"], seed=EVALUATION_SEED)
        self.known = {kind: [image.tobytes() for image in pictures_of(self.puzzles, kind)]
                      for kind in ("clean", "photo")}
        self.misread, self.batches = set(misread), []

    def generate_batch(self, prompts, seeds, **settings):
        self.batches.append(len(prompts))
        return [SimpleNamespace(text=self._answer(prompt)) for prompt in prompts]

    def _answer(self, prompt):
        if isinstance(prompt, str):
            place = [sudoku.to_line(puzzle) for puzzle in self.puzzles].index(prompt)
            return sudoku.format_grid(self.solutions[place])
        image, words = prompt[0]["content"]
        kind, place = next((kind, known.index(image["image"].tobytes())) for kind, known in self.known.items()
                           if image["image"].tobytes() in known)
        if (kind, place) in self.misread:
            return sudoku.format_grid(self.solutions[place - 1])
        grids = {READ: self.puzzles, SOLVE: self.solutions}[words["text"]]
        return sudoku.format_grid(grids[place])


def test_what_is_read_and_solved_is_counted_by_kind_beside_the_text():
    reader = Reader(4, misread=[("photo", 1), ("photo", 3)])
    scores = evaluate_pictures(reader, 4, bands=["easy"], batch=3)
    assert {kind: set(by_band) for kind, by_band in scores.items()} == {kind: {"easy", "all"} for kind in
                                                                        ("clean", "photo")}
    clean, photo = scores["clean"]["easy"], scores["photo"]["all"]
    assert (clean.count, clean.read, clean.solved, clean.solved_if_read, clean.text_solved) == (4, 1, 1, 1, 1)
    assert (photo.count, photo.read, photo.solved, photo.solved_if_read, photo.text_solved) == (4, 0.5, 0.5, 1, 1)
    assert photo.read_interval[0] < 0.5 < photo.read_interval[1]
    assert set(reader.batches) == {3, 1}


def test_nothing_read_has_no_share_that_was_solved():
    scores = evaluate_pictures(Reader(1, misread=[("clean", 0)]), 1, ["clean"], ["easy"])
    assert scores["clean"]["all"].solved_if_read is None


@pytest.mark.parametrize("kind", ["clean", "photo"])
def test_pictures_follow_from_their_seed(kind):
    puzzles = sudoku.generate(2, 40, seed=1)[0]
    one, again, other = ([image.tobytes() for image in pictures_of(puzzles, kind, seed)] for seed in (0, 0, 1))
    assert one == again != other
