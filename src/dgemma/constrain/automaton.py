"""A language as a deterministic automaton over the bytes of UTF-8, minimal, possibly with calls to other rules.

By way of Thompson's construction, subsets and partition refinement. Knows nothing of JSON, tokens.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, TypeVar

import numpy as np

from dgemma.constrain.ecma import Ranges
from dgemma.constrain.language import (
    Alt,
    Both,
    Call,
    Chars,
    Literal,
    Look,
    Net,
    Node,
    Repeat,
    Seq,
    Watched,
)
from dgemma.errors import DgemmaError

MAX_STATES = 10_000  # of a minimal automaton's construction; about a second's work
MAX_PIECES = 100_000  # of the nondeterministic one
MAX_EFFORT = 12_000_000  # of a whole constraint's construction, in about 0.4 µs each
ADVICE = "use fewer or smaller repetitions, lengths and alternatives"
FAR = 2**30  # more steps than anything takes: no way at all


T = TypeVar("T")


class TooLarge(DgemmaError):  # noqa: N818  (what is wrong is its size)
    """A constraint would take too much time or memory to make."""


class Effort:
    """What constructing a constraint may take altogether, so that no schema or pattern costs minutes or gigabytes."""

    def __init__(self, steps: int = MAX_EFFORT, states: int = 2 * MAX_STATES):
        self.left, self.states = steps, states
        self.parts: dict[int, tuple[Node, Automaton]] = {}  # what was made, by the node's identity

    def spend(self, steps: int) -> None:
        """Raises DgemmaError when there is not so much left."""
        self.left -= steps
        if self.left < 0:
            raise TooLarge(f"the constraint is too large: {ADVICE}")

    def keep(self, automaton: Automaton, otherwise: str) -> Automaton:
        """An automaton that the constraint holds; raises DgemmaError, saying so, when all have too many states."""
        self.states -= len(automaton.table)
        if self.states < 0:
            raise TooLarge(otherwise)
        return automaton


@dataclass(frozen=True)
class Automaton:
    """State 0 is the first; a state from which nothing can be accepted does not exist.

    A language without any text has one state, not accepting and without transitions.
    """

    table: np.ndarray  # [states, byte classes] int32: the next state, -1: none
    byte_class: np.ndarray  # [256] which column a byte reads
    accepts: np.ndarray  # [states] bool
    calls: list[list[tuple[str, int]]]  # per state: the rules that may begin here, the states they return to

    @property
    def nbytes(self) -> int:
        return self.table.nbytes + self.byte_class.nbytes + self.accepts.nbytes + 64 * len(self.calls)

    def next_byte(self, state: int, byte: int) -> int:
        return int(self.table[state, self.byte_class[byte]])


class Numbers(Generic[T]):
    """Things by the number in which they were met, which grow while they are walked; at most ``most`` of them."""

    def __init__(self, first: T, most: int, complaint: str):
        self.most, self.complaint = most, complaint
        self._numbers = {first: 0}
        self._things = [first]

    def __getitem__(self, thing: T) -> int:
        """The number of a thing, which is met now if it was not yet; raises TooLarge."""
        if thing not in self._numbers:
            if len(self._things) >= self.most:
                raise TooLarge(self.complaint)
            self._numbers[thing] = len(self._things)
            self._things.append(thing)
        return self._numbers[thing]

    def __iter__(self) -> Iterator[T]:
        return iter(self._things)


def nearest(table: np.ndarray, ends: np.ndarray, detours: Iterable[tuple[int, int, int]] = ()) -> np.ndarray:
    """Steps from every state to one of the ends, [S]; `FAR` where there is no way.

    table [S, K]: next states, -1 for none; ends [S] bool; detours: (state, next state, steps that this takes).
    """
    pairs = np.arange(len(table))[:, None] * len(table) + table
    sources, targets = np.divmod(np.unique(pairs[table >= 0]), len(table))
    into: list[list[tuple[int, int]]] = [[] for _ in table]
    for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
        into[target].append((source, 1))
    for source, target, cost in detours:
        into[target].append((source, cost))
    distance = [FAR] * len(table)
    queue = [(0, state) for state in np.flatnonzero(ends).tolist()]
    while queue:
        steps, state = heapq.heappop(queue)
        if steps < distance[state]:
            distance[state] = steps
            for source, cost in into[state]:
                if steps + cost < distance[source]:
                    heapq.heappush(queue, (steps + cost, source))
    return np.array(distance)


def compile_language(language: Node, effort: Effort | None = None) -> Automaton:
    """The minimal automaton; raises DgemmaError when it, or the way to it, would be too large."""
    effort = effort or Effort()
    return effort.keep(compile_part(language, effort),
                       f"the constraint's definitions need automata of too many states together: {ADVICE}")


def compile_part(language: Node, effort: Effort) -> Automaton:
    """The minimal automaton of a part of a language, which does not count among the states of its definitions."""
    if id(language) not in effort.parts:
        if isinstance(language, Both):
            made = _product(language, effort)
        elif isinstance(language, Watched):
            from dgemma.constrain.looking import compile_watched

            made = compile_watched(language, effort)
        else:
            nfa = Nfa(effort)
            start = nfa.state()
            made = nfa.automaton(start, nfa.add(language, start))
        effort.parts[id(language)] = language, made
    return effort.parts[id(language)][1]


def utf8_sequences(ranges: Ranges) -> list[list[tuple[int, int]]]:
    """Byte ranges in a row that together are exactly the UTF-8 of these characters."""
    out: list[list[tuple[int, int]]] = []
    for low, high in ranges:
        for first, last in ((0, 0x7F), (0x80, 0x7FF), (0x800, 0xFFFF), (0x10000, 0x10FFFF)):
            if max(low, first) <= min(high, last):
                out += _split(chr(max(low, first)).encode(), chr(min(high, last)).encode())
    return out


def _split(low: bytes, high: bytes) -> list[list[tuple[int, int]]]:
    """All byte strings from low to high (one length) whose bytes after the first are 80…BF."""
    if len(low) == 1:
        return [[(low[0], high[0])]]
    least, most = b"\x80" * (len(low) - 1), b"\xbf" * (len(low) - 1)
    if low[0] == high[0]:
        return [[(low[0], low[0]), *rest] for rest in _split(low[1:], high[1:])]
    out, first, last = [], low[0], high[0]
    if low[1:] != least:
        out += [[(first, first), *rest] for rest in _split(low[1:], most)]
        first += 1
    tail = []
    if high[1:] != most:
        tail = [[(last, last), *rest] for rest in _split(least, high[1:])]
        last -= 1
    if first <= last:
        out.append([(first, last), *((0x80, 0xBF) for _ in least)])
    return out + tail


class Nfa:
    """States with edges over bytes, empty edges and calls."""

    def __init__(self, effort: Effort):
        self.effort = effort
        self.edges: list[list[tuple[int, int, int]]] = []  # per state: (first byte, last byte, target)
        self.empty: list[list[int]] = []
        self.calls: list[list[tuple[str, int]]] = []
        # By the node's identity, since repetitions add it again and again.
        self._sequences: dict[int, list[list[tuple[int, int]]]] = {}

    def state(self) -> int:
        self.effort.spend(4)
        if len(self.edges) >= MAX_PIECES:
            raise TooLarge(f"the constraint is too large: {ADVICE}")
        self.edges.append([])
        self.empty.append([])
        self.calls.append([])
        return len(self.edges) - 1

    def add(self, node: Node, start: int) -> int:
        """Add a language that begins at a state; returns the state where it ends. No edge leads back to start."""
        self.effort.spend(10)
        if isinstance(node, Literal):
            for byte in node.data:
                following = self.state()
                self.edges[start].append((byte, byte, following))
                start = following
            return start
        if isinstance(node, Chars):
            end = self.state()
            known: dict[tuple[tuple[int, int], ...], int] = {(): end}
            if id(node) not in self._sequences:
                self._sequences[id(node)] = utf8_sequences(node.ranges)
            self.effort.spend(4 * len(self._sequences[id(node)]))
            for sequence in self._sequences[id(node)]:
                for depth in range(len(sequence) - 1, 0, -1):  # sequences with a common end share it
                    rest = tuple(sequence[depth:])
                    if rest not in known:
                        known[rest] = self.state()
                        self.edges[known[rest]].append((*rest[0], known[rest[1:]]))
                self.edges[start].append((*sequence[0], known[tuple(sequence[1:])]))
            return end
        if isinstance(node, Seq):
            for part in node.parts:
                start = self.add(part, start)
            return start
        if isinstance(node, Alt):
            end = self.state()
            for part in node.parts:
                self.empty[self.add(part, start)].append(end)
            return end
        if isinstance(node, Repeat):
            return self._repeat(node, start)
        if isinstance(node, Call):
            end = self.state()
            self.calls[start].append((node.rule, end))
            return end
        if isinstance(node, Net):
            return self._net(node, start)
        if isinstance(node, Look):
            raise DgemmaError("a look-around stands outside of any text")
        return self.embed(compile_part(node, self.effort), start)

    def _net(self, node: Net, start: int) -> int:
        states = defaultdict(self.state)
        self.empty[start].append(states[0])
        end = self.state()
        for source, part, target in node.ways:
            self.empty[self.add(part, states[source])].append(states[target])
        for one in node.ends:
            self.empty[states[one]].append(end)
        return end

    def _repeat(self, node: Repeat, start: int) -> int:
        for _ in range(node.least):
            before, start = start, self.add(node.part, start)
            if start == before:
                return start  # nothing, however often
        if node.most is None:
            loop = self.state()
            self.empty[start].append(loop)
            self.empty[self.add(node.part, loop)].append(loop)
            # What follows must not lead back into the loop's own state, nor a loop that follows into this one.
            end = self.state()
            self.empty[loop].append(end)
            return end
        end = self.state()
        for _ in range(node.most - node.least):
            self.empty[start].append(end)
            before, start = start, self.add(node.part, start)
            if start == before:
                return end
        self.empty[start].append(end)
        return end

    def automaton(self, start: int, end: int) -> Automaton:
        """The minimal deterministic one of what leads from a state to another."""
        return minimal(*_subsets(self, start, end), self.effort)

    def embed(self, automaton: Automaton, start: int) -> int:
        """Add an automaton as `add` does a language."""
        states = [self.state() for _ in automaton.accepts]
        end = self.state()
        self.empty[start].append(states[0])
        self.effort.spend(100 * len(states))
        for source, row in enumerate(automaton.table[:, automaton.byte_class]):
            cuts = [0, *(np.flatnonzero(np.diff(row)) + 1).tolist(), 256]
            self.edges[states[source]] += [(low, past - 1, states[row[low]]) for low, past in pairwise(cuts)
                                           if row[low] >= 0]
            self.calls[states[source]] += [(rule, states[back]) for rule, back in automaton.calls[source]]
        for state in np.flatnonzero(automaton.accepts):
            self.empty[states[state]].append(end)
        return end


def byte_classes(nfa: Nfa, cuts: Iterable[int] = ()) -> tuple[list[int], list[int]]:
    """Where bytes begin that all edges, and what is cut at ``cuts``, treat alike; and the class of every byte."""
    bounds = {0, *cuts, *(bound for out in nfa.edges for low, high, _ in out for bound in (low, high + 1))}
    starts = sorted(bounds - {256})
    return starts, (np.searchsorted(starts, np.arange(256), side="right") - 1).tolist()


def _subsets(nfa: Nfa, start: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[list]]:
    """Deterministic: (table [S, K] with -1 for none, byte_class, accepts, calls)."""
    starts, byte_class = byte_classes(nfa)
    edges = [[(byte_class[low], byte_class[high] + 1, target) for low, high, target in out] for out in nfa.edges]
    # Which states matter: those that read something, call something or are the end.
    matters = [bool(nfa.edges[state] or nfa.calls[state]) or state == end for state in range(len(nfa.edges))]
    closures: dict[int, frozenset[int]] = {}

    def closure(state: int) -> frozenset[int]:
        if state not in closures:
            seen, todo = {state}, [state]
            while todo:
                for target in nfa.empty[todo.pop()]:
                    if target not in seen:
                        seen.add(target)
                        todo.append(target)
            nfa.effort.spend(10 * len(seen))
            closures[state] = frozenset(one for one in seen if matters[one])
        return closures[state]

    subsets = Numbers(closure(start), MAX_STATES,
                      f"the constraint needs an automaton of more than {MAX_STATES} states: {ADVICE}")
    rows, calls = [], []
    for subset in subsets:
        nfa.effort.spend(2 * len(starts) + len(subset))
        moves: dict[int, set[int]] = defaultdict(set)
        called: dict[str, set[int]] = defaultdict(set)
        for state in subset:
            for first, past, target in edges[state]:
                reached = closure(target)
                nfa.effort.spend((past - first) * (3 + len(reached) // 3))
                for column in range(first, past):
                    moves[column] |= reached
            for rule, target in nfa.calls[state]:
                called[rule] |= closure(target)
        row = np.full(len(starts), -1, np.int32)
        for column, reached in moves.items():
            row[column] = subsets[frozenset(reached)]
        rows.append(row)
        calls.append([(rule, subsets[frozenset(reached)]) for rule, reached in sorted(called.items())])
    accepts = np.array([end in subset for subset in subsets])
    return np.stack(rows), np.array(byte_class), accepts, calls


def minimal(table: np.ndarray, byte_class: np.ndarray, accepts: np.ndarray, calls: list[list],
            effort: Effort) -> Automaton:
    """Without states that lead nowhere, states that do the same and byte classes that do."""
    effort.spend(2500 + 2 * table.size)
    count = len(table)
    rules = sorted({rule for out in calls for rule, _ in out})
    full = np.full((count + 1, table.shape[1] + len(rules)), -1, np.int64)  # the last row: nowhere
    full[:-1, : table.shape[1]] = table
    for state, out in enumerate(calls):
        for rule, target in out:
            full[state, table.shape[1] + rules.index(rule)] = target
    steps = nearest(full[:-1], accepts)
    lost = np.append(steps >= FAR, True)
    full[lost[full]] = -1
    full[lost] = -1

    part = _same_future(full, np.unique(np.append(steps, FAR), return_inverse=True)[1])
    kept: dict[int, int] = {int(part[0]): 0}  # part -> new state, in order of discovery; the first stays 0
    queue = [0]
    for state in queue:
        for target in full[state]:
            if target >= 0 and int(part[target]) not in kept:
                kept[int(part[target])] = len(kept)
                queue.append(int(target))
    renamed = np.array([kept.get(int(one), -1) for one in part[:-1]] + [-1], np.int32)
    states = np.array(queue)
    columns, column_of = np.unique(renamed[full[states, : table.shape[1]]], axis=1, return_inverse=True)
    return Automaton(
        np.ascontiguousarray(columns), column_of.reshape(-1)[byte_class], accepts[states],
        [[(rule, int(renamed[target])) for rule, target in calls[state] if steps[target] < FAR]
         for state in queue])


def _same_future(table: np.ndarray, part: np.ndarray) -> np.ndarray:
    """The coarsest partition of the states, finer than ``part``, whose members step into the same parts.

    table [S, K] with -1 for the last state. In the spirit of Hopcroft: when a part is split its largest piece keeps the
    name, so only what steps into the others is looked at again; what a state steps into is compared by a random 64-bit
    sum.
    """
    states, columns = table.shape
    weights = np.random.default_rng(0).integers(1, 2**63, columns, dtype=np.uint64) * 2 + 1
    names = np.random.default_rng(1).integers(1, 2**63, 2 * states + 1, dtype=np.uint64)
    order = np.argsort(table % states, axis=None, kind="stable")
    before = order // columns  # sources of all steps, by target
    first = np.searchsorted((table % states).reshape(-1)[order], np.arange(states + 1))
    part, sizes = part.copy(), np.bincount(part, minlength=2 * states + 1)
    fresh = int(part.max()) + 1
    look = np.arange(states)
    while len(look):
        keys = (names[part[table[look]]] * weights).sum(axis=1)
        look = look[np.lexsort((keys, part[look]))]
        keys = (names[part[table[look]]] * weights).sum(axis=1)
        cuts = np.flatnonzero((np.diff(keys) != 0) | (np.diff(part[look]) != 0)) + 1
        pieces: dict[int, list[np.ndarray]] = defaultdict(list)
        for piece in np.split(look, cuts):
            pieces[int(part[piece[0]])].append(piece)
        moved = []
        for name, found in pieces.items():
            others = int(sizes[name]) - sum(map(len, found))
            largest = max(found, key=len)
            if others < len(largest):
                found = [piece for piece in found if piece is not largest]
                if others:
                    found.append(np.setdiff1d(np.flatnonzero(part == name), np.concatenate([largest, *found])))
            for piece in found:
                part[piece] = fresh
                sizes[fresh], sizes[name] = len(piece), sizes[name] - len(piece)
                fresh += 1
                moved.append(piece)
        look = np.unique(np.concatenate([before[first[state] : first[state + 1]]
                                         for piece in moved for state in piece.tolist()])) if moved else look[:0]
    return part


def _product(node: Both, effort: Effort) -> Automaton:
    """Both languages at once."""
    left, right = compile_part(node.left, effort), compile_part(node.right, effort)
    if any(left.calls) or any(right.calls):
        raise DgemmaError("a recursive part cannot be intersected with another")
    pairs = np.stack([left.byte_class, right.byte_class])
    columns, byte_class = np.unique(pairs, axis=1, return_inverse=True)
    found = Numbers[tuple[int, int]]((0, 0), MAX_STATES, "the constraint is too large: a pattern beside a length or a "
                                                         f"format needs more than {MAX_STATES} states")
    rows = []
    for one, other in found:
        row = []
        effort.spend(15 * columns.shape[1])
        for column in columns.T:
            target = (int(left.table[one, column[0]]), int(right.table[other, column[1]]) if other >= 0 else -1)
            lost = target[0] < 0 or (target[1] < 0 and not node.negated)
            row.append(-1 if lost else found[target])
        rows.append(row)
    accepts = np.array([left.accepts[one] and ((other >= 0 and right.accepts[other]) != node.negated)
                        for one, other in found])
    return minimal(np.array(rows, np.int32), byte_class.reshape(-1), accepts, [[] for _ in rows], effort)
