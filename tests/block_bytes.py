"""Packed weights for the tests: random bytes, so that every pattern of every block type occurs."""

from __future__ import annotations

import numpy as np
import torch

from dgemma.kernels.blocks import BLOCK_TYPES, BlockType
from dgemma.kernels.packed import PackedWeight

# Where the half-precision scales of a block lie.
HALVES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108],
          "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0]}


def packed(name: str, *shape: int, seed: int = 0, wild: bool = False) -> PackedWeight:
    """A weight of this shape: random bytes with scales of either sign from 2^-7 to 2^-6, or any finite ones."""
    kind: BlockType = BLOCK_TYPES[name]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // kind.block, kind.nbytes), dtype=np.uint8)
    for at in HALVES[name]:
        halves = rng.integers(0, 1 << 16, blocks.shape[:-1]).astype(np.uint16)
        if wild:
            halves = np.where((halves & 0x7C00) == 0x7C00, halves & 0x83FF, halves)
        else:
            halves = (halves & 0x83FF) | 0x2000
        blocks[..., at : at + 2] = halves[..., None].view(np.uint8)
    return PackedWeight(torch.from_numpy(blocks.reshape(*shape[:-1], kind.row_bytes(shape[-1]))), kind)


def exact_activations(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """Float32 [rows, width] that int8 holds exactly: whole numbers up to 127 times a power of two per 256 inputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-127, 128, (rows, width), generator=generator).float()
    for start in range(0, width, 256):
        part = x[:, start : start + 256]
        part[:, torch.randint(part.shape[1], (), generator=generator)] = 127.0
        part *= 2.0 ** torch.randint(-6, 7, (rows, 1), generator=generator)
    return x
