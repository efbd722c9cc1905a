"""The studio's tables, and how an older file becomes one of today.

Works on: SQLite connections. Knows nothing of: what the tables mean to anybody.

`MIGRATIONS` is only ever added to: entry n brings a file of version n to version n + 1.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from dgemma.errors import DgemmaError

MIGRATIONS = (
    """
    CREATE TABLE conversations (
        id TEXT PRIMARY KEY, title TEXT NOT NULL, system TEXT NOT NULL DEFAULT '',
        options TEXT NOT NULL DEFAULT '{}', pinned INTEGER NOT NULL DEFAULT 0, head TEXT,
        created REAL NOT NULL, updated REAL NOT NULL);
    CREATE INDEX conversations_by_time ON conversations (pinned DESC, updated DESC);
    CREATE TABLE messages (
        number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE,
        conversation TEXT NOT NULL REFERENCES conversations (id) ON DELETE CASCADE,
        parent TEXT REFERENCES messages (id) ON DELETE CASCADE, role TEXT NOT NULL, content TEXT NOT NULL,
        text TEXT NOT NULL DEFAULT '', reasoning TEXT NOT NULL DEFAULT '', status TEXT NOT NULL,
        info TEXT NOT NULL DEFAULT '{}', created REAL NOT NULL);
    CREATE INDEX messages_by_conversation ON messages (conversation, created);
    CREATE INDEX messages_by_parent ON messages (parent);
    CREATE TABLE recordings (
        message TEXT PRIMARY KEY REFERENCES messages (id) ON DELETE CASCADE, data BLOB NOT NULL);
    CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
    CREATE TABLE sessions (
        digest TEXT PRIMARY KEY, label TEXT NOT NULL, created REAL NOT NULL, seen REAL NOT NULL);
    CREATE TABLE runs (
        id TEXT PRIMARY KEY, kind TEXT NOT NULL, status TEXT NOT NULL, info TEXT NOT NULL DEFAULT '{}',
        created REAL NOT NULL, updated REAL NOT NULL);
    CREATE INDEX runs_by_kind ON runs (kind, created DESC);
    """,
    """
    CREATE TABLE battles (
        id TEXT PRIMARY KEY, series TEXT NOT NULL, prompt TEXT NOT NULL, first TEXT NOT NULL, second TEXT NOT NULL,
        blind INTEGER NOT NULL, swapped INTEGER NOT NULL, in_turn INTEGER NOT NULL, status TEXT NOT NULL, verdict TEXT,
        created REAL NOT NULL);
    CREATE INDEX battles_by_series ON battles (series);
    CREATE TABLE battle_recordings (
        battle TEXT NOT NULL REFERENCES battles (id) ON DELETE CASCADE, side INTEGER NOT NULL, data BLOB NOT NULL,
        PRIMARY KEY (battle, side));
    """,
)


def migrate(connection: sqlite3.Connection, path: Path) -> Path | None:
    """Bring a file up to date; returns the backup made of it before, None where nothing was there to lose.

    Each migration is a transaction with its new version number. Raises DgemmaError for a file of a newer program.
    """
    connection.execute("CREATE TABLE IF NOT EXISTS version (number INTEGER NOT NULL)")
    row = connection.execute("SELECT number FROM version").fetchone()
    number = 0 if row is None else row[0]
    if number > len(MIGRATIONS):
        raise DgemmaError(f"{path}: was written by a newer dgemma (version {number} of the studio's tables; this one "
                          f"knows {len(MIGRATIONS)}): update dgemma, or choose another folder with --data")
    backup = _back_up(connection, path, number) if 0 < number < len(MIGRATIONS) else None
    for version, script in enumerate(MIGRATIONS[number:], number + 1):
        try:
            connection.executescript(f"BEGIN; {script}; DELETE FROM version; INSERT INTO version VALUES ({version}); "
                                     "COMMIT")
        except sqlite3.Error:
            connection.rollback()
            raise
    return backup


def _back_up(connection: sqlite3.Connection, path: Path, number: int) -> Path:
    place = path.with_name(f"{path.name}.v{number}.backup")
    with sqlite3.connect(place) as copy:
        connection.backup(copy)
    copy.close()
    return place
