"""The photo that the README shows is small, can be read, and is what its script draws."""

import runpy
import sys
from pathlib import Path

import numpy as np

from dgemma.chat.pictures import open_picture

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_photo_is_small_and_what_its_script_draws(tmp_path, monkeypatch):
    photo, again = EXAMPLES / "sudoku-photo.png", tmp_path / "again.png"
    assert photo.stat().st_size < 150_000
    monkeypatch.setattr(sys, "argv", ["make_sudoku_photo.py", str(again)])
    runpy.run_path(str(EXAMPLES / "make_sudoku_photo.py"), run_name="__main__")
    one, other = (np.asarray(open_picture(path), float) for path in (photo, again))
    assert np.abs(one - other).mean() < 2
