"""Sudoku without an end, as text and as pictures, as examples to train on.

Works on the task's batches and questions, and a tokenizer; knows nothing of networks and noise. Pictures are drawn a
step ahead, in a thread: that takes as long as a small network's step.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property

import numpy as np
from PIL import Image

from dgemma.chat.media import show
from dgemma.config import VisionConfig
from dgemma.tasks.sudoku_data import SudokuBatches, sudoku_conversations
from dgemma.tasks.sudoku_questions import PictureQuestion, PictureQuestions, held_out_questions
from dgemma.train.data.conversations import Conversation
from dgemma.train.data.examples import Example
from dgemma.train.data.turns import Turn
from dgemma.train.sights import Medium, PreparedPictures, Sight, placed_sights

_LOOKED_AT = 20  # steps of a stream, to tell what is in it
_DRAWN = 4  # where that takes long


class SeenPuzzles:
    """Examples about pictures: in a share of ``share`` of steps, by ``questions``, seen by the tower ``vision``."""

    def __init__(self, made: SudokuBatches, vision: VisionConfig, share: float, questions: PictureQuestions):
        self.made, self.vision, self.share, self.questions = made, vision, share, questions
        self._prepared = PreparedPictures(vision, kept=0)  # no picture comes twice
        self._prompts: dict[str, list[int]] = {}  # rendered, by what is said: rendering is slow

    def batch(self, step: int) -> list[Example] | None:
        """The examples of a step; None where it has text only."""
        rng = np.random.default_rng([self.made.seed, 3, step])
        if rng.random() >= self.share:
            return None
        return self._examples(step, rng)

    def some(self, step: int) -> list[Example]:
        """Examples about pictures, whatever the step."""
        return self._examples(step, np.random.default_rng([self.made.seed, 3, step]))

    def _examples(self, step: int, rng: np.random.Generator) -> list[Example]:
        asked = self.questions.about(*self.made.puzzles(step, rng), rng)
        return [self._example(question, f"step {step}: picture") for question in asked]

    def _example(self, question: PictureQuestion, row: str) -> Example:
        made, words = self.made, question.said[0]
        [picture] = show({"type": "image", "image": question.image}, self.vision, words=words).pictures
        # What the tower sees, and no more: it is resized already, and small.
        part = {"type": "image", "image": Image.fromarray(picture.pixels), "tokens": picture.budget}
        ids, sights = placed_sights([Medium(part, words, self._prepared, "image 1", row)], self._prompt(question),
                                    made.tokenizer)
        return _example(made, ids, made.canvas(question.answers[-1]), row, 2 * len(question.said) - 1, sights)

    def _prompt(self, question: PictureQuestion) -> list[int]:
        """The rendered conversation, with one token for the picture."""
        *before, words = question.said
        if before:
            return self.made.tokenizer.apply_chat_template(question.messages())
        if words not in self._prompts:
            self._prompts[words] = self.made.tokenizer.apply_chat_template(question.messages())
        return self._prompts[words]


class Puzzles:
    """A stream of puzzles, ``kept`` of other grids for validation; ``seen`` and ``kept_seen`` are those in pictures."""

    def __init__(self, made: SudokuBatches, kept: SudokuBatches, seen: SeenPuzzles | None = None,
                 kept_seen: SeenPuzzles | None = None):
        self.made, self.kept, self.seen, self.kept_seen = made, kept, seen, kept_seen
        self._ahead: tuple[int, Future[list[Example]]] | None = None

    def batch(self, step: int) -> list[Example]:
        if self.seen is None:
            return self._made(step)
        ahead, self._ahead = self._ahead, None
        found = ahead[1].result() if ahead is not None and ahead[0] == step else self._made(step)
        self._ahead = (step + 1, self._drawing.submit(self._made, step + 1))
        return found

    def held_out(self, count: int) -> list[Example]:
        """As many of pictures as training has, at their share."""
        seen = self.kept_seen
        pictures = [] if seen is None else seen.some(10**6)[: round(count * seen.share)]
        return [*_of_puzzles(self.kept, 10**6)[: count - len(pictures)], *pictures]

    def questions(self, count: int) -> list[Conversation]:
        found = [numbered(made, f"{band} puzzle ", 1) for band, made in sudoku_conversations(count).items()]
        if self.seen is not None:
            found += [numbered(made, f"picture of {band} puzzle, ", 1)
                      for band, made in held_out_questions(count).items()]
        return [conversation for conversations in found for conversation in conversations]

    @cached_property
    def largest(self) -> tuple[int, int]:
        """The most tokens before a canvas, and the most of them that are pictures', in the first steps."""
        steps = _LOOKED_AT if self.seen is None else _DRAWN
        examples = [example for step in range(steps) for example in self.batch(step)]
        examples += [] if self.seen is None else self.seen.some(0)
        return (max(example.context_length for example in examples),
                max(sum(sight.tokens for sight in example.sights) for example in examples))

    @cached_property
    def _drawing(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, "pictures")

    def _made(self, step: int) -> list[Example]:
        found = None if self.seen is None else self.seen.batch(step)
        return _of_puzzles(self.made, step) if found is None else found


def numbered(made: list[list[dict]], what: str, first: int) -> list[Conversation]:
    """Conversations that a task has made, numbered, of each of which the last message is learnt."""
    return [Conversation(messages, None, (len(messages) - 1,), f"{what}{number}")
            for number, messages in enumerate(made, start=first)]


def _of_puzzles(made: SudokuBatches, step: int) -> list[Example]:
    """The batch of a step as examples whose every token counts, fill too."""
    batch = made.batch(step)
    return [_example(made, prompt, canvas, f"step {step}: {batch.kind}")
            for prompt, canvas in zip(batch.prompt.tolist(), batch.canvas.tolist(), strict=True)]


def _example(made: SudokuBatches, prompt: list[int], canvas: list[int], row: str, message: int = 1,
             sights: tuple[Sight, ...] = ()) -> Example:
    response = canvas[: canvas.index(made.stop) + 1]
    return Example(Turn(prompt, response, row, message, sights=sights), 0, canvas, [1.0] * len(canvas))
