"""How much memory there is: of this machine, and for the requests that a network answers."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dgemma.nn import DiffusionTransformer


# Where control groups keep their limit and what is used, in their second and first version
_CGROUPS = {Path("/sys/fs/cgroup"): ("memory.max", "memory.current"),
            Path("/sys/fs/cgroup/memory"): ("memory.limit_in_bytes", "memory.usage_in_bytes")}


def machine_memory() -> tuple[int | None, int | None]:
    """This machine's memory in bytes, what is available now and all of it; None where it cannot be told."""
    available = total = None
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        available, total = (int(lines[key].split()[0]) * 1024 for key in ("MemAvailable", "MemTotal"))
    except (OSError, KeyError, ValueError):  # not Linux: all of it, where the system tells
        if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
            available = total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for folder, names in _CGROUPS.items():  # a container may have less than its machine
        try:
            limit, used = (int((folder / name).read_text()) for name in names)
            lines = (folder / "memory.stat").read_text().splitlines()
            files = sum(int(line.split()[1]) for line in lines if line.startswith(("inactive_file ", "active_file ")))
        except (OSError, ValueError):
            continue
        left = max(limit - used + files, 0)  # the files that are cached are let go first
        return left if available is None else min(available, left), limit if total is None else min(total, limit)
    return available, total


def request_memory(network: DiffusionTransformer) -> int:
    """Memory for the requests that a network answers and for what they leave to be read again, in bytes.

    Four fifths of what is free once the network is there. Packed weights stay in their file, whose pages count as
    free memory although every step needs them.
    """
    import torch

    from dgemma.nn.packed import packed_bytes

    if network.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(network.device)
    else:
        available, _ = machine_memory()
        free = (8 << 30 if available is None else available) - packed_bytes(network)
    return max(free * 4 // 5, 64 << 20)


def release_freed() -> None:
    """Give memory that was freed back to the system, where the C library can (glibc keeps it for itself).

    Batches of ever other lengths leave holes that the next one does not fit into: without this a training run on a
    CPU grows to several times what it uses.
    """
    import ctypes

    if sys.platform == "win32":  # where there is no library of the process itself
        return
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):  # another C library
        return
