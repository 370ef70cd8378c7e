"""The operator's records of sessions in an SQLite file: who used the worker, when, and how much."""

from __future__ import annotations

import dataclasses
import logging
import os
import sqlite3
import stat
from collections.abc import Iterable
from pathlib import Path

from ciphertune.errors import ConfigError
from ciphertune.worker.usage import SessionRecord

log = logging.getLogger(__name__)

_VERSION = 1
_BUSY_SECONDS = 5.0
_MOST_PENDING = 20_000
_COLUMNS = tuple(field.name for field in dataclasses.fields(SessionRecord))
_TABLE = """
CREATE TABLE IF NOT EXISTS sessions (
    client TEXT NOT NULL, bundle TEXT NOT NULL, backend TEXT NOT NULL,
    opened REAL NOT NULL, last_used REAL NOT NULL, ended REAL, why TEXT NOT NULL,
    products INTEGER NOT NULL, errors INTEGER NOT NULL, bytes_in INTEGER NOT NULL, bytes_out INTEGER NOT NULL,
    evaluate_seconds REAL NOT NULL, id TEXT PRIMARY KEY
)
"""
_WRITE = f"INSERT OR REPLACE INTO sessions ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})"  # noqa: S608 - names of ours
_READ = f"SELECT {', '.join(_COLUMNS)} FROM sessions WHERE opened >= ? AND opened < ? ORDER BY opened"  # noqa: S608


class AuditLog:
    """Writes records of sessions. Several workers may write to one file. For one thread at a time.

    Args:
        path: of the file; made with mode 0600 if missing.

    Raises:
        ConfigError: it cannot be used, others can read it, or it is of another version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pending: dict[str, SessionRecord] = {}
        self._written: dict[str, SessionRecord] = {}  # of open sessions, as they are in the file
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            _refuse_shared(path)
            self._file = sqlite3.connect(path, timeout=_BUSY_SECONDS, check_same_thread=False)
            (version,) = self._file.execute("PRAGMA user_version").fetchone()
            if version not in (0, _VERSION):
                self._file.close()
                raise ConfigError(f"{path} was written by another version of CipherTune: name another file")
            with self._file:
                self._file.execute(_TABLE)
                self._file.execute("CREATE INDEX IF NOT EXISTS by_time ON sessions (opened)")
                self._file.execute(f"PRAGMA user_version = {_VERSION}")
        except (OSError, sqlite3.Error) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(f"records of sessions cannot be kept in {path}: {reason}") from None

    def write(self, records: Iterable[SessionRecord]) -> None:
        """Write records that have changed. Where that fails, as on a full disk, they are written with the next call."""
        self._pending |= {record.id: record for record in records if self._written.get(record.id) != record}
        while len(self._pending) > _MOST_PENDING:
            del self._pending[next(iter(self._pending))]
        if not self._pending:
            return
        try:
            with self._file:
                self._file.executemany(_WRITE, map(dataclasses.astuple, self._pending.values()))
        except sqlite3.Error as error:
            log.error("records of sessions are not written, and kept: %s", error)
            return
        for record in self._pending.values():
            if record.ended is None:
                self._written[record.id] = record
            else:
                self._written.pop(record.id, None)
        self._pending.clear()

    def close(self) -> None:
        """Close the file. Idempotent."""
        self._file.close()


def read_records(path: Path, since: float, until: float) -> list[SessionRecord]:
    """Records of sessions that were opened from ``since`` to before ``until``, both in seconds since the epoch.

    Raises:
        ConfigError: the file cannot be read, or holds no such records.
    """
    try:
        if not path.exists():
            raise ConfigError(f"{path} does not exist: name the file of 'ciphertune worker --audit'")
        file = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=_BUSY_SECONDS)
        try:
            return [SessionRecord(*row) for row in file.execute(_READ, (since, until))]
        finally:
            file.close()
    except sqlite3.Error as error:
        raise ConfigError(f"{path} cannot be read as records of sessions: {error}") from None


def _refuse_shared(path: Path) -> None:
    if os.name == "posix" and stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise ConfigError(f"{path} can be read by others, and says who uses this worker: run chmod 600 {path}")
