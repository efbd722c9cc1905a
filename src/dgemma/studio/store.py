"""What the studio keeps: conversations as trees of messages, settings, sessions, runs; in one SQLite file.

Works on: a file, in write-ahead mode: a process that is killed loses nothing that was written; files of conversations
lie beside it (`media`). Knows nothing of: pages, models, the network.

A message's parent is the message that it answers. Siblings are branches: a message that was edited, an answer that was
made again. A conversation's ``head`` is the last message of the branch that is shown.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dgemma.errors import DgemmaError
from dgemma.files import make_folder
from dgemma.studio.media import MediaFolder
from dgemma.studio.migrations import migrate

FILE = "studio.db"
INTERRUPTED = "The server was stopped in the middle of this answer; what was there by then was kept."
_BUSY = 5.0  # seconds to wait for another process that writes
_TITLE = 60  # characters
_MEDIA = re.compile(r'"media":"([0-9a-f]{64})"')  # as `_json` writes it: within a text the quotes are escaped

Status = Literal["running", "done", "stopped", "failed"]
Content = str | list[dict[str, Any]]  # text, or OpenAI's typed parts


@dataclass(frozen=True)
class Message:
    """``info`` is what became of an answer: finish_reason, tokens, steps, seconds, seed, model, error, tool_calls.

    Of a call (role "tool"): name, tool_call_id, arguments, fault, files, sources (`dgemma.studio.turns`).
    """

    id: str
    conversation: str
    parent: str | None
    role: str  # "user", "assistant", "tool"
    content: Content
    reasoning: str = ""
    status: Status = "done"
    info: dict[str, Any] = field(default_factory=dict)
    created: float = 0.0

    @property
    def text(self) -> str:
        """What it says, without pictures."""
        return text_of(self.content)


@dataclass(frozen=True)
class Conversation:
    """``options`` are the settings that its next answer is made with."""

    id: str
    title: str
    system: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    pinned: bool = False
    head: str | None = None
    created: float = 0.0
    updated: float = 0.0


@dataclass(frozen=True)
class Found:
    """A message that holds what was searched for; ``excerpt`` is a stretch of its text around that."""

    conversation: Conversation
    message: str
    excerpt: str


@dataclass(frozen=True)
class Run:
    """Something that goes on for a while, or did: a training run."""

    id: str
    kind: str
    status: str
    info: dict[str, Any]
    created: float
    updated: float


def data_folder(given: Path | None = None, environment: Mapping[str, str] = os.environ) -> Path:
    """Where the studio keeps what it keeps: ``given``, else the user's data folder (XDG_DATA_HOME)."""
    if given is not None:
        return given
    base = environment.get("XDG_DATA_HOME") or ""
    home = Path(base) if os.path.isabs(base) else Path.home() / ".local" / "share"
    return home / "dgemma" / "studio"


def text_of(content: Content) -> str:
    """The text of a message's content."""
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if isinstance(part.get("text"), str))


def title_of(text: str) -> str:
    """A conversation's title, from the first thing that was said in it."""
    line = " ".join(text.split())
    return (line[: _TITLE - 1].rstrip() + "…" if len(line) > _TITLE else line) or "New chat"


