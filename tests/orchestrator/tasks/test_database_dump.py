"""A task database is dumped while it is written to, and loaded into an empty one of either kind."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from configs.errors import Conflict, Corrupt, InvalidInput
from orchestrator.tasks.audit_log import AuditLog
from orchestrator.tasks.database import Database, look
from orchestrator.tasks.database_dump import dump, load
from orchestrator.tasks.tables import HEAD
from orchestrator.tasks.task_events import Claimed
from orchestrator.tasks.task_queue import TaskQueue
from orchestrator.tasks.task_record import Drain
from tests.builders import task_record
from tests.orchestrator.tasks.golden import GOLDEN, facts, unpacked


def filled(url: str) -> str:
    """A database with something in every kind of column: truth values, text of any language, missing numbers."""
    queue = TaskQueue(url)
    queue.add(task_record("red/alpha"))
    queue.add(task_record("blue/beta", submitted_at=1000.1))
    queue.apply("t-blue-beta", Claimed(token="tok", worker="worker-0", at=1010.0))
    queue.set_drain("worker-1", False, Drain(what="worker-1", by="ann", reason="новое ядро", at=1.5, lets_end=True))
    queue.close()
    database = Database(url)
    log = AuditLog(database)
    log.ended(log.asked("ann", "", "submit", {"name": "red/alpha"}), "done")
    database.close()
    return url


def told(url: str) -> tuple[Any, ...]:
    """Whatever a queue says, and its chain of requests."""
    queue, database = TaskQueue(url), Database(url)
    try:
        return facts(queue), queue.drains(), AuditLog(database).verify(), AuditLog(database).page()
    finally:
        queue.close()
        database.close()


def test_what_was_dumped_is_there_again_in_either_kind(tmp_path: Path, url: str) -> None:
    source = filled(f"sqlite:///{tmp_path}/tasks.db")
    lines = [*dump(source)]
    rows = json.loads(lines[-1])["rows"]
    assert load(url, lines) == rows > 5
    assert told(url) == told(source)
    assert [*dump(url)] == lines
    queue = TaskQueue(url)  # and it is gone on with: new events get new numbers
    queue.apply("t-red-alpha", Claimed(token="new", worker="worker-0", at=2000.0))
    queue.close()


def test_a_dump_is_one_state_and_keeps_nobody_waiting(tmp_path: Path) -> None:
    source = filled(f"sqlite:///{tmp_path}/tasks.db")
    before, lines = [*dump(source)], dump(source)
    begun = next(lines)
    queue = TaskQueue(source)
    queue.add(task_record("red/later"))
    queue.close()
    assert [begun, *lines] == before


@pytest.mark.parametrize("release", sorted(path.stem for path in GOLDEN.glob("*.json")))
def test_tables_of_an_earlier_release_are_dumped_as_they_are_and_brought_up_to_date_when_loaded(
    release: str, tmp_path: Path, url: str
) -> None:
    source = unpacked(release, tmp_path)
    was = look(source).revision
    lines = [*dump(source)]
    assert look(source).revision == was
    load(url, lines)
    assert look(url).revision == HEAD
    queue = TaskQueue(url)
    assert facts(queue) == json.loads((GOLDEN / f"{release}.json").read_text())
    queue.close()


def test_a_database_that_has_tables_is_not_loaded_into(tmp_path: Path, url: str) -> None:
    source = filled(f"sqlite:///{tmp_path}/tasks.db")
    Database(url).close()
    with pytest.raises(Conflict, match="already"):
        load(url, dump(source))


def test_a_dump_that_was_cut_off_or_changed_leaves_nothing(tmp_path: Path) -> None:
    lines = [*dump(filled(f"sqlite:///{tmp_path}/tasks.db"))]
    into = f"sqlite:///{tmp_path}/other.db"
    row = next(number for number, line in enumerate(lines) if line.startswith(b"["))
    without_it = [*lines[:row], *lines[row + 1 :]]
    for wrong in (lines[:-1], without_it, [], [b"{}\n", *lines[1:]], [*lines[:row], b'["one"]\n', *lines[row:]]):
        with pytest.raises(Corrupt):
            load(into, wrong)
        assert look(into).revision is None


def test_what_a_newer_release_made_is_refused(tmp_path: Path) -> None:
    source = filled(f"sqlite:///{tmp_path}/tasks.db")
    lines = [*dump(source)]
    with pytest.raises(InvalidInput, match="newer onebasis"):
        load(f"sqlite:///{tmp_path}/other.db", [lines[0].replace(HEAD.encode(), b"9999"), *lines[1:]])
    with sqlite3.connect(tmp_path / "tasks.db") as connection:
        connection.execute("UPDATE onebasis_schema SET version_num = '9999'")
    connection.close()
    with pytest.raises(InvalidInput, match="9999"):
        next(dump(source))
