"""Judgements on disk: every reply of a judge in one SQLite file, written as it arrives.

Processes that share a file claim a key before they ask for it, for `LEASE` seconds at a time, so that
nothing is paid for twice; what a killed process had claimed is free again soon after.
"""

import hashlib
import json
import math
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any

from vaalign_lib.store import write_atomically

LEASE = 10.0  # seconds; whoever is alive renews its claims several times in them


class RecordError(ValueError):
    """A file of judgements that cannot be read or written, or contradicts what is recorded."""


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


_FIELDS = [field.name for field in fields(Record)]
_SELECT = (
    f"SELECT {', '.join(f'judgements.{name}' for name in _FIELDS)}, checksum "
    "FROM judgements LEFT JOIN checksums ON judgements.key = checksums.key"
)


def _checksum(record: Record) -> str:
    values = [float(one) if isinstance(one, int) else one for one in astuple(record)]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _problem(record: Record) -> str:
    """Return what is wrong with a record, nothing if it is sound."""
    if not all(isinstance(getattr(record, name), str) for name in _FIELDS if name not in "ab"):
        return "expected text in all fields but a and b"
    bounds = (record.a, record.b)
    if record.failure:
        return "" if bounds == (None, None) else "expected no a and b beside a failure"
    numbers = all(isinstance(one, float | int) and not isinstance(one, bool) for one in bounds)
    if not numbers or not 1 <= record.a <= record.b < math.inf:  # type: ignore[operator]
        return f"expected 1 <= a <= b, got a={record.a}, b={record.b}"
    return ""


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
            self._open()
        except (sqlite3.DatabaseError, OSError) as error:
            raise RecordError(f"{self.path}: not a file of judgements: {error}") from None

    def _open(self) -> None:
        run = self._connection.execute
        run("PRAGMA journal_mode=DELETE")  # WAL needs one machine
        run("PRAGMA synchronous=FULL")
        run(
            "CREATE TABLE IF NOT EXISTS judgements (key TEXT PRIMARY KEY, text_hash TEXT NOT NULL, "
            "model_asked TEXT NOT NULL, model_served TEXT NOT NULL, reply TEXT NOT NULL, a REAL, "
            "b REAL, failure TEXT NOT NULL, date TEXT NOT NULL)"
        )
        run(
            "CREATE TABLE IF NOT EXISTS claims (key TEXT PRIMARY KEY, owner TEXT NOT NULL, "
            "until REAL NOT NULL)"
        )
        # what was written before there were checksums has none
        run("CREATE TABLE IF NOT EXISTS checksums (key TEXT PRIMARY KEY, checksum TEXT NOT NULL)")
        self._connection.commit()
        (found,) = run("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise sqlite3.DatabaseError(f"damaged: {found}")

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def __len__(self) -> int:
        with self._told():
            return int(self._connection.execute("SELECT count(*) FROM judgements").fetchone()[0])

    def get(self, key: str) -> Record | None:
        """Return the record of a key, or None.

        Raises:
            RecordError: it is not as it was written.
        """
        with self._told(), closing(self._connection.cursor()) as cursor:
            row = cursor.execute(f"{_SELECT} WHERE judgements.key = ?", (key,)).fetchone()
        return None if row is None else self._sound(row)

    def _sound(self, row: Sequence[Any]) -> Record:
        """Return a record as it was written."""
        *values, checksum = row
        record = Record(*values)
        if checksum not in (None, _checksum(record)) or _problem(record):
            raise RecordError(
                f"{self.path}: the judgement {record.key} is damaged: restore the file from a copy, "
                f"or remove it: DELETE FROM judgements WHERE key = '{record.key}'"
            )
        return record

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

    def put(self, *records: Record) -> None:
        """Add records, all or none; a judgement that is there stays, a failure gives way. Their keys are free
        then.
        """
        marks = ", ".join("?" * len(_FIELDS))
        with self._changes() as connection:
            for record in records:
                changed = connection.execute(
                    f"INSERT INTO judgements ({', '.join(_FIELDS)}) VALUES ({marks}) ON CONFLICT (key) "
                    "DO UPDATE SET (model_served, reply, a, b, failure, date) = "
                    "(excluded.model_served, excluded.reply, excluded.a, excluded.b, excluded.failure, "
                    "excluded.date) WHERE judgements.failure != ''",
                    astuple(record),
                ).rowcount
                if changed:
                    connection.execute(
                        "INSERT OR REPLACE INTO checksums VALUES (?, ?)", (record.key, _checksum(record))
                    )
                connection.execute("DELETE FROM claims WHERE key = ?", (record.key,))

    # --- claims ---

    def claim(self, keys: Sequence[str], owner: str) -> set[str]:
        """Claim what nobody else has claimed, and return it."""
        now = time.time()
        with self._changes() as connection:
            over = (now, now + 2 * LEASE)  # or made by a clock that is far ahead
            connection.execute("DELETE FROM claims WHERE until < ? OR until > ?", over)
            return {
                key
                for key in keys
                if connection.execute(
                    "INSERT INTO claims VALUES (?, ?, ?) ON CONFLICT (key) DO UPDATE SET "
                    "until = excluded.until WHERE owner = excluded.owner",
                    (key, owner, now + LEASE),
                ).rowcount
            }

    def renew(self, owner: str) -> None:
        """Keep an owner's claims for another lease."""
        with self._changes() as connection:
            connection.execute("UPDATE claims SET until = ? WHERE owner = ?", (time.time() + LEASE, owner))

    def release(self, owner: str) -> None:
        """Give up an owner's claims."""
        with self._changes() as connection:
            connection.execute("DELETE FROM claims WHERE owner = ?", (owner,))

    # --- all of them ---

    def __iter__(self) -> Iterator[Record]:
        with self._told():
            rows = self._connection.execute(f"{_SELECT} ORDER BY date, judgements.key").fetchall()
        return map(self._sound, rows)

    def export(self, path: str | Path) -> int:
        """Write all records as JSON Lines and return their number."""
        lines = [json.dumps(asdict(record)) for record in self]
        write_atomically(Path(path), "".join(f"{line}\n" for line in lines))
        Path(path).chmod(0o600)
        return len(lines)

    def load(self, path: str | Path) -> int:
        """Add the records of a JSON Lines file, all or none, and return how many lines it has.

        Raises:
            RecordError: a line is no record, or is another judgement of what is recorded; says which.
        """
        records: dict[str, Record] = {}
        lines = Path(path).read_bytes().splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                record = self._checked(json.loads(line), records)
            except (ValueError, TypeError, RecursionError) as error:
                raise RecordError(f"{path}:{number}: not a judgement: {error}") from None
            if record.key not in records or records[record.key].failure:
                records[record.key] = record
        self.put(*records.values())
        return len(lines)

    def _checked(self, content: dict[str, Any], before: dict[str, Record]) -> Record:
        """Return a record read from outside, after comparing it with what is there and came before."""
        if set(content) != set(_FIELDS):
            raise ValueError(f"expected the fields {', '.join(_FIELDS)}")
        record = Record(**content)
        if problem := _problem(record):
            raise ValueError(problem)
        for there in (self.get(record.key), before.get(record.key)):
            judged = there and not (there.failure or record.failure)
            if there and judged and (there.a, there.b) != (record.a, record.b):
                raise ValueError(f"recorded is a={there.a}, b={there.b}, got a={record.a}, b={record.b}")
        return record
