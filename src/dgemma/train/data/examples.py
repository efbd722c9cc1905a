"""Turns to what training runs on: a context, a clean canvas, and how much each of its positions counts.

Works on: token ids. Knows nothing of: files, templates, networks, noise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dgemma.chat.tokenizer import Tokenizer
from dgemma.errors import DgemmaError
from dgemma.train.data.conversations import Conversation
from dgemma.train.data.turns import Thinking, Turn, turn_of
from dgemma.train.sights import PreparedPictures, Sight

TooLong = Literal["error", "truncate", "skip"]
Fill = Literal["eos", "pad"]

BUCKET = 16  # batches whose examples are sorted by length together


@dataclass(frozen=True)
class Example:
    """One canvas of a turn. Both lists have the canvas's length: the clean tokens, and how much the loss of each counts
    (1 on what the model has to write, the stop token included; the fill weight behind it)."""

    turn: Turn
    canvas_index: int
    canvas_ids: list[int]
    weights: list[float]

    @property
    def context_ids(self) -> list[int]:
        """What the canvas is written after: the prompt and the turn's earlier canvases, clean."""
        return self.turn.context_ids + self.turn.response_ids[: self.canvas_index * len(self.canvas_ids)]

    @property
    def context_length(self) -> int:
        return len(self.turn.context_ids) + self.canvas_index * len(self.canvas_ids)

    @property
    def prompt_length(self) -> int:
        """How many tokens of the context are not of the response."""
        return len(self.turn.context_ids)

    @property
    def sights(self) -> tuple[Sight, ...]:
        """The pictures in the context."""
        return self.turn.sights

    @property
    def real_length(self) -> int:
        """How many tokens of the canvas are the response's; fill stands behind them."""
        return min(len(self.canvas_ids), len(self.turn.response_ids) - self.canvas_index * len(self.canvas_ids))


@dataclass(frozen=True)
class Prepared:
    """The examples of all conversations, in order, and a line for every turn or conversation that was left out."""

    examples: list[Example]
    skipped: list[str]


def prepare(conversations: Iterable[Conversation], tokenizer: Tokenizer, canvas_length: int, fill_weight: float = 1.0,
            max_context: int | None = None, *, too_long: TooLong = "error", thinking: Thinking = "auto",
            fill: Fill = "eos", stop_ids: Sequence[int] | None = None, skip_bad: bool = False,
            pictures: PreparedPictures | None = None) -> Prepared:
    """`examples_of` each conversation. With ``skip_bad`` one that the template refuses or misrepresents is left out.

    Raises `DgemmaError` as `examples_of` does, and when nothing is left to train on.
    """
    examples: list[Example] = []
    skipped: list[str] = []
    for conversation in conversations:
        try:
            found = examples_of(conversation, tokenizer, canvas_length, fill_weight, max_context, too_long=too_long,
                                thinking=thinking, fill=fill, stop_ids=stop_ids, pictures=pictures)
        except DgemmaError as error:
            if not skip_bad:
                raise
            skipped.append(str(error))
            continue
        examples += found
        kept = {example.turn.message for example in found}
        skipped += [f"{conversation.where}, message {message}: too long" for message in conversation.trained
                    if message not in kept]
    if not examples:
        first = f"; the first: {skipped[0]}" if skipped else ""
        raise DgemmaError(f"there is nothing to train on: {len(skipped)} turns were left out{first}")
    return Prepared(examples, skipped)


