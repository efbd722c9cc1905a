"""Writing files so that nobody ever sees half of one, and saying in plain words why one cannot be written.

Works on paths. Knows nothing of what is in the files.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dgemma.errors import CheckpointError, DgemmaError

_NAME_KEPT = 50  # characters, of up to 4 bytes: a file's name has 255 bytes at most


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """The path of an empty file beside ``path``: it takes ``path``'s place if the block succeeds, and goes if not.

    Any number of threads and processes may write the same path at a time: each has a file of its own, and the last to
    end wins. The mode is that of any new file (by the umask), whatever the block's writer gives it. Raises DgemmaError
    naming ``path`` when it is a folder or cannot be written, and for text that has no UTF-8 form.
    """
    path = Path(path)
    beside = None
    try:
        if path.is_dir() or not path.name:
            raise DgemmaError(f"{path}: cannot be written: this is a folder; give the name of a file")
        if path.exists() and not path.is_file():  # renaming over /dev/null would do harm
            raise DgemmaError(f"{path}: cannot be written: this is not a regular file")
        if "\0" in path.name:
            raise DgemmaError(f"{path!s:.80}: cannot be written: a file's name has no NUL character in it")
        with contextlib.suppress(FileNotFoundError):
            path.lstat()  # a name that is too long is known before the work, not when the file gets it
        place = name_beside(path)
        with place.open("xb") as file:
            beside = place
            mode = _mode(file.fileno())
        yield beside
        if _mode(beside) != mode:  # some writers make a private file of their own and rename it
            beside.chmod(mode)
        beside.replace(path)
    except OSError as error:
        raise DgemmaError(f"{path}: cannot be written ({error.strerror or error})") from error
    except UnicodeEncodeError as error:
        raise DgemmaError(f"{path}: cannot be written: {error.object[error.start]!r} at character {error.start} has no "
                          f"{error.encoding} form") from error
    finally:
        if beside is not None:
            with contextlib.suppress(OSError):  # the first error is the one to hear of
                beside.unlink(missing_ok=True)


def name_beside(path: Path) -> Path:
    """A name in the same folder that nobody else uses, for what shall take ``path``'s place when it is complete.

    It tells which file is meant and which process writes it, and is never too long where ``path``'s own is not.
    """
    return path.with_name(f"{path.name[:_NAME_KEPT]}.{os.getpid()}-{secrets.token_hex(8)}.tmp")


def free_space(path: Path) -> int:
    """The bytes that are free on the disk where ``path`` is, or will be: its folders need not be there yet."""
    return shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free


def read_pieces(path: Path, start: int, nbytes: int, size: int, what: str) -> Iterator[memoryview]:
    """``nbytes`` of a file from ``start`` on, ``size`` at a time, every piece in the memory of the one before.

    Plain reads into one buffer: pages of a mapped file would count as memory. Raises CheckpointError when the file
    cannot be read or ends before; ``what`` names what the bytes are of.
    """
    buffer = memoryview(bytearray(min(size, nbytes)))
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            for done in range(0, nbytes, size):
                piece, filled = buffer[: nbytes - done], 0
                while filled < len(piece):
                    count = file.readinto(piece[filled:])
                    if not count:
                        raise CheckpointError(f"{path}: the data of {what} ends early")
                    filled += count
                yield piece
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error


def make_folder(path: str | Path) -> Path:
    """Make a folder, and those above it, unless they exist; raises DgemmaError when it cannot be made."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DgemmaError(f"{path}: this folder cannot be made ({error.strerror or error})") from error
    return path


def json_bytes(data: Any, indent: int | None = None) -> bytes:
    """One JSON value as readable UTF-8 without a line break after it.

    A lone surrogate (a damaged byte on stdin or in an argument becomes one) has no UTF-8 form: where there is one,
    everything beyond ASCII is escaped, which reads back the same.
    """
    separators = None if indent else (",", ":")
    try:
        return json.dumps(data, ensure_ascii=False, indent=indent, separators=separators).encode()
    except UnicodeEncodeError:
        return json.dumps(data, indent=indent, separators=separators).encode()


def _mode(file: int | Path) -> int:
    return os.stat(file).st_mode & 0o777
