"""Writing the GGUF container, version 3: a header that names everything, then the tensors' bytes in turn.

Works on bytes; knows nothing of models. `reader` is the other direction and describes the format.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dgemma.gguf.blocks import BlockType
from dgemma.gguf.container import ALIGNMENT, ARRAY, MAGIC, NUMBERS, STRING

_TYPES = {letter: code for code, letter in NUMBERS.items()}


@dataclass(frozen=True)
class TensorEntry:
    """A tensor to be written; ``shape`` is torch's, its last axis the one that is packed in blocks."""

    name: str
    shape: tuple[int, ...]
    type: BlockType

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.type.tensor_bytes(self.shape)


def padding(nbytes: int) -> int:
    """How many zero bytes follow so many bytes, up to the next multiple of `ALIGNMENT`."""
    return -nbytes % ALIGNMENT


def header(metadata: Mapping[str, Any], tensors: Sequence[TensorEntry]) -> bytes:
    """Everything before the data, which follows in the order of ``tensors``, each with its `padding`.

    ``metadata`` are texts, numbers, booleans and lists of one of these. Whole numbers become 32-bit (unsigned by
    themselves, signed in lists: what ggml's readers take), fractions float32; wider where these do not hold them.
    """
    parts = [MAGIC, struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        parts.append(_text(key))
        parts += _value(value)
    offset = 0
    for tensor in tensors:
        count = len(tensor.shape)
        parts += [_text(tensor.name), struct.pack(f"<I{count}QIQ", count, *reversed(tensor.shape), tensor.type.code,
                                                  offset)]
        offset += tensor.nbytes + padding(tensor.nbytes)
    data = b"".join(parts)
    return data + bytes(padding(len(data)))


def _text(text: str) -> bytes:
    data = text.encode(errors="replace")  # a lone surrogate has no UTF-8 form
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> list[bytes]:
    """The type's number and the value."""
    if isinstance(value, str):
        return [struct.pack("<I", STRING), _text(value)]
    if not isinstance(value, (list, tuple)):
        letter = _letter([value], "I")
        return [struct.pack(f"<I{letter}", _TYPES[letter], value)]
    if value and isinstance(value[0], str):
        return [struct.pack("<IIQ", ARRAY, STRING, len(value)), *map(_text, value)]
    letter = _letter(value, "i")
    return [struct.pack(f"<IIQ{len(value)}{letter}", ARRAY, _TYPES[letter], len(value), *value)]


def _letter(values: Iterable[Any], whole: str) -> str:
    """The smallest type from ``whole`` on that holds them all; float32 for fractions unless they need more."""
    values = list(values)
    if all(isinstance(value, bool) for value in values) and values:
        return "?"
    if all(isinstance(value, int) for value in values):
        low, high = min(values, default=0), max(values, default=0)
        fits = {"I": low >= 0 and high < 1 << 32, "i": low >= -(1 << 31) and high < 1 << 31, "Q": low >= 0, "q": True}
        return whole if fits[whole] else next(letter for letter, fit in fits.items() if fit)
    if all(isinstance(value, (int, float)) for value in values):
        return "f" if all(abs(value) < 3.4e38 or value != value for value in values) else "d"
    raise TypeError(f"no GGUF value: {values!r:.80}")
