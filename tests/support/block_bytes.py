"""Packed weights for the tests: random bytes, so that every pattern of every block type occurs."""

from __future__ import annotations

import numpy as np
import torch

from dgemma.gguf.blocks import BLOCK_TYPES, BlockType
from dgemma.kernels.packed import PackedWeight

# Where the half-precision scales of a block lie.
HALVES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108],
          "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0],
          "IQ2_XXS": [0], "IQ2_XS": [0], "IQ2_S": [0], "IQ3_XXS": [0], "IQ3_S": [0], "IQ1_S": [0], "TQ1_0": [52],
          "TQ2_0": [64], "IQ1_M": [], "MXFP4": [], "NVFP4": []}  # the last three in a form of their own: `_set_scales`


def packed(name: str, *shape: int, seed: int = 0, wild: bool = False) -> PackedWeight:
    """A weight of this shape: random bytes with scales of either sign from 2^-7 to 2^-6, or any finite ones."""
    kind: BlockType = BLOCK_TYPES[name]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // kind.block, kind.nbytes), dtype=np.uint8)
    for at in HALVES[name]:
        blocks[..., at : at + 2] = _halves(rng, blocks.shape[:-1], wild)[..., None].view(np.uint8)
    _set_scales(name, blocks, rng, wild)
    return PackedWeight(torch.from_numpy(blocks.reshape(*shape[:-1], kind.row_bytes(shape[-1]))), kind)


def with_half(weight: PackedWeight, row: int, half: int) -> PackedWeight:
    """A copy whose row (of a matrix) has these 16 bits in the place of each of its first block's scales; of types that
    have a float16."""
    name, data = weight.type.name, weight.data.clone()
    block = data[row, : weight.type.nbytes].numpy()
    for at in HALVES[name]:
        block[at : at + 2] = half & 0xFF, half >> 8
    if name == "IQ1_M":
        _set_iq1_m(block, half)
    return PackedWeight(data, weight.type)


def _halves(rng: np.random.Generator, shape: tuple[int, ...], wild: bool) -> np.ndarray:
    halves = rng.integers(0, 1 << 16, shape).astype(np.uint16)
    return np.where((halves & 0x7C00) == 0x7C00, halves & 0x83FF, halves) if wild else (halves & 0x83FF) | 0x2000


def _set_scales(name: str, blocks: np.ndarray, rng: np.random.Generator, wild: bool) -> None:
    """The scales of the types that keep them otherwise, likewise."""
    shape = blocks.shape[:-1]
    if name == "IQ1_M":
        _set_iq1_m(blocks, _halves(rng, shape, wild))
    elif name == "MXFP4":  # a power of two, of which the two smallest are subnormal
        powers = rng.integers(100, 150, shape) if wild else rng.integers(119, 121, shape)
        blocks[..., 0] = np.where(rng.random(shape) < 0.1, powers % 3, powers) if wild else powers
    elif name == "NVFP4" and not wild:  # floats of eight bits: any is finite
        blocks[..., :4] = (blocks[..., :4] & 7) | 8


def _set_iq1_m(blocks: np.ndarray, halves: np.ndarray | int) -> None:
    """IQ1_M's scale: four bits of it at the top of each of the last four words."""
    for i in range(4):
        blocks[..., 49 + 2 * i] = (blocks[..., 49 + 2 * i] & 15) | (halves >> 4 * i & 15) << 4


def exact_activations(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """Float32 [rows, width] that int8 holds exactly: whole numbers up to 127 times a power of two per 256 inputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-127, 128, (rows, width), generator=generator).float()
    for start in range(0, width, 256):
        part = x[:, start : start + 256]
        part[:, torch.randint(part.shape[1], (), generator=generator)] = 127.0
        part *= 2.0 ** torch.randint(-6, 7, (rows, 1), generator=generator)
    return x
