"""`dgemma serve`, or another command that serves, as a process of its own."""

import os
import re
import subprocess
import sys
import threading
import time
from contextlib import contextmanager


class Process:
    """The command, its port once it is ready, and what it says on stderr."""

    def __init__(self, *arguments, command="serve", **environment):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dgemma.cli.main", command, *arguments], stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment})
        self.lines = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line.rstrip())

    def wait_for(self, pattern, seconds=60):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for line in list(self.lines):
                if found := re.search(pattern, line):
                    return found
            assert self.process.poll() is None, f"it ended: {self.lines}"
            time.sleep(0.02)
        raise AssertionError(f"no {pattern!r} in {self.lines}")

    @property
    def url(self):
        return self.wait_for(r"at (http://\S+) ")[1]

    def end(self, sign, seconds=60):
        self.process.send_signal(sign)
        return self.code(seconds)

    def code(self, seconds=60):
        code = self.process.wait(seconds)
        self.reader.join(5)
        return code


@contextmanager
def serving(*arguments, **environment):
    process = Process("--port", "0", *arguments, **environment)
    try:
        yield process
    finally:
        if process.process.poll() is None:
            process.process.kill()
            process.process.wait()
