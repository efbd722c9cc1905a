"""Who may use the studio: a launch link that works once, a password, sessions.

Works on: a store. Knows nothing of: HTTP.

A session is a random word in the browser's cookie; the store has its SHA-256, so that whoever reads the file cannot
become anybody. Passwords are kept by Argon2id. Whoever may read the terminal, or the data folder, owns the studio.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from dgemma.errors import DgemmaError
from dgemma.serve.auth import RateLimit
from dgemma.studio.store import Store

IDLE_DAYS = 30.0  # without being seen, after which a session is over
SHORTEST = 8  # characters of a password
LONGEST = 1000
TRIES = 5.0  # passwords a minute that one address may try
ALL_TRIES = 20.0  # and all of them together
LINK_MINUTES = 15.0  # that a launch link works, unless it is used
_SEEN = 60.0  # seconds between notes that a session is in use
_PASSWORD = "password"  # the setting that holds the hash


def set_password(store: Store, password: str) -> None:
    """Keep a password's hash, and end all sessions. Raises DgemmaError for one that is too short."""
    if not SHORTEST <= len(password) <= LONGEST:
        raise DgemmaError(f"a password needs {SHORTEST} characters at least, and {LONGEST} at most")
    store.set_setting(_PASSWORD, PasswordHasher().hash(password))
    for digest, *_ in store.sessions():
        store.delete_session(digest)


def has_password(store: Store) -> bool:
    return store.setting(_PASSWORD) is not None


class TooManyTriesError(Exception):
    """Passwords are tried too fast; the next one may be in ``seconds``."""

    def __init__(self, seconds: float):
        super().__init__(f"too many tries: wait {seconds:.0f} seconds")
        self.seconds = seconds


class Passwords:
    """Checks passwords, not too many of them."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.monotonic):
        self._store, self._clock = store, clock
        self._by_address, self._all = RateLimit(TRIES), RateLimit(ALL_TRIES)
        self._one = asyncio.Semaphore(1)  # a check takes 64 MiB

    async def check(self, password: str, address: str) -> bool:
        """Whether it is the password. Raises `TooManyTriesError`."""
        now = self._clock()
        wait = self._by_address.wait(address, now) or self._all.wait("", now)
        if wait:
            raise TooManyTriesError(wait)
        known = self._store.setting(_PASSWORD)
        if known is None or len(password) > LONGEST:
            return False
        async with self._one:
            return await asyncio.to_thread(_verify, known, password)


def _verify(known: str, password: str) -> bool:
    try:
        return PasswordHasher().verify(known, password)
    except (VerificationError, InvalidHashError):
        return False


@dataclass(frozen=True)
class Session:
    """``label`` says where it was begun: an address and a browser. Times are seconds since 1970."""

    digest: str
    label: str
    created: float
    seen: float


class Sessions:
    """The sessions that are on, and the launch link that begins one."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.time):
        self._store, self._clock = store, clock
        self._tokens: dict[str, float] = {}  # digest -> until when
        self._links = RateLimit(TRIES)
        self._noted: dict[str, float] = {}  # digest -> when it was last noted as seen

    def new_token(self) -> str:
        """What a launch link has in it. Raises `TooManyTriesError`: whoever asks for links is not known yet."""
        if wait := self._links.wait("", self._clock()):
            raise TooManyTriesError(wait)
        token = secrets.token_urlsafe(32)
        self._tokens[_digest(token)] = self._clock() + 60 * LINK_MINUTES
        return token

    def use_token(self, token: str, label: str) -> str | None:
        """The cookie of a new session for a token that was not used before; None for any other."""
        self._tokens = {digest: until for digest, until in self._tokens.items() if until >= self._clock()}
        if self._tokens.pop(_digest(token), None) is None:
            return None
        return self.begin(label)

    def begin(self, label: str) -> str:
        """A new session's cookie."""
        cookie = secrets.token_urlsafe(32)
        self._store.add_session(_digest(cookie), label[:200])
        return cookie

    def find(self, cookie: str | None) -> str | None:
        """The digest of the session that a cookie belongs to, None for none; it was seen now."""
        if not cookie:
            return None
        digest = _digest(cookie)
        return digest if self.alive(digest) else None

    def alive(self, digest: str) -> bool:
        """Whether the session is still on."""
        now = self._clock()
        if now - self._noted.get(digest, 0.0) < _SEEN:
            return True
        found = next((session for session in self.all() if session.digest == digest), None)
        if found is None:
            self._noted.pop(digest, None)
            return False
        self._store.saw_session(digest)
        self._noted[digest] = now
        return True

    def all(self) -> list[Session]:
        """Those that are on, the last seen first; those that nobody used for long are over."""
        oldest = self._clock() - IDLE_DAYS * 86_400
        sessions = [Session(*row) for row in self._store.sessions()]
        for session in sessions:
            if session.seen < oldest:
                self._store.delete_session(session.digest)
        return [session for session in sessions if session.seen >= oldest]

    def end_all(self) -> None:
        """End every session."""
        for session in self.all():
            self.end(session.digest)

    def end(self, digest: str) -> None:
        """End a session: its pages lose their connection."""
        self._noted.pop(digest, None)
        self._store.delete_session(digest)


def _digest(word: str) -> str:
    return hashlib.sha256(word.encode("utf-8", "surrogatepass")).hexdigest()
