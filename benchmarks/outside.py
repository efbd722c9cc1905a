"""Running a command and looking at it from outside: its memory, its files in the page cache, a limit on both.

Linux only, standard library only.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CONTROL_GROUPS = Path("/sys/fs/cgroup")
_LOWEST_BIT = bytes(value & 1 for value in range(256))


class CannotRun(Exception):  # noqa: N818
    """A part of the benchmark has not what it needs here; the message says what."""


@dataclass
class Watched:
    """What a command did and how much memory it held; sizes in bytes, `samples` as (seconds, RSS, anonymous, file)."""

    returncode: int
    seconds: float
    stdout: str
    stderr: str
    samples: list[tuple[float, int, int, int]] = field(default_factory=list)
    peak_pss: int = 0

    def peak(self, column: int) -> int:
        return max((sample[column] for sample in self.samples), default=0)

    def sizes(self) -> dict[str, Any]:
        """Peaks; the parts' peaks need not have been at the same time as the sum's."""
        return {"peak_rss": self.peak(1), "peak_anonymous": self.peak(2), "peak_file": self.peak(3),
                "peak_pss": self.peak_pss, "seconds": round(self.seconds, 2), "returncode": self.returncode}


def resident(pid: int) -> tuple[int, int, int] | None:
    """Resident memory of a process now: all of it, anonymous, file-backed; None when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return None
    found = {name: int(value.split()[0]) * 1024 for name, _, value in (line.partition(":") for line in lines)
             if name in ("VmRSS", "RssAnon", "RssFile")}
    return (found["VmRSS"], found["RssAnon"], found["RssFile"]) if len(found) == 3 else None


def proportional(pid: int) -> int:
    """Pss of a process: shared pages counted by their share. Walks its page tables, so ask rarely."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def watch(command: list[str], text: str = "", threads: int = 1, every: float = 0.05, pss_every: float = 5.0) -> Watched:
    """Run a command with ``text`` on its standard input and sample its memory until it ends."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryFile("w+") as given, tempfile.TemporaryFile("w+") as out, \
            tempfile.TemporaryFile("w+") as err:
        given.write(text)
        given.seek(0)
        began = time.perf_counter()
        child = subprocess.Popen(command, stdin=given, stdout=out, stderr=err, env=environment)
        seen = Watched(0, 0.0, "", "")
        ended = threading.Event()

        def sample() -> None:
            asked = began
            while not ended.wait(every):
                now, held = time.perf_counter(), resident(child.pid)
                if held is not None:
                    seen.samples.append((round(now - began, 3), *held))
                if now - asked > pss_every:
                    asked = now
                    seen.peak_pss = max(seen.peak_pss, proportional(child.pid))

        sampler = threading.Thread(target=sample, daemon=True)
        sampler.start()
        try:
            seen.returncode = child.wait()
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
            seen.seconds = time.perf_counter() - began
            ended.set()
            sampler.join()
        out.seek(0)
        err.seek(0)
        seen.stdout, seen.stderr = out.read(), err.read()
    return seen


def cached_part(path: Path) -> float:
    """The part of a file that is in the page cache, 0 to 1."""
    if sys.platform == "win32":
        raise CannotRun("this system does not tell what is in its page cache")
    size = path.stat().st_size
    pages = -(-size // mmap.PAGESIZE)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    with path.open("rb") as file:
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), f"{path} cannot be mapped")
    held = ctypes.create_string_buffer(pages)
    try:
        if libc.mincore(address, size, held):
            raise OSError(ctypes.get_errno(), f"mincore of {path}")
    finally:
        libc.munmap(address, size)
    return sum(held.raw.translate(_LOWEST_BIT)) / pages


def warm(path: Path) -> float:
    """Read a file through; returns how much of it is in the page cache then."""
    buffer = bytearray(16 << 20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return cached_part(path)


def drop(path: Path) -> float:
    """Ask for a file to leave the page cache; returns how much stayed (what another process maps does)."""
    if not hasattr(os, "posix_fadvise"):
        raise CannotRun("this system cannot be asked to let a file go from its page cache")
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return cached_part(path)


@contextmanager
def memory_limit(limit: int) -> Iterator[list[str]]:
    """What to put before a command so that it and its page cache get no more than ``limit`` bytes.

    A control group made by hand (both versions; needs root), or a scope of systemd's. RLIMIT_AS would not do: it
    forbids the mapping of a large file, resident or not.
    """
    old = CONTROL_GROUPS / "memory"
    unified = next((root for root in (CONTROL_GROUPS, CONTROL_GROUPS / "unified")
                    if _words(root / "cgroup.controllers", "memory")), None)
    if (old / "memory.limit_in_bytes").exists() and os.access(old, os.W_OK):
        group, settings = old / f"dgemma-{os.getpid()}", {"memory.limit_in_bytes": limit}
    elif unified and os.access(unified / "cgroup.subtree_control", os.W_OK):
        (unified / "cgroup.subtree_control").write_text("+memory")
        group, settings = unified / f"dgemma-{os.getpid()}", {"memory.max": limit, "memory.swap.max": 0}
    elif shutil.which("systemd-run") and Path("/run/systemd/system").exists():
        user = [] if os.geteuid() == 0 else ["--user"]
        yield ["systemd-run", *user, "--scope", "--quiet", "-p", f"MemoryMax={limit}", "-p", "MemorySwapMax=0", "--"]
        return
    else:
        raise CannotRun("no way to limit memory here: neither a writable memory control group nor systemd")
    try:
        group.mkdir()
    except OSError as error:
        raise CannotRun(f"{group} cannot be made ({error.strerror})") from error
    try:
        for name, value in settings.items():
            if (group / name).exists():
                (group / name).write_text(str(value))
        yield ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group / "cgroup.procs")]
    finally:
        for _ in range(50):  # the last process leaves it a moment after it ended
            try:
                group.rmdir()
                break
            except OSError:
                time.sleep(0.1)


def _words(path: Path, word: str) -> bool:
    try:
        return word in path.read_text().split()
    except OSError:
        return False
