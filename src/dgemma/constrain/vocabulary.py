"""A vocabulary's tokens as bytes, and how an automaton reads all of them at once.

Tokens are read side by side, byte after byte, and those that an automaton cannot tell apart are read as one. Knows
nothing of languages, probabilities.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from dgemma.chat.tokenizer import Tokenizer
from dgemma.constrain.automaton import ADVICE, TooLarge

MOST_CELLS = 2**25  # of the table of where token classes lead, and twice that on the way there
_BLOCK = 4_000_000  # numbers worked on at a time
_known: weakref.WeakKeyDictionary[Tokenizer, dict[tuple[tuple[str, int], ...], Vocabulary]] = \
    weakref.WeakKeyDictionary()


class Vocabulary:
    """The bytes of every token that is text: not special, not empty. ``marks``: tokens that a byte stands for."""

    def __init__(self, tokens: dict[int, bytes], marks: dict[int, int] | None = None):
        self.marks = marks or {}  # byte -> token
        tokens = tokens | {token: bytes([byte]) for byte, token in self.marks.items()}
        self.ids = np.array(sorted(tokens), np.int64)  # [N]
        texts = [tokens[token] for token in self.ids.tolist()]
        self.lengths = np.array([len(text) for text in texts], np.int64)  # [N] bytes
        self.offsets = np.cumsum(self.lengths) - self.lengths  # [N] into `data`
        self.data = np.frombuffer(b"".join(texts), np.uint8)

    @classmethod
    def of(cls, tokenizer: Tokenizer, marks: Mapping[str, int] | None = None) -> Vocabulary:
        """A tokenizer's, made once. ``marks``: special tokens that count as a byte each, one that no text has."""
        made, key = _known.setdefault(tokenizer, {}), tuple((marks or {}).items())
        if key not in made:
            tokens = {token: tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)
                      if not tokenizer.is_special(token)}
            tokens = {token: text for token, text in tokens.items() if text}
            if marks:
                taken = set(marks.values())
                tokens = {token: text for token, text in tokens.items() if not taken & set(text)}
            made[key] = cls(tokens, {byte: token for mark, byte in (marks or {}).items()
                                     if (token := tokenizer.token_to_id(mark)) is not None})
        return made[key]

    def places(self, without: Collection[int]) -> np.ndarray:
        """The places in ``ids`` of all tokens but these."""
        return np.flatnonzero(~np.isin(self.ids, list(without)))

    def bytes_of(self, token: int) -> bytes | None:
        """A token's bytes; None when it is no text."""
        place = int(np.searchsorted(self.ids, token))
        if place == len(self.ids) or self.ids[place] != token:
            return None
        return self.data[self.offsets[place] : self.offsets[place] + self.lengths[place]].tobytes()

    def column(self, places: np.ndarray, depth: int, byte_class: np.ndarray) -> np.ndarray:
        """The class of these tokens' byte at a depth."""
        return byte_class[self.data[self.offsets[places] + depth]].astype(np.int64)

    def single_bytes(self, places: np.ndarray) -> np.ndarray:
        """Which bytes are a token of their own, among these tokens; [256] bool."""
        alone = np.zeros(256, bool)
        alone[self.data[self.offsets[places[self.lengths[places] == 1]]]] = True
        return alone

    def can_grow(self, text: bytes) -> bool:
        """Whether a token begins with these bytes and goes on."""
        longer = self.lengths > len(text)
        for place, byte in enumerate(text):
            longer[longer] = self.data[self.offsets[longer] + place] == byte
        return bool(longer.any())


def merge_tokens(vocabulary: Vocabulary, places: np.ndarray, table: np.ndarray, byte_class: np.ndarray,
                 starts: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens in classes that lead to the same states from each of the first ``starts`` states.

    table [S, K]: next states; the last state is "nowhere" and leads to itself; byte_class [256]. Returns the class of
    every token of ``places`` (-1: it leads nowhere from anywhere) and where the classes lead, [classes, starts].

    Classes are told apart by random 64-bit sums over where they lead. What has the same beginning, or one that leads to
    the same states, is read as one, so the work grows with the differences, not with the vocabulary.
    """
    columns = table.shape[1]
    weights = np.random.default_rng(0).integers(1, 2**63, starts, dtype=np.uint64) * 2 + 1
    of_token = np.full(len(places), np.uint64(0))
    leads: dict[int, np.ndarray] = {}  # key of a class -> where it leads
    alive, node = np.arange(len(places)), np.zeros(len(places), np.int64)
    reached = np.arange(starts, dtype=np.int32)[None]
    table = table.astype(np.int32)
    dead = np.full(starts, len(table), np.uint64) @ weights
    depth = 0
    while len(alive):
        pairs, inverse = np.unique(node * columns + vocabulary.column(places[alive], depth, byte_class),
                                   return_inverse=True)
        parent, column = np.divmod(pairs, columns)
        blocks = np.array_split(np.arange(len(pairs)), -(-len(pairs) * starts // _BLOCK))
        keys = np.concatenate([(table[reached[parent[block]], column[block, None]] + 1).astype(np.uint64) @ weights
                               for block in blocks])
        keys, examples, merged = np.unique(keys, return_index=True, return_inverse=True)
        if max(len(leads), len(keys) / 2) * starts > MOST_CELLS:
            raise TooLarge(f"the constraint is too large for a vocabulary of {len(places)} tokens: {ADVICE}")
        reached = np.concatenate([table[reached[parent[block]], column[block, None]]
                                  for block in np.array_split(examples, -(-len(examples) * starts // _BLOCK))])
        node = merged[inverse]
        going = keys[node] != dead
        alive, node = alive[going], node[going]
        depth += 1
        over = vocabulary.lengths[places[alive]] == depth
        of_token[alive[over]] = keys[node[over]]
        for one in np.unique(node[over]).tolist():
            leads.setdefault(int(keys[one]), reached[one].copy())
        alive, node = alive[~over], node[~over]
    order = sorted(leads)
    classes = np.searchsorted(np.array(order, np.uint64), of_token) if leads else np.zeros(len(places), np.int64)
    found = np.array([leads[key] for key in order], np.int32).reshape(-1, starts)
    return np.where(of_token == 0, -1, classes), found


@dataclass(frozen=True)
class Level:
    """The nodes of a trie at one depth."""

    parent: np.ndarray  # [nodes] place in the level above
    column: np.ndarray  # [nodes] byte class read on the way from there
    ends: np.ndarray  # [words of this length] the nodes that are words
    first: int  # the number of the first of these words

    @property
    def nbytes(self) -> int:
        return self.parent.nbytes + self.column.nbytes + self.ends.nbytes


def make_trie(vocabulary: Vocabulary, places: np.ndarray, byte_class: np.ndarray) -> tuple[list[Level], np.ndarray]:
    """The words that some tokens are, as sequences of byte classes; and which word each token is, [places]."""
    alive, node = np.arange(len(places)), np.zeros(len(places), np.int64)
    word = np.zeros(len(places), np.int64)
    levels: list[Level] = []
    words = 0
    while len(alive):
        keys, node = np.unique(node * 256 + vocabulary.column(places[alive], len(levels), byte_class),
                               return_inverse=True)
        over = vocabulary.lengths[places[alive]] == len(levels) + 1
        ends, number = np.unique(node[over], return_inverse=True)
        word[alive[over]] = words + number
        levels.append(Level(keys // 256, keys % 256, ends, words))
        words += len(ends)
        alive, node = alive[~over], node[~over]
    return levels, word
