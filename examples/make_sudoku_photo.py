"""The photo of a Sudoku that the README shows: drawn, in a font that no picture of the training shows.

    python examples/make_sudoku_photo.py examples/sudoku-photo.png
"""

from __future__ import annotations

import sys

import numpy as np

from dgemma.tasks import sudoku
from dgemma.tasks.sudoku_pictures import picture

PUZZLE = sudoku.generate(1, givens=34, seed=20)[0][0]


def main() -> None:
    """The command line."""
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    photo = picture(PUZZLE, np.random.default_rng(5), photo=True, held_out=True).image
    photo.quantize(128).save(sys.argv[1], optimize=True)  # a third of the size, and no difference to be seen


if __name__ == "__main__":
    main()
