"""What stands before an answer: token ids, and spans of them that are something else, such as a picture's soft tokens.

Works on ids, embeddings and hashes; knows nothing of what makes these.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class SoftSpan:
    """Embeddings [n, D] that stand for the ids of a prompt from ``start`` on: a picture.

    They are as `DiffusionTransformer.embed` gives them. ``digest`` is a hash of what they were made of: what was read
    of one picture is read again for another one only where it is the same.
    """

    start: int
    embeddings: Tensor
    digest: bytes

    @property
    def stop(self) -> int:
        return self.start + len(self.embeddings)


@dataclass(frozen=True)
class Piece:
    """Some tokens of a context: ``ids``, and of these which [begin, end) are soft, with the embeddings."""

    ids: list[int]
    soft: list[tuple[int, int, Tensor]]


def piece_of(ids: Sequence[int], spans: Sequence[SoftSpan], start: int, count: int) -> Piece:
    """``count`` tokens of a context from ``start`` on."""
    soft = []
    for span in spans:
        begin, end = max(span.start, start), min(span.stop, start + count)
        if begin < end:
            soft.append((begin - start, end - start, span.embeddings[begin - span.start : end - span.start]))
    return Piece(list(ids[start : start + count]), soft)


def uncut(spans: Sequence[SoftSpan], start: int, count: int) -> int:
    """``count`` tokens from ``start`` on, or so many more that no picture is read in parts."""
    return next((span.stop - start for span in spans if span.start < start + count < span.stop), count)


def prompt_keys(ids: Sequence[int], spans: Sequence[SoftSpan]) -> list[int]:
    """What a prompt's tokens are known by: their ids, and in a span numbers below 0 that say whose part they are."""
    keys = list(ids)
    for span in spans:
        for place in range(len(span.embeddings)):
            digest = hashlib.blake2b(span.digest + place.to_bytes(4, "little"), digest_size=16).digest()
            keys[span.start + place] = -1 - int.from_bytes(digest, "little")
    return keys


def check_spans(spans: Sequence[SoftSpan], length: int, width: int) -> None:
    """Raises ValueError unless the spans fit a prompt of ``length`` tokens and embeddings of ``width`` numbers."""
    end = 0
    for span in spans:
        if span.embeddings.ndim != 2 or span.embeddings.shape[1] != width or not len(span.embeddings):
            raise ValueError(f"soft tokens are embeddings of {width} numbers each, got {list(span.embeddings.shape)}")
        if not end <= span.start < span.stop <= length:
            raise ValueError(f"soft tokens {span.start} to {span.stop} do not stand in order in a prompt of {length}")
        end = span.stop
