"""What every benchmark prints first, and the measurements they share."""

from __future__ import annotations

import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def describe(*packages: str) -> str:
    """One line: processor, cores, memory, Python and the versions of torch and ``packages``."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        flags = next((line for line in info.read_text().splitlines() if line.startswith("flags")), "")
        wanted = ("amx_int8", "amx_bf16", "avx512_bf16", "avx512_vnni", "avx2")
        kinds = [name for name in wanted if name in flags.split()]
        model = f"{lines[0].split(':', 1)[1].strip()} ({', '.join(kinds)})" if lines else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    versions = []
    for package in ("torch", *packages):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            versions.append(f"{package} absent")
    return (f"{model}, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads, {memory:.0f} GB; "
            f"Python {platform.python_version()}, {', '.join(versions)}")


def resident_bytes() -> int:
    """The memory that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


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


def read_bandwidth() -> float:
    """Measured memory read rate, bytes per second (a sum over 1 GB)."""
    block = torch.ones(1 << 27, dtype=torch.int64)
    return block.nbytes / median_seconds(lambda: block.sum())
