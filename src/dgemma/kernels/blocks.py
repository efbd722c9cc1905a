"""ggml's block formats: how weights lie packed in bytes, and what numbers they stand for.

A row of K weights is K / `BlockType.block` blocks of `BlockType.nbytes` bytes, whatever the tensor's other axes.
`dequantize` is the plain-torch reference that every kernel is held to; layouts after ggml's ``ggml-common.h``.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BlockType:
    """One way to pack weights; ``code`` is ggml's number for it, ``block`` weights take ``nbytes`` bytes."""

    name: str
    code: int
    block: int
    nbytes: int

    def row_bytes(self, width: int) -> int:
        """The bytes of a row of ``width`` weights; raises ValueError when it is no whole number of blocks."""
        if width % self.block:
            raise ValueError(f"a row of {width} weights is no whole number of {self.name} blocks of {self.block}")
        return width // self.block * self.nbytes

    def row_width(self, nbytes: int) -> int:
        """The weights in a row of ``nbytes`` bytes."""
        return nbytes // self.nbytes * self.block


BLOCK_TYPES: dict[str, BlockType] = {t.name: t for t in (
    BlockType("F32", 0, 1, 4),
    BlockType("F16", 1, 1, 2),
    BlockType("Q4_0", 2, 32, 18),
    BlockType("Q4_1", 3, 32, 20),
    BlockType("Q5_0", 6, 32, 22),
    BlockType("Q5_1", 7, 32, 24),
    BlockType("Q8_0", 8, 32, 34),
    BlockType("Q2_K", 10, 256, 84),
    BlockType("Q3_K", 11, 256, 110),
    BlockType("Q4_K", 12, 256, 144),
    BlockType("Q5_K", 13, 256, 176),
    BlockType("Q6_K", 14, 256, 210),
    BlockType("IQ4_NL", 20, 32, 18),
    BlockType("IQ4_XS", 23, 256, 136),
    BlockType("BF16", 30, 1, 2),
)}
BY_CODE: dict[int, BlockType] = {t.code: t for t in BLOCK_TYPES.values()}
