"""Fetching one large file over HTTP: going on where an earlier try stopped, and checking what arrived.

Works on addresses and files; knows nothing of models. The hub's own library does not always keep what an interrupted
download has fetched (its version 2 never does), which nobody wants to hear who has waited for 15 of 17 GB.
"""

from __future__ import annotations

import hashlib
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from dgemma import __version__
from dgemma.formats import size_text

TRIES = 5  # in a row without a byte of progress
_WAIT = 1.0  # seconds before the second try, then twice as long each time
_LONGEST_WAIT = 30.0
# The most to ask for at once: content delivery networks refuse answers of more than 50 GB.
_MOST_AT_ONCE = 40_000_000_000
_PIECE = 4 << 20  # bytes hashed at a time
_GIT_DIGITS = 40  # of a SHA-1
_CONTENT_RANGE = re.compile(r"\s*bytes\s+(?P<first>\d{1,18})-(?P<last>\d{1,18})/(?P<total>\d{1,18}|\*)\s*",
                            re.IGNORECASE | re.ASCII)
_PASSING = (408, 429, 500, 502, 503, 504)  # what a server answers that may answer better in a moment

_LINE_PERCENT = 10  # between two lines
_LINE_AT_LEAST = 2.0  # seconds between two lines, however much has been done
_LINE_EVERY = 30.0  # seconds after which there is a line, however little has been done
_WORTH_SHOWING = 100_000  # bytes


class Listener:
    """Who is told how things go, for as long as a ``with`` lasts; this one keeps silent."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing more is told."""

    def begin(self, what: str, done: int, total: int) -> None:
        """Something of ``total`` bytes begins; ``done`` of them are there already."""

    def advance(self, done: int) -> None:
        """So many bytes of it are done now."""

    def note(self, text: str) -> None:
        """Something to know, in one line."""


class ProgressLines(Listener):
    """Tells of a transfer in lines on stderr, one now and then; on Ctrl-C it says that nothing is lost."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        from huggingface_hub import constants

        self._silent = bool(constants.HF_HUB_DISABLE_PROGRESS_BARS)
        self._clock = clock
        self._what = ""
        self._began_at = self._told_at = 0.0
        self._first = self._total = self._percent = 0
        self._shown = False

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self.note("Stopped. What has arrived is kept: the same command goes on from here.")

    def begin(self, what: str, done: int, total: int) -> None:
        self._what, self._first, self._total = what, done, total
        self._began_at = self._told_at = self._clock()
        self._percent = _percent(done, total)
        self._shown = not self._silent and total >= _WORTH_SHOWING
        if self._shown:
            self.show(done, begins=True)

    def advance(self, done: int) -> None:
        if self._shown:
            self.show(done)

    def show(self, done: int, begins: bool = False) -> None:
        """Show how far it is that is worth showing, or that it begins."""
        if begins:
            here = f", {size_text(done)} already here" if done else ""
            self.note(f"{self._what} ({size_text(self._total)}{here})")
            return
        now, percent = self._clock(), _percent(done, self._total)
        waited = now - self._told_at
        if waited < _LINE_EVERY and (percent < self._percent + _LINE_PERCENT or waited < _LINE_AT_LEAST):
            return
        self._told_at, self._percent = now, percent - percent % _LINE_PERCENT
        speed = (done - self._first) / max(now - self._began_at, 1e-9)
        self.note(f"{self._what}: {percent} % ({size_text(done)} of {size_text(self._total)}, "
                  f"{size_text(round(speed))}/s)")

    def note(self, text: str) -> None:
        # A file's name comes from the hub: it steers no terminal.
        print("".join(char if char.isprintable() else "\ufffd" for char in text), file=sys.stderr, flush=True)


def _percent(done: int, total: int) -> int:
    return 100 * done // total if total else 100


Downloads = Callable[[], Listener]  # makes who is told of a download that begins


class TransferError(Exception):
    """A file that did not arrive, or not as it should be; the message is the cause in a few words."""


def download(url: str, target: Path, size: int, listener: Listener, *, first: int = 0, whole: int | None = None,
             at_once: int = _MOST_AT_ONCE) -> None:
    """Make ``target`` the ``size`` bytes that stand at ``url``; those that it holds already are not fetched again.
    No request asks for more than ``at_once`` of them.

    With ``whole``, the size of the file there, it is a part of it: the bytes from ``first`` on.

    Tries again by itself when the connection breaks; whatever ends it, what has arrived stays in ``target``, and no
    byte is added that the server does not say belongs there. Raises TransferError when nothing more arrives, the HTTP
    client's errors when the server refuses, and OSError when the file cannot be written.
    """
    if size_of(target) > size:
        target.unlink()
    target.touch()
    failures, ranges = 0, True
    while (before := size_of(target)) < size:
        try:
            trouble = _stream(url, target, _Part(first, first + size, whole or size), first + before, listener,
                              at_once if ranges else None)
        except _WrongAnswerError as error:  # whoever cannot do ranges may have the whole file
            trouble, ranges = str(error), not ranges
        if trouble is None:
            continue
        failures = 1 if size_of(target) > before else failures + 1
        if failures >= TRIES:
            raise TransferError(trouble)
        listener.note(f"interrupted: {trouble}; trying again")
        time.sleep(min(_WAIT * 2 ** (failures - 1), _LONGEST_WAIT))


def verify(path: Path, checksum: str, listener: Listener) -> None:
    """Read a file and raise TransferError unless it has this checksum: a SHA-256, or the SHA-1 that git gives it."""
    if len(checksum) == _GIT_DIGITS:
        kind, digest = "git SHA-1", hashlib.sha1(b"blob %d\0" % size_of(path), usedforsecurity=False)
    else:
        kind, digest = "SHA-256", hashlib.sha256()
    done = 0
    with path.open("rb", buffering=0) as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
            done += len(piece)
            listener.advance(done)
    if digest.hexdigest() != checksum.lower():
        raise TransferError(f"its {kind} is {digest.hexdigest()[:16]}…, but should be {checksum[:16]}…")


def size_of(path: Path) -> int:
    """The size of a file in bytes; 0 if there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def is_network_trouble(error: BaseException) -> bool:
    """Whether an error says that the network failed, rather than that somebody refused.

    By name, because the hub's library has changed its HTTP client before (httpx, httpx2) and their errors are not
    related to each other.
    """
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return False
    if isinstance(error, HfHubHTTPError):
        return getattr(error.response, "status_code", None) in _PASSING
    return (isinstance(error, ConnectionError | TimeoutError)
            or any(kind.__name__ == "TransportError" for kind in type(error).__mro__))


