"""Recursive languages over tokens: automata that call each other, read with stacks of calls.

Works out a state when it is met; a state is a set of stacks, since a text may be read in several ways at first. Knows
nothing of probabilities, stop tokens, canvases.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from dgemma.constrain.automaton import FAR, Automaton, nearest
from dgemma.constrain.reading import Reader, TokenClasses, by_target, single_byte
from dgemma.constrain.vocabulary import Vocabulary, make_trie, merge_tokens
from dgemma.errors import DgemmaError

_ENTRY = 300  # bytes that a stack, and its place in a table, take
DEEPEST = 64  # calls within calls; deeper only where there is no shorter way to the end
_UNKNOWN = -2


@dataclass(frozen=True)
class _Rules:
    """All rules' automata with their states numbered through, over common byte classes; 0 is the first state."""

    table: np.ndarray  # [S, K] -1: nowhere
    byte_class: np.ndarray  # [256]
    accepts: np.ndarray  # [S]
    calls: list[list[tuple[int, int]]]  # per state: first state of a rule, state to return to
    rule: np.ndarray  # [S] the first state of the rule that each belongs to

    @classmethod
    def join(cls, automaton: Automaton, rules: dict[str, Automaton]) -> _Rules:
        parts = [automaton, *rules.values()]
        sizes = [len(part.table) for part in parts]
        firsts = (np.cumsum(sizes) - sizes).tolist()
        first_of = dict(zip(rules, firsts[1:], strict=True))
        columns, byte_class = np.unique(np.stack([part.byte_class for part in parts]), axis=1, return_inverse=True)
        table = np.concatenate([np.where(part.table >= 0, part.table + first, -1)[:, column]
                                for part, first, column in zip(parts, firsts, columns, strict=True)])
        calls = [[(first_of[rule], target + first) for rule, target in out]
                 for part, first in zip(parts, firsts, strict=True) for out in part.calls]
        return cls(table, byte_class.reshape(-1), np.concatenate([part.accepts for part in parts]), calls,
                   np.repeat(firsts, sizes))

    @property
    def nbytes(self) -> int:
        return self.table.nbytes + self.accepts.nbytes + self.rule.nbytes + 64 * len(self.calls)

    def distances(self, alone: np.ndarray) -> np.ndarray:
        """[S] steps to the end of a state's own rule, in bytes that are tokens of their own (alone [256])."""
        usable = np.zeros(self.table.shape[1], bool)
        usable[self.byte_class[alone]] = True
        steps = np.where(usable, self.table, -1)
        cost = {rule: FAR for out in self.calls for rule, _ in out}
        while True:
            detours = [(state, back, cost[rule]) for state, out in enumerate(self.calls) for rule, back in out
                       if cost[rule] < FAR]
            distance = nearest(steps, self.accepts, detours)
            found = {rule: int(distance[rule]) for rule in cost}
            if found == cost:
                return distance
            cost = found

    def first_bytes(self) -> np.ndarray:
        """[S, K] what can be read next inside a state's rule or the rules called there.

        Raises DgemmaError for a rule that calls itself before it reads anything.
        """
        first = self.table >= 0
        done: set[int] = set()

        def complete(state: int, above: tuple[int, ...]) -> None:
            if state in above:
                raise DgemmaError("the schema refers to itself without end: a definition is nothing but itself")
            if state not in done:
                for rule, _ in self.calls[state]:
                    complete(rule, (*above, state))
                    first[state] |= first[rule]
                done.add(state)

        for state in range(len(first)):
            complete(state, ())
        return first

    def plain_table(self) -> np.ndarray:
        """[2S + 2, K] the steps that are the same whatever stack lies below.

        States S … 2S - 1 are those of a rule that was called on the way; 2S is "it depends" and the last is "nowhere".
        It depends when more than one thing can happen, or a rule returns, or a called rule calls another.
        """
        states, columns = self.table.shape
        depends, nowhere = 2 * states, 2 * states + 1
        first = self.first_bytes()
        after = {int(rule): np.zeros(columns, bool) for rule in np.unique(self.rule)}  # what follows a rule's end
        changed = True
        while changed:
            changed = False
            for out in self.calls:
                for rule, back in out:
                    follows = first[back] | (after[int(self.rule[back])] if self.accepts[back] else False)
                    changed |= bool((follows & ~after[rule]).any())
                    after[rule] = after[rule] | follows
        plain = np.full((2 * states + 2, columns), nowhere, np.int64)
        plain[depends] = depends
        for state, out in enumerate(self.calls):
            own = self.table[state] >= 0
            inside = np.where(own, self.table[state], nowhere)
            called = np.where(own, self.table[state] + states, nowhere)
            ways = own.astype(int)
            for rule, _ in out:
                entered = first[rule]
                ways += entered
                direct = self.table[rule] >= 0
                for column in range(columns):
                    direct[column] &= not any(first[deeper][column] for deeper, _ in self.calls[rule])
                inside = np.where(entered, np.where(direct, self.table[rule] + states, depends), inside)
                called = np.where(entered, depends, called)
            if self.accepts[state]:
                returns = after[int(self.rule[state])]
                ways += returns
                inside, called = np.where(returns, depends, inside), np.where(returns, depends, called)
            plain[state] = np.where(ways > 1, depends, inside)
            plain[state + states] = np.where(ways > 1, depends, called)
        return plain


