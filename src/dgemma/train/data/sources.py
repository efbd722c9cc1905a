"""Where a run's examples come from: the user's conversations, or a stream that is made on the way.

Works on recipes' data sections and a tokenizer; knows nothing of networks, noise and optimizers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dgemma.chat.tokenizer import Tokenizer
from dgemma.config import GenerationConfig, ModelConfig
from dgemma.errors import DgemmaError
from dgemma.tasks import extraction, sudoku
from dgemma.tasks.sudoku_data import SudokuBatches
from dgemma.tasks.sudoku_questions import PictureQuestions
from dgemma.train.data.conversations import Conversation, read_conversations
from dgemma.train.data.examples import Example, batches, prepare
from dgemma.train.data.puzzles import Puzzles, SeenPuzzles, numbered
from dgemma.train.data.text import TextSource, read_texts
from dgemma.train.recipe import ConversationData, ExtractionData, Recipe, SudokuData, TextData
from dgemma.train.sights import PreparedPictures

Report = Callable[[str], None]


class Source(Protocol):
    """A run's examples. What a step trains on depends on the seed and the step only, so a resumed run goes on as it
    would have."""

    def batch(self, step: int) -> list[Example]:
        """All examples of a step, in an order that stays."""
        ...

    def held_out(self, count: int) -> list[Example]:
        """Up to so many examples that are never trained on, always the same."""
        ...

    def questions(self, count: int) -> list[Conversation]:
        """Up to so many conversations that are never trained on, for the task's metric (Sudoku: of each band)."""
        ...


@dataclass
class Listed:
    """Conversations that are all at hand, in epochs."""

    examples: list[Example]
    kept: list[Example]
    asked: list[Conversation]
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        self._order: tuple[int, list[list[int]]] = (-1, [])  # an epoch and its batches

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.examples) / self.batch_size)

    def batch(self, step: int) -> list[Example]:
        epoch, index = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, batches(self.examples, self.batch_size, self.seed, epoch))
        return [self.examples[i] for i in self._order[1][index]]

    def held_out(self, count: int) -> list[Example]:
        return self.kept[:count]

    def questions(self, count: int) -> list[Conversation]:
        return self.asked[:count]


def source_of(recipe: Recipe, tokenizer: Tokenizer, config: ModelConfig, generation: GenerationConfig, folder: Path,
              report: Report = lambda text: None) -> Source:
    """What a recipe trains on. ``folder`` keeps what takes long to make; ``report`` is told of what is left out.

    Raises DgemmaError for data that cannot be used.
    """
    data, canvas = recipe.data, config.canvas_length
    if isinstance(data, SudokuData):
        return _puzzles(recipe, data, tokenizer, config, folder, report)
    if isinstance(data, TextData):
        texts, held_out = read_texts(data.paths, data.suffix)
        report(f"{len(texts):,} texts to train on, {len(held_out):,} kept for validation")
        return TextSource(texts, held_out, tokenizer, canvas, recipe.batch_size, recipe.seed, data.context)
    if isinstance(data, ExtractionData):
        train, kept = (numbered(extraction.conversations(count, recipe.seed, apart, keys=data.keys,
                                                         distractors=data.distractors),
                                f"extraction{' held out' * apart} {recipe.seed}: ", 0)
                       for count, apart in ((data.count, False), (data.held_out, True)))
        return _listed(recipe, ConversationData(("generated notes",), fill="pad"), train, kept, tokenizer, config,
                       generation, report)
    found = read_conversations(data.train, skip_bad=data.skip_bad, image_tokens=data.image_tokens)
    _tell(found.bad, report)
    if data.held_out:
        apart = read_conversations(data.held_out, skip_bad=data.skip_bad, image_tokens=data.image_tokens)
        _tell(apart.bad, report)
        train, kept = found.rows, apart.rows
    else:
        train, kept = split(found.rows, data.held_out_share)
    return _listed(recipe, data, train, kept, tokenizer, config, generation, report)


def few(recipe: Recipe) -> Recipe:
    """The recipe with only as much of the data that is made on the way as is needed to look at it."""
    data = recipe.data
    if isinstance(data, SudokuData):
        data = dataclasses.replace(data, bases=min(data.bases, 64))
    elif isinstance(data, ExtractionData):
        data = dataclasses.replace(data, count=min(data.count, 64), held_out=min(data.held_out, 16))
    return dataclasses.replace(recipe, data=data)


def longest_context(source: Source) -> int:
    """The most tokens before a canvas: of all examples where they are at hand, or of the first steps of a stream."""
    if isinstance(source, Puzzles):
        return source.largest[0]
    examples = source.examples if isinstance(source, Listed) else [e for step in range(20) for e in source.batch(step)]
    return max(example.context_length for example in examples)