def examples_of(conversation: Conversation, tokenizer: Tokenizer, canvas_length: int, fill_weight: float = 1.0,
                max_context: int | None = None, *, too_long: TooLong = "error", thinking: Thinking = "auto",
                fill: Fill = "eos", stop_ids: Sequence[int] | None = None,
                pictures: PreparedPictures | None = None) -> list[Example]:
    """Every canvas of every turn to learn from, in order.

    ``max_context`` is the most tokens that may stand before a canvas; what does not fit is an error, loses its oldest
    turns ("truncate"; system messages stay) or is left out as a whole turn ("skip"). ``thinking`` "auto" switches it on
    for conversations with thoughts in them; "off" leaves those out. ``fill`` stands behind the stop token. ``stop_ids``
    are the checkpoint's (`GenerationConfig.eos_token_id`); None: those of the family that the tokenizer has.
    ``pictures`` makes them ready for the model's tower, which they need.
    Raises `DgemmaError` naming the conversation.
    """
    if canvas_length < 1 or fill_weight < 0:
        raise DgemmaError(f"canvas_length must be at least 1 and fill_weight at least 0, got {canvas_length} and "
                          f"{fill_weight}")
    fill_id = tokenizer.end_of_text_id if fill == "eos" else tokenizer.padding_id
    if fill_id is None:
        raise DgemmaError(f"{tokenizer.source} has no {fill} token to fill canvases with: choose the other fill")
    examples = []
    for message in conversation.trained:
        turn = _fitting_turn(conversation, message, tokenizer, canvas_length, max_context, too_long, thinking, stop_ids,
                             pictures)
        if turn is not None:
            for index in range(-(-len(turn.response_ids) // canvas_length)):
                real = turn.response_ids[index * canvas_length : (index + 1) * canvas_length]
                rest = canvas_length - len(real)  # of the last one, filled up
                examples.append(Example(turn, index, real + [fill_id] * rest,
                                        [1.0] * len(real) + [float(fill_weight)] * rest))
    return examples


def batches(examples: Sequence[Example], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """An epoch's batches as indices of examples: every example once, in an order that depends on the arguments only.

    Examples of a similar context length share a batch, so that little is padded; so do the canvases of a turn, which
    then share one reading of it; the last batch may be smaller.
    """
    if batch_size < 1:
        raise DgemmaError(f"batch_size must be at least 1, got {batch_size}")
    rng = np.random.default_rng([seed, epoch])
    turns: dict[int, list[int]] = {}
    for index, example in enumerate(examples):
        turns.setdefault(id(example.turn), []).append(index)
    units = list(turns.values())
    order = [(examples[units[unit][-1]].context_length, unit, index)
             for unit in rng.permutation(len(units)).tolist() for index in units[unit]]
    made: list[list[int]] = []
    for start in range(0, len(order), batch_size * BUCKET):
        bucket = [index for _, _, index in sorted(order[start : start + batch_size * BUCKET])]
        made += [bucket[at : at + batch_size] for at in range(0, len(bucket), batch_size)]
    return [made[index] for index in rng.permutation(len(made))]


# ---- contexts that do not fit ----------------------------------------------------------------------


def _fitting_turn(conversation: Conversation, message: int, tokenizer: Tokenizer, canvas_length: int,
                  max_context: int | None, too_long: TooLong, thinking: Thinking,
                  stop_ids: Sequence[int] | None, pictures: PreparedPictures | None) -> Turn | None:
    """The turn, with what ``too_long`` allows if its last canvas would stand behind too much; None: left out."""
    turn = turn_of(conversation, message, tokenizer, thinking=thinking, stop_ids=stop_ids, pictures=pictures)
    if max_context is None or (needed := _needed(turn, canvas_length)) <= max_context:
        return turn
    if too_long == "skip":
        return None
    if too_long == "truncate":
        # A shortened context begins at one of the user's messages, but for the first.
        users = [at for at in range(message) if conversation.messages[at].get("role") == "user"]
        for first in users[1:]:
            turn = turn_of(conversation, message, tokenizer, thinking=thinking, stop_ids=stop_ids, first=first,
                           pictures=pictures)
            needed = _needed(turn, canvas_length)
            if needed <= max_context:
                return turn
        raise DgemmaError(f"{turn.where}: even without earlier turns {needed} tokens stand before its last canvas, "
                          f"{max_context} are allowed: shorten it, or skip what is too long")
    raise DgemmaError(f"{turn.where}: {needed} tokens stand before its last canvas, {max_context} are allowed: "
                      "truncate or skip what is too long")


def _needed(turn: Turn, canvas_length: int) -> int:
    return len(turn.context_ids) + (len(turn.response_ids) - 1) // canvas_length * canvas_length
