"""Automata of languages that look ahead and back: obligations about the text to come, and what was read so far.

A state is a set of threads, each a place and the obligations that it took on, beside the states of what is looked back
for. Knows nothing of JSON, tokens.
"""

from __future__ import annotations

import functools
from collections import defaultdict

import numpy as np

from dgemma.constrain.automaton import (
    ADVICE,
    MAX_STATES,
    Automaton,
    Effort,
    Nfa,
    Numbers,
    TooLarge,
    byte_classes,
    compile_part,
    minimal,
)
from dgemma.constrain.language import ANY_CHAR, Chars, Look, Node, Repeat, Watched

_Obligation = tuple[int, int]  # what is looked for, and how far it was read
_Thread = tuple[int, frozenset[_Obligation]]
_DEAD = -1
_MOST_THREADS = 2000  # of one state


class _Watching(Nfa):
    """With edges that say what lies ahead or behind."""

    def __init__(self, effort: Effort):
        super().__init__(effort)
        self.looks: dict[int, list[tuple[int, int]]] = defaultdict(list)  # state -> (what is looked for, target)
        self.sought: list[tuple[Look, Automaton]] = []

    def add(self, node: Node, start: int) -> int:
        if not isinstance(node, Look):
            return super().add(node, start)
        end = self.state()
        known = next((number for number, (look, _) in enumerate(self.sought) if look == node), None)
        if known is None:
            known = len(self.sought)
            self.sought.append((node, compile_part(node.part, self.effort)))
        self.looks[start].append((known, end))
        return end


def compile_watched(node: Watched, effort: Effort) -> Automaton:
    """The minimal automaton of a language with Looks; raises TooLarge."""
    nfa = _Watching(effort)
    start = nfa.state()
    end = nfa.add(node.part, start)
    sought = nfa.sought
    starts, byte_class = byte_classes(nfa, [cut for _, automaton in sought for cut in (
        np.flatnonzero(np.diff(automaton.byte_class)) + 1).tolist()])
    edges: list[dict[int, list[int]]] = [{} for _ in nfa.edges]  # per state: byte class -> targets
    for state, out in enumerate(nfa.edges):
        for low, high, target in out:
            for column in range(byte_class[low], byte_class[high] + 1):
                edges[state].setdefault(column, []).append(target)
    # What has come true, whatever follows, is no longer an obligation.
    settled = [_always(automaton, effort) for _, automaton in sought]
    behind = [number for number, (look, _) in enumerate(sought) if look.behind]

    @functools.cache
    def closure(threads: frozenset[_Thread], seen: tuple[int, ...]) -> frozenset[_Thread]:
        """With all that is reached without reading; ``seen``: the states of what is looked back for."""
        found, todo = set(threads), list(threads)
        while todo:
            state, owed = todo.pop()
            effort.spend(4)
            reached: list[_Thread] = [(target, owed) for target in nfa.empty[state]]
            for number, target in nfa.looks[state]:
                look, automaton = sought[number]
                if look.behind:
                    at = seen[behind.index(number)]
                    if (at != _DEAD and bool(automaton.accepts[at])) != look.negated:
                        reached.append((target, owed))
                elif 0 in settled[number]:
                    if not look.negated:
                        reached.append((target, owed))
                else:
                    reached.append((target, owed | {(number, 0)}))
            for one in reached:
                if one not in found:
                    found.add(one)
                    todo.append(one)
        if len(found) > _MOST_THREADS:
            raise TooLarge(f"the constraint's look-around is too large: {ADVICE}")
        kept = [one for one in found if nfa.edges[one[0]] or one[0] == end]
        fewest: dict[int, list[frozenset[_Obligation]]] = defaultdict(list)
        for state, owed in sorted(kept, key=lambda one: len(one[1])):
            if not any(less <= owed for less in fewest[state]):
                fewest[state].append(owed)
        return frozenset((state, owed) for state, sets in fewest.items() for owed in sets)

    @functools.cache
    def advance(owed: frozenset[_Obligation], byte: int) -> frozenset[_Obligation] | None:
        left = set()
        for number, at in owed:
            look, automaton = sought[number]
            following = automaton.next_byte(at, byte)
            if following == _DEAD:
                if look.negated:
                    continue
                return None
            if following in settled[number]:
                if look.negated:
                    return None
                continue
            left.add((number, following))
        return frozenset(left)

    @functools.cache
    def steps(state: int, owed: frozenset[_Obligation]) -> list[tuple[int, frozenset[_Thread]]]:
        """Where a thread gets by each class of bytes, nothing being reached yet without reading."""
        found = []
        for column, targets in edges[state].items():
            effort.spend(2 + len(targets) * (1 + len(owed)))
            if (left := advance(owed, starts[column])) is not None:
                found.append((column, frozenset((target, left) for target in targets)))
        return found

    @functools.cache
    def look_back(seen: tuple[int, ...], column: int) -> tuple[int, ...]:
        """The states of what is looked back for after a byte."""
        return tuple(_DEAD if at == _DEAD else sought[number][1].next_byte(at, starts[column])
                     for number, at in zip(behind, seen, strict=True))

    first_seen = tuple(0 for _ in behind)
    states = Numbers((closure(frozenset({(start, frozenset())}), first_seen), first_seen), MAX_STATES,
                     f"the constraint's look-around needs more than {MAX_STATES} states: {ADVICE}")
    rows, accepts = [], []
    for threads, seen in states:
        row = [-1] * len(starts)
        moves: dict[int, set[_Thread]] = defaultdict(set)
        for state, owed in threads:
            stepped = steps(state, owed)
            effort.spend(2 + len(stepped))
            for column, reached in stepped:
                moves[column] |= reached
        effort.spend(3 * len(moves))
        for column in sorted(moves):
            following = look_back(seen, column)
            if reached := closure(frozenset(moves[column]), following):
                row[column] = states[reached, following]
        rows.append(row)
        accepts.append(any(state == end and all(bool(sought[number][1].accepts[at]) != sought[number][0].negated
                                                for number, at in owed) for state, owed in threads))
    return minimal(np.array(rows, np.int32), np.array(byte_class), np.array(accepts), [[] for _ in rows], effort)


def _always(automaton: Automaton, effort: Effort) -> frozenset[int]:
    """The states after which any text at all is accepted."""
    anything = compile_part(Repeat(Chars(ANY_CHAR), 0, None), effort)
    states = {0, *np.flatnonzero(automaton.accepts).tolist()}
    return frozenset(state for state in states if _covers(automaton, state, anything))


def _covers(automaton: Automaton, state: int, anything: Automaton) -> bool:
    pairs, todo = {(state, 0)}, [(state, 0)]
    while todo:
        one, other = todo.pop()
        if anything.accepts[other] and not automaton.accepts[one]:
            return False
        for byte in range(256):
            following = anything.next_byte(other, byte)
            if following < 0:
                continue
            mine = automaton.next_byte(one, byte)
            if mine < 0:
                return False
            if (mine, following) not in pairs:
                pairs.add((mine, following))
                todo.append((mine, following))
    return True