@dataclass(frozen=True)
class _Part:
    """The bytes ``first`` to (without) ``last`` of a file of ``size``."""

    first: int
    last: int
    size: int


def _stream(url: str, target: Path, part: _Part, start: int, listener: Listener, most: int | None) -> str | None:
    """Append to ``target`` what one request brings of a part, from ``start`` on; what went wrong with the network if
    anything did.

    ``most`` is how many bytes may be asked for; None asks for the whole file. Raises _WrongAnswerError, with nothing
    written, for an answer that is not it.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    headers: dict[str, Any] = build_hf_headers(library_name="dgemma", library_version=__version__)
    headers["Accept-Encoding"] = "identity"  # a range of a compressed file would be of no use
    end = min(part.last, start + (most or part.size))
    if most is not None and (start or end < part.size):
        headers["Range"] = f"bytes={start}-{end - 1}"
    try:
        with get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                                  follow_redirects=True) as response:
            if response.status_code == 416:  # the whole file will tell whether there really is less of it
                raise _WrongAnswerError("the server says that it has less of the file than has arrived before")
            if response.status_code >= 400:
                response.read()
            hf_raise_for_status(response)
            skip = 0
            if response.status_code == 206:
                end = min(end, _answered_end(response.headers, start, part.size))
            else:
                _check_whole(response.status_code, response.headers, part.size)
                skip, end = start, part.last  # it does not do ranges: what is here already comes once more
            with open(target, "ab") as file:
                for chunk in response.iter_bytes():
                    if skip:
                        skip, chunk = max(skip - len(chunk), 0), chunk[skip:]
                    chunk = chunk[: end - start]
                    file.write(chunk)
                    start += len(chunk)
                    listener.advance(start - part.first)
                    if start == end < part.size:  # what comes after the part is not wanted
                        break
    except Exception as error:
        if not is_network_trouble(error):
            raise
        return first_line(error)
    return None if start == end else "the connection was closed early"


class _WrongAnswerError(Exception):
    """An answer that does not hold what was asked for; nothing of it is used."""


def _answered_end(headers: Mapping[str, str], start: int, size: int) -> int:
    """Where the part of a file ends that a 206 holds, if it is the one from ``start`` of ``size`` bytes.

    Between us and the hub there are content delivery networks, mirrors and proxies, and some give another part.
    """
    told = headers.get("content-range")
    if told is None:
        raise _WrongAnswerError("the server sent a part of the file and did not say which (no Content-Range)")
    found = _CONTENT_RANGE.fullmatch(told)
    if found is None or int(found["first"]) > int(found["last"]):
        raise _WrongAnswerError(f"the server sent a part of the file that makes no sense (Content-Range: {told[:80]})")
    if found["total"] != "*" and int(found["total"]) != size:
        raise _WrongAnswerError(f"the server's file has {found['total']} bytes, not {size}")
    if int(found["first"]) != start or int(found["last"]) >= size:
        raise _WrongAnswerError(f"the server sent bytes {found['first']} to {found['last']} of the file, not those "
                                f"from {start}")
    if encoding := _encoding(headers):  # a range counts the bytes of what is compressed
        raise _WrongAnswerError(f"the server sent a part of the file compressed ({encoding[:40]})")
    return int(found["last"]) + 1


def _check_whole(status: int, headers: Mapping[str, str], size: int) -> None:
    """Refuse what cannot be the whole file: a login page, a notice, another file."""
    if status != 200:
        raise _WrongAnswerError(f"the server answered with status {status}")
    length = "" if _encoding(headers) else headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length) != size:
        raise _WrongAnswerError(f"the server's file has {length} bytes, not {size}")


def _encoding(headers: Mapping[str, str]) -> str:
    """How an answer is compressed although we asked for it as it is; empty if it is not."""
    encoding = headers.get("content-encoding", "").strip().lower()
    return "" if encoding == "identity" else encoding


def first_line(error: BaseException) -> str:
    """What an error says, in one line and without the address that everybody knows."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].split(" for url ")[0]
