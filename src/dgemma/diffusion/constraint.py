"""What the loop asks of a constraint on the answer, such as a JSON schema; `dgemma.constrain` makes them.

A constraint sees distributions and token ids only. It never sees the network.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# Positions of the canvas and their log-probabilities [n, V], float32, some positions at a time and in order: a whole
# canvas of a large vocabulary never stands in memory.
Walk = Iterable[tuple[slice, Tensor]]


def said_tokens(tokens: Sequence[int | None], pinned: Sequence[bool], stops: Collection[int], room: int) -> int:
    """How many of a canvas' first ``room`` tokens belong to the answer because of what is pinned.

    What is pinned is said: a stop token ends the answer behind it only, or where it is pinned itself.
    """
    asked = next((i for i, pin in enumerate(pinned) if pin and tokens[i] in stops), len(pinned))
    return max((i + 1 for i, pin in enumerate(pinned[: min(asked, room)]) if pin), default=0)


def held(walk: Walk, tokens: Tensor, pinned: Tensor, stops: Collection[int], room: int) -> Walk:
    """The walk in which a pinned position can only be its token, and no `said_tokens` a stop token.

    tokens and pinned [C], on the walk's device. Behind ``room`` nothing is the answer's.
    """
    pinned = pinned.clone()
    pinned[room:] = False
    said = said_tokens(tokens.tolist(), pinned.tolist(), stops, room)
    for place, log_p in walk:
        log_p[: max(said - place.start, 0), list(stops)] = -torch.inf
        rows = pinned[place].nonzero().squeeze(1)
        log_p[rows] = -torch.inf
        log_p[rows, tokens[place][rows]] = 0.0
        yield place, log_p


@dataclass(frozen=True)
class Chosen:
    """Valid tokens for a whole canvas, [C] each, on the CPU."""

    draft: Tensor  # the most probable valid canvas (int64)
    sample: Tensor  # a valid canvas drawn from the distributions (int64)
    fixed: Tensor  # positions that can be nothing else (bool)


class Guide(Protocol):
    """One answer's way through a constraint, canvas by canvas."""

    finished: bool  # what was committed is valid and complete
    least: int  # tokens of the shortest valid answer
    may_be_empty: bool  # it is text that is free but for its calls: nobody asked for an answer of nothing

    def template(self, canvas: int, room: int) -> list[int | None]:
        """The tokens of the next canvas that are known before any is drawn; None where one is not. [canvas]

        ``room``: how many tokens the answer may still have, this canvas included.
        """
        ...

    def choose(self, walk: Walk, canvas: int, room: int, uniform: Tensor) -> Chosen:
        """The most probable valid canvas, and a drawn one, under per-position distributions.

        ``uniform`` [canvas] in [0, 1) is the randomness of the draw. Whatever is chosen can be completed within
        ``room`` tokens.
        """
        ...

    def commit(self, token_ids: list[int]) -> None:
        """A canvas is done and these (up to the stop token, which is not included) are its tokens."""
        ...

    def takes(self, token_ids: list[int], canvas: int, room: int) -> bool:
        """Whether a canvas may be these tokens as they are; False where that is not worth asking."""
        ...

    def begin_with(self, token_ids: list[int]) -> None:
        """The next canvas begins with these tokens, whatever is probable."""
        ...


class Constraint(Protocol):
    """A form that answers must have; shared by any number of requests."""

    free: bool  # it is text as any, but for the calls in it

    def guide(self, room: int) -> Guide:
        """A guide for one answer of at most ``room`` tokens; ValueError when no valid answer is so short."""
        ...
