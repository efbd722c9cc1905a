"""Training runs as processes of their own: begun, stopped, gone on with, and found again by their folders.

Works on: folders and processes (`dgemma train`). Knows nothing of: pages, networks.

A run's process inherits a lock on ``process.lock`` in its folder, which the system lets go of when it ends, however it
does: so whoever looks, after a restart as well, knows whether it runs, and its number is nobody else's.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dgemma.errors import DgemmaError
from dgemma.files import atomic_write, make_folder
from dgemma.studio.training.recipes import ASKED, bases_of, name_in, steps_of, write_recipe
from dgemma.train.log.history import Run as History
from dgemma.train.log.history import read_run
from dgemma.train.log.journal import FILE as JOURNAL

LOG, LOCK, PROCESS = "train.log", "process.lock", "process.json"
_LOG_END = 4000  # bytes
State = Literal["running", "finished", "stopped", "failed", "new"]


@dataclass(frozen=True)
class Run:
    """A run's folder as it is now."""

    folder: Path
    state: State
    pid: int | None = None
    stopping: bool = False

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def recipe(self) -> Path:
        return self.folder / ASKED

    def log_end(self) -> str:
        """The end of what its process said."""
        path = self.folder / LOG
        if not path.exists():
            return ""
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _LOG_END))
            return re.sub(r"\x1b\[[0-9;]*m", "", file.read().decode("utf-8", "replace"))

    def histories(self) -> dict[str, History]:
        """What was recorded so far, by variant; "" for a run without such. Raises DgemmaError for damaged files."""
        found = {}
        for path in sorted([*self.folder.glob(JOURNAL), *self.folder.glob(f"*/{JOURNAL}")]):
            if path.stat().st_size:
                found["" if path.parent == self.folder else path.parent.name] = read_run(path.parent)
        return found

    def results(self) -> list[Path]:
        """Its best checkpoints, or adapters, one of each variant."""
        return [path for path in sorted([*self.folder.glob("best"), *self.folder.glob("*/best")]) if path.is_dir()]

    def checks(self) -> list[dict[str, str | bool]]:
        """What the preflight found."""
        path = self.folder / "preflight.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []

    def steps(self) -> int | None:
        """How many steps it is to take."""
        try:
            return steps_of(self.recipe)
        except DgemmaError:  # its data was moved away; what is recorded is there all the same
            return None


class Runs:
    """All runs in a folder."""

    def __init__(self, folder: Path):
        self.folder = make_folder(folder)

    def all(self) -> list[Run]:
        """The runs, the latest first."""
        found = [path for path in self.folder.iterdir() if (path / ASKED).exists() or (path / JOURNAL).exists()]
        return [self.look(path) for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)]

    def find(self, name: str) -> Run | None:
        """The run of that name."""
        path = self.folder / name
        return self.look(path) if Path(name).name == name and path.is_dir() else None

    def look(self, folder: Path) -> Run:
        """A run as it is now."""
        about = _json(folder / PROCESS)
        if _is_held(folder / LOCK):
            return Run(folder, "running", about.get("pid"), bool(about.get("stopped")))
        told = [_json(path) for path in (*folder.glob("run.json"), *folder.glob("*/run.json"))
                if path.stat().st_mtime >= about.get("started", 0)]
        if told and all(one.get("finished") for one in told) and about.get("code", 0) == 0:
            return Run(folder, "finished")
        if about.get("stopped") or (told and not all(one.get("finished") for one in told)):
            return Run(folder, "stopped")
        return Run(folder, "failed" if about else "new")

    def begin(self, text: str, *, device: str | None = None) -> Run:
        """Begin a run by a recipe's text; raises DgemmaError for one that is wrong, or whose name is taken."""
        folder = self.folder / name_in(text)
        if folder.exists():
            raise DgemmaError(f"there is a run called {folder.name}: give this one another name")
        write_recipe(folder, text, bases_of(text))
        return self.go_on(folder, device=device)

    def go_on(self, folder: Path, *, device: str | None = None) -> Run:
        """Start the process of a run, which goes on from what is saved; raises DgemmaError where one works there."""
        command = [sys.executable, "-m", "dgemma.cli.main", "train", str(folder / ASKED), "--out", str(folder)]
        _start([*command, *(["--device", device] if device else [])], folder)
        return self.look(folder)

    def stop(self, run: Run) -> None:
        """Ask a run to save and end; a second time: to end at once."""
        if run.pid is not None and run.state == "running":
            _write(run.folder / PROCESS, {**_json(run.folder / PROCESS), "stopped": True})
            os.kill(run.pid, signal.SIGTERM)


def _start(command: Sequence[str], folder: Path) -> None:
    try:
        import fcntl
    except ImportError as error:
        raise DgemmaError("here a process cannot inherit a lock: begin the run with dgemma train") from error
    with (folder / LOCK).open("ab") as lock, (folder / LOG).open("ab") as log:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DgemmaError(f"{folder.name}: a process trains in this folder already") from error
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                   pass_fds=[lock.fileno()], start_new_session=True)
        _write(folder / PROCESS, {"pid": process.pid, "started": time.time()})
    threading.Thread(target=_wait, args=(process, folder), daemon=True).start()


def _wait(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Say how a process ended, if its studio is still there then."""
    code = process.wait()
    about = _json(folder / PROCESS)
    if about.get("pid") == process.pid:
        _write(folder / PROCESS, {**about, "code": code})


def _is_held(path: Path) -> bool:
    if not path.exists():
        return False
    import fcntl

    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _write(path: Path, data: dict[str, object]) -> None:
    with atomic_write(path) as beside:
        beside.write_text(json.dumps(data), encoding="utf-8")
