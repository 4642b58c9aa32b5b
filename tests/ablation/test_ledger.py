import multiprocessing
import os
import signal
import sqlite3
from pathlib import Path

import pytest

from fluxflow_train.ablation.ledger import FILE_NAME, Ledger
from fluxflow_train.errors import UserError


def test_rows_stay_as_they_were_written(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / FILE_NAME)
    assert ledger.events() == []
    ledger.add("frozen", None, None, {"plan": {"seeds": [0, 1]}})
    ledger.add("begun", "main/a", 1, {"x": 0.1})
    ledger.add("failed", "main/a", 1, {"error": "NaN"})
    ledger.add("begun", "main/a", 2, {})
    ledger.add("finished", "main/a", 2, {"metric": 21.25, "arm": "a"})
    events = ledger.events()
    assert [(e.event, e.run, e.attempt) for e in events] == [
        ("frozen", None, None), ("begun", "main/a", 1), ("failed", "main/a", 1), ("begun", "main/a", 2),
        ("finished", "main/a", 2),
    ]  # fmt: skip
    assert events[-1].record == {"metric": 21.25, "arm": "a"} and events[0].record["plan"] == {"seeds": [0, 1]}
    assert ledger.finished() == {"main/a"} and ledger.failures() == {"main/a": 1}
    last = ledger.last("main/a")
    assert last is not None and last.event == "finished"
    assert ledger.last("main/b") is None
    assert ledger.records("finished", ("main/a", "main/b")) == {"main/a": {"metric": 21.25, "arm": "a"}}


def test_nothing_can_be_taken_back(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / FILE_NAME)
    ledger.add("frozen", None, None, {})
    ledger.add("finished", "main/a", 1, {"metric": 1.0})
    with sqlite3.connect(ledger.path) as connection:
        for change in ("DELETE FROM ledger", "UPDATE ledger SET event = 'failed'"):
            with pytest.raises(sqlite3.IntegrityError, match="only added to"):
                connection.execute(change)
        assert connection.execute("SELECT run, metric FROM runs").fetchall() == [("main/a", 1.0)]
    with pytest.raises(sqlite3.IntegrityError):  # a second result
        ledger.add("finished", "main/a", 2, {"metric": 2.0})
    with pytest.raises(sqlite3.IntegrityError):  # a second plan
        ledger.add("frozen", None, None, {})
    with pytest.raises(ValueError):  # JSON has no NaN
        ledger.add("finished", "main/b", 1, {"metric": float("nan")})
    assert len(ledger.events()) == 2


def write_many(path: Path, writer: int) -> None:
    for number in range(40):
        Ledger(path).add("begun", f"main/{writer}-{number}", 1, {"text": "x" * 5000})


def write_for_ever(path: Path) -> None:
    number = 0
    while True:
        Ledger(path).add("begun", f"killed/{number}", 1, {"text": "x" * 50_000})
        number += 1


def test_many_writers_and_one_that_is_killed(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    context = multiprocessing.get_context("fork")
    doomed = context.Process(target=write_for_ever, args=(path,))
    doomed.start()
    writers = [context.Process(target=write_many, args=(path, number)) for number in range(3)]
    for writer in writers:
        writer.start()
    assert doomed.pid is not None
    writers[0].join(0.5)
    os.kill(doomed.pid, signal.SIGKILL)
    for process in (doomed, *writers):
        process.join()
    names = [event.run for event in Ledger(path).events()]
    assert {f"main/{w}-{n}" for w in range(3) for n in range(40)} <= set(names)
    killed = [name for name in names if name and name.startswith("killed/")]
    assert killed == [f"killed/{number}" for number in range(len(killed))]
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_damaged_file_is_said_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    path.write_bytes(b"no database at all, but long enough to look like one" * 20)
    with pytest.raises(UserError, match="is damaged"):
        Ledger(path).events()
    with pytest.raises(UserError, match="can't be used"):
        Ledger(tmp_path / "missing" / FILE_NAME).add("frozen", None, None, {})
