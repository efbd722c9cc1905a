"""Random generators from seeds of up to 64 bits, every bit of which counts."""

from __future__ import annotations

import torch

_LOW = 2**32
_WORDS = slice(3, 627)  # of a CPU generator's state, as int64: the Mersenne twister's 624 words of 32 bits


def generator(seed: int) -> torch.Generator:
    """A CPU generator for a seed from 0 to 2^64 - 1; of one below 2^32 it is torch's own of that seed.

    torch keeps the lower 32 bits of a seed only, so that seeds which differ by a multiple of 2^32 would draw the same.
    Here the upper 32 bits seed a second generator, whose numbers are mixed into the state of the first. Raises
    ValueError for other numbers.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"a seed is a whole number from 0 to 2^64 - 1, got {seed}")
    high, low = divmod(seed, _LOW)
    made = torch.Generator().manual_seed(low)
    if high:
        state = made.get_state()
        words = state.view(torch.int64)[_WORDS]
        words ^= torch.randint(_LOW, words.shape, generator=torch.Generator().manual_seed(high))
        made.set_state(state)
    return made