@dataclass(frozen=True)
class _Stack:
    """A state and the stack to return to."""

    state: int
    below: int  # number of a stack; -1: none
    depth: int
    distance: int  # bytes to the end of everything
    rank: int  # a number that depends on nothing but what the stack holds


class StackReader(Reader):
    """States are numbered as they are met.

    Distances are counted in single bytes: a text may need fewer tokens, and none needs more.
    """

    exact = False

    def __init__(self, automaton: Automaton, rules: dict[str, Automaton], vocabulary: Vocabulary,
                 without: Collection[int], deepest: int = DEEPEST):
        """``without``: tokens that are never text; ``deepest``: calls within calls (see `DEEPEST`)."""
        self._deepest = deepest
        self._rules = _Rules.join(automaton, rules)
        places = vocabulary.places(without)
        self._distance = self._rules.distances(vocabulary.single_bytes(places))
        plain = self._rules.plain_table()
        token_class, leads = merge_tokens(vocabulary, places, plain, self._rules.byte_class,
                                          len(self._rules.table))
        # A class that does the same whatever the stack is read as one of its tokens, all others token by token.
        depends = (leads == len(plain) - 2).any(axis=1)
        alone = np.flatnonzero((token_class >= 0) & depends[token_class]) if len(leads) else np.zeros(0, np.int64)
        shared = np.flatnonzero((token_class >= 0) & ~depends[token_class]) if len(leads) else alone
        _, examples, member = np.unique(token_class[shared], return_index=True, return_inverse=True)
        self._levels, word = make_trie(vocabulary, np.concatenate([places[alone], places[shared[examples]]]),
                                       self._rules.byte_class)
        self.words = int(word.max(initial=-1)) + 1
        # Two examples, or an example and another token, may be spelt in the same byte classes; then they are one word.
        word_of = np.concatenate([word[: len(alone)], word[len(alone) :][member]])
        self.classes = TokenClasses.of(vocabulary.ids[places[np.concatenate([alone, shared])]], word_of, self.words)
        self.nbytes = (self._rules.nbytes + self._distance.nbytes + self.classes.nbytes
                       + sum(level.nbytes for level in self._levels))
        self._forget()

    @property
    def grown(self) -> int:
        return self._table.nbytes + _ENTRY * (len(self._stacks) + len(self._states)) + self._members

    def _forget(self) -> None:
        self._stacks: list[_Stack] = []
        self._stack_numbers: dict[tuple[int, int], int] = {}
        self._states: list[frozenset[int]] = []
        self._numbers: dict[frozenset[int], int] = {}
        self._members = 0  # bytes of what these sets hold
        self._table = np.zeros((64, self._rules.table.shape[1]), np.int32)  # grows; -1: nowhere
        first = self._push(0, -1)
        self._state(set() if first is None else {first})

    def fresh(self) -> StackReader:
        other = copy.copy(self)
        other._forget()
        return other

    def _push(self, state: int, below: int, least: bool = False) -> int | None:
        """The number of a stack; None when it cannot be finished, or is deep and not the ``least`` way to the end."""
        depth = self._stacks[below].depth + 1 if below >= 0 else 0
        if depth > self._deepest and not least:
            return None
        key = (state, below)
        if key not in self._stack_numbers:
            rest, rank = (self._stacks[below].distance, self._stacks[below].rank) if below >= 0 else (0, 0)
            distance = min(int(self._distance[state]) + rest, FAR)
            if distance >= FAR:
                return None
            self._stack_numbers[key] = len(self._stacks)
            self._stacks.append(_Stack(state, below, depth, distance, hash((state, rank))))
        return self._stack_numbers[key]

    def _state(self, tops: set[int]) -> int:
        """The number of the state with these stacks and whatever they call or return to without reading."""
        seen, todo = set(tops), list(tops)
        while todo:
            stack = self._stacks[todo.pop()]
            reached = []
            for rule, back in self._rules.calls[stack.state]:
                below = self._push(back, stack.below, least=True)  # as deep as this one
                if below is not None:
                    least = int(self._distance[rule]) + self._stacks[below].distance == stack.distance
                    reached.append(self._push(rule, below, least))
            if self._rules.accepts[stack.state] and stack.below >= 0:
                reached.append(stack.below)
            for one in reached:
                if one is not None and one not in seen:
                    seen.add(one)
                    todo.append(one)
        key = frozenset(seen)
        if key not in self._numbers:
            self._numbers[key] = len(self._states)
            self._states.append(key)
            self._members += 64 * len(key)
            if len(self._states) > len(self._table):
                self._table = np.concatenate([self._table, np.zeros_like(self._table)])
            self._table[len(self._states) - 1] = _UNKNOWN
        return self._numbers[key]

    def _step(self, state: int, column: int) -> int:
        """The state after a byte of a class; -1: nowhere."""
        if self._table[state, column] == _UNKNOWN:
            tops = set()
            for number in self._states[state]:
                stack = self._stacks[number]
                target = int(self._rules.table[stack.state, column])
                if target >= 0 and (top := self._push(target, stack.below, least=True)) is not None:
                    tops.add(top)
            reached = self._state(tops) if tops else -1  # may make the table anew
            self._table[state, column] = reached
        return int(self._table[state, column])

    def step(self, state: int, byte: int) -> int:
        return self._step(state, int(self._rules.byte_class[byte]))

    def only_byte(self, state: int) -> int | None:
        row = np.array([self._step(state, column) for column in range(self._table.shape[1])])
        return single_byte(row, self._rules.byte_class)

    def moves(self, state: int) -> list[tuple[int, np.ndarray]]:
        out = np.full(self.words, -1, np.int64)
        reached = np.array([state])
        for level in self._levels:
            parents = reached[level.parent]
            live = np.flatnonzero(parents >= 0)
            if not len(live):
                break
            sources, columns = parents[live], level.column[live]
            found = self._table[sources, columns]
            unknown = found == _UNKNOWN
            if unknown.any():
                for source, column in set(zip(sources[unknown].tolist(), columns[unknown].tolist(), strict=True)):
                    self._step(source, column)
                found = self._table[sources, columns]
            reached = np.full(len(level.parent), -1, np.int64)
            reached[live] = found
            out[level.first : level.first + len(level.ends)] = reached[level.ends]
        return by_target(out)

    def distance(self, state: int) -> int:
        return min((self._stacks[number].distance for number in self._states[state]), default=FAR)

    def rank(self, state: int) -> int:
        return hash(frozenset(self._stacks[number].rank for number in self._states[state]))
