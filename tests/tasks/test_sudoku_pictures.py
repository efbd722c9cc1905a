"""Pictures of puzzles: what is drawn is what was given, and unseen fonts stay unseen."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dgemma.tasks import sudoku
from dgemma.tasks.sudoku_pictures import HELD_OUT, SEEN, picture

PUZZLE = sudoku.generate(1, 30, seed=4)[0][0]


def drawn(seed: int, puzzle: np.ndarray = PUZZLE, **how: bool) -> Image.Image:
    return picture(puzzle, np.random.default_rng(seed), **{"photo": False, **how}).image


@pytest.mark.parametrize("photo", [False, True])
def test_a_picture_follows_from_its_puzzle_and_seed(photo):
    one, again, other = (np.asarray(drawn(seed, photo=photo)) for seed in (1, 1, 2))
    assert np.array_equal(one, again)
    assert one.shape != other.shape or not np.array_equal(one, other)


@pytest.mark.parametrize("photo", [False, True])
def test_a_picture_is_rgb_of_a_useful_size(photo):
    for seed in range(5):
        image = drawn(seed, photo=photo)
        assert image.mode == "RGB"
        assert min(image.size) > 230
        assert max(image.size) < 1200


def test_a_digit_is_drawn_in_its_own_cell_and_changes_no_other():
    """Of a page of nine cells a side, one digit fewer changes pixels within one."""
    lone = PUZZLE.copy()
    lone[np.flatnonzero(PUZZLE)[0]] = 0
    blank, full, fewer = (np.asarray(drawn(7, puzzle), int) for puzzle in (np.zeros(81, int), PUZZLE, lone))
    ink = np.argwhere((full != blank).any(-1))
    changed = np.argwhere((full != fewer).any(-1))
    assert len(changed)
    assert np.ptp(changed, axis=0).max() < np.ptp(ink, axis=0).max() / 8


@pytest.mark.parametrize("photo", [False, True])
def test_a_picture_knows_in_which_cell_a_point_lies(photo):
    """Where two pictures differ by one digit is that digit's cell."""
    place = int(np.flatnonzero(PUZZLE)[5])
    fewer = PUZZLE.copy()
    fewer[place] = 0
    rngs = [np.random.default_rng(1 if photo else 0) for _ in range(2)]
    one, two = (picture(puzzle, rng, photo=photo) for puzzle, rng in zip((PUZZLE, fewer), rngs, strict=True))
    strength = np.abs(np.asarray(one.image, int) - np.asarray(two.image, int)).sum(-1)
    points = np.argwhere(strength > strength.max() / 2)[:, ::-1]
    columns, rows = one.cells(points + 0.5).T
    assert np.median(np.floor(rows)) * 9 + np.median(np.floor(columns)) == place


def test_held_out_fonts_are_drawn_in_no_other_picture():
    seen, unseen = drawn(3), drawn(3, held_out=True)
    assert seen.size == unseen.size
    assert not np.array_equal(np.asarray(seen), np.asarray(unseen))
    assert not set(HELD_OUT) & set(SEEN)
