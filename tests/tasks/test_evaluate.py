"""The Sudoku score counts what it says."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from dgemma.errors import DgemmaError
from dgemma.tasks import sudoku
from dgemma.tasks.evaluate import evaluate_bands, evaluate_file, evaluate_sudoku, read_puzzles, wilson_interval
from support.sudoku_solver import solve


class Solver:
    """Stands for a model: solves every puzzle but spoils the answers named in ``wrong``."""

    def __init__(self, wrong=()):
        self.wrong, self.asked = wrong, 0

    def generate_batch(self, prompts, seeds, **settings):
        answers = []
        for prompt in prompts:
            solution = solve(sudoku.parse(prompt)[None])[0][0]
            text = sudoku.format_grid(solution)
            if self.asked in self.wrong:
                text = {"given": _spoil(text, prompt, given=True), "blank": _spoil(text, prompt, given=False),
                        "words": "I cannot"}[self.wrong[self.asked]]
            self.asked += 1
            answers.append(SimpleNamespace(text=text, steps=[4 + self.asked]))
        return answers


def _spoil(text, prompt, given):
    digits = list(text.replace("\n", ""))
    place = next(i for i, cell in enumerate(prompt) if (cell != ".") == given)
    digits[place] = str(int(digits[place]) % 9 + 1)
    return "".join(digits)


def test_exact_givens_kept_and_steps_are_counted():
    puzzles, solutions = sudoku.generate(5, 40, seed=1)
    score = evaluate_sudoku(Solver(wrong={0: "given", 1: "blank", 2: "words"}), puzzles, solutions, batch=2)
    assert (score.count, score.exact, score.givens_kept) == (5, 0.4, 0.6)
    assert score.steps == {5: 1, 6: 1, 7: 1, 8: 1, 9: 1}
    assert score.mean_steps == 7


def test_bands_hold_puzzles_of_their_givens():
    assert {band: s.exact for band, s in evaluate_bands(Solver(), 2).items()} == dict.fromkeys(sudoku.BANDS, 1.0)


def test_a_file_is_scored_by_band(tmp_path):
    path = tmp_path / "p.jsonl"
    rows = [sudoku.generate(1, givens, seed=2) for givens in (27, 42, 60)]
    path.write_text("\n".join(json.dumps({"puzzle": sudoku.to_line(p[0]), "solution": sudoku.to_line(s[0])})
                              for p, s in rows))
    assert {band: score.count for band, score in evaluate_file(Solver(), path).items()} == \
        {"easy": 1, "hard": 1, "other": 1}


@pytest.mark.parametrize(("line", "message"), [
    ("{", "line 1: expected"), ('{"puzzle": "12"}', "line 1"), ('{"puzzle": "12", "solution": "34"}', "81 cells"),
    ("", "holds no puzzles")])
def test_a_bad_puzzle_file_is_named_with_its_line(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(line)
    with pytest.raises(DgemmaError, match=message):
        read_puzzles(path)


def test_the_interval_is_wilsons():
    # Agresti & Coull 1998: 10 of 10 -> (0.722, 1); 0 of 10 mirrors it.
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-3)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-3)
    assert np.isclose(sum(wilson_interval(150, 300)), 1.0)
