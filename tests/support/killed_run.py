"""A run in a process of its own, to be killed."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import torch

from dgemma.train.parallel.distributed import Ranks
from dgemma.train.runs.run import STATE
from dgemma.train.trainer import train

_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload([__name__])  # imported once for all of them


def _train(path: Path, out: Path, threads: int) -> None:
    torch.set_num_threads(threads)
    train(path, out, Ranks(torch.device("cpu")))


def kill_after_a_save(path: Path, out: Path, seconds: float) -> None:
    """Train by the recipe at ``path`` in ``out``, and SIGKILL it so long after it has saved its state."""
    def saved() -> int:
        return (out / STATE).stat().st_mtime_ns if (out / STATE).exists() else 0

    before = saved()
    process = _PROCESSES.Process(target=_train, args=(path, out, torch.get_num_threads()))  # sums depend on it
    process.start()
    while saved() == before:
        assert process.is_alive(), "it ended before it had saved"
        time.sleep(0.005)
    time.sleep(seconds)
    assert process.is_alive(), "it ended before it was killed"
    process.kill()
    process.join()
