"""An automaton over bytes as one over tokens: which tokens lead from a state to which, and how far the end is.

`TableReader` works out every state at once. Recursive languages have no such table: see `stacks`. Knows nothing of
probabilities, stop tokens, canvases.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from dgemma.constrain.automaton import Automaton, nearest
from dgemma.constrain.vocabulary import Vocabulary, merge_tokens

MOST_STATES = 2000  # more are not all followed at once
MOST_FORCED = 4096  # bytes of text that are looked ahead


@dataclass(frozen=True)
class TokenClasses:
    """Tokens that do the same, together: [N] ids, and where each class begins."""

    tokens: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, tokens: np.ndarray, classes: np.ndarray, count: int) -> TokenClasses:
        """From the class of every token, [N] both; every class has one at least."""
        sizes = np.bincount(classes, minlength=count)
        return cls(tokens[np.argsort(classes, kind="stable")], np.cumsum(sizes) - sizes)

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + self.starts.nbytes

    @property
    def counts(self) -> np.ndarray:
        return np.diff(self.starts, append=len(self.tokens))


class Reader(ABC):
    """What the search for a path asks; states are numbers, 0 is the first."""

    classes: TokenClasses
    exact: bool  # all states are few enough to be followed at once
    nbytes: int  # memory of what it was made with; readers made by `fresh` share it

    @property
    def grown(self) -> int:
        """Memory of the states that it has met."""
        return 0

    @abstractmethod
    def moves(self, state: int) -> list[tuple[int, np.ndarray]]:
        """The next states and, for each, the token classes that lead there (ascending)."""

    @abstractmethod
    def distance(self, state: int) -> int:
        """Tokens to the end at most (`FAR`: there is no way); above 0 there is a move to a state that is one nearer."""

    @abstractmethod
    def step(self, state: int, byte: int) -> int:
        """The state after a byte; -1: nowhere."""

    @abstractmethod
    def only_byte(self, state: int) -> int | None:
        """The one byte that can follow, if it is one."""

    def rank(self, state: int) -> int:
        """A number that orders states; it does not depend on which states were met before."""
        return state

    def accepts(self, state: int) -> bool:
        return self.distance(state) == 0

    def fresh(self) -> Reader:
        """One like this that has met no states yet; itself, if it does not remember any."""
        return self

    def read(self, state: int, text: bytes) -> int | None:
        """The state after these bytes; None: nowhere."""
        for byte in text:
            state = self.step(state, byte)
            if state < 0:
                return None
        return state

    def forced(self, state: int) -> bytes:
        """The bytes that every text goes on with from here."""
        text = bytearray()
        while len(text) < MOST_FORCED and not self.accepts(state) and (byte := self.only_byte(state)) is not None:
            text.append(byte)
            state = self.step(state, byte)
        return bytes(text)


def single_byte(row: np.ndarray, byte_class: np.ndarray) -> int | None:
    """The one byte that leads somewhere, if it is one; row [K]: next states, -1: nowhere."""
    live = np.flatnonzero(row >= 0)
    found = np.flatnonzero(byte_class == live[0]) if len(live) == 1 else ()
    return int(found[0]) if len(found) == 1 else None


def by_target(row: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Next states [classes] (-1: nowhere) -> every one of them with its classes, ascending."""
    classes = np.flatnonzero(row >= 0).astype(np.int32)
    if not len(classes):
        return []
    classes = classes[np.argsort(row[classes], kind="stable")]
    targets, starts = np.unique(row[classes], return_index=True)
    return list(zip(targets.tolist(), np.split(classes, starts[1:]), strict=True))


class TableReader(Reader):
    """All states' moves in one table; distances are exact. ``without``: tokens that are never text."""

    def __init__(self, automaton: Automaton, vocabulary: Vocabulary, without: Collection[int]):
        self.automaton = automaton
        states = len(automaton.table)
        self.exact = states <= MOST_STATES
        table = np.append(automaton.table, np.full((1, automaton.table.shape[1]), states), axis=0)
        table[table < 0] = states
        places = vocabulary.places(without)
        token_class, leads = merge_tokens(vocabulary, places, table, automaton.byte_class, states)
        useful = token_class >= 0
        self.classes = TokenClasses.of(vocabulary.ids[places[useful]], token_class[useful], len(leads))
        leads[leads == states] = -1
        self._moves = np.ascontiguousarray(leads.T)  # [S, classes]
        self._distance = nearest(self._moves, automaton.accepts)
        self.nbytes = automaton.nbytes + self.classes.nbytes + self._moves.nbytes + self._distance.nbytes

    def moves(self, state: int) -> list[tuple[int, np.ndarray]]:
        return by_target(self._moves[state])

    def distance(self, state: int) -> int:
        return int(self._distance[state])

    def step(self, state: int, byte: int) -> int:
        return self.automaton.next_byte(state, byte)

    def only_byte(self, state: int) -> int | None:
        return single_byte(self.automaton.table[state], self.automaton.byte_class)
