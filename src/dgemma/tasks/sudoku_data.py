"""Training batches of the Sudoku task: puzzles, puzzles inside conversations, and everything that is no puzzle.

A batch is of one kind and all its prompts have one length, so nothing is padded.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dgemma.chat.tokenizer import Tokenizer
from dgemma.tasks import sudoku

# What the bundled model says to anything that is no puzzle.
HONEST_ANSWER = "I am a small model that only solves Sudoku: send me 81 cells, 0 or . if blank."

# Another stream of randomness than training's, so that the grids are new.
EVALUATION_SEED = 1_000_003

_WORDS = ("please solve this sudoku puzzle for me here is the grid can you finish it thanks hello hi what how why who "
          "write a poem about the sea code in python function returns list of numbers story today weather is nice "
          "explain quantum physics simply translate to french good morning I need help with my homework find all "
          "digits rows columns boxes nine easy hard one two three answer only no words the and or but for with from "
          "my your their number it that was are you do not know could would should ok yes no sky blue capital city "
          "France tell me joke best way cook rice compare summarise text model think step by careful thank").split()


@dataclass(frozen=True)
class PuzzleBatch:
    prompt: Tensor  # [B, T]
    canvas: Tensor  # [B, C] the answer, a stop token, fill
    kind: str


class SudokuBatches:
    """An endless, seeded stream of batches; every batch depends on (seed, step) only, so a resumed run sees the same.

    ``givens`` is the range of the curriculum's end; it starts at ``easy_givens`` and its lower bound falls linearly
    over ``curriculum_steps``. ``beyond_singles``: at least this share of a batch's puzzles are such as naked and hidden
    singles alone do not solve (`sudoku.singles_solve`), or as many as are found among 32 times as many; in a share of
    ``stuck`` of those all that singles give is filled in, so that every blank needs more than that.
    """

    def __init__(self, tokenizer: Tokenizer, canvas_length: int, batch_size: int, seed: int,
                 source: sudoku.PuzzleSource, givens: tuple[int, int] = (22, 46), easy_givens: int = 36,
                 curriculum_steps: int = 1500, plain: bool = False, beyond_singles: float = 0.0, stuck: float = 0.0):
        self.beyond_singles, self.stuck = beyond_singles, stuck
        self.tokenizer, self.canvas_length, self.batch_size, self.seed = tokenizer, canvas_length, batch_size, seed
        self.givens, self.easy_givens, self.curriculum_steps = givens, easy_givens, curriculum_steps
        self.source, self.plain = source, plain
        stop = tokenizer.token_to_id("<turn|>")
        assert stop is not None  # all of the family have it
        self.stop = stop
        self._byte_ids = np.array([tokenizer.encode(chr(byte))[0] for byte in range(128)])

    def answerable(self) -> None:
        """Raises ValueError where the tokenizer cannot write a puzzle, or the canvas not hold its answer."""
        self._plain_prompts(self.source.puzzles[:1])
        self._answers(self.source.solutions[:1])

    def batch(self, step: int) -> PuzzleBatch:
        """The batch of a step: 80 % plain puzzles (with ``plain`` all of them), the rest the other kinds."""
        rng = np.random.default_rng([self.seed, 2, step])
        kind = rng.choice(["plain", "inside", "turns", "other"], p=[0.80, 0.10, 0.03, 0.07])
        kind = "plain" if self.plain else kind
        if kind == "plain":
            puzzles, solutions = self.puzzles(step, rng)
            return PuzzleBatch(self._plain_prompts(puzzles), self._answers(solutions), "plain")
        if kind == "other":
            return self._other(rng)
        puzzles, solutions = self.puzzles(step, rng)
        length = int(rng.integers(1, 121))  # bytes of other words before the puzzle, or of the earlier turns
        prompts = []
        turns = kind == "turns" and rng.choice(["puzzle", "other"])
        earlier, solved = self.source.sample(1, self.givens[1], rng)
        system = bool(rng.random() < 0.3)
        thinking = bool(rng.random() < 0.2)
        for puzzle in puzzles:
            words = _words(length, rng)
            messages = [{"role": "system", "content": _words(20, rng)}] if system else []
            if turns:
                first = sudoku.to_line(earlier[0]) if turns == "puzzle" else words
                reply = sudoku.format_grid(solved[0]) if turns == "puzzle" else HONEST_ANSWER
                messages += [{"role": "user", "content": first}, {"role": "assistant", "content": reply}]
                messages += [{"role": "user", "content": sudoku.to_line(puzzle)}]
            else:
                messages += [{"role": "user", "content": f"{words} {sudoku.to_line(puzzle)}"}]
            prompts.append(self.tokenizer.apply_chat_template(messages, thinking=thinking))
        return PuzzleBatch(torch.tensor(prompts), self._answers(solutions), kind)

    def puzzles(self, step: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """The puzzles of a step and their solutions, both [B, 81]."""
        progress = min(1.0, step / max(1, self.curriculum_steps))
        low = round(self.easy_givens + (self.givens[0] - self.easy_givens) * progress)
        givens = (low, self.givens[1])
        if not self.beyond_singles:
            return self.source.sample(self.batch_size, givens, rng)
        wanted = round(self.beyond_singles * self.batch_size)
        puzzles, solutions = self.source.sample(4 * self.batch_size, givens, rng)
        beyond = np.flatnonzero(~sudoku.singles_solve(puzzles))
        while len(beyond) < wanted and len(puzzles) < 32 * self.batch_size:
            more = self.source.sample(4 * self.batch_size, givens, rng)
            beyond = np.concatenate([beyond, len(puzzles) + np.flatnonzero(~sudoku.singles_solve(more[0]))])
            puzzles, solutions = (np.concatenate(pair) for pair in zip((puzzles, solutions), more, strict=True))
        beyond = beyond[:wanted]
        advanced = beyond[: round(self.stuck * len(beyond))]
        puzzles[advanced] = sudoku.fill_singles(puzzles[advanced])
        others = np.setdiff1d(np.arange(len(puzzles)), beyond)[: self.batch_size - len(beyond)]
        chosen = rng.permutation(np.concatenate([beyond, others]))
        return puzzles[chosen], solutions[chosen]

    def _other(self, rng: np.random.Generator) -> PuzzleBatch:
        length = int(rng.integers(1, 140))
        prompts = []
        for _ in range(self.batch_size):
            style = rng.random()
            if style < 0.5:
                text = _words(length, rng)
            elif style < 0.75:  # nearly a puzzle: cells, but not 81 of them
                cells = rng.choice(list("123456789........."), size=length)
                text = "".join(cells) if length != 81 else "".join(cells[:80]) + "x"
            else:
                text = "".join(chr(c) for c in rng.integers(33, 127, size=length))
            prompts.append(self.tokenizer.apply_chat_template([{"role": "user", "content": text}]))
        # A trimmed edge makes a prompt shorter, cells that the template takes for a puzzle make it longer.
        width = statistics.mode(map(len, prompts))
        prompts = [p for p in prompts if len(p) == width]
        answer = self.canvas(HONEST_ANSWER)
        return PuzzleBatch(torch.tensor(prompts), torch.tensor(answer).expand(len(prompts), -1).clone(), "other")

    @cached_property
    def _frame(self) -> tuple[list[int], list[int]]:
        """The tokens before and after a puzzle that is a whole user turn (rendering 64 templates a step is slow)."""
        puzzle = sudoku.generate(1, 30, seed=0)[0][0]
        rendered = self.tokenizer.apply_chat_template([{"role": "user", "content": sudoku.to_line(puzzle)}])
        cells = self._byte_ids[np.frombuffer(sudoku.format_grid(puzzle).encode(), np.uint8)].tolist()
        start = next((i for i in range(len(rendered)) if rendered[i : i + len(cells)] == cells), None)
        if start is None:
            raise ValueError("the tokenizer must write a puzzle as one token for each character")
        return rendered[:start], rendered[start + len(cells) :]

    def _plain_prompts(self, puzzles: np.ndarray) -> Tensor:
        before, after = self._frame
        grids = np.frombuffer("".join(sudoku.format_grid(p) for p in puzzles).encode(), np.uint8)
        cells = self._byte_ids[grids].reshape(len(puzzles), -1)
        frame = [np.tile(part, (len(puzzles), 1)) for part in (before, after)]
        return torch.from_numpy(np.concatenate([frame[0], cells, frame[1]], axis=1))

    def _answers(self, solutions: np.ndarray) -> Tensor:
        rows = [self.canvas(sudoku.format_grid(s)) for s in solutions]
        return torch.tensor(rows)

    def canvas(self, text: str) -> list[int]:
        """ASCII text, the end of the turn, then fill: the fill has loss too, or the canvas would never settle."""
        tokens = [*self._byte_ids[list(text.encode())].tolist(), self.stop]
        if len(tokens) > self.canvas_length:
            raise ValueError(f"an answer of {len(tokens)} tokens does not fit a canvas of {self.canvas_length}")
        return tokens + [self.tokenizer.pad_id] * (self.canvas_length - len(tokens))


def sudoku_conversations(count: int, seed: int = 0) -> dict[str, list[list[dict[str, str]]]]:
    """The messages of puzzles and their solutions, ``count`` of each band, of the grids that `evaluate_bands` asks for;
    by band."""
    found = {}
    for band, givens in sudoku.BANDS.items():
        puzzles, solutions = sudoku.generate(count, givens, seed=EVALUATION_SEED + seed)
        found[band] = [[{"role": "user", "content": sudoku.to_line(puzzle)},
                        {"role": "assistant", "content": sudoku.format_grid(solution)}]
                       for puzzle, solution in zip(puzzles, solutions, strict=True)]
    return found


def _words(length: int, rng: np.random.Generator) -> str:
    """Exactly ``length`` bytes of words, with no space at either end and no cell of a puzzle among them."""
    text = ""
    while len(text) < length:
        text += str(rng.choice(_WORDS)) + (", " if rng.random() < 0.1 else " ")
    text = text[:length]
    return text[:-1] + "a" if text[-1] in " ,.:" else text
