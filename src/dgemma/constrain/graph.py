"""All that an answer may be, as states and the token classes between them: the constrained text, its end, a thought.

After a stop token anything may follow; before the text there may be one thought. Knows nothing of canvases and
probabilities.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dgemma.constrain.reading import Reader, TokenClasses
from dgemma.constrain.vocabulary import Vocabulary

DONE, THOUGHT, OPENING, TEXT = range(4)  # the text's states are numbered from TEXT on
_MOST_PLANNED = 2**26  # bytes of the plans that are remembered
_ENTRY = 200  # bytes that a small thing and its place in a table take


@dataclass(frozen=True)
class Special:
    """The control tokens that an answer may hold."""

    stops: tuple[int, ...]  # any of them ends it
    opened: int | None = None  # a thought begins and ends; None where there are none
    closed: int | None = None
    marks: tuple[int, ...] = ()  # of calls: these are never in a thought


@dataclass(frozen=True)
class Plan:
    """One step from some states. An edge is (state, target, label); a label is a set of token classes.

    Edges lie together by target; ``starts`` says where each target's begin.
    """

    src: np.ndarray  # [E] place in the states
    label: np.ndarray  # [E] place in the labels
    starts: np.ndarray  # [T]
    targets: np.ndarray  # [T] states
    distance: np.ndarray  # [T] tokens from there to the end of the text, at most
    members: np.ndarray  # [M] the labels' token classes, one after the other
    label_starts: np.ndarray  # [L] where each label's begin
    label_counts: np.ndarray  # [L]
    only: np.ndarray  # [L] the token of a label that has but one, -1 for the others

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in vars(self).values())


class Graph:
    """States 0 (DONE), 1 (THOUGHT), 2 (OPENING: a thought or the text begins) and those of the text.

    ``classes``: the text's token classes and after them those of the control tokens. One more, ``any``, stands for all
    tokens; it is used behind the end.
    """

    def __init__(self, reader: Reader, vocabulary: Vocabulary, special: Special, start: int):
        self.reader, self.start, self.vocabulary = reader, start, vocabulary
        self.special = special
        self.lock = threading.Lock()  # states are met, and remembered, by every answer that it guides
        tokens, counts = [reader.classes.tokens], [*reader.classes.counts.tolist()]

        def group(ids: Sequence[int] | np.ndarray) -> np.ndarray:
            """A new class of these tokens, if there are any."""
            if not len(ids):
                return np.zeros(0, np.int32)
            tokens.append(np.asarray(ids, np.int64))
            counts.append(len(ids))
            return np.array([len(counts) - 1], np.int32)

        self._stop = group(special.stops)
        if start != TEXT:
            marks = [token for token in (*special.stops, *special.marks, special.opened, special.closed)
                     if token is not None]
            everywhere = np.setdiff1d(vocabulary.ids, np.append(reader.classes.tokens, marks))
            group(everywhere)  # what the text cannot hold, a thought can
            self._opened, self._closed = group([special.opened]), group([special.closed])  # type: ignore[list-item]
            own = reader.classes.counts.cumsum()
            marked = np.searchsorted(own, np.flatnonzero(np.isin(reader.classes.tokens, special.marks)), side="right")
            self._thought = np.setdiff1d(np.arange(self._opened[0], dtype=np.int32), [*self._stop, *marked])
        sizes = np.array(counts)
        self.classes = TokenClasses(np.concatenate(tokens), np.cumsum(sizes) - sizes)
        self.any = len(counts)
        self._labels: list[np.ndarray] = []
        self._label_numbers: dict[bytes, int] = {}
        self._fans: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # state -> targets, labels
        self._plans: dict[bytes, Plan] = {}
        self._planned = self._known = 0  # bytes of these plans; of labels and fans

    @property
    def grown(self) -> int:
        """Bytes of what was remembered while it was used."""
        return self._planned + self._known + self.reader.grown

    @property
    def nbytes(self) -> int:
        return self.classes.nbytes + self.reader.nbytes + self.grown

    @property
    def size(self) -> int:
        """How many states' moves are remembered."""
        return len(self._fans)

    def distance(self, state: int) -> int:
        """Tokens to the end of the text, at most; below any room for what is over."""
        if state == DONE:
            return -(2**30)
        if state == THOUGHT:
            return 1 + self.reader.distance(0)
        return self.reader.distance(self._text(state))

    def accepts(self, state: int) -> bool:
        """Whether the answer may end here."""
        return state not in (DONE, THOUGHT) and self.reader.accepts(self._text(state))

    def ends(self, state: int) -> bool:
        """Whether the answer must end here: nothing can follow."""
        return self.accepts(state) and not self.reader.moves(self._text(state))

    def step(self, state: int, token: int) -> int | None:
        """The state after one token, which is not a stop token; None when it cannot stand there."""
        if state == OPENING and token == self.special.opened:
            return THOUGHT
        if state == THOUGHT and token == self.special.closed:
            return TEXT
        text = None if token in self.special.stops else self.vocabulary.bytes_of(token)
        if text is None or state == DONE:
            return None
        if state == THOUGHT:
            return None if token in self.special.marks else THOUGHT
        reached = self.reader.read(self._text(state), text)
        return None if reached is None else TEXT + reached

    def forced(self, state: int) -> bytes:
        """The bytes that the text goes on with in any case."""
        return self.reader.forced(state - TEXT) if state >= TEXT else b""

    def plan(self, states: np.ndarray) -> Plan:
        """One step from these states."""
        key = states.tobytes()
        if key not in self._plans:
            plan = self._make_plan(states.tolist())
            taken = plan.nbytes + len(key) + _ENTRY
            if self._planned + taken > _MOST_PLANNED:
                self._plans.clear()
                self._planned = 0
            self._planned += taken
            self._plans[key] = plan
        return self._plans[key]

    def _text(self, state: int) -> int:
        return 0 if state == OPENING else state - TEXT

    def _moves(self, state: int) -> list[tuple[int, np.ndarray]]:
        if state == DONE:
            return [(DONE, np.array([self.any], np.int32))]
        if state == THOUGHT:
            return [(THOUGHT, self._thought), (TEXT, self._closed)]
        moves = [(TEXT + target, classes) for target, classes in self.reader.moves(self._text(state))]
        if self.accepts(state) and len(self._stop):
            moves.append((DONE, self._stop))
        if state == OPENING:
            moves.append((THOUGHT, self._opened))
        return moves

    def _fan(self, state: int) -> tuple[np.ndarray, np.ndarray]:
        if state not in self._fans:
            moves = self._moves(state)
            self._known += 16 * len(moves) + _ENTRY
            self._fans[state] = (np.array([target for target, _ in moves], np.int64),
                                 np.array([self._label(classes) for _, classes in moves], np.int64))
        return self._fans[state]

    def _label(self, classes: np.ndarray) -> int:
        key = hashlib.blake2b(classes.tobytes(), digest_size=16).digest()
        if key not in self._label_numbers:
            self._label_numbers[key] = len(self._labels)
            self._labels.append(classes)
            self._known += classes.nbytes + _ENTRY
        return self._label_numbers[key]

    def _make_plan(self, states: list[int]) -> Plan:
        fans = [self._fan(state) for state in states]
        src = np.repeat(np.arange(len(states)), [len(targets) for targets, _ in fans])
        target = np.concatenate([targets for targets, _ in fans])
        used, label = np.unique(np.concatenate([labels for _, labels in fans]), return_inverse=True)
        # Sorted by rank, so that a draw does not depend on which states were met before.
        targets, place = np.unique(target, return_inverse=True)
        by_rank = np.argsort([state if state < TEXT else self.reader.rank(state - TEXT) for state in targets.tolist()],
                             kind="stable")
        targets, place = targets[by_rank], np.argsort(by_rank)[place]
        order = np.argsort(place, kind="stable")
        starts = np.searchsorted(place[order], np.arange(len(targets)))
        sets = [self._labels[number] for number in used.tolist()]
        counts = np.array([len(classes) for classes in sets])
        sizes = np.append(self.classes.counts, 0)  # `any` is never one token only
        only = np.array([self.classes.tokens[self.classes.starts[classes[0]]]
                         if len(classes) == 1 and sizes[classes[0]] == 1 else -1 for classes in sets])
        return Plan(src[order], label[order], starts, targets,
                    np.array([self.distance(state) for state in targets.tolist()]),
                    np.concatenate(sets), np.cumsum(counts) - counts, counts, only)
