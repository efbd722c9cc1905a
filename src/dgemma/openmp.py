"""How the threads of OpenMP wait for each other: asleep, not spinning, so that a busy machine does not stop them.

torch and the C++ kernels share work out over OpenMP's threads, and at the end of each share the first to finish waits
for the last. By default it spins for milliseconds, which costs nothing on an idle machine; where something else runs
too, it spins away the time slices that the last one needs, and a step takes many times as long.

OpenMP reads its settings when its library is loaded, with torch. So `wait_passively` runs when ``dgemma`` is imported,
before anything here imports torch; processes started later inherit the setting. Standard library only, as is `machine`.
"""

from __future__ import annotations

import os
import sys
import threading

from dgemma.machine import usable_cores

# Each alone says how threads wait, to libgomp (GCC's, torch's on Linux) or libomp (LLVM's and Intel's): whoever has set
# one of them has decided.
SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
PASSIVE = {"OMP_WAIT_POLICY": "passive",
           "KMP_BLOCKTIME": "0"}  # milliseconds; some versions of libomp spin so long before they are passive

ADVICE = "import dgemma before torch, or set OMP_WAIT_POLICY=passive"

_state: str | None = None


def wait_passively() -> None:
    """Have OpenMP's threads sleep while they wait, unless the environment already says how they wait."""
    global _state
    if _state is not None:
        return
    theirs = {name: os.environ[name] for name in SETTINGS if name in os.environ}
    if theirs:
        _state = "passive" if theirs == PASSIVE else " ".join(f"{name}={value}" for name, value in theirs.items())
        return
    os.environ.update(PASSIVE)
    if "torch" not in sys.modules:
        _state = "passive"
    else:
        _state = "short" if _outnumber_processors() else "spinning"


def waiting() -> str:
    """How OpenMP's threads wait in this process.

    ``"passive"``; the user's own settings, such as ``"GOMP_SPINCOUNT=1000"``; or, where torch was imported before
    dgemma, ``"short"`` (they spin for microseconds) or ``"spinning"`` (as OpenMP does by default: see `ADVICE`).
    """
    return _state or "spinning"


def _outnumber_processors() -> bool:
    """What is left once torch is loaded: give libgomp more threads than there are processors.

    It spins a thousand times instead of 300,000 then. The threads are made by torch operations in threads that sleep
    for good afterwards, as theirs do. False where torch has another OpenMP.
    """
    import torch

    threads = torch.get_num_threads()
    if threads == 1:
        return True  # nobody to wait for
    if not _is_libgomp():
        return False
    # 1 for the process, and every thread that shares out work has `threads` - 1 others; the caller's count, too.
    for _ in range((usable_cores() - 1) // (threads - 1)):
        ready = threading.Event()
        threading.Thread(target=_share_once, args=(ready,), name="openmp-crowd", daemon=True).start()
        ready.wait()
    return True


def _share_once(ready: threading.Event) -> None:
    import torch

    torch.ones(1 << 20).sum()  # large enough to be shared out
    ready.set()
    threading.Event().wait()


def _is_libgomp() -> bool:
    """Whether libgomp is what is loaded here (Linux)."""
    try:
        with open("/proc/self/maps") as maps:
            return any("libgomp" in line for line in maps)
    except OSError:
        return False
