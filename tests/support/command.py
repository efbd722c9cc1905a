"""Standard streams in memory, for the `dgemma` command run in the tests' process."""

import io
from dataclasses import dataclass


@dataclass
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str


class Stream(io.TextIOWrapper):
    """A standard stream in memory, of a pipe or of a terminal."""

    def __init__(self, data: bytes = b"", terminal: bool = False, encoding: str = "utf-8"):
        super().__init__(io.BytesIO(data), encoding=encoding, newline="\n")
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal

    def text(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode()