class Store:
    """The open file; for any thread. Every method is one transaction, on the disk when it returns."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time):
        """Opens the file in a folder, or makes it. Raises DgemmaError when it cannot be used."""
        self.path = make_folder(folder) / FILE
        self.media = MediaFolder(folder / "media")
        self._clock = clock
        self._lock = threading.RLock()
        try:
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))  # what people write is theirs alone
            self._db = sqlite3.connect(self.path, timeout=_BUSY, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA foreign_keys = ON")
            self.backup = migrate(self._db, self.path)
            self._indexed = self._index()
        except (sqlite3.Error, OSError) as error:
            raise DgemmaError(f"{self.path}: cannot be used ({error}); move it away, or choose another folder with "
                              "--data") from error

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def _index(self) -> bool:
        """Whether messages can be searched by an index (FTS5, which not every SQLite has)."""
        known = bool(self._run("SELECT 1 FROM sqlite_master WHERE name = 'found'"))
        try:
            self._db.executescript("""
                BEGIN;
                CREATE VIRTUAL TABLE IF NOT EXISTS found USING fts5 (
                    text, reasoning, content = 'messages', content_rowid = 'number', tokenize = 'unicode61');
                CREATE TRIGGER IF NOT EXISTS found_new AFTER INSERT ON messages BEGIN
                    INSERT INTO found (rowid, text, reasoning) VALUES (new.number, new.text, new.reasoning); END;
                CREATE TRIGGER IF NOT EXISTS found_gone AFTER DELETE ON messages BEGIN
                    INSERT INTO found (found, rowid, text, reasoning)
                    VALUES ('delete', old.number, old.text, old.reasoning); END;
                CREATE TRIGGER IF NOT EXISTS found_changed AFTER UPDATE OF text, reasoning ON messages BEGIN
                    INSERT INTO found (found, rowid, text, reasoning)
                    VALUES ('delete', old.number, old.text, old.reasoning);
                    INSERT INTO found (rowid, text, reasoning) VALUES (new.number, new.text, new.reasoning); END;
                COMMIT;""")
        except sqlite3.OperationalError as error:
            if "fts5" not in str(error):
                raise
            self._db.execute("ROLLBACK")
            return False
        if not known:
            self._run("INSERT INTO found (found) VALUES ('rebuild')")
        return True

    def _run(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._db.execute(sql, values).fetchall()

    def _transaction(self) -> _Transaction:
        return _Transaction(self._db, self._lock)

    # ---- conversations ----

    def conversations(self) -> list[Conversation]:
        """All of them: pinned ones first, then by when they last changed."""
        rows = self._run(f"SELECT {_CONVERSATION} FROM conversations c "
                         "ORDER BY pinned DESC, updated DESC, c.rowid DESC")
        return [_conversation(row) for row in rows]

    def conversation(self, id: str) -> Conversation | None:
        rows = self._run(f"SELECT {_CONVERSATION} FROM conversations c WHERE id = ?", id)
        return _conversation(rows[0]) if rows else None

    def new_conversation(self, title: str, *, system: str = "",
                         options: Mapping[str, Any] | None = None) -> Conversation:
        now = self._clock()
        made = Conversation(_new_id(), title, system, dict(options or {}), created=now, updated=now)
        self._run("INSERT INTO conversations (id, title, system, options, created, updated) VALUES (?, ?, ?, ?, ?, ?)",
                  made.id, made.title, made.system, _json(made.options), now, now)
        return made

    def change_conversation(self, id: str, *, title: str | None = None, system: str | None = None,
                            options: Mapping[str, Any] | None = None, pinned: bool | None = None,
                            head: str | None = None) -> None:
        """Change what is given; this does not count as news. A conversation that is gone stays gone."""
        given = {"title": title, "system": system, "options": None if options is None else _json(dict(options)),
                 "pinned": pinned, "head": head}
        changed = {name: value for name, value in given.items() if value is not None}
        if changed:
            self._run(f"UPDATE conversations SET {', '.join(f'{name} = ?' for name in changed)} WHERE id = ?",
                      *changed.values(), id)

    def delete_conversation(self, id: str) -> None:
        """Delete it with all of its messages, recordings and files."""
        held = self._held_media("conversation = ?", id)
        self._run("DELETE FROM conversations WHERE id = ?", id)
        for name in held - self._held_media():
            self.media.remove(name)

    def forget_media(self) -> None:
        """Remove files that no message has: they were chosen, and never sent."""
        for name in self.media.names() - self._held_media():
            self.media.remove(name)

    def _held_media(self, where: str = "TRUE", *values: Any) -> set[str]:
        rows = self._run(f"SELECT content || info FROM messages WHERE {where} AND content || info LIKE '%\"media\":%'",
                         *values)
        return {name for (text,) in rows for name in _MEDIA.findall(text)}

    # ---- messages ----

    def add_message(self, conversation: str, role: str, content: Content, *, parent: str | None = None,
                    reasoning: str = "", status: Status = "done", info: Mapping[str, Any] | None = None) -> Message:
        """Add a message behind ``parent`` (None: the first one) and make it the conversation's head.

        Raises DgemmaError when the conversation, or the parent in it, is not there any more.
        """
        now = self._clock()
        made = Message(_new_id(), conversation, parent, role, content, reasoning, status, dict(info or {}), now)
        with self._transaction():
            self._insert(made)
            self._run("UPDATE conversations SET head = ?, updated = ? WHERE id = ?", made.id, now, conversation)
        return made

    def _insert(self, made: Message) -> None:
        if made.parent is not None and ((parent := self.message(made.parent)) is None
                                        or parent.conversation != made.conversation):
            raise DgemmaError("the message that this one follows is not there any more")
        try:
            self._run("INSERT INTO messages (id, conversation, parent, role, content, text, reasoning, status, info, "
                      "created) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", made.id, made.conversation, made.parent,
                      made.role, _json(made.content), _utf8(made.text), _utf8(made.reasoning), made.status,
                      _json(made.info), made.created)
        except sqlite3.IntegrityError as error:
            raise DgemmaError("this conversation was deleted") from error

    def change_message(self, id: str, *, content: Content | None = None, reasoning: str | None = None,
                       status: Status | None = None, info: Mapping[str, Any] | None = None) -> None:
        """Change what is given. A message that is gone stays gone."""
        given = {"content": None if content is None else _json(content),
                 "text": None if content is None else _utf8(text_of(content)),
                 "reasoning": None if reasoning is None else _utf8(reasoning), "status": status,
                 "info": None if info is None else _json(dict(info))}
        changed = {name: value for name, value in given.items() if value is not None}
        if changed:
            self._run(f"UPDATE messages SET {', '.join(f'{name} = ?' for name in changed)} WHERE id = ?",
                      *changed.values(), id)

    def message(self, id: str) -> Message | None:
        rows = self._run(f"SELECT {_MESSAGE} FROM messages m WHERE id = ?", id)
        return _message(rows[0]) if rows else None

    def messages(self, conversation: str) -> list[Message]:
        """All messages of all branches, oldest first."""
        return [_message(row) for row in self._run(
            f"SELECT {_MESSAGE} FROM messages m WHERE conversation = ? ORDER BY created, m.number", conversation)]

    def branch(self, conversation: str) -> list[Message]:
        """The messages from the first one to the conversation's head."""
        known = {message.id: message for message in self.messages(conversation)}
        owner = self.conversation(conversation)
        path, at = [], None if owner is None else owner.head
        while at is not None and at in known:
            path.append(known[at])
            at = known[at].parent
        return path[::-1]

    def siblings(self, message: Message) -> list[Message]:
        """The message and its alternatives: those behind the same one, oldest first."""
        return [_message(row) for row in self._run(
            f"SELECT {_MESSAGE} FROM messages m WHERE conversation = ? AND parent IS ? ORDER BY created, m.number",
            message.conversation, message.parent)]

    def switch(self, message: str) -> None:
        """Show the branch of a message, as far as its youngest descendant."""
        chosen = self.message(message)
        if chosen is None:
            return
        children: dict[str | None, str] = {one.parent: one.id for one in self.messages(chosen.conversation)}
        head = chosen.id
        while head in children:
            head = children[head]  # of siblings the youngest stays in the dictionary
        self.change_conversation(chosen.conversation, head=head)

    def mark_interrupted(self) -> int:
        """Answers that were running when the server last went away are so no more; how many there were."""
        with self._transaction():
            rows = self._run("SELECT id, info FROM messages WHERE status = 'running'")
            for id, info in rows:
                self.change_message(id, status="stopped", info={**json.loads(info), "error": INTERRUPTED})
        return len(rows)

    def search(self, words: str, most: int = 50) -> list[Found]:
        """Messages that have all of these words, or words that begin so; conversations by their titles, too."""
        terms = words.split()
        if not terms:
            return []
        titles = [Found(conversation, "", "") for conversation in self.conversations()
                  if all(term.casefold() in conversation.title.casefold() for term in terms)]
        if self._indexed:
            # Every word is quoted: to the reader of the index they are text and nothing else.
            match = " ".join('"' + term.replace('"', '""') + '"*' for term in terms)
            rows = self._run(f"SELECT {_CONVERSATION}, m.id, snippet(found, -1, '', '', ' … ', 12) FROM found "
                             "JOIN messages m ON m.number = found.rowid JOIN conversations c ON c.id = m.conversation "
                             "WHERE found MATCH ? ORDER BY rank LIMIT ?", match, most)
        else:
            like = ["%" + term.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") + "%" for term in terms]
            rows = self._run(f"SELECT {_CONVERSATION}, m.id, substr(m.text, 1, 100) FROM messages m "
                             "JOIN conversations c ON c.id = m.conversation WHERE "
                             + " AND ".join(["m.text || ' ' || m.reasoning LIKE ? ESCAPE '\\'"] * len(like))
                             + " ORDER BY m.created DESC LIMIT ?", *like, most)
        return [*titles, *(Found(_conversation(row[:-2]), row[-2], row[-1]) for row in rows)]

    # ---- recordings of how answers were denoised ----

    def put_recording(self, message: str, data: bytes) -> None:
        """Keep an answer's recording, unless the answer is gone."""
        self._run("INSERT OR REPLACE INTO recordings SELECT id, ? FROM messages WHERE id = ?", data, message)

    def recording(self, message: str) -> bytes | None:
        rows = self._run("SELECT data FROM recordings WHERE message = ?", message)
        return rows[0][0] if rows else None

    # ---- settings ----

    def setting(self, name: str, default: Any = None) -> Any:
        rows = self._run("SELECT value FROM settings WHERE name = ?", name)
        return json.loads(rows[0][0]) if rows else default

    def set_setting(self, name: str, value: Any) -> None:
        """Keep any JSON value under a name; None forgets it."""
        if value is None:
            self._run("DELETE FROM settings WHERE name = ?", name)
        else:
            self._run("INSERT OR REPLACE INTO settings VALUES (?, ?)", name, _json(value))

    # ---- sessions, by the digest of what the browser holds ----

    def add_session(self, digest: str, label: str) -> None:
        now = self._clock()
        self._run("INSERT OR REPLACE INTO sessions VALUES (?, ?, ?, ?)", digest, label, now, now)

    def sessions(self) -> list[tuple[str, str, float, float]]:
        """Digest, label, when it began and when it was last seen; the last seen first."""
        return self._run("SELECT digest, label, created, seen FROM sessions ORDER BY seen DESC")  # type: ignore

    def saw_session(self, digest: str) -> None:
        self._run("UPDATE sessions SET seen = ? WHERE digest = ?", self._clock(), digest)

    def delete_session(self, digest: str) -> None:
        self._run("DELETE FROM sessions WHERE digest = ?", digest)

    # ---- runs ----

    def add_run(self, kind: str, info: Mapping[str, Any], status: str = "running") -> Run:
        now = self._clock()
        made = Run(_new_id(), kind, status, dict(info), now, now)
        self._run("INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?)", made.id, kind, status, _json(made.info), now, now)
        return made

    def change_run(self, id: str, *, status: str | None = None, info: Mapping[str, Any] | None = None) -> None:
        given = {"status": status, "info": None if info is None else _json(dict(info)), "updated": self._clock()}
        changed = {name: value for name, value in given.items() if value is not None}
        self._run(f"UPDATE runs SET {', '.join(f'{name} = ?' for name in changed)} WHERE id = ?", *changed.values(), id)

    def runs(self, kind: str) -> list[Run]:
        """Those of a kind, the newest first."""
        return [Run(id, kind, status, json.loads(info), created, updated) for id, kind, status, info, created, updated
                in self._run("SELECT * FROM runs WHERE kind = ? ORDER BY created DESC, rowid DESC", kind)]

    def delete_run(self, id: str) -> None:
        self._run("DELETE FROM runs WHERE id = ?", id)

    # ---- for modules that have tables of their own ----

    def execute(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """One statement, on the disk when this returns; its rows."""
        return self._run(sql, *values)

    def now(self) -> float:
        """Seconds since 1970."""
        return self._clock()

    # ---- for `exchange`, which knows the formats ----

    def add_whole(self, conversation: Conversation, messages: Sequence[Message]) -> None:
        """Add a conversation with its messages as they are, parents before those that follow them.

        Raises DgemmaError, and adds nothing, for what does not hold together.
        """
        with self._transaction():
            try:
                self._run("INSERT INTO conversations VALUES (?, ?, ?, ?, ?, ?, ?, ?)", conversation.id,
                          conversation.title, conversation.system, _json(conversation.options), conversation.pinned,
                          conversation.head, conversation.created, conversation.updated)
                for message in messages:
                    self._insert(message)
            except sqlite3.IntegrityError as error:
                raise DgemmaError("there is such a conversation already, or such a message") from error


class _Transaction:
    """All or nothing; one at a time."""

    def __init__(self, db: sqlite3.Connection, lock: threading.RLock):  # type: ignore[valid-type]
        self._db, self._lock = db, lock

    def __enter__(self) -> None:
        self._lock.acquire()
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._db.execute("COMMIT" if kind is None else "ROLLBACK")
        finally:
            self._lock.release()


_CONVERSATION = "c.id, c.title, c.system, c.options, c.pinned, c.head, c.created, c.updated"
_MESSAGE = "m.id, m.conversation, m.parent, m.role, m.content, m.reasoning, m.status, m.info, m.created"


def _conversation(row: Sequence[Any]) -> Conversation:
    id, title, system, options, pinned, head, created, updated = row
    return Conversation(id, title, system, json.loads(options), bool(pinned), head, created, updated)


def _message(row: Sequence[Any]) -> Message:
    id, conversation, parent, role, content, reasoning, status, info, created = row
    return Message(id, conversation, parent, role, json.loads(content), reasoning, status, json.loads(info), created)


def _json(value: Any) -> str:
    # ASCII: a lone surrogate, which SQLite cannot write, is an escape then.
    return json.dumps(value, separators=(",", ":"))


def _utf8(text: str) -> str:
    """The text without halves of characters, which SQLite cannot write."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _new_id() -> str:
    return secrets.token_urlsafe(12)


def new_ids(count: int) -> Iterable[str]:
    """Ids for what comes from elsewhere."""
    return (_new_id() for _ in range(count))
