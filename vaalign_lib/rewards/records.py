"""Judgements on disk: every reply of a judge in one SQLite file, written as it arrives."""

import json
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from vaalign_lib.runs import write_atomically


class RecordError(ValueError):
    """A file of judgements that cannot be read, or contradicts what is recorded."""


@dataclass(frozen=True)
class Record:
    """One judgement, or one failure to get one.

    Attributes:
        key: hash of the filled-in prompt, the model asked and the sampling settings.
        text_hash: hash of the text judged.
        model_asked: as in the request.
        model_served: as in the last reply; empty if there was none.
        reply: raw text of the last reply.
        a, b: the interval; None after a failure.
        failure: why there is no interval; empty if there is one.
        date: of the reply, ISO 8601, UTC.
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


class JudgementStore:
    """Judgements by key. Every write is on disk before it returns; threads may share a store."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._connection = sqlite3.connect(self.path, check_same_thread=False, timeout=30)
        try:
            self._connection.execute("PRAGMA journal_mode=DELETE")  # WAL needs one machine
            self._connection.execute("PRAGMA synchronous=FULL")
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS judgements (key TEXT PRIMARY KEY, text_hash TEXT NOT NULL, "
                "model_asked TEXT NOT NULL, model_served TEXT NOT NULL, reply TEXT NOT NULL, a REAL, "
                "b REAL, failure TEXT NOT NULL, date TEXT NOT NULL)"
            )
            self._connection.commit()
        except sqlite3.DatabaseError as error:
            self._connection.close()
            raise RecordError(f"{self.path}: not a file of judgements: {error}") from None

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def __len__(self) -> int:
        with self._lock:
            return int(self._connection.execute("SELECT count(*) FROM judgements").fetchone()[0])

    def get(self, key: str) -> Record | None:
        """Return the record of a key, or None."""
        with self._lock, closing(self._connection.cursor()) as cursor:
            row = cursor.execute(
                f"SELECT {', '.join(_FIELDS)} FROM judgements WHERE key = ?", (key,)
            ).fetchone()
        return None if row is None else Record(*row)

    def put(self, record: Record) -> None:
        """Add a record; a judgement that is there stays, a failure gives way."""
        self._put([record])

    def _put(self, records: list[Record]) -> None:
        """Add records, all or none."""
        marks = ", ".join("?" * len(_FIELDS))
        with self._lock, self._connection:
            self._connection.executemany(
                f"INSERT INTO judgements ({', '.join(_FIELDS)}) VALUES ({marks}) ON CONFLICT (key) "
                "DO UPDATE SET (model_served, reply, a, b, failure, date) = (excluded.model_served, "
                "excluded.reply, excluded.a, excluded.b, excluded.failure, excluded.date) "
                "WHERE judgements.failure != ''",
                [tuple(asdict(record).values()) for record in records],
            )

    def __iter__(self) -> Iterator[Record]:
        with self._lock:
            rows = self._connection.execute(
                f"SELECT {', '.join(_FIELDS)} FROM judgements ORDER BY date, key"
            ).fetchall()
        return (Record(*row) for row in rows)

    def export(self, path: str | Path) -> int:
        """Write all records as JSON Lines and return their number."""
        lines = [json.dumps(asdict(record)) for record in self]
        write_atomically(Path(path), "".join(f"{line}\n" for line in lines))
        return len(lines)

    def load(self, path: str | Path) -> int:
        """Add the records of a JSON Lines file, all or none, and return how many lines it has.

        Raises:
            RecordError: a line is no record, or is another judgement of what is recorded; says which.
        """
        records = []
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
            try:
                records.append(self._checked(json.loads(line)))
            except (ValueError, TypeError) as error:
                raise RecordError(f"{path}:{number}: not a judgement: {error}") from None
        self._put(records)
        return len(records)

    def _checked(self, content: dict[str, Any]) -> Record:
        """Return a record read from outside, after comparing it with what is there."""
        if set(content) != set(_FIELDS):
            raise ValueError(f"expected the fields {', '.join(_FIELDS)}")
        record = Record(**content)
        texts = [getattr(record, name) for name in _FIELDS if name not in ("a", "b")]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("expected text in all fields but a and b")
        if not record.failure and not 1 <= float(record.a or 0) < float(record.b or 0):
            raise ValueError(f"expected 1 <= a < b, got a={record.a}, b={record.b}")
        there = self.get(record.key)
        if (
            there
            and not (there.failure or record.failure)
            and (there.a, there.b) != (record.a, record.b)
        ):
            raise ValueError(
                f"recorded is a={there.a}, b={there.b}, got a={record.a}, b={record.b}"
            )
        return record