def most_soft_tokens(source: Source) -> int:
    """The most tokens of a context that are pictures'."""
    if isinstance(source, Puzzles):
        return source.largest[1]
    examples = source.examples if isinstance(source, Listed) else []
    return max((sum(sight.tokens for sight in example.sights) for example in examples), default=0)


def shows_pictures(source: Source) -> bool:
    """Whether there are pictures in what is trained on."""
    if isinstance(source, Puzzles):
        return source.seen is not None
    return isinstance(source, Listed) and any(example.sights for example in (*source.examples, *source.kept))


def fingerprint(examples: Sequence[Example]) -> str:
    """The same for the same tokens and pictures (those in files by their paths), in the same order, that count as
    much."""
    found = hashlib.sha256()
    for example in examples:
        seen = [(sight.medium.source, sight.start) for sight in example.sights]
        found.update(repr((example.context_ids, example.canvas_ids, example.weights, *seen)).encode())
    return found.hexdigest()


def split(rows: Sequence[Conversation], share: float) -> tuple[list[Conversation], list[Conversation]]:
    """What to train on, and every so-manieth row for validation: ``share`` of them, at least one unless it is 0."""
    if not share or len(rows) < 2:
        return list(rows), []
    every = max(2, round(1 / share))
    last = min(every, len(rows)) - 1
    return ([row for i, row in enumerate(rows) if i % every != last],
            [row for i, row in enumerate(rows) if i % every == last])


def _listed(recipe: Recipe, data: ConversationData, train: list[Conversation], kept: list[Conversation],
            tokenizer: Tokenizer, config: ModelConfig, generation: GenerationConfig, report: Report) -> Listed:
    room = config.max_position_embeddings - config.canvas_length
    pictures = PreparedPictures.of(config)
    found = []
    for rows in (train, kept):
        prepared = prepare(rows, tokenizer, config.canvas_length, recipe.objective.fill_weight,
                           min(data.max_context or room, room), too_long=data.too_long, thinking=data.thinking,
                           fill=data.fill, stop_ids=generation.eos_token_id, skip_bad=data.skip_bad,
                           pictures=pictures) if rows else None
        found.append(prepared.examples if prepared else [])
        _tell(prepared.skipped if prepared else [], report)
    report(f"{len(train):,} conversations to train on ({len(found[0]):,} canvases), {len(kept):,} kept for validation "
           f"({len(found[1]):,})")
    return Listed(found[0], found[1], kept, recipe.batch_size, recipe.seed)


def _puzzles(recipe: Recipe, data: SudokuData, tokenizer: Tokenizer, config: ModelConfig, folder: Path,
             report: Report) -> Puzzles:
    if data.pictures and config.vision is None:
        raise DgemmaError(f"recipe {recipe.name}: data: pictures: the model sees none: it has no vision tower (give it "
                          "one: vision)")
    report("preparing base puzzles (computed once)")
    source = sudoku.PuzzleSource.cached(folder / "puzzles.npz", data.bases, recipe.seed)
    givens = _reachable(data.givens, source, f"recipe {recipe.name}: data")
    made = SudokuBatches(tokenizer, config.canvas_length, recipe.batch_size, recipe.seed, source, givens,
                         min(max(data.easy_givens, givens[0]), givens[1]), data.curriculum_steps, data.plain,
                         data.beyond_singles, data.stuck)
    try:
        made.answerable()
    except ValueError as error:
        raise DgemmaError(f"recipe {recipe.name}: data: this model cannot learn Sudoku: {error}") from error
    seed = recipe.seed + 1_000_003  # other grids
    few = sudoku.PuzzleSource.cached(folder / "held-out.npz", min(data.bases, 200), seed)
    kept = SudokuBatches(tokenizer, config.canvas_length, recipe.evaluation.examples, seed, few,
                         _reachable(data.givens, few, f"recipe {recipe.name}: validation"), data.easy_givens, 0,
                         plain=True)
    if not data.pictures or config.vision is None:
        return Puzzles(made, kept)
    seen, kept_seen = (SeenPuzzles(batches, config.vision, data.pictures,
                                   PictureQuestions(data.photos, data.reading, held_out, data.scribbled))
                       for batches, held_out in ((made, False), (kept, True)))
    return Puzzles(made, kept, seen, kept_seen)


def _reachable(givens: tuple[int, int], source: sudoku.PuzzleSource, where: str) -> tuple[int, int]:
    """The range of givens as far as the base puzzles go: of few of them none has as few as of many."""
    if source.fewest > givens[1]:
        raise DgemmaError(f"{where}: of {len(source.puzzles)} base puzzles none has {givens[1]} givens or fewer, the "
                          f"fewest is {source.fewest}: ask for more givens, or for more bases")
    return max(givens[0], source.fewest), givens[1]


def _tell(left_out: Sequence[str], report: Report) -> None:
    if left_out:
        report(f"{len(left_out):,} left out; the first: {left_out[0]}")
