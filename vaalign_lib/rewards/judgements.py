"""Judgements on disk: every reply of a judge in one SQLite file, written as it arrives.

Processes that share a file claim a key before they ask for it, so that nothing is paid for twice.
"""

import hashlib
import json
import math
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from pathlib import Path

LEASE = 10.0  # seconds; whoever is alive renews its claims several times in them


class RecordError(ValueError):
    """A file of judgements that cannot be read or written, or does not hold what was written."""


@dataclass(frozen=True)
class Record:
    """One judgement, or one failure to get one; dates in ISO 8601, UTC.

    The `key` is a hash of the filled-in prompt, the model asked and the sampling settings, `text_hash` that
    of the text judged. After a failure a and b are None, without one `failure` is empty; so are
    `model_served` and `reply`, those of the last reply, if there was none.
    """

    key: str
    text_hash: str
    model_asked: str
    model_served: str
    reply: str
    a: float | None
    b: float | None
    failure: str
    date: str

    def checksum(self) -> str:
        """Return a hash of all that is recorded."""
        values = [float(one) if isinstance(one, int) else one for one in astuple(self)]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()

    def is_sound(self) -> bool:
        """Whether there is an interval or a failure, and all else is text."""
        if not all(isinstance(value, str) for name, value in vars(self).items() if name not in "ab"):
            return False
        if self.a is None or self.b is None:
            return self.a is self.b and self.failure != ""
        numbers = isinstance(self.a, float) and isinstance(self.b, float)
        return numbers and not self.failure and 1 <= self.a <= self.b < math.inf


_NAMES = [field.name for field in fields(Record)]
_TABLES = (  # what was written before there were checksums has none
    "judgements (key TEXT PRIMARY KEY, text_hash TEXT NOT NULL, model_asked TEXT NOT NULL, model_served TEXT "
    "NOT NULL, reply TEXT NOT NULL, a REAL, b REAL, failure TEXT NOT NULL, date TEXT NOT NULL)",
    "claims (key TEXT PRIMARY KEY, owner TEXT NOT NULL, until REAL NOT NULL)",
    "checksums (key TEXT PRIMARY KEY, checksum TEXT NOT NULL)",
)
_GET = f"SELECT {', '.join(_NAMES)}, checksum FROM judgements LEFT JOIN checksums USING (key) WHERE key = ?"
_PUT = (
    f"INSERT OR REPLACE INTO judgements ({', '.join(_NAMES)}) SELECT {', '.join('?' * len(_NAMES))} "
    "WHERE NOT EXISTS (SELECT 1 FROM judgements WHERE key = ? AND failure = '')"
)
_CLAIM = (
    "INSERT INTO claims VALUES (?, ?, ?) ON CONFLICT (key) DO UPDATE SET until = excluded.until "
    "WHERE owner = excluded.owner"
)


class JudgementStore:
    """Judgements by key. Every write is on disk before it returns; threads may share a store."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self.path.exists():
                self.path.touch(mode=0o600)  # nobody else's business
            self._connection = sqlite3.connect(self.path, check_same_thread=False, timeout=30)
            run = self._connection.execute
            run("PRAGMA journal_mode=DELETE")  # WAL needs one machine
            run("PRAGMA synchronous=FULL")
            for table in _TABLES:
                run(f"CREATE TABLE IF NOT EXISTS {table}")
            self._connection.commit()
            (found,) = run("PRAGMA quick_check(1)").fetchone()
            if found != "ok":
                raise sqlite3.DatabaseError(f"damaged: {found}")
        except (sqlite3.DatabaseError, OSError) as error:
            raise RecordError(f"{self.path}: not a file of judgements: {error}") from None

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def get(self, key: str) -> Record | None:
        """Return the record of a key as it was written, or None."""
        with self._told():
            rows = self._connection.execute(_GET, (key,)).fetchall()
        if not rows:
            return None
        *values, checksum = rows[0]
        record = Record(*values)
        if not record.is_sound() or checksum not in (None, record.checksum()):
            raise RecordError(
                f"{self.path}: the judgement {key} is damaged: restore the file from a copy, "
                f"or remove it: DELETE FROM judgements WHERE key = '{key}'"
            )
        return record

    def put(self, record: Record) -> None:
        """Add a record and free its key; a judgement that is there stays, a failure gives way."""
        with self._changes() as connection:
            if connection.execute(_PUT, (*astuple(record), record.key)).rowcount:
                checksum = (record.key, record.checksum())
                connection.execute("INSERT OR REPLACE INTO checksums VALUES (?, ?)", checksum)
            connection.execute("DELETE FROM claims WHERE key = ?", (record.key,))

    def claim(self, keys: Sequence[str], owner: str) -> set[str]:
        """Claim what nobody else has claimed, and return it; what a killed process had is free soon after."""
        now = time.time()
        with self._changes() as connection:
            over = (now, now + 2 * LEASE)  # or made by a clock that is far ahead
            connection.execute("DELETE FROM claims WHERE until < ? OR until > ?", over)
            return {key for key in keys if connection.execute(_CLAIM, (key, owner, now + LEASE)).rowcount}

    def renew(self, owner: str) -> None:
        """Keep an owner's claims for another lease."""
        with self._changes() as connection:
            connection.execute("UPDATE claims SET until = ? WHERE owner = ?", (time.time() + LEASE, owner))

    def release(self, owner: str) -> None:
        """Give up an owner's claims."""
        with self._changes() as connection:
            connection.execute("DELETE FROM claims WHERE owner = ?", (owner,))

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Keep other threads out, and say which file it is that fails."""
        with self._lock:
            try:
                yield
            except sqlite3.Error as error:
                raise RecordError(f"{self.path}: cannot be read or written: {error}") from None

    @contextmanager
    def _changes(self) -> Iterator[sqlite3.Connection]:
        """Yield the connection for changes that are on disk, all or none, when the block ends."""
        with self._told(), self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            yield self._connection
