"""Generators from seeds: every bit counts, and those that fit 32 bits are torch's own."""

import itertools

import pytest
import torch

from dgemma import seeds

HIGH = [2**32, 2**33, 2**40, 2**62, 3 << 32, 5 << 40, 2**63 - 1, 2**63 - 2, 2**64 - 1]


def drawn(seed):
    return tuple(torch.randint(2**31, (8,), generator=seeds.generator(seed)).tolist())


def test_seeds_that_fit_32_bits_draw_as_torch_does():
    for seed in (0, 1, 7, 2**31, 2**32 - 1):
        assert torch.equal(torch.rand(5, generator=seeds.generator(seed)),
                           torch.rand(5, generator=torch.Generator().manual_seed(seed)))


def test_no_two_seeds_draw_the_same():
    low = [0, 1, 2, 5, 2**31, 2**32 - 1]
    every = {*low, *HIGH, *(high + small for high, small in itertools.product((2**32, 2**45, 2**62), low)),
             *((1 << bit) | 9 for bit in range(63))}
    assert len({drawn(seed) for seed in every}) == len(every)
    assert len({drawn(seed) for seed in (HIGH[0], HIGH[0])}) == 1


@pytest.mark.parametrize("seed", HIGH)
def test_numbers_of_long_seeds_are_as_even_as_others(seed):
    generator = seeds.generator(seed)
    numbers = torch.rand(20_000, generator=generator)
    assert abs(numbers.mean() - 0.5) < 0.01
    assert abs(numbers.std() - 12**-0.5) < 0.01
    counts = torch.bincount(torch.randint(10, (20_000,), generator=generator), minlength=10)
    assert counts.min() > 1800
    assert counts.max() < 2200


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_other_numbers_are_refused(seed):
    with pytest.raises(ValueError, match="2\\^64"):
        seeds.generator(seed)
