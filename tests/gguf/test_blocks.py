"""Our own reading of ggml's blocks against the `gguf` package's, bit for bit."""

import gguf
import numpy as np
import pytest
import torch

from dgemma.gguf.blocks import BLOCK_TYPES, BY_CODE, dequantize, gather, gather_scales, spread, spread_scales
from support.block_bytes import HALVES

SPECIAL_HALVES = [0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x7BFF, 0xFBFF, 0x3C00]


def random_bytes(block_type, count, seed=0):
    """uint8 [count, nbytes] of every pattern, with scales that are finite: all sorts, zero and subnormal too."""
    rng = np.random.default_rng(seed)
    raw = rng.integers(0, 256, (count, block_type.nbytes), dtype=np.uint8)
    for at in HALVES.get(block_type.name, ()):
        halves = rng.integers(0, 1 << 16, count).astype(np.uint16)
        halves = np.where((halves & 0x7C00) == 0x7C00, halves & 0x83FF, halves)
        halves[: len(SPECIAL_HALVES)] = SPECIAL_HALVES[:count]
        raw[:, at : at + 2] = halves.view(np.uint8).reshape(-1, 2)
    return raw


def oracle(raw, name):
    numbers = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])
    return torch.from_numpy(np.ascontiguousarray(numbers))


def same_bits(ours, theirs):
    """Equal to the last bit, the sign of zero included; NaN equals NaN (F32, F16 and BF16 can hold one)."""
    nan = theirs.isnan()
    return torch.equal(ours.isnan(), nan) and torch.equal(ours.view(torch.int32)[~nan], theirs.view(torch.int32)[~nan])


def test_the_table_is_ggml_s():
    for name, block_type in BLOCK_TYPES.items():
        theirs = gguf.GGMLQuantizationType[name]
        assert (block_type.block, block_type.nbytes) == gguf.GGML_QUANT_SIZES[theirs]
        assert block_type.code == theirs.value
        assert BY_CODE[theirs.value] is block_type


@pytest.mark.parametrize("name", BLOCK_TYPES)
@pytest.mark.parametrize("seed", range(2))
def test_dequantize_is_bit_exact_on_random_bytes(name, seed):
    block_type = BLOCK_TYPES[name]
    raw = random_bytes(block_type, 1800, seed)
    assert same_bits(dequantize(torch.from_numpy(raw), block_type), oracle(raw, name))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_rows_of_several_blocks_keep_their_shape(name):
    block_type = BLOCK_TYPES[name]
    raw = random_bytes(block_type, 3 * 5 * 4).reshape(3, 5, -1)
    ours = dequantize(torch.from_numpy(raw), block_type)
    assert ours.shape == (3, 5, 4 * block_type.block)
    assert same_bits(ours, oracle(raw, name))


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_more_weights_than_a_chunk(name):
    block_type = BLOCK_TYPES[name]
    raw = random_bytes(block_type, (1 << 18) // block_type.block + 7)
    assert same_bits(dequantize(torch.from_numpy(raw), block_type), oracle(raw, name))


@pytest.mark.parametrize("name", BLOCK_TYPES)
@pytest.mark.parametrize("blocks", [1, 6])
def test_odd_addresses_and_strides(name, blocks):
    """As views of a mapped file may lie: at an odd offset, every other row, and a slice of the columns."""
    block_type = BLOCK_TYPES[name]
    raw = random_bytes(block_type, 4 * blocks).reshape(4, -1)
    theirs = oracle(raw, name)
    for offset in (1, 3):
        storage = torch.zeros(raw.size + offset, dtype=torch.uint8)
        odd = storage[offset:].view(4, -1)
        odd.copy_(torch.from_numpy(raw))
        assert same_bits(dequantize(odd, block_type), theirs)
        assert same_bits(dequantize(odd[::2], block_type), theirs[::2])
        assert same_bits(dequantize(odd[0], block_type), theirs[0])
    wide = torch.zeros(4, raw.shape[1] + 5, dtype=torch.uint8)
    wide[:, 3 : 3 + raw.shape[1]] = torch.from_numpy(raw)
    assert same_bits(dequantize(wide[:, 3 : 3 + raw.shape[1]], block_type), theirs)
    assert same_bits(dequantize(torch.from_numpy(raw.T.copy()).T, block_type), theirs)


def test_other_dtypes_are_the_rounded_numbers():
    raw = torch.from_numpy(random_bytes(BLOCK_TYPES["Q4_K"], 10, seed=3))
    exact = dequantize(raw, BLOCK_TYPES["Q4_K"])
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(dequantize(raw, BLOCK_TYPES["Q4_K"], dtype), exact.to(dtype))


def test_the_result_is_a_tensor_of_its_own():
    raw = torch.ones(2, 8, dtype=torch.uint8)
    dequantize(raw, BLOCK_TYPES["F32"]).zero_()
    assert raw.min() == 1


def test_no_rows_and_no_columns():
    assert dequantize(torch.empty(0, 144, dtype=torch.uint8), BLOCK_TYPES["Q4_K"]).shape == (0, 256)
    assert dequantize(torch.empty(3, 0, dtype=torch.uint8), BLOCK_TYPES["Q4_K"]).shape == (3, 0)


def test_half_a_block_and_other_dtypes_are_refused():
    with pytest.raises(ValueError, match="143 bytes is no whole number of Q4_K blocks of 144"):
        dequantize(torch.zeros(2, 143, dtype=torch.uint8), BLOCK_TYPES["Q4_K"])
    with pytest.raises(ValueError, match="uint8, not int8"):
        dequantize(torch.zeros(2, 144, dtype=torch.int8), BLOCK_TYPES["Q4_K"])
    with pytest.raises(ValueError, match="704 weights is no whole number of Q4_K blocks"):
        BLOCK_TYPES["Q4_K"].row_bytes(704)


@pytest.mark.parametrize(("bits", "group"), [(1, 1), (1, 32), (2, 32), (4, 16), (4, 64), (4, 1)])
def test_gather_undoes_spread(bits, group):
    packed = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 64), dtype=np.uint8))
    assert torch.equal(gather(spread(packed, bits, group), bits, group), packed)


def test_gather_scales_undoes_spread_scales():
    packed = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (50, 12), dtype=np.uint8))
    scales, minima = spread_scales(packed)
    assert scales.max() < 64 and minima.max() < 64
    assert torch.equal(gather_scales(scales, minima), packed)
