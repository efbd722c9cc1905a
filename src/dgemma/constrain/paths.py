"""The most probable path through a graph under per-position distributions, and a path drawn from them.

Dynamic programming over (position, state), as DINGO does it (Suresh et al. 2025, "DINGO: Constrained inference for
diffusion LLMs", arXiv 2505.23061): per position the best and the summed probability of every set of tokens that leads
from one state to another, then the best way to every state (Viterbi) and the sum over all ways there (forward). Knows
nothing of text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dgemma.constrain.graph import Graph, Plan
from dgemma.constrain.reading import TokenClasses
from dgemma.diffusion.constraint import Walk

# Stands for the logarithm of 0: what must be chosen is, however improbable (a bias or top_k may exclude all that is
# valid at a place).
FLOOR = -1e4
WIDTH = 16  # states followed at each position where there are too many to follow all
_BLOCK = 2**18  # numbers worked on at a time: what the cache holds


@dataclass(frozen=True)
class Scores:
    """Sets of tokens at one place of the canvas, [sets] each."""

    best: np.ndarray  # log-probability of the set's best token
    best_token: np.ndarray
    mass: np.ndarray  # log of the set's summed probability
    drawn: np.ndarray  # a token drawn from the set


@dataclass(frozen=True)
class _Layer:
    """One position: what leads from its states to the next."""

    plan: Plan
    scores: Scores  # of the plan's labels
    best: np.ndarray  # [S] log-probability of the best way to each state
    mass: np.ndarray  # [S] log of all ways' probability
    kept: np.ndarray  # which of the plan's targets are the next layer's states


@dataclass(frozen=True)
class Paths:
    """Tokens from the first position on, to the canvas' end."""

    best: list[int]
    drawn: list[int]
    fixed: list[bool]  # where no other token is possible


def find_paths(graph: Graph, start: int, walk: Walk, first: int, canvas: int, room: int,
               uniform: np.ndarray) -> Paths:
    """The best and a drawn path over positions ``first`` … ``canvas`` - 1, from a state at ``first``.

    ``room``: tokens the text may still have, counted from position 0; after every token of a path what is left is
    enough to complete it. uniform [canvas] in [0, 1).
    """
    # Three independent draws a position: the edge, the class in the edge's set, the token in the class; one for the
    # last state.
    inside = np.random.default_rng(uniform.astype(np.float32).view(np.uint32)).random((2, canvas + 1))
    states, best, mass = np.array([start]), np.zeros(1), np.zeros(1)
    layers: list[_Layer] = []
    fixed: list[bool] = []
    everything = True  # no state has been dropped yet
    for position, classes in _positions(walk, graph.classes, first, inside[0]):
        plan = graph.plan(states)
        scores = _label_scores(plan, classes, inside[1, position])
        near = plan.distance <= room - position - 1
        next_best = np.maximum.reduceat(best[plan.src] + scores.best[plan.label], plan.starts)
        next_mass = np.logaddexp.reduceat(mass[plan.src] + scores.mass[plan.label], plan.starts)
        next_best[~near], next_mass[~near] = -np.inf, -np.inf
        fixed.append(everything and _only_one(plan, np.isfinite(best), near))
        kept = np.arange(len(near))
        if not graph.reader.exact:
            kept = np.flatnonzero(np.isfinite(next_best))
            if len(kept) > WIDTH:
                kept = np.sort(kept[np.argpartition(-next_best[kept], WIDTH)[:WIDTH]])
                everything = False
        layers.append(_Layer(plan, scores, best, mass, kept))
        states, best, mass = plan.targets[kept], next_best[kept], next_mass[kept]
    if len(layers) != canvas - first:
        raise ValueError(f"the walk ended after {first + len(layers)} of {canvas} positions")

    def drawn(logs: np.ndarray, chance: float) -> int:
        if len(logs) == 1:
            return 0
        total = np.exp(logs - logs.max()).cumsum()
        return int(np.searchsorted(total, chance * total[-1], side="right").clip(0, len(logs) - 1))

    likely = [(layer, layer.best, layer.scores.best, layer.scores.best_token) for layer in layers]
    by_mass = [(layer, layer.mass, layer.scores.mass, layer.scores.drawn) for layer in layers]
    return Paths(_trace(likely, int(best.argmax()), lambda _, logs: int(logs.argmax())),
                 _trace(by_mass, drawn(mass, inside[0, canvas]),
                        lambda position, logs: drawn(logs, uniform[first + position])), fixed)


