"""Whatever the database refuses, and whenever, is one of our errors, after a bounded wait, with nothing half done."""

from __future__ import annotations

import contextlib
import inspect
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.errors import Corrupt, Unavailable
from orchestrator.scheduling.fair_share import Use
from orchestrator.tasks import database
from orchestrator.tasks.task_events import CancelRequested, Claimed
from orchestrator.tasks.task_queue import TaskQueue
from orchestrator.tasks.task_record import Drain, Pause
from tests.builders import task_record

KNOWN = "t-red-alpha"
READS: dict[str, Callable[[TaskQueue], Any]] = {
    "by_client_key": lambda q: q.by_client_key("red", "k"),
    "same_content": lambda q: q.same_content("red", "ab"),
    "check": lambda q: q.check(task_record("red/new"), 5),
    "get": lambda q: q.get(KNOWN),
    "find": lambda q: q.find("red/alpha"),
    "revisions": lambda q: q.revisions(task_record("red/alpha")),
    "tasks": lambda q: q.tasks(),
    "page": lambda q: q.page(limit=5),
    "among": lambda q: q.among([KNOWN]),
    "teams_of": lambda q: q.teams_of([KNOWN]),
    "changes": lambda q: q.changes(1),
    "known": lambda q: q.known([KNOWN]),
    "teams": lambda q: q.teams(),
    "counts": lambda q: q.counts(),
    "in_flight": lambda q: q.in_flight(),
    "is_anyone_waiting": lambda q: q.is_anyone_waiting(["default"]),
    "waiting": lambda q: q.waiting({"default": 3}),
    "queued": lambda q: q.queued(),
    "alive_of_base_models": lambda q: q.alive_of_base_models(),
    "alive_of_teams": lambda q: q.alive_of_teams(),
    "pools_in_line": lambda q: q.pools_in_line(),
    "queued_for": lambda q: q.queued_for("default"),
    "due": lambda q: q.due(5.0),
    "pauses": lambda q: q.pauses(),
    "drains": lambda q: q.drains(),
    "placed": lambda q: q.placed("tiny"),
    "is_anyone_unjudged": lambda q: q.is_anyone_unjudged("tiny"),
    "living_of_names": lambda q: q.living_of_names(["red/alpha"]),
    "progress": lambda q: q.progress(KNOWN),
    "curve": lambda q: q.curve(KNOWN),
    "events": lambda q: q.events(KNOWN),
    "told": lambda q: q.told(0, 5),
    "newest_event": lambda q: q.newest_event(),
    "use_of_teams": lambda q: q.use_of_teams(5.0),
    "gpu_use_of_teams": lambda q: q.gpu_use_of_teams(5.0),
    "spent": lambda q: q.spent(KNOWN),
    "spent_by": lambda q: q.spent_by([KNOWN]),
    "with_deadline": lambda q: q.with_deadline(),
}
WRITES: dict[str, Callable[[TaskQueue], Any]] = {
    "add": lambda q: q.add(task_record("red/beta")),
    "apply": lambda q: q.apply(KNOWN, CancelRequested("ann", 2.0)),
    "apply_all": lambda q: q.apply_all([KNOWN], CancelRequested("ann", 2.0)),
    "try_apply": lambda q: q.try_apply([KNOWN], CancelRequested("ann", 2.0)),
    "heartbeat": lambda q: q.heartbeat(KNOWN, "tok", 9.0, {"step": 1}),
    "set_pause": lambda q: q.set_pause("red", Pause(by="ann", at=2.0)),
    "set_drain": lambda q: q.set_drain("worker-0", False, Drain(what="worker-0", by="ann", at=2.0)),
    "append": lambda q: q.append(KNOWN, [("log", "a line")]),
    "append_log": lambda q: q.append_log(KNOWN, ["a line"]),
    "charge": lambda q: q.charge(KNOWN, Use(team="red", seconds=1.0, ended_at=2.0), token="t", what="score"),
}
every_read = pytest.mark.parametrize("read", READS.values(), ids=READS)
every_write = pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
every_method = pytest.mark.parametrize("ask", (READS | WRITES).values(), ids=READS | WRITES)


def test_every_method_of_the_queue_is_tried_here() -> None:
    methods = {name for name, _ in inspect.getmembers(TaskQueue, inspect.isfunction) if not name.startswith("_")}
    assert methods - {"close", "unreadable"} == {*READS, *WRITES}


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(database, "WAIT_SECONDS", 0.2)
    return tmp_path / "tasks.db"


@pytest.fixture
def queue(file: Path) -> Iterator[TaskQueue]:
    queue = TaskQueue(f"sqlite:///{file}")
    queue.add(task_record())
    queue.apply(KNOWN, Claimed(token="tok", worker="worker-0", at=1.0))
    yield queue
    queue.close()


