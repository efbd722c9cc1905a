"""Memory that is freed goes back to the system."""

import ctypes
import resource

import pytest

from dgemma.memory import release_freed


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="another C library than glibc")
def test_memory_freed_between_what_is_kept_is_given_back():
    blocks = [bytearray(60_000) for _ in range(4000)]
    kept = blocks[::100]
    del blocks
    before = resident()
    release_freed()
    assert before - resident() > 100_000_000
    assert len(kept) == 40
