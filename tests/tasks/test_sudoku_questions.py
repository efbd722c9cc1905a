"""Questions about pictures of puzzles: what is answered is what is asked for, of what is drawn."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from dgemma.tasks import sudoku
from dgemma.tasks.sudoku_questions import PictureQuestions, held_out_questions

PUZZLES, SOLUTIONS = sudoku.generate(3, 40, seed=6)


def about(seed=0, **how):
    return PictureQuestions(**{"photos": 0.0, "reading": 0.5, **how}).about(PUZZLES, SOLUTIONS,
                                                                           np.random.default_rng(seed))


@pytest.mark.parametrize(("reading", "wanted"), [(1.0, PUZZLES), (0.0, SOLUTIONS)])
def test_what_is_read_is_the_puzzle_and_what_is_solved_its_solution(reading, wanted):
    for seed in range(12):
        asked = about(seed, reading=reading)
        assert [one.answers[-1] for one in asked] == [sudoku.format_grid(grid) for grid in wanted]


def test_questions_follow_from_their_generator():
    one, again, other = ([(one.said, one.answers, one.image.tobytes()) for one in about(seed, photos=0.5)]
                         for seed in (1, 1, 2))
    assert one == again
    assert one != other


def test_now_and_then_a_picture_has_been_asked_about_before():
    lengths = {len(one.messages()) for seed in range(40) for one in about(seed)}
    assert lengths == {1, 3}
    later = next(one for seed in range(40) for one in about(seed) if len(one.said) == 2)
    roles = [message["role"] for message in later.messages()]
    assert roles == ["user", "assistant", "user"]
    assert later.messages()[1]["content"] == later.answers[0]
    assert later.messages()[0]["content"][0] == {"type": "image", "image": later.image}


def test_held_out_pictures_are_the_same_every_time_and_are_read_and_solved():
    found = held_out_questions(2)
    assert found == held_out_questions(2)
    assert set(found) == set(sudoku.BANDS)
    for conversations in found.values():
        assert len(conversations) == 4
        for read, solved in zip(conversations[::2], conversations[1::2], strict=True):
            image = read[0]["content"][0]["image"]
            assert solved[0]["content"][0]["image"] == image
            assert Image.open(io.BytesIO(image)).mode == "RGB"
            assert sudoku.is_solved(sudoku.parse(solved[1]["content"]), sudoku.parse(read[1]["content"]))


def test_random_digits_are_read_as_they_are_drawn_and_never_solved():
    read = about(photos=0.0, reading=1.0, scribbled=1.0)
    assert {one.answers[-1] for one in read}.isdisjoint(map(sudoku.format_grid, PUZZLES))
    solved = about(photos=0.0, reading=0.0, scribbled=1.0)
    assert [one.answers[-1] for one in solved] == list(map(sudoku.format_grid, SOLUTIONS))