@pytest.fixture(params=["BEGIN IMMEDIATE", "BEGIN EXCLUSIVE"])
def other(file: Path, queue: TaskQueue, request: pytest.FixtureRequest) -> Iterator[sqlite3.Connection]:
    """Another program that holds the database."""
    connection = sqlite3.connect(file, isolation_level=None)
    connection.execute(request.param)
    yield connection
    connection.close()


def test_a_person_waits_no_longer_than_a_few_seconds() -> None:
    assert database.WAIT_SECONDS <= 5.0


@every_read
def test_a_read_waits_for_nobody(queue: TaskQueue, other: sqlite3.Connection, read: Callable[[TaskQueue], Any]) -> None:
    read(queue)  # what waited for the other program would be refused after a while


def test_a_database_that_another_program_holds_can_be_opened_and_read(file: Path, other: sqlite3.Connection) -> None:
    second = TaskQueue(f"sqlite:///{file}")
    assert [record.task_id for record in second.tasks()] == [KNOWN]
    second.close()


@every_write
def test_a_write_that_another_program_keeps_waiting_is_unavailable_and_nothing_is_half_done(
    file: Path, queue: TaskQueue, other: sqlite3.Connection, write: Callable[[TaskQueue], Any]
) -> None:
    before = _everything(file)
    started = time.monotonic()
    with pytest.raises(Unavailable) as caught:
        write(queue)
    assert 0.15 < time.monotonic() - started < 4.0
    assert f"sqlite:///{file}: the task database does not answer: database is locked" in str(caught.value)
    assert "find that program and end its transaction" in caught.value.todo
    other.execute("ROLLBACK")
    assert _everything(file) == before
    write(queue)
    assert _everything(file) != before


def test_a_full_disk_is_unavailable_and_nothing_is_half_done(file: Path, queue: TaskQueue) -> None:
    before = _everything(file)
    _on_every_connection(queue, "PRAGMA max_page_count = 1")  # as many as there are: none more
    with pytest.raises(Unavailable) as caught:
        queue.add(task_record("red/beta"), note="x" * 100_000)  # the row has room, its event has not
    assert "database or disk is full" in str(caught.value)
    assert "make space" in caught.value.todo
    assert _everything(file) == before
    assert queue.get(KNOWN).token == "tok"


@every_write
def test_a_database_that_may_not_be_written_is_unavailable_with_what_to_allow(
    queue: TaskQueue, write: Callable[[TaskQueue], Any]
) -> None:
    _on_every_connection(queue, "PRAGMA query_only = 1")  # what the driver says of a file without the right to write
    with pytest.raises(Unavailable) as caught:
        write(queue)
    assert "let this user read and write it" in caught.value.todo


@every_method
def test_a_table_that_is_gone_is_unavailable(file: Path, queue: TaskQueue, ask: Callable[[TaskQueue], Any]) -> None:
    with sqlite3.connect(file) as connection:
        for table in ("tasks", "events", "uses", "team_uses", "pauses", "drains"):
            connection.execute(f"DROP TABLE {table}")
    with pytest.raises(Unavailable, match="the task database does not answer: no such table"):
        ask(queue)


@every_method
def test_a_connection_that_was_closed_is_unavailable_or_made_anew(
    queue: TaskQueue, ask: Callable[[TaskQueue], Any]
) -> None:
    with queue._database.engine.connect() as connection:
        connection.connection.dbapi_connection.close()  # type: ignore[union-attr]
    with contextlib.suppress(Unavailable):
        ask(queue)


@pytest.mark.parametrize("place", ["head", "middle"])
def test_damaged_bytes_are_corrupt(file: Path, queue: TaskQueue, place: str) -> None:
    for number in range(300):
        queue.append(KNOWN, [("log", f"{number}" * 50)])
    queue.close()
    content = bytearray(file.read_bytes())
    if place == "head":
        content[:100] = b"x" * 100
    else:
        content[4096:] = b"\xff" * (len(content) - 4096)
    file.write_bytes(content)
    with pytest.raises(Corrupt) as caught:
        TaskQueue(f"sqlite:///{file}").tasks()
    assert "restore it from a backup" in caught.value.todo


def test_a_folder_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="unable to open database file") as caught:
        TaskQueue(f"sqlite:///{tmp_path}/nowhere/tasks.db")
    assert "its folder too" in caught.value.todo


def _on_every_connection(queue: TaskQueue, pragma: str) -> None:
    """The pool of a queue that one thread uses has one connection."""
    with queue._database.engine.connect() as connection:
        connection.exec_driver_sql(pragma)


def _everything(file: Path) -> list[str]:
    with sqlite3.connect(file) as connection:
        return list(connection.iterdump())
