"""What differs between systems: modules that some lack, units, threads that get no signals."""

import ctypes
import os
import pkgutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import dgemma
from dgemma.machine import peak_memory, signals_handled, usable_cores
from dgemma.memory import release_freed
from support.threads import in_thread

UNIX_ONLY = ("fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "readline", "syslog")
# Python takes the library of kernels for a module: it is none.
MODULES = sorted(module.name for module in pkgutil.walk_packages(dgemma.__path__, "dgemma.")
                 if "libdgemma" not in module.name)


def test_every_module_is_imported_where_unixes_own_are_missing():
    code = f"import sys, importlib\nsys.modules.update(dict.fromkeys({UNIX_ONLY!r}))\n" \
           f"for name in {MODULES!r}: importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_model_answers_and_a_run_is_locked_where_unixes_own_modules_are_missing(tmp_path):
    code = f"""if True:
        import sys
        sys.modules.update(dict.fromkeys({UNIX_ONLY!r}))
        import dgemma
        from pathlib import Path
        from dgemma.errors import DgemmaError
        from dgemma.train.recipe import Recipe, SudokuData
        from dgemma.train.runs.run import RunFolder
        assert dgemma.load("sudoku").generate("hi", max_denoising_steps=1).steps == [1]
        import torch
        folder = RunFolder(Path(sys.argv[1]), Recipe(name="a", model="sudoku", data=SudokuData(), max_steps=1))
        assert folder.memory(torch.device("cpu")) == 0
        with folder.alone():
            try:
                with folder.alone():
                    print("twice")
            except DgemmaError as error:
                print(error)
        with folder.alone():
            print("again")
    """
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == [f"{tmp_path}: another process is training in this folder", "again"]


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("freebsd14", 1024), ("darwin", 1)])
def test_the_most_memory_held_is_counted_as_the_system_does(platform, unit):
    resource = pytest.importorskip("resource")
    least = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert least * unit <= peak_memory(platform) < 2 * least * unit


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_most_memory_held_is_what_the_system_says():
    block = torch.ones(50_000_000, dtype=torch.uint8)
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    assert len(block) < peak_memory() == pytest.approx(peak, rel=0.05)


def test_freeing_memory_asks_for_no_library_that_windows_lacks(monkeypatch):
    def none(name):
        raise TypeError("bad argument type for built-in operation")

    monkeypatch.setattr(ctypes, "CDLL", none)
    monkeypatch.setattr(sys, "platform", "win32")
    release_freed()


def test_cores_are_counted_where_none_can_be_set_aside(monkeypatch):
    assert 1 <= usable_cores() <= os.cpu_count()
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert usable_cores() == os.cpu_count()


class TestSignals:
    def test_a_handler_is_there_for_so_long_and_the_old_ones_come_back(self):
        seen = []
        before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        with signals_handled(lambda number, _: seen.append(number), signal.SIGINT, signal.SIGTERM):
            for number in (signal.SIGTERM, signal.SIGINT):
                os.kill(os.getpid(), number)
                time.sleep(0.01)
        assert seen == [signal.SIGTERM, signal.SIGINT]
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before

    def test_another_thread_goes_without(self):
        before = signal.getsignal(signal.SIGINT)

        def work():
            with signals_handled(lambda *_: None, signal.SIGINT, signal.SIGTERM):
                return signal.getsignal(signal.SIGINT)

        assert in_thread(work) == before

    def test_a_handler_that_is_not_pythons_is_no_error(self, monkeypatch):
        put = []
        monkeypatch.setattr(signal, "signal", lambda number, handler: put.append(handler))
        with signals_handled(print, signal.SIGINT):
            pass
        assert put == [print, signal.SIG_DFL]
