"""Examples of any lengths as one batch: clean canvases, and what stands before them, read once for a whole turn.

Works on token ids. Knows nothing of text, noise, networks or losses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from dgemma.train.data.examples import Example
    from dgemma.train.sights import Sight


@dataclass(frozen=True)
class Batch:
    """Clean canvases and what stands before them: B canvases that read R rows of context.

    Canvases of one turn share a row, which is as long as the longest of their contexts: each sees so much of it as
    stands before itself. A row's canvases are in the order of their contexts' lengths, and all of them but the last
    are part of the row.
    """

    context: Tensor  # [R, T] token ids, padded behind
    canvas: Tensor  # [B, C] token ids
    lengths: tuple[int, ...] | None = None  # [B] the tokens that stand before every canvas; None: the whole row
    prompts: tuple[int, ...] | None = None  # [B] how many of them are the prompt's; None: all are
    weights: Tensor | None = None  # [B, C] of each position's loss; None: 1, and the objective's for fill
    fill: Tensor | None = None  # [B, C] bool: what stands behind the response's end; None: nothing does
    owners: tuple[int, ...] | None = None  # [B] the row that every canvas reads; None: each its own, in order
    sights: tuple[tuple[int, Sight], ...] = ()  # the pictures, each with the row that it stands in

    @property
    def rows(self) -> tuple[int, ...]:
        """The row that every canvas reads [B]."""
        return self.owners or tuple(range(len(self.canvas)))

    @property
    def before(self) -> tuple[int, ...]:
        """How many tokens of its row stand before every canvas [B]."""
        return self.lengths or (self.context.shape[1],) * len(self.canvas)

    @property
    def spans(self) -> list[list[tuple[int, int]]] | None:
        """The columns of every row that are pictures' [R]; None where there are no pictures."""
        if not self.sights:
            return None
        return [[(sight.start, sight.stop) for owner, sight in self.sights if owner == row]
                for row in range(len(self.context))]

    @property
    def last(self) -> tuple[int, ...]:
        """The last canvas of every row [R]: the one whose context is the whole row."""
        ends: dict[int, int] = {}
        for index in sorted(range(len(self.canvas)), key=self.before.__getitem__):
            ends[self.rows[index]] = index
        return tuple(ends[row] for row in range(len(self.context)))

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, **tensors)


def collate(examples: Sequence[Example]) -> Batch:
    """Examples of any context lengths as one batch on the CPU, canvases in their order; those of a turn share a row.

    Raises ValueError for no examples, an empty context, canvases of several lengths, or one whose weights are all 0.
    """
    if not examples:
        raise ValueError("a batch needs at least one example")
    contexts = [np.asarray(example.context_ids) for example in examples]
    lengths = tuple(len(context) for context in contexts)
    widths = {len(example.canvas_ids) for example in examples} | {len(example.weights) for example in examples}
    if 0 in lengths or len(widths) != 1:
        raise ValueError(f"contexts must not be empty, and canvases and their weights of one length; got contexts of "
                         f"{sorted(set(lengths))} tokens and canvases and weights of {sorted(widths)}")
    owners, longest = _shared_rows(examples, contexts)
    context = torch.zeros((len(longest), max(lengths)), dtype=torch.long)  # padded with whatever: nothing sees it
    for row, index in enumerate(longest):
        context[row, : lengths[index]] = torch.from_numpy(contexts[index])
    canvas = torch.stack([torch.as_tensor(example.canvas_ids) for example in examples])
    weights = torch.stack([torch.as_tensor(example.weights, dtype=torch.float32) for example in examples])
    if bool((weights.sum(1) <= 0).any()):
        raise ValueError("the weights of an example's canvas are all 0: there is nothing to learn from it")
    fill = torch.arange(canvas.shape[1]) >= torch.tensor([example.real_length for example in examples]).unsqueeze(1)
    uniform = len(set(lengths)) == 1
    prompts = tuple(example.prompt_length for example in examples)
    sights = tuple((row, sight) for row, index in enumerate(longest) for sight in examples[index].sights)
    return Batch(context, canvas, None if uniform else lengths, prompts, weights, fill,
                 None if len(longest) == len(examples) else owners, sights)


def _shared_rows(examples: Sequence[Example], contexts: Sequence[np.ndarray]) -> tuple[tuple[int, ...], list[int]]:
    """The row of every example [B], and the example with the longest context of every row [R].

    A row goes on with an example whose context begins with the row's prompt, context and last canvas, all of it real:
    a later canvas of the same response. Told by the tokens and pictures alone, so it can never be wrong.
    """
    first: dict[int, int] = {}  # example -> the first one of its row
    ends: dict[int, int] = {}  # first example of a row -> its last one so far
    for index in sorted(range(len(examples)), key=lambda i: len(contexts[i])):
        example = examples[index]
        first[index] = next((begin for begin, end in ends.items()
                             if examples[end].prompt_length == example.prompt_length
                             and examples[end].sights == example.sights
                             and _goes_on(contexts[index], contexts[end], examples[end])), index)
        ends[first[index]] = index
    rows = {begin: row for row, begin in enumerate(dict.fromkeys(first[index] for index in range(len(examples))))}
    return tuple(rows[first[index]] for index in range(len(examples))), [ends[begin] for begin in rows]


def _goes_on(context: np.ndarray, before: np.ndarray, example: Example) -> bool:
    """Whether a context begins with that of an earlier example and its canvas."""
    end = len(before) + len(example.canvas_ids)
    return (example.real_length == len(example.canvas_ids) and len(context) >= end
            and np.array_equal(context[: len(before)], before)
            and np.array_equal(context[len(before) : end], example.canvas_ids))