def _trace(ways: Sequence[tuple[_Layer, np.ndarray, np.ndarray, np.ndarray]], state: int,
           pick: Callable[[int, np.ndarray], int]) -> list[int]:
    """From a state (its place) after the last layer back to the start, the edges chosen by ``pick``.

    ``ways``: layers, each with the logarithms of its states and of its labels, and the labels' tokens.
    """
    path = []
    for position, (layer, of_states, of_labels, tokens) in reversed([*enumerate(ways)]):
        plan, target = layer.plan, layer.kept[state]
        ends = plan.starts[target + 1] if target + 1 < len(plan.starts) else len(plan.src)
        edges = slice(plan.starts[target], ends)
        src, label = plan.src[edges], plan.label[edges]
        edge = pick(position, of_states[src] + of_labels[label])
        state = int(src[edge])
        path.append(int(tokens[label[edge]]))
    return path[::-1]


def _only_one(plan: Plan, reached: np.ndarray, near: np.ndarray) -> bool:
    """Whether one token only can stand here."""
    edge_near = np.repeat(near, np.diff(plan.starts, append=len(plan.src)))
    tokens = plan.only[plan.label[reached[plan.src] & edge_near]]
    return bool(tokens[0] >= 0 and (tokens == tokens[0]).all())


def _label_scores(plan: Plan, classes: Scores, uniform: float) -> Scores:
    """The classes' scores -> those of the plan's labels."""
    best, where, _ = _segment_best(classes.best[plan.members], plan.label_starts, plan.label_counts)
    mass, drawn = _segment_draw(classes.mass[plan.members], plan.label_starts, plan.label_counts, uniform)
    return Scores(best, classes.best_token[plan.members[where]], mass, classes.drawn[plan.members[drawn]])


def _positions(walk: Walk, classes: TokenClasses, first: int, uniform: np.ndarray) -> Iterator[tuple[int, Scores]]:
    """The scores of all token classes, and of any token, position by position from ``first``."""
    width = max(1, _BLOCK // max(1, len(classes.tokens)))
    for places, log_probs in walk:
        rows = log_probs.float().cpu().numpy()
        start = places.start
        for low in range(max(0, first - start), len(rows), width):
            part = rows[low : low + width]
            positions = range(start + low, start + low + len(part))
            yield from zip(positions, _class_scores(part, classes, uniform[positions.start : positions.stop]),
                           strict=True)


def _class_scores(rows: np.ndarray, classes: TokenClasses, uniform: np.ndarray) -> list[Scores]:
    """rows [n, V] log-probabilities -> the scores of every class, `any` the last, for each row."""
    count, size = len(rows), len(classes.tokens)
    rows = np.fmax(rows, np.float32(FLOOR))
    values = np.take(rows, classes.tokens, axis=1).reshape(-1)
    starts = (np.arange(count)[:, None] * size + classes.starts).reshape(-1)
    counts = np.tile(classes.counts, count)
    best, where, spread = _segment_best(values, starts, counts)
    mass, drawn = _segment_draw(values, starts, counts, np.repeat(uniform, len(classes.starts)), best, spread)
    top = rows.argmax(axis=1)[:, None]
    height = np.take_along_axis(rows, top, axis=1)

    def table(values: np.ndarray, any_token: np.ndarray) -> np.ndarray:
        return np.concatenate([values.reshape(count, -1), any_token], axis=1)

    tables = (table(best, height), table(classes.tokens[where % size], top),
              table(mass, np.zeros_like(height)), table(classes.tokens[drawn % size], top))
    return [Scores(*(one[row] for one in tables)) for row in range(count)]


def _segment_best(values: np.ndarray, starts: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, ...]:
    """Of every segment its largest value, where that stands, and the former repeated over the segment."""
    best = np.maximum.reduceat(values, starts)
    spread = np.repeat(best, counts)
    hits = np.flatnonzero(values == spread)
    return best, hits[np.searchsorted(hits, starts)], spread


def _segment_draw(values: np.ndarray, starts: np.ndarray, counts: np.ndarray, uniform: np.ndarray | float,
                  best: np.ndarray | None = None, spread: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Of every segment of logarithms the logarithm of the sum, and a place drawn by weight.

    Weights are relative to the segment's largest, so that a small segment is not lost beside a large one.
    """
    if best is None or spread is None:
        best = np.maximum.reduceat(values, starts)
        spread = np.repeat(best, counts)
    weight = torch.from_numpy(np.exp(values - spread))
    total = weight.cumsum(0, dtype=torch.float64).numpy()  # numpy's takes five times as long
    ends = total[starts + counts - 1]
    before = np.concatenate([[0.0], ends[:-1]])
    sums = ends - before
    places = np.searchsorted(total, before + uniform * sums, side="right")
    return best + np.log(sums), places.clip(starts, starts + counts - 1)
