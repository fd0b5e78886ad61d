"""The task queue on real databases: a SQLite file, and a Postgres server of its own."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, text

from configs.errors import Conflict, InvalidInput, Unavailable
from orchestrator.tasks import database
from orchestrator.tasks.task_events import CancelRequested, Claimed
from orchestrator.tasks.task_queue import TaskQueue
from orchestrator.tasks.task_record import TaskState
from tests.builders import task_record
from tests.contracts.task_queue_contract import TaskQueueContract, at_once
from tests.moto_server import free_port
from tests.orchestrator.tasks.golden import GOLDEN, facts, unpacked
from tests.servers.postgres import Postgres

ROOT = Path(__file__).parents[3]


class TestSqliteTaskQueue(TaskQueueContract):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path}/tasks.db"

    def test_an_acknowledged_task_outlives_a_killed_process(self, url: str) -> None:
        program = (
            "import os, signal, sys\n"
            "from orchestrator.tasks.task_lifecycle import Claimed\n"
            "from orchestrator.tasks.task_queue import TaskQueue\n"
            "from orchestrator.tasks.task_record import TaskRecord\n"
            f"queue = TaskQueue({url!r})\n"
            "queue.add(TaskRecord.model_validate_json(sys.argv[1]))\n"
            "queue.apply('t-red-a', Claimed(token='tok', worker='worker-0', at=1.0))\n"
            "os.kill(os.getpid(), signal.SIGKILL)\n"
        )
        command = [sys.executable, "-c", program, task_record("red/a").model_dump_json()]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        queue = TaskQueue(url)
        assert (queue.get("t-red-a").state, queue.get("t-red-a").token) == (TaskState.TRAINING, "tok")
        assert [event.kind for event in queue.events("t-red-a")] == ["submitted", "Claimed"]
        queue.close()

    def test_a_commit_reaches_the_disk_before_it_is_acknowledged(self, queue: TaskQueue) -> None:
        with queue._database.engine.connect() as connection:
            assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL
            assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"


class TestPostgresTaskQueue(TaskQueueContract):
    @pytest.fixture
    def url(self, postgres: Postgres) -> str:
        postgres.empty()
        return postgres.url

    def test_a_writer_that_was_overtaken_reads_again(self, queue: TaskQueue, monkeypatch: pytest.MonkeyPatch) -> None:
        # Between our read and our write somebody cancels. Our claim must not bring the task back to life.
        record = task_record()
        queue.add(record)
        read, overtaken = queue._row, []

        def read_then_be_overtaken(connection: Any, task_id: str) -> Any:
            found = read(connection, task_id)
            if not overtaken:
                overtaken.append(True)
                queue.apply(task_id, CancelRequested("ann", 1.0))
            return found

        monkeypatch.setattr(queue, "_row", read_then_be_overtaken)
        with pytest.raises(Conflict, match="'Claimed' cannot happen to a task that is cancelled"):
            queue.apply(record.task_id, Claimed(token="tok", worker="w", at=2.0))
        assert queue.get(record.task_id).state is TaskState.CANCELLED

    def test_a_lock_that_another_program_holds_is_unavailable_after_a_bounded_wait(
        self, url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(database, "WAIT_SECONDS", 1.0)
        queue, engine = TaskQueue(url), create_engine(url)
        queue.add(task_record())
        with engine.connect() as other:
            other.exec_driver_sql("LOCK TABLE tasks IN ACCESS EXCLUSIVE MODE")
            started = time.monotonic()
            with pytest.raises(Unavailable) as caught:
                queue.apply("t-red-alpha", CancelRequested("ann", 1.0))
            assert 0.5 < time.monotonic() - started < 3.0
        assert "find that program and end its transaction" in caught.value.todo
        assert queue.get("t-red-alpha").state is TaskState.QUEUED
        queue.close()
        engine.dispose()

    def test_a_server_that_ends_a_connection_is_unavailable_and_the_next_question_connects_anew(
        self, queue: TaskQueue
    ) -> None:
        def end(connection: Any) -> None:
            number = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar()
            other = create_engine(queue._database.engine.url)
            with other.connect() as killer:
                killer.exec_driver_sql(f"SELECT pg_terminate_backend({number})")
            other.dispose()

        queue.add(task_record())
        read, ended = queue._row, []

        def read_after_the_end(connection: Any, task_id: str) -> Any:
            if not ended:
                ended.append(True)
                end(connection)
            return read(connection, task_id)

        queue._row = read_after_the_end  # type: ignore[method-assign]
        with pytest.raises(Unavailable, match="the task database does not answer"):
            queue.apply("t-red-alpha", CancelRequested("ann", 1.0))
        assert queue.apply("t-red-alpha", CancelRequested("ann", 1.0)).state is TaskState.CANCELLED

    def test_queues_that_are_opened_at_once_make_the_tables_once(self, url: str) -> None:
        found = at_once(6, lambda _: TaskQueue(url))
        assert [queue.tasks() for queue in found] == [[]] * 6
        for queue in found:
            queue.close()

    def test_the_tables_of_release_0_3_become_those_of_this_one(self, url: str, tmp_path: Path) -> None:
        engine = create_engine(url)
        with engine.begin() as connection:
            connection.exec_driver_sql(
                "CREATE TABLE tasks (task_id VARCHAR(40) PRIMARY KEY, team VARCHAR(63) NOT NULL,"
                " name VARCHAR(63) NOT NULL,"
                " client_key VARCHAR(120) NOT NULL, state VARCHAR(20) NOT NULL, token VARCHAR(40) NOT NULL,"
                " revision INTEGER NOT NULL, submitted_at FLOAT NOT NULL, train_seconds FLOAT, ended_training_at FLOAT,"
                " lease_until FLOAT, progress TEXT, record TEXT NOT NULL, UNIQUE (team, client_key))"
            )
            connection.exec_driver_sql("CREATE INDEX tasks_by_state ON tasks (state)")
            connection.exec_driver_sql("CREATE INDEX tasks_by_name ON tasks (team, name)")
            connection.exec_driver_sql(
                "CREATE TABLE events (event_id SERIAL PRIMARY KEY, task_id VARCHAR(40) NOT NULL, at FLOAT NOT NULL,"
                " kind VARCHAR(40) NOT NULL, text TEXT NOT NULL)"
            )
            connection.exec_driver_sql("CREATE INDEX events_by_task ON events (task_id, event_id)")
            with sqlite3.connect(unpacked("release-0.3", tmp_path).removeprefix("sqlite:///")) as old:
                for table in ("tasks", "events"):
                    names = [row[1] for row in old.execute(f"PRAGMA table_info({table})")]
                    rows = [dict(zip(names, row, strict=True)) for row in old.execute(f"SELECT * FROM {table}")]
                    values = ", ".join(f":{name}" for name in names)
                    connection.execute(text(f"INSERT INTO {table} ({', '.join(names)}) VALUES ({values})"), rows)
        engine.dispose()
        queue = TaskQueue(url)
        assert facts(queue) == json.loads((GOLDEN / "release-0.3.json").read_text())
        assert queue.use_of_teams(1400.0)["red"] == pytest.approx(200.0, rel=1e-3)
        queue.close()


@pytest.mark.parametrize("url", ["postgresql://u:se/cr@t:x@h/db", "postgresql://u:secret@h:secret/db", "u:secret@h/db"])
def test_a_url_that_cannot_be_taken_apart_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(InvalidInput, match="database_url") as caught:
        TaskQueue(url)
    assert "cr" not in str(caught.value).replace("postgresql+psycopg", "")


def test_a_database_that_does_not_answer_is_unavailable_and_its_password_is_not_told() -> None:
    port = free_port()
    with pytest.raises(Unavailable) as caught:
        TaskQueue(f"postgresql+psycopg://me:secret-word@127.0.0.1:{port}/x")
    assert f"me:***@127.0.0.1:{port}" in str(caught.value)
    assert "secret-word" not in str(caught.value)


@pytest.mark.parametrize("url", ["nonsense", "oracle+nothing://x/y", ""])
def test_what_is_no_database_url_is_refused_with_two_that_are(url: str) -> None:
    with pytest.raises(InvalidInput, match=r"(?s)database_url.*sqlite:///FILE or postgresql\+psycopg://"):
        TaskQueue(url)
