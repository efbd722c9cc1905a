"""Sudoku puzzles for training and evaluation: solver, generator, symmetries, text forms (numpy only).

A puzzle is a row-major ``uint8 [81]`` array, 0 = blank; a solution holds digits 1..9. Everything works
on batches ``[N, 81]``. The solver keeps one 9-bit candidate mask per cell and is vectorised across
boards: the board axis comes last in memory, so each numpy call runs over many boards at once.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from dgemma.files import atomic_write, make_folder

MIN_GIVENS, MAX_GIVENS = 22, 81
BANDS: dict[str, tuple[int, int]] = {"easy": (40, 45), "medium": (30, 39), "hard": (24, 29)}

Givens = int | tuple[int, int] | np.ndarray

_ALL = np.uint16(0x1FF)
_BIT_COUNT = np.array([mask.bit_count() for mask in range(512)], np.uint8)
_DIGIT_MASK = np.array([0x1FF] + [1 << d for d in range(9)], np.uint16)  # a blank allows every digit
_CHUNK = 2048  # boards in flight: large enough to hide numpy's call cost, small enough to stay in cache
_DIG_BATCH = 4096
_CELL = np.arange(81)
_ROW, _COL = _CELL // 9, _CELL % 9
_BOX = _ROW // 3 * 3 + _COL // 3
_UNITS = np.array([np.flatnonzero(kind == i) for kind in (_ROW, _COL, _BOX) for i in range(9)])  # [27, 9]


# ---- solver ----------------------------------------------------------------------------------------


def _fold(cells: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Bits present at least once, and at least twice, over the nine cells of a unit."""
    once, twice = cells[0].copy(), np.zeros_like(cells[0])
    for cell in cells[1:]:
        twice |= once & cell
        once |= cell
    return once, twice


