"""What every benchmark prints first, and the measurements they share."""

from __future__ import annotations

import dgemma  # noqa: F401  before torch: see dgemma/openmp.py

# isort: split
import mmap
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dgemma.bench import describe_machine as describe
from dgemma.bench import read_bandwidth

__all__ = ["bf16_flops", "describe", "median_seconds", "peak_bytes", "read_bandwidth", "reset_peak", "resident_bytes"]


def resident_bytes() -> int:
    """The memory that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * mmap.PAGESIZE


def reset_peak() -> None:
    """Start `peak_bytes` anew from what is held now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The most memory that this process has held since `reset_peak`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def median_seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """The median time of ``work`` after one warm-up."""
    work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def bf16_flops() -> float:
    """Measured bf16 matrix-product rate, operations per second (2048³)."""
    a, b = torch.randn(2048, 2048).bfloat16(), torch.randn(2048, 2048).bfloat16()
    return 2 * 2048**3 / median_seconds(lambda: a @ b.T)
