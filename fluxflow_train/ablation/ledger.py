"""What happened to every run of a study: one table that is only ever added to, in `ledger.sqlite`.

A row is an event: the plan was frozen; a run began, finished, failed, was stopped, or was found killed; a tuned value
was chosen; an arm was measured for the table of targets. Failures stay. Rows hold all that the report is made of.
"""

import json
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from fluxflow_train.errors import UserError

FILE_NAME = "ledger.sqlite"
TIMEOUT = 120.0  # seconds that a writer waits for others
ENDS = ("finished", "failed", "stopped", "killed")

# The rollback journal, not WAL: it works on file systems that several nodes share, where these know locks.
SCHEMA = """
CREATE TABLE IF NOT EXISTS ledger (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    time TEXT NOT NULL,
    event TEXT NOT NULL CHECK (event IN
        ('frozen', 'begun', 'finished', 'failed', 'stopped', 'killed', 'chosen', 'measured')),
    run TEXT,
    attempt INTEGER,
    record TEXT NOT NULL CHECK (json_valid(record))
);
CREATE TRIGGER IF NOT EXISTS keeps_rows BEFORE DELETE ON ledger
    BEGIN SELECT RAISE(ABORT, 'the ledger is only added to'); END;
CREATE TRIGGER IF NOT EXISTS keeps_values BEFORE UPDATE ON ledger
    BEGIN SELECT RAISE(ABORT, 'the ledger is only added to'); END;
CREATE UNIQUE INDEX IF NOT EXISTS one_plan ON ledger (event) WHERE event = 'frozen';
CREATE UNIQUE INDEX IF NOT EXISTS one_result ON ledger (run) WHERE event = 'finished';
CREATE UNIQUE INDEX IF NOT EXISTS one_choice ON ledger (run) WHERE event = 'chosen';
CREATE VIEW IF NOT EXISTS runs AS SELECT run, event, attempt, time,
    json_extract(record, '$.arm') AS arm, json_extract(record, '$.size') AS size,
    json_extract(record, '$.seed') AS seed, json_extract(record, '$.vae') AS vae,
    json_extract(record, '$.metric') AS metric, json_extract(record, '$.seconds') AS seconds,
    json_extract(record, '$.error') AS error
    FROM ledger WHERE run IS NOT NULL;
"""


class Event(NamedTuple):
    """A row. `time` in UTC, ISO 8601; `attempt` counts from 1.

    `run` is its name; of a choice, arm and size; of a measurement, the arm; of the plan None. These have no `attempt`.
    """

    time: str
    event: str
    run: str | None
    attempt: int | None
    record: dict[str, Any]


class Ledger:
    """Any number of processes may hold one and write to it."""

    def __init__(self, path: Path):
        self.path = path

    @contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        # A connection for each call: threads share none, and a killed process leaves none behind.
        try:
            connection = sqlite3.connect(self.path, timeout=TIMEOUT)
            try:
                with connection:
                    yield connection
            finally:
                connection.close()
        except sqlite3.OperationalError as error:
            if "full" in str(error) or "readonly" in str(error) or "open" in str(error):
                raise UserError(f"{self.path} can't be used ({error}): make room, or give another dir=DIR") from error
            raise
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.IntegrityError):
                raise
            raise UserError(f"{self.path} is damaged ({error}): put a good copy there") from error

    def add(self, event: str, run: str | None, attempt: int | None, record: dict[str, Any]) -> None:
        """Append a row; it is on the disk when this returns.

        Raises:
            sqlite3.IntegrityError: a second plan, a second result of a run, or a second choice.
            ValueError: the record holds a number that is not finite.
        """
        now = datetime.now(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z")
        with self._connected() as connection:
            connection.executescript(SCHEMA)
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute(
                "INSERT INTO ledger (time, event, run, attempt, record) VALUES (?, ?, ?, ?, ?)",
                (now, event, run, attempt, json.dumps(record, allow_nan=False)),
            )

    def events(self) -> list[Event]:
        """All rows, in the order of writing; none where nothing has been written."""
        if not self.path.exists():
            return []
        with self._connected() as connection:
            if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'ledger'").fetchone():
                return []
            rows = connection.execute("SELECT time, event, run, attempt, record FROM ledger ORDER BY id").fetchall()
        return [event_of(row) for row in rows]

    def finished(self) -> set[str]:
        """Names of the runs that have a result."""
        return set(self._counts("finished"))

    def failures(self) -> dict[str, int]:
        """How often each run has failed."""
        return self._counts("failed")

    def _counts(self, event: str) -> dict[str, int]:
        with self._connected() as connection:
            rows = connection.execute("SELECT run, COUNT(*) FROM ledger WHERE event = ? GROUP BY run", (event,))
            return dict(rows.fetchall())

    def last(self, run: str) -> Event | None:
        """The newest row of a run."""
        with self._connected() as connection:
            row = connection.execute(
                "SELECT time, event, run, attempt, record FROM ledger WHERE run = ? ORDER BY id DESC LIMIT 1", (run,)
            ).fetchone()
        return None if row is None else event_of(row)

    def records(self, event: str, runs: tuple[str, ...]) -> dict[str, dict[str, Any]]:
        """Records of that event, by run, of those among `runs` that have one."""
        marks = ",".join("?" * len(runs))
        with self._connected() as connection:
            rows = connection.execute(
                f"SELECT run, record FROM ledger WHERE event = ? AND run IN ({marks})", (event, *runs)
            ).fetchall()
        return {run: json.loads(record) for run, record in rows}


def event_of(row: tuple[str, str, str | None, int | None, str]) -> Event:
    time, event, run, attempt, record = row
    return Event(time, event, run, attempt, json.loads(record))
