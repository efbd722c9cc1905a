import numpy as np
import pytest

from dgemma.errors import DgemmaError
from dgemma.tasks import sudoku

WIKI = "530070000600195000098000060800060003400803001700020006060000280000419005000080079"
WIKI_SOLUTION = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
SEVENTEEN = "000000010400000000020000000000050407008000300001090000300400200050100000000806000"


def cells(line: str) -> np.ndarray:
    return np.array([int(ch) for ch in line], np.uint8)


def brute_force_count(puzzle: list[int], limit: int = 2) -> int:
    """Plain backtracking, sharing nothing with the module: the number of solutions, up to ``limit``."""

    def options(grid: list[int], cell: int) -> list[int]:
        r, c = divmod(cell, 9)
        used = set(grid[r * 9 : r * 9 + 9]) | set(grid[c::9])
        for dr in range(3):
            start = (r // 3 * 3 + dr) * 9 + c // 3 * 3
            used |= set(grid[start : start + 3])
        return [d for d in range(1, 10) if d not in used]

    grid = list(puzzle)
    for cell, digit in enumerate(puzzle):
        if digit:
            grid[cell] = 0
            if digit not in options(grid, cell):
                return 0
            grid[cell] = digit

    def count(found: int) -> int:
        blanks = [(options(grid, cell), cell) for cell in range(81) if not grid[cell]]
        if not blanks:
            return found + 1
        choices, cell = min(blanks, key=lambda item: len(item[0]))
        for digit in choices:
            grid[cell] = digit
            found = count(found)
            grid[cell] = 0
            if found >= limit:
                break
        return found

    return count(0)


def test_solves_known_puzzles() -> None:
    solutions, counts = sudoku.solve(np.stack([cells(WIKI), cells(SEVENTEEN)]))
    assert counts.tolist() == [1, 1]
    assert "".join(map(str, solutions[0])) == WIKI_SOLUTION
    assert sudoku.is_solved(solutions[1], cells(SEVENTEEN))


def test_singles_solve_what_needs_no_guess() -> None:
    solved = sudoku.random_solutions(3, np.random.default_rng(0))
    nearly = solved.copy()
    nearly[:, :9] = 0  # every column and box says which digit is left
    assert sudoku.singles_solve(nearly).all()
    assert not sudoku.singles_solve(np.zeros((1, 81), np.uint8)).any()


def test_singles_fill_in_what_is_right_and_leave_the_rest_blank() -> None:
    puzzles, solutions = sudoku.generate(24, (25, 29), seed=3)
    filled = sudoku.fill_singles(puzzles)
    assert ((filled == solutions) | (filled == 0)).all() and ((filled == puzzles) | (puzzles == 0)).all()
    solved = (filled == solutions).all(axis=1)
    assert 0 < solved.sum() < 24
    assert (sudoku.singles_solve(puzzles) == solved).all()
    assert (sudoku.fill_singles(filled) == filled).all()  # nothing more is to be had


def test_a_puzzle_without_a_solution_is_filled_in_without_an_error() -> None:
    impossible = np.zeros((1, 81), np.uint8)
    impossible[0, :9] = [1, 2, 3, 4, 5, 6, 7, 8, 0]
    impossible[0, 17] = 9
    assert sudoku.fill_singles(impossible).shape == (1, 81)


def test_blank_grid_has_several_solutions() -> None:
    blank = np.zeros((2, 81), np.uint8)
    solutions, counts = sudoku.solve(blank)
    assert counts.tolist() == [2, 2]
    assert sudoku.solved_mask(solutions, blank).all()


def test_impossible_puzzles_have_no_solution() -> None:
    conflict = np.zeros(81, np.uint8)
    conflict[[0, 8]] = 5  # twice in a row
    no_candidate = np.zeros(81, np.uint8)
    no_candidate[:8], no_candidate[17] = range(1, 9), 9  # cell 8 sees all nine digits
    wrong_full = cells(WIKI_SOLUTION)
    wrong_full[[0, 1]] = wrong_full[[1, 0]]
    solutions, counts = sudoku.solve(np.stack([conflict, no_candidate, wrong_full]))
    assert counts.tolist() == [0, 0, 0]
    assert not solutions.any()


def test_solve_agrees_with_brute_force() -> None:
    rng = np.random.default_rng(7)
    bases, grids = sudoku.base_puzzles(8, rng)
    fewer, wrong = bases.copy(), bases.copy()
    for i in range(len(bases)):
        given = rng.choice(np.flatnonzero(bases[i]), 2, replace=False)
        fewer[i, given[:1]] = 0  # minimal puzzles lose uniqueness with any given
        wrong[i, given[1]] = wrong[i, given[1]] % 9 + 1
    random_subsets = np.where(rng.random((8, 81)) < 0.33, grids, 0).astype(np.uint8)
    puzzles = np.concatenate([bases, fewer, wrong, random_subsets])
    _, counts = sudoku.solve(puzzles)
    assert counts[:8].tolist() == [1] * 8
    assert counts[8:16].tolist() == [2] * 8
    assert counts.tolist() == [brute_force_count(p.tolist()) for p in puzzles]


def test_solve_handles_more_boards_than_run_at_once() -> None:
    rng = np.random.default_rng(8)
    grids = sudoku.random_solutions(40, rng)
    puzzles = np.where(rng.random((40, 81)) < 0.28, grids, 0).astype(np.uint8)
    expected = sudoku.solve(puzzles)[1]
    many = np.tile(puzzles, (60, 1))
    solutions, counts = sudoku.solve(many)
    assert counts.tolist() == 60 * expected.tolist()
    assert sudoku.solved_mask(solutions, many).all()


@pytest.mark.parametrize("bad", [np.zeros(81), np.zeros((1, 80)), np.full((1, 81), 10), np.full((1, 81), -1)])
def test_solve_rejects_malformed_input(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="puzzle"):
        sudoku.solve(bad)


def test_random_solutions_are_valid_and_distinct() -> None:
    grids = sudoku.random_solutions(300, np.random.default_rng(1))
    assert sudoku.solved_mask(grids, np.zeros_like(grids)).all()
    # Relabelled so that the first row is 1..9, grids that only differ by digit names would coincide.
    names = grids[:, :9].argsort(axis=1)
    canonical = np.take_along_axis(names, grids.astype(np.int64) - 1, axis=1)
    assert len(np.unique(canonical, axis=0)) == 300


def test_augment_keeps_puzzles_valid_and_unique() -> None:
    rng = np.random.default_rng(3)
    base, grid = np.repeat(cells(WIKI)[None], 50, 0), np.repeat(cells(WIKI_SOLUTION)[None], 50, 0)
    puzzles, solutions = sudoku.augment(base, grid, rng)
    assert sudoku.solved_mask(solutions, puzzles).all()
    found, counts = sudoku.solve(puzzles)
    assert (counts == 1).all() and (found == solutions).all()
    assert len(np.unique(solutions, axis=0)) == 50


@pytest.mark.parametrize("givens", [25, 35, (40, 45)])
def test_generate_gives_unique_puzzles_with_asked_givens(givens: int | tuple[int, int]) -> None:
    low, high = (givens, givens) if isinstance(givens, int) else givens
    puzzles, solutions = sudoku.generate(6, givens, seed=5)
    number = (puzzles > 0).sum(axis=1)
    assert puzzles.dtype == np.uint8 and number.min() >= low and number.max() <= high
    found, counts = sudoku.solve(puzzles)
    assert (counts == 1).all() and (found == solutions).all()


def test_generate_is_fixed_by_its_seed() -> None:
    first, again, other = (sudoku.generate(4, (26, 30), seed=seed)[0] for seed in (1, 1, 2))
    assert (first == again).all() and (first != other).any()


@pytest.mark.parametrize("givens", [21, 82, (20, 30), (30, 90), (30, 24)])
def test_generate_rejects_impossible_givens(givens: int | tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="givens"):
        sudoku.generate(1, givens, seed=0)


@pytest.fixture(scope="module")
def source() -> sudoku.PuzzleSource:
    return sudoku.PuzzleSource(bases=60, seed=11)


def test_source_samples_unique_puzzles_in_range(source: sudoku.PuzzleSource) -> None:
    puzzles, solutions = source.sample(400, (26, 45))
    number = (puzzles > 0).sum(axis=1)
    assert set(number.tolist()) == set(range(26, 46))
    found, counts = sudoku.solve(puzzles)
    assert (counts == 1).all() and (found == solutions).all()


def test_source_takes_givens_per_row(source: sudoku.PuzzleSource) -> None:
    wanted = np.array([25, 81, 40])
    puzzles, _ = source.sample(3, wanted)
    assert (puzzles > 0).sum(axis=1).tolist() == wanted.tolist()
    with pytest.raises(ValueError, match="shape"):
        source.sample(2, wanted)


def test_source_says_when_no_base_is_small_enough(source: sudoku.PuzzleSource) -> None:
    few = sudoku.PuzzleSource.__new__(sudoku.PuzzleSource)
    few._set(np.where(np.arange(81) < 60, source.solutions, 0), source.solutions, 0)
    with pytest.raises(ValueError, match="no base has 30 givens"):
        few.sample(5, 30)


def test_source_survives_saving(source: sudoku.PuzzleSource, tmp_path) -> None:
    path = tmp_path / "new" / "bases.npz"
    source.save(path)
    assert [p.name for p in path.parent.iterdir()] == ["bases.npz"]
    loaded = sudoku.PuzzleSource.cached(path, bases=60, seed=11)
    assert (loaded.puzzles == source.puzzles).all()
    first, second = (s.sample(20, (30, 39))[0] for s in (loaded, sudoku.PuzzleSource.load(path)))
    assert (first == second).all()


def test_failed_save_keeps_the_old_file(source: sudoku.PuzzleSource, tmp_path, monkeypatch) -> None:
    path = tmp_path / "bases.npz"
    source.save(path)
    before = path.read_bytes()

    def fail(*_args, **_kwargs) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(DgemmaError, match="disk full"):
        source.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def boxed(line: str) -> str:
    rows = [" | ".join(" ".join(line[i + j : i + j + 3]) for j in (0, 3, 6)) for i in range(0, 81, 9)]
    return "\n------+-------+------\n".join("\n".join(rows[i : i + 3]) for i in (0, 3, 6))


DOTS = WIKI.replace("0", ".")
NINE = "\n".join(DOTS[i : i + 9] for i in range(0, 81, 9))


@pytest.mark.parametrize(
    "text",
    [
        WIKI,
        DOTS,
        WIKI.replace("0", "*"),
        WIKI.replace("0", "_"),
        NINE,
        NINE.replace("\n", " "),
        boxed(DOTS),
        boxed(WIKI),
        str(cells(WIKI).reshape(9, 9).tolist()),
        f"Please solve {DOTS}. Thanks.",
        f"Solve this 9x9 sudoku for me... {WIKI}, please (level 3).",
        f"Level 4:\n{NINE}\n\nGive 81 digits.",
        f"**Puzzle 7**\n\n{boxed(DOTS)}\nThat's all, folks.",
        f"Here is one. {' '.join(DOTS)}. Go",
        f"```\n{NINE}\n```",
    ],
)
def test_parse_reads_common_forms(text: str) -> None:
    assert sudoku.to_line(sudoku.parse(text)) == DOTS


@pytest.mark.parametrize("text", ["", "no grid here", WIKI[:80], WIKI + "12", "\n".join(["12345678"] * 9)])
def test_parse_returns_none_without_a_grid(text: str) -> None:
    assert sudoku.parse(text) is None


def test_formatted_grid_parses_back() -> None:
    text = sudoku.format_grid(cells(WIKI))
    assert text.splitlines() == NINE.splitlines()
    assert (sudoku.parse(text) == cells(WIKI)).all()


def test_is_solved_checks_rules_and_givens() -> None:
    puzzle, answer = cells(WIKI), cells(WIKI_SOLUTION)
    assert sudoku.is_solved(answer, puzzle)
    assert not sudoku.is_solved(puzzle, puzzle)
    relabelled = answer % 9 + 1  # a valid grid that changes the givens
    assert sudoku.is_solved(relabelled, np.zeros(81)) and not sudoku.is_solved(relabelled, puzzle)
    assert not sudoku.is_solved(answer.astype(int) - 1, np.zeros(81))