def _fold_units(c: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """``_fold`` of rows, columns and boxes of ``c`` [3, 3, 3, 3, M] = (band, row, stack, column, board)."""
    pairs = [(i, j) for i in range(3) for j in range(3)]
    return [_fold([c[:, :, i, j] for i, j in pairs]), _fold([c[i, j] for i, j in pairs]),
            _fold([c[:, i, :, j] for i, j in pairs])]


def _spread(rows: np.ndarray, cols: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """OR of the three unit masks that each cell belongs to: three [3, 3, M] -> [3, 3, 3, 3, M]."""
    return (rows[:, :, None, None] | cols) | boxes[:, None, :, None]


def _propagate_once(c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One round of naked then hidden singles on candidates [81, M]: (new candidates, contradiction [M])."""
    m = c.shape[1]
    c = c.reshape(3, 3, 3, 3, m)
    fixed = c * ((c & (c - np.uint16(1))) == 0)
    (row, row2), (col, col2), (box, box2) = _fold_units(fixed)
    clash = (row2 | col2 | box2).reshape(9, m)
    c = (c & ~_spread(row, col, box)) | fixed
    (row, row2), (col, col2), (box, box2) = _fold_units(c)
    missing = ((row & col & box) ^ _ALL).reshape(9, m)
    hidden = c & _spread(row & ~row2, col & ~col2, box & ~box2)
    torn = (hidden & (hidden - (hidden != 0))).reshape(81, m)  # one cell must hold two digits
    c = np.where(hidden != 0, hidden, c).reshape(81, m)
    bad = np.bitwise_or.reduce(clash | missing, axis=0) | np.bitwise_or.reduce(torn, axis=0)
    return c, bad != 0


def _branch(c: np.ndarray, rng: np.random.Generator | None) -> tuple[np.ndarray, np.ndarray]:
    """Split stuck boards [81, S] on a cell with fewest candidates: (one digit there, all the others)."""
    size = _BIT_COUNT[c].astype(np.float32)
    size[size < 2] = 99
    if rng is not None:
        size += rng.random(size.shape, np.float32) * np.float32(0.5)
    cell, board = size.argmin(axis=0), np.arange(c.shape[1])
    mask = c[cell, board]
    first = mask & (~mask + np.uint16(1))
    if rng is not None:
        first = np.where(rng.random(len(first)) < 0.5, first, mask ^ first)
    left, right = c.copy(), c.copy()
    left[cell, board] = first
    right[cell, board] = mask ^ first
    return left, right


def _search(candidates: np.ndarray, limits: np.ndarray,
            rng: np.random.Generator | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Count solutions of boards given as candidate masks ``uint16 [81, N]``: bit d-1 is set where digit d may stand.

    A board is stopped at its number of ``limits`` [N]; with ``rng`` branches are random instead of in cell and digit
    order. Returns one of the solutions found ``uint8 [N, 81]`` (zeros if none), and how many, limit included [N].
    """
    n = candidates.shape[1]
    solutions, counts = np.zeros((n, 81), np.uint8), np.zeros(n, np.int64)
    # Depth first: at most _CHUNK boards run at once and postponed branches are taken last in, first out,
    # so even an empty grid needs memory for one path per running board only.
    postponed: list[tuple[np.ndarray, np.ndarray]] = [(candidates, np.arange(n))]
    c, tag = candidates[:, :0], np.arange(0)
    while True:
        if len(tag) < _CHUNK * 3 // 4 and postponed:
            parts, room = [(c, tag)], _CHUNK - len(tag)
            while postponed and room > 0:
                block, owner = postponed.pop()
                if len(owner) > room:
                    postponed.append((block[:, :-room], owner[:-room]))
                    block, owner = block[:, -room:], owner[-room:]
                wanted = counts[owner] < limits[owner]
                parts.append((block[:, wanted], owner[wanted]))
                room -= len(parts[-1][1])
            c = np.concatenate([part[0] for part in parts], axis=1)
            tag = np.concatenate([part[1] for part in parts])
        if not len(tag):
            if postponed:
                continue
            return solutions, counts
        new, bad = _propagate_once(c)
        still = ~np.bitwise_or.reduce(new ^ c, axis=0).astype(bool) & ~bad
        c, keep = new, ~bad
        if still.any():
            index = np.flatnonzero(still)
            settled = c[:, index]
            # A board that no longer changes without contradiction is solved once all cells are single.
            full = ~np.bitwise_or.reduce(settled & (settled - np.uint16(1)), axis=0).astype(bool)
            if full.any():
                owner = tag[index[full]]
                solutions[owner] = _digits(settled[:, full]).T
                counts = np.minimum(counts + np.bincount(owner, minlength=n), limits)
                keep[index[full]] = False
            index = index[~full]
            index = index[counts[tag[index]] < limits[tag[index]]]
            if len(index):
                c[:, index], other = _branch(c[:, index], rng)
                postponed.append((other, tag[index]))
            keep &= counts[tag] < limits[tag]
        if np.count_nonzero(keep) < len(keep):
            c, tag = c[:, keep], tag[keep]


def _digits(singles: np.ndarray) -> np.ndarray:
    """Digits 1..9 of one-bit masks: the number of bits in ``mask - 1``, plus one."""
    return _BIT_COUNT[singles - np.uint16(1)] + np.uint8(1)


def singles_solve(puzzles: np.ndarray) -> np.ndarray:
    """Whether naked and hidden singles alone solve each puzzle, without looking further or guessing: bool ``[N]``.

    Raises ValueError for what are no puzzles.
    """
    return np.count_nonzero(fill_singles(puzzles), axis=1) == 81


def fill_singles(puzzles: np.ndarray) -> np.ndarray:
    """Puzzles ``[N, 81]`` with every digit that naked and hidden singles give: ``uint8 [N, 81]``.

    Raises ValueError for what are no puzzles.
    """
    masks = _DIGIT_MASK[_checked(puzzles).T]
    while not ((after := _propagate_once(masks)[0]) == masks).all():
        masks = after
    single = _BIT_COUNT[masks] == 1
    return np.where(single, _digits(np.where(single, masks, np.uint16(1))), np.uint8(0)).T


def _checked(puzzles: np.ndarray) -> np.ndarray:
    """``puzzles`` as uint8 [N, 81], or ValueError."""
    puzzles = np.asarray(puzzles)
    if puzzles.ndim != 2 or puzzles.shape[1] != 81:
        raise ValueError(f"puzzles must have shape [N, 81], got {list(puzzles.shape)}")
    if puzzles.size and (puzzles.min() < 0 or puzzles.max() > 9):
        raise ValueError("puzzle cells must be 0 (blank) to 9")
    return puzzles.astype(np.uint8)


def solved_mask(answers: np.ndarray, puzzles: np.ndarray) -> np.ndarray:
    """Which ``answers`` [N, 81] are valid complete grids that keep the givens of ``puzzles``: bool [N]."""
    answers, puzzles = np.asarray(answers), np.asarray(puzzles)
    in_range = ((answers >= 1) & (answers <= 9)).all(axis=1)
    bits = np.left_shift(1, np.clip(answers, 0, 9).astype(np.int64))
    complete = (np.bitwise_or.reduce(bits[:, _UNITS], axis=2) == 0x3FE).all(axis=1)
    return in_range & complete & ((puzzles == 0) | (puzzles == answers)).all(axis=1)


def is_solved(answer: np.ndarray, puzzle: np.ndarray) -> bool:
    """Whether one ``answer`` [81] is a valid complete grid that keeps the givens of ``puzzle`` [81]."""
    return bool(solved_mask(np.asarray(answer)[None], np.asarray(puzzle)[None])[0])


# ---- generator -------------------------------------------------------------------------------------


def random_solutions(count: int, rng: np.random.Generator) -> np.ndarray:
    """Random complete grids ``uint8 [count, 81]``, each from its own randomised search.

    The three diagonal boxes do not constrain each other, so they are filled at random first.
    """
    masks = np.full((81, count), _ALL)
    for box in (0, 4, 8):
        masks[_UNITS[18 + box]] = np.uint16(1) << rng.random((9, count)).argsort(axis=0).astype(np.uint16)
    return _search(masks, np.ones(count, np.int64), rng)[0]


def base_puzzles(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Minimal unique puzzles, mostly 22 to 26 givens, each from its own random grid: two ``[count, 81]``."""
    parts = [(np.zeros((0, 81), np.uint8),) * 2]
    for start in range(0, count, _DIG_BATCH):
        solutions = random_solutions(min(_DIG_BATCH, count - start), rng)
        parts.append((_dig(solutions, rng), solutions))
    return np.concatenate([p for p, _ in parts]), np.concatenate([s for _, s in parts])


def _dig(solutions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blank cells of ``solutions`` [N, 81] in a random order for as long as the solution stays unique."""
    n = len(solutions)
    puzzles = solutions.copy()
    rank = rng.random((n, 81)).argsort(axis=1).astype(np.int16)  # when each cell is tried
    position, step = np.zeros(n, np.int16), np.full(n, 16, np.int16)
    while len(rows := np.flatnonzero(position < 81)):
        start, width = position[rows, None], step[rows, None]
        tried = (rank[rows] >= start) & (rank[rows] < start + width)
        trial = np.where(tried, 0, puzzles[rows])
        masks = _DIGIT_MASK[trial.T]
        # One cell at a time it is cheaper to ask for a solution with any *other* digit in that cell.
        single = step[rows] == 1
        masks ^= np.where(tried & single[:, None], _DIGIT_MASK[solutions[rows]], np.uint16(0)).T
        limits = np.where(single, 1, 2)
        unique = _search(masks, limits)[1] < limits
        puzzles[rows[unique]] = trial[unique]
        position[rows] += np.where(unique | single, step[rows], 0).astype(np.int16)
        step[rows[~unique]] = np.maximum(step[rows[~unique]] // 2, 1)
    return puzzles


def augment(puzzles: np.ndarray, solutions: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Apply one random symmetry per board (both arrays ``[N, 81]``, same symmetry): two new ``[N, 81]``.

    Digit relabelling, band and stack permutations, row and column permutations inside them, transposition.
    """
    n = len(puzzles)
    row, col = _line_permutation(n, rng), _line_permutation(n, rng)
    flip = rng.random(n) < 0.5
    row_step = np.where(flip, 1, 9).astype(np.int16)[:, None]
    source = (row * row_step)[:, :, None] + (col * (10 - row_step))[:, None, :]
    source = source.reshape(n, 81) + (np.arange(n) * 81)[:, None]
    relabel = np.zeros((n, 10), np.uint8)
    relabel[:, 1:] = rng.random((n, 9), np.float32).argsort(axis=1) + 1
    relabel, offset = relabel.ravel(), (np.arange(n) * 10)[:, None]
    return relabel[np.take(puzzles, source) + offset], relabel[np.take(solutions, source) + offset]


def _line_permutation(n: int, rng: np.random.Generator) -> np.ndarray:
    """Row (or column) orders that keep bands together: int16 [n, 9]."""
    band = rng.random((n, 3), np.float32).argsort(axis=1)[:, :, None]
    line = rng.random((n, 3, 3), np.float32).argsort(axis=2)
    return (band * 3 + line).reshape(n, 9).astype(np.int16)


def _add_givens(puzzles: np.ndarray, solutions: np.ndarray, targets: np.ndarray,
                rng: np.random.Generator) -> np.ndarray:
    """Reveal random cells until row i has ``targets[i]`` givens (it must not have more already)."""
    # Sort keys: givens first, then blanks at random; the cell number in the low bits avoids ties.
    keys = rng.integers(1 << 31, 1 << 32, puzzles.shape, np.uint32) & np.uint32(0xFFFFFF80)
    keys = (keys * (puzzles == 0)) | _CELL.astype(np.uint32)
    last = np.take_along_axis(np.sort(keys, axis=1), targets[:, None] - 1, axis=1)
    return np.where(keys <= last, solutions, 0).astype(np.uint8)


def _draw_givens(givens: Givens, count: int, rng: np.random.Generator) -> np.ndarray:
    """Number of givens per puzzle, int64 [count]; ValueError when out of range."""
    bounds = np.asarray(givens, np.int64)
    if bounds.size and (bounds.min() < MIN_GIVENS or bounds.max() > MAX_GIVENS):
        got = f"{bounds.min()}..{bounds.max()}" if bounds.ndim else str(bounds)
        raise ValueError(f"givens must be within {MIN_GIVENS}..{MAX_GIVENS}, got {got}")
    if isinstance(givens, (tuple, list)):
        if len(givens) != 2 or givens[0] > givens[1]:
            raise ValueError(f"givens range must be (low, high) with low <= high, got {givens}")
        return rng.integers(givens[0], givens[1], count, endpoint=True)
    if bounds.ndim and bounds.shape != (count,):
        raise ValueError(f"givens array must have shape [{count}], got {list(bounds.shape)}")
    return np.broadcast_to(bounds, (count,))


def generate(count: int, givens: int | tuple[int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Unique puzzles and their solutions ``uint8 [count, 81]``, each from its own fresh random grid.

    ``givens`` is their exact number, or an inclusive ``(low, high)`` drawn uniformly per puzzle. The same seed (at
    least 0) gives the same puzzles. Raises ValueError for givens outside 22..81 or low > high.
    """
    rng = np.random.default_rng(seed)
    targets = _draw_givens(givens, count, rng)
    puzzles, solutions = np.zeros((count, 81), np.uint8), np.zeros((count, 81), np.uint8)
    missing, batch = np.arange(count), count
    while len(missing):
        slots = np.resize(missing, batch)
        base, grid = base_puzzles(len(slots), rng)
        slots, first = np.unique(np.where((base > 0).sum(axis=1) <= targets[slots], slots, count), True)
        slots, first = slots[slots < count], first[slots < count]
        puzzles[slots] = _add_givens(base[first], grid[first], targets[slots], rng)
        solutions[slots] = grid[first]
        missing = np.setdiff1d(missing, slots)
        # Few minimal puzzles have 22 or 23 givens: try several grids for each slot that is still open.
        batch = max(256, min(4 * len(missing), _DIG_BATCH), len(missing))
    return puzzles, solutions


class PuzzleSource:
    """Endless training puzzles: random symmetries of a fixed set of base puzzles, with givens added back.

    Attributes: ``puzzles`` and ``solutions``, the bases, ``uint8 [B, 81]`` sorted by number of givens.
    """

    def __init__(self, bases: int, seed: int) -> None:
        """Compute ``bases`` base puzzles (2 to 3 ms each); ``seed`` fixes them."""
        if bases < 1:
            raise ValueError(f"bases must be at least 1, got {bases}")
        self._set(*base_puzzles(bases, np.random.default_rng([seed, 0])), seed)

    def _set(self, puzzles: np.ndarray, solutions: np.ndarray, seed: int) -> None:
        order = np.argsort((puzzles > 0).sum(axis=1), kind="stable")
        self.puzzles, self.solutions, self.seed = puzzles[order], solutions[order], seed
        self._givens = (self.puzzles > 0).sum(axis=1)

    @property
    def fewest(self) -> int:
        """The number of givens of the base that has fewest."""
        return int(self._givens[0])

    @classmethod
    def load(cls, path: str | Path) -> PuzzleSource:
        """Read bases written by ``save``."""
        with np.load(path, allow_pickle=False) as data:
            puzzles, solutions, seed = data["puzzles"], data["solutions"], int(data["seed"])
        if not len(puzzles) or not solved_mask(solutions, puzzles).all():
            raise ValueError(f"{path} does not hold valid Sudoku bases")
        source = cls.__new__(cls)
        source._set(puzzles, solutions, seed)
        return source

    @classmethod
    def cached(cls, path: str | Path, bases: int, seed: int) -> PuzzleSource:
        """Load ``path`` when it holds ``bases`` bases made with ``seed``; otherwise compute and save them."""
        if Path(path).exists():
            source = cls.load(path)
            if len(source.puzzles) == bases and source.seed == seed:
                return source
        source = cls(bases, seed)
        source.save(path)
        return source

    def save(self, path: str | Path) -> None:
        """Write the bases as ``.npz``; readers see the old file or the whole new one."""
        path = Path(path)
        make_folder(path.parent)
        with atomic_write(path) as beside, beside.open("wb") as file:
            np.savez_compressed(file, puzzles=self.puzzles, solutions=self.solutions, seed=self.seed)

    def sample(self, count: int, givens: Givens, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw puzzles with unique solutions -> both ``uint8 [count, 81]``.

        ``givens`` is an int, an inclusive ``(low, high)`` drawn uniformly, or an int array ``[count]``. Raises
        ValueError for givens out of 22..81, or fewer than every base has.
        """
        targets = _draw_givens(givens, count, rng)
        usable = np.searchsorted(self._givens, targets, side="right")
        if count and usable.min() == 0:
            raise ValueError(f"no base has {targets.min()} givens or fewer; fewest is {self.fewest}")
        pick = rng.integers(0, usable)
        puzzles, solutions = augment(self.puzzles[pick], self.solutions[pick], rng)
        return _add_givens(puzzles, solutions, targets, rng), solutions


# ---- text ------------------------------------------------------------------------------------------

_RUN = re.compile(r"(?<![0-9.*_])([0-9.*_]{81})(?:\.(?=\s|$))?(?![0-9.*_])")
_LOOSE_RUN = re.compile(r"[0-9.*_\s|+\-,\[\]]+")
_SEPARATORS = re.compile(r"[\s|+\-,\[\]]+")
_PUNCTUATION = re.compile(r"(?<=[A-Za-z])[.*_]+|[.*_]+(?=[A-Za-z])")


def parse(text: str) -> np.ndarray | None:
    """The first grid in ``text`` as uint8 [81], or None.

    Blanks are ``.``, ``0``, ``*`` or ``_``. Understood: 81 characters in one run; nine lines of nine
    cells; 81 cells with spaces, commas, brackets, ``|``, ``-`` or ``+`` between; each also inside prose.
    """
    for candidate in (text, _PUNCTUATION.sub(" ", text)):
        run = _RUN.search(candidate)
        if cells := run[1] if run else _find_lines(candidate) or _find_loose(candidate):
            return np.array([int(ch) if ch.isdigit() else 0 for ch in cells], np.uint8)
    return None


def _find_lines(text: str) -> str | None:
    lines: list[str] = []
    for line in text.splitlines():
        cells = _SEPARATORS.sub("", line)
        if not cells:  # blank lines and rules between boxes
            continue
        lines = [*lines, cells] if re.fullmatch(r"[0-9.*_]{9}", cells) else []
        if len(lines) == 9:
            return "".join(lines)
    return None


def _find_loose(text: str) -> str | None:
    for match in _LOOSE_RUN.finditer(text):
        cells = _SEPARATORS.sub("", match.group())
        if len(cells) == 81 or (len(cells) == 82 and cells[-1] == "."):  # a full stop after the grid
            return cells[:81]
    return None


def to_line(cells: np.ndarray) -> str:
    """81 characters, ``.`` for blanks."""
    return "".join(str(int(v)) if v else "." for v in np.asarray(cells).ravel())


def format_grid(cells: np.ndarray) -> str:
    """Nine lines of nine characters joined by newlines, ``.`` for blanks."""
    line = to_line(cells)
    return "\n".join(line[i : i + 9] for i in range(0, 81, 9))
