"""One answer's way through a constraint, canvas by canvas: what the denoising loop sees.

Works on token ids and log-probabilities. Knows nothing of the network or of how the constraint was written down.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

from dgemma.chat.tokenizer import Tokenizer
from dgemma.constrain.graph import Graph
from dgemma.constrain.paths import find_paths
from dgemma.diffusion.constraint import Chosen, Walk

# A graph that grows as it is used is made anew for the next answer when it remembers so many states or bytes.
MOST_STATES = 8192
MOST_GROWN = 2**26


class TextConstraint:
    """The form of an answer's text (`dgemma.diffusion.constraint.Constraint`).

    ``what`` asked for it, for errors. ``free``: text that may go on for ever; no room left does not make it complete.
    """

    def __init__(self, make_graph: Callable[[], Graph], tokenizer: Tokenizer, what: str = "response_format",
                 free: bool = False):
        self._make_graph, self._tokenizer, self._what, self.free = make_graph, tokenizer, what, free
        self._graph = make_graph()

    @property
    def nbytes(self) -> int:
        """Memory, with what was remembered so far."""
        return self._graph.nbytes

    def guide(self, room: int) -> TextGuide:
        """A guide for one answer of at most ``room`` tokens; ValueError when no valid answer is so short."""
        if self._graph.size > MOST_STATES or self._graph.grown > MOST_GROWN:
            self._graph = self._make_graph()
        needed = self._graph.distance(self._graph.start)
        if needed > room:
            raise ValueError(f"{self._what} asks for an answer of {needed} tokens or more, and there is room for "
                             f"{room}: raise max_tokens")
        return TextGuide(self._graph, self._tokenizer, self.free)


class TextGuide:
    """See `dgemma.diffusion.constraint.Guide`.

    ``finished`` is set when the text is complete and a stop token ended it, or nothing can follow, or no room is
    left. A text that is complete at the end of a canvas and could go on is not: the next canvas may end it at once.
    """

    def __init__(self, graph: Graph, tokenizer: Tokenizer, free: bool = False):
        self.finished = False
        self.may_be_empty = free
        self.least = max(graph.distance(graph.start), 0)
        self._graph, self._tokenizer, self._free = graph, tokenizer, free
        self._state = graph.start
        self._given: list[int] = []  # what the next canvas begins with
        self._canvas = self._room = 0  # of the canvas that is being denoised
        self._forced: list[tuple[int, int]] | None = None  # tokens that must follow, and the states after them

    def template(self, canvas: int, room: int) -> list[int | None]:
        """The tokens that any valid text goes on with, in the tokenizer's own spelling."""
        self._canvas, self._room = canvas, room
        with self._graph.lock:
            known = [token for token, _ in self._known(canvas, room)]
        return [*known, *([None] * (canvas - len(known)))]

    def choose(self, walk: Walk, canvas: int, room: int, uniform: Tensor) -> Chosen:
        """The most probable canvas of the graph and a drawn one; both begin with the template.

        Where a constraint has too many states to follow all (`Reader.exact`), both are so among the states followed.
        """
        self._canvas, self._room = canvas, room
        with self._graph.lock:
            known = self._known(canvas, room)
            state = known[-1][1] if known else self._state
            paths = find_paths(self._graph, state, walk, len(known), canvas, room, uniform.double().cpu().numpy())
        head = [token for token, _ in known]
        return Chosen(torch.tensor(head + paths.best), torch.tensor(head + paths.drawn),
                      torch.tensor([True] * len(head) + paths.fixed))

    def takes(self, token_ids: list[int], canvas: int, room: int) -> bool:
        """Whether text that is free but for its calls may be these tokens, as they are."""
        graph = self._graph
        with graph.lock:
            if not self.may_be_empty or self._known(canvas, room):
                return False
            state = self._state
            for place, token in enumerate(token_ids, start=1):
                if token in graph.special.stops:
                    return graph.accepts(state) and place <= room + 1
                reached = graph.step(state, token)
                if reached is None or graph.distance(reached) > room - place:
                    return place > room and graph.accepts(state)
                state = reached
        return True

    def commit(self, token_ids: list[int]) -> None:
        """Take over a canvas' tokens; ValueError when they are not valid."""
        with self._graph.lock:
            for place, token in enumerate(token_ids):
                state = self._graph.step(self._state, token)
                if state is None:
                    raise ValueError(f"token {token} at position {place} does not satisfy the constraint")
                self._state = state
            self._forced, self._given = None, []
            stopped = len(token_ids) < self._canvas or len(token_ids) >= self._room
            over = self._graph.ends(self._state) or (stopped and not self._free)
            self.finished = self._graph.accepts(self._state) and over

    def begin_with(self, token_ids: list[int]) -> None:
        """The next canvas begins with these, whatever is probable."""
        self._given, self._forced = token_ids, None

    def _known(self, canvas: int, room: int) -> list[tuple[int, int]]:
        """The template's tokens as far as the text can be completed after them, with the states they lead to."""
        if self._forced is None:
            self._forced = self._force()
        fit = 0
        for place, (_, state) in enumerate(self._forced[:canvas], start=1):
            if self._graph.distance(state) <= room - place:
                fit = place
        return self._forced[:fit]

    def _force(self) -> list[tuple[int, int]]:
        graph, state = self._graph, self._state
        tokens: list[tuple[int, int]] = []
        for token in self._given:
            reached = graph.step(state, token)
            if reached is None:
                raise ValueError(f"token {token} cannot stand at the canvas' start")
            tokens.append((token, reached))
            state = reached
        data, place, last = graph.forced(state), 0, b""
        for token in self._spelling(data):
            piece = graph.vocabulary.bytes_of(token)
            reached = graph.step(state, token)
            if reached is None or piece is None or not data.startswith(piece, place):
                break  # the tokenizer does not give back what it is given
            tokens.append((token, reached))
            state, place = reached, place + len(piece)
            last = piece
        if last and not graph.ends(state) and graph.vocabulary.can_grow(last):
            tokens.pop()  # together with what follows, it may be another token
        return tokens

    def _spelling(self, data: bytes) -> list[int]:
        """The tokens of text and marks in the tokenizer's own spelling; of half a character at the end, none."""
        marks, tokens = self._graph.vocabulary.marks, []
        for piece in re.split(b"([" + re.escape(bytes(marks)) + b"])", data) if marks else [data]:
            if len(piece) == 1 and piece[0] in marks:
                tokens.append(marks[piece[0]])
            elif piece:
                try:
                    text = piece.decode()
                except UnicodeDecodeError as error:  # begins or ends inside a character
                    text = piece[: error.start].decode()
                tokens += self._tokenizer.encode(text, specials=False) if text else []
        return tokens
