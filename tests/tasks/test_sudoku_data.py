"""Training batches: prompts as the template makes them, answers that fit the canvas."""

import numpy as np
import pytest
import torch

from dgemma.chat.tokenizer import Tokenizer
from dgemma.tasks import sudoku
from dgemma.tasks.sudoku_data import HONEST_ANSWER, SudokuBatches
from dgemma.train.data import tokenizer


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return SudokuBatches(Tokenizer.from_folder(folder), 90, 4, seed=0, source=sudoku.PuzzleSource(60, 0),
                         givens=(24, 40))


@pytest.fixture(scope="module")
def kinds(batches):
    found = {}
    for step in range(200):
        batch = batches.batch(step)
        found.setdefault(batch.kind, batch)
    return found


def test_every_kind_of_batch_comes_up(kinds):
    assert set(kinds) == {"plain", "inside", "turns", "other"}


def test_a_plain_prompt_is_what_the_template_renders(batches, kinds):
    text = batches.tokenizer.decode(kinds["plain"].prompt[0].tolist())
    puzzle = sudoku.parse(text)
    assert puzzle is not None
    rendered = batches.tokenizer.apply_chat_template([{"role": "user", "content": sudoku.to_line(puzzle)}])
    assert kinds["plain"].prompt[0].tolist() == rendered


@pytest.mark.parametrize("kind", ["plain", "inside", "turns"])
def test_the_answer_solves_the_last_puzzle_of_the_prompt(batches, kinds, kind):
    for prompt, canvas in zip(kinds[kind].prompt, kinds[kind].canvas, strict=True):
        turn = batches.tokenizer.decode(prompt.tolist()).rsplit("<|turn>user", 1)[1]
        answer, end, fill = batches.tokenizer.decode(canvas.tolist()).partition("<turn|>")
        assert sudoku.is_solved(sudoku.parse(answer), sudoku.parse(turn))
        assert end
        assert fill.replace("<pad>", "") == ""


def test_what_is_no_puzzle_is_answered_honestly(batches, kinds):
    for canvas in kinds["other"].canvas:
        assert batches.tokenizer.decode(canvas.tolist()).split("<turn|>")[0] == HONEST_ANSWER


def test_a_batch_depends_on_seed_and_step_only(batches, tmp_path):
    batches.source.save(tmp_path / "p.npz")
    source = sudoku.PuzzleSource.cached(tmp_path / "p.npz", 60, 0)
    again = SudokuBatches(batches.tokenizer, 90, 4, seed=0, source=source, givens=(24, 40))
    for step in (0, 7, 3):
        assert torch.equal(batches.batch(step).prompt, again.batch(step).prompt)


def test_plain_batches_are_all_plain(batches):
    plain = SudokuBatches(batches.tokenizer, 90, 3, seed=0, source=batches.source, givens=(24, 40), plain=True)
    assert {plain.batch(step).kind for step in range(40)} == {"plain"}


@pytest.mark.parametrize("stuck", [0.0, 0.4])
def test_a_share_of_the_puzzles_is_beyond_singles_and_some_of_those_are_stuck(batches, stuck):
    hard = SudokuBatches(batches.tokenizer, 90, 20, 0, batches.source, (25, 29), 25, 0, plain=True, beyond_singles=0.5,
                         stuck=stuck)
    for step in range(3):
        text = [batches.tokenizer.decode(row.tolist()) for row in hard.batch(step).prompt]
        puzzles = np.array([sudoku.parse(one) for one in text])
        assert len(puzzles) == 20
        assert (~sudoku.singles_solve(puzzles)).sum() >= 10
        assert (sudoku.fill_singles(puzzles) == puzzles).all(axis=1).sum() == 10 * stuck
