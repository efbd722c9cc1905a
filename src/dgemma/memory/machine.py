"""What memory this machine has, and about what a program with a model takes of it.

Standard library only (but for a GPU's memory): it is asked before torch is needed. `memory.inference` and
`memory.training` count what a network takes exactly.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class _Names:
    """What a version of control groups calls things. Of several limits the smallest counts."""

    limits: tuple[str, ...]
    used: str
    files: tuple[str, ...]  # in memory.stat: files that are cached, the group's children's included


_V2 = _Names(("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file"))
_V1 = _Names(("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))


def machine_memory(proc: Path = Path("/proc")) -> tuple[int | None, int | None]:
    """This machine's memory in bytes, what is available now and all of it; None where it cannot be told.

    A container, or any other control group that this process is in, may have less than its machine.
    """
    available = total = None
    try:
        lines = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
        available, total = (int(lines[key].split()[0]) * 1024 for key in ("MemAvailable", "MemTotal"))
    except (OSError, KeyError, ValueError):  # not Linux: all of it, where the system tells
        if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
            available = total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for folder, names in _own_groups(proc):
        limit = min((limit for name in names.limits if (limit := _number(folder / name)) is not None), default=None)
        if limit is None:
            continue
        left = limit
        if (used := _number(folder / names.used)) is not None:
            left = min(max(limit - used + _cached_files(folder, names), 0), limit)  # these files are let go first
        available = left if available is None else min(available, left)
        total = limit if total is None else min(total, limit)
    return available, total


def available_memory(device: torch.device) -> int | None:
    """The bytes that may be taken on a device now; None where nobody can tell."""
    if device.type != "cuda":
        return machine_memory()[0]
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _own_groups(proc: Path) -> Iterator[tuple[Path, _Names]]:
    """The folders of the memory control groups that this process is in: the innermost, and all around it."""
    try:
        mounts = [line.split(" ") for line in (proc / "self/mountinfo").read_text().splitlines()]
        groups = [line.split(":", 2) for line in (proc / "self/cgroup").read_text().splitlines()]
    except OSError:  # not Linux
        return
    for fields in mounts:
        # "36 35 0:31 ROOT MOUNTED options … - TYPE source super-options"
        dash = fields.index("-") if "-" in fields else len(fields)
        if len(fields) < dash + 4 or dash < 5:
            continue
        root, mounted, kind, options = fields[3], Path(_unescaped(fields[4])), fields[dash + 1], fields[dash + 3]
        for group in groups:
            if len(group) < 3:
                continue
            controllers = group[1].split(",")
            second = kind == "cgroup2" and group[0] == "0"
            if not (second or (kind == "cgroup" and "memory" in options.split(",") and "memory" in controllers)):
                continue
            # What is mounted may be a part of the tree only, as in a container: then paths begin there.
            inside = group[2].removeprefix(root) if f"{group[2]}/".startswith(f"{root}/") else group[2]
            folder = mounted / inside.strip("/")
            for at in (folder, *folder.parents):
                if at.is_relative_to(mounted) and at.is_dir():
                    yield at, _V2 if second else _V1


def _unescaped(path: str) -> str:
    r"""A path of /proc/self/mountinfo, where blanks are "\040"."""
    return path.encode().decode("unicode_escape") if "\\" in path else path


def _number(path: Path) -> int | None:
    """The number that a file holds; None for "max", for what is more than any machine has, and without the file."""
    try:
        number = int(path.read_text())
    except (OSError, ValueError):
        return None
    return number if number < 1 << 60 else None


def _cached_files(folder: Path, names: _Names) -> int:
    try:
        lines = [line.split() for line in (folder / "memory.stat").read_text().splitlines()]
    except OSError:
        return 0
    return sum(int(line[1]) for line in lines if len(line) == 2 and line[0] in names.files)


def program_bytes(vocab_size: int, training: bool = False) -> int:
    """What this program takes beside weights and what is worked on: Python, torch and the other libraries, and a
    tokenizer of ``vocab_size`` tokens with about twice as many merges.

    Measured: torch 2.13 without a GPU, one thread, after an answer, and after a step of ``training``; `tokenizers` 0.22
    while it reads its file. With the 26B model's 262,144 tokens an answer's is 0.59 GB.
    """
    return (400_000_000 if training else 240 << 20) + 1300 * vocab_size


def conversation_bytes(weights: int, packed: bool) -> int:
    """About how many bytes a conversation takes with so many of weights: its cache and the working tensors.

    They grow with the model but not without end, and are larger in bf16, whose layers are worked on in larger pieces,
    than with ``packed`` weights. With the program that makes the 18 GB of the 26B model's 16.8 GB in Q4_K_M, and 1.7 GB
    more than the weights in bf16.
    """
    return min(weights // 20, 800_000_000 if packed else 1_100_000_000)


def model_bytes(weights: int, packed: bool, vocab_size: int) -> int:
    """About how many bytes running a model takes: its weights, the program and a conversation."""
    return weights + program_bytes(vocab_size) + conversation_bytes(weights, packed)


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
