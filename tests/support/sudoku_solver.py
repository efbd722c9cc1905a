"""All solutions of puzzles, by the search that makes them."""

import numpy as np

from dgemma.tasks import sudoku


def solve(puzzles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Solve ``[N, 81]`` puzzles exactly.

    Returns ``(solutions uint8 [N, 81], counts [N])``: a count is 0, 1, or 2 for "more than one"; a
    solution row is zeros where the count is 0 and some solution where it is 2.
    Raises ValueError for a wrong shape or cells outside 0..9.
    """
    puzzles = sudoku._checked(puzzles)
    solutions, counts = np.zeros_like(puzzles), np.zeros(len(puzzles), np.int64)
    for start in range(0, len(puzzles), 1 << 16):
        part = slice(start, start + (1 << 16))
        masks = sudoku._DIGIT_MASK[puzzles[part].T]
        solutions[part], counts[part] = sudoku._search(masks, np.full(masks.shape[1], 2))
    return solutions, counts
