"""The photo that the README shows is small, can be read, and is what its script draws."""

import runpy
import sys
from pathlib import Path

import numpy as np

import dgemma
from dgemma.chat.pictures import open_picture
from dgemma.tasks import sudoku

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_photo_is_small_and_what_its_script_draws(tmp_path, monkeypatch):
    photo, again = EXAMPLES / "sudoku-photo.png", tmp_path / "again.png"
    assert photo.stat().st_size < 150_000
    monkeypatch.setattr(sys, "argv", ["make_sudoku_photo.py", str(again)])
    runpy.run_path(str(EXAMPLES / "make_sudoku_photo.py"), run_name="__main__")
    one, other = (np.asarray(open_picture(path), float) for path in (photo, again))
    assert np.abs(one - other).mean() < 2


def test_the_model_beside_it_solves_the_photo_and_reads_nearly_all_of_it():
    model, photo = dgemma.load(EXAMPLES / "sudoku-seeing"), EXAMPLES / "sudoku-photo.png"
    [puzzle], [solution] = sudoku.generate(1, givens=34, seed=20)  # as its script has it
    solved = model.generate("Solve this", images=[photo], seed=1).text
    assert np.array_equal(sudoku.parse(solved), solution)
    read = sudoku.parse(model.generate("What does it say?", images=[photo], seed=1).text)
    assert (read == puzzle).sum() >= 79
