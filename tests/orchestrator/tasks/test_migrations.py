"""Databases of earlier releases become those of this one, once, whoever opens them; those of later ones are refused."""

from __future__ import annotations

import json
import multiprocessing
import re
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from configs.errors import InvalidInput
from orchestrator.tasks import migrations, tables
from orchestrator.tasks.database import Database
from orchestrator.tasks.task_events import Claimed, Judged, MergeBegun, Merged, TrainingDone
from orchestrator.tasks.task_queue import TaskQueue
from orchestrator.tasks.task_record import TaskState
from tests.builders import BASE, task_record, trained
from tests.orchestrator.tasks.golden import GOLDEN, facts, unpacked

every_release = pytest.mark.parametrize("release", sorted(path.stem for path in GOLDEN.glob("*.json")))


def differences(url: str) -> list[Any]:
    """What the tables of a database are not, in comparison with those of this release."""
    database = Database(url)
    options = {"version_table": migrations.VERSION_TABLE}
    with database.reading() as connection:
        found = compare_metadata(MigrationContext.configure(connection, opts=options), tables.metadata)
    database.close()
    return list(found)


@every_release
def test_a_database_of_an_earlier_release_is_read_as_it_was_written(release: str, tmp_path: Path) -> None:
    queue = TaskQueue(unpacked(release, tmp_path))
    assert facts(queue) == json.loads((GOLDEN / f"{release}.json").read_text())
    assert queue.unreadable() == ()
    states = [state for state in TaskState if state is not TaskState.REPLACED]  # which is of a later release
    assert queue.counts() == {str(state): queue.counts()[str(state)] for state in states}
    queue.close()
    assert facts(TaskQueue(f"sqlite:///{tmp_path}/tasks.db")) == json.loads((GOLDEN / f"{release}.json").read_text())


@every_release
def test_a_database_of_an_earlier_release_is_gone_on_with(release: str, tmp_path: Path) -> None:
    queue = TaskQueue(unpacked(release, tmp_path))
    assert [waiting.task_id for waiting in queue.waiting({"": 2})] == ["t-red-urgent", "t-red-queued"]
    assert {at.task_id: at.version for at in queue.placed(BASE)} == {
        "t-blue-published": 3,
        "t-blue-refined": 4,
        "t-red-rolled-back": 3,
    }
    for event in (
        Claimed(token="new", worker="worker-0", at=2000.0),
        TrainingDone(trained("new", worker_seconds=50.0), 2100.0),
        MergeBegun("m"),
        Merged(9),
        Judged(True, "fine", 2200.0),
    ):
        record = queue.apply("t-red-urgent", event)
    assert record.state is TaskState.PUBLISHED
    assert queue.apply("t-red-training", TrainingDone(trained("tok"), 1050.0)).state is TaskState.MERGING
    assert queue.add(task_record("red/parked", task_id="t-new"))[1]
    queue.close()


def test_what_tasks_of_release_0_3_cost_is_still_their_teams(tmp_path: Path) -> None:
    queue = TaskQueue(unpacked("release-0.3", tmp_path))
    # Claimed at 1010, 100 s of training each: blue merging, refining, evaluating, published and refined, the last with
    # 20 s more and, in another version, 30 s; red rejected and rolled back. A few minutes decay nothing to speak of.
    assert queue.use_of_teams(1400.0) == {
        "blue": pytest.approx(550.0, rel=1e-3),
        "red": pytest.approx(200.0, rel=1e-3),
    }
    (spent,) = queue.spent("t-blue-refined")
    assert (spent.seconds, spent.ended_at) == (pytest.approx(150.0, rel=1e-3), 1400.0)
    queue.close()


def test_a_record_of_an_earlier_release_that_cannot_be_read_keeps_nothing_from_being_migrated(tmp_path: Path) -> None:
    url = unpacked("release-0.3", tmp_path)
    with sqlite3.connect(tmp_path / "tasks.db") as connection:
        connection.execute("UPDATE tasks SET record = 'nonsense' WHERE task_id = 't-red-queued'")
    queue = TaskQueue(url)
    assert len(queue.tasks()) == 12
    assert [told.task_id for told in queue.unreadable()] == ["t-red-queued"]
    queue.close()


def test_the_migrations_lead_to_the_tables_of_this_release(tmp_path: Path) -> None:
    assert differences(f"sqlite:///{tmp_path}/new.db") == []
    assert differences(unpacked("release-0.3", tmp_path)) == []
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    assert ScriptDirectory.from_config(config).get_current_head() == tables.HEAD


def test_the_migrations_are_in_a_wheel() -> None:
    listed = re.findall(r'"(orchestrator\.[\w.]+)"', (Path(__file__).parents[3] / "pyproject.toml").read_text())
    assert {"orchestrator.tasks.migrations", "orchestrator.tasks.migrations.versions"} <= set(listed)


def test_a_database_of_a_newer_release_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/tasks.db"
    TaskQueue(url).close()
    with sqlite3.connect(tmp_path / "tasks.db") as connection:
        connection.execute("UPDATE onebasis_schema SET version_num = '0999'")
    for _ in range(2):
        with pytest.raises(InvalidInput, match=r"(?s)database_url.*revision 0999.*use a newer onebasis"):
            TaskQueue(url)


def test_the_tables_of_another_program_in_the_same_database_are_not_ours(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "tasks.db") as connection:  # MLflow keeps its revision in Alembic's usual table
        connection.execute("CREATE TABLE alembic_version (version_num VARCHAR(32))")
        connection.execute("INSERT INTO alembic_version VALUES ('of-mlflow')")
    queue = TaskQueue(f"sqlite:///{tmp_path}/tasks.db")
    queue.add(task_record())
    queue.close()
    with sqlite3.connect(tmp_path / "tasks.db") as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [("of-mlflow",)]
        assert connection.execute("SELECT version_num FROM onebasis_schema").fetchall() == [(tables.HEAD,)]


def test_a_migration_that_breaks_off_leaves_the_old_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, before = unpacked("release-0.3", tmp_path), _dump(tmp_path / "tasks.db")
    migrate = migrations.migrate

    def broken(connection: Any, known: str | None) -> None:
        migrate(connection, known)
        raise KeyboardInterrupt

    monkeypatch.setattr(migrations, "migrate", broken)
    with pytest.raises(KeyboardInterrupt):
        TaskQueue(url)
    assert _dump(tmp_path / "tasks.db") == before
    monkeypatch.undo()
    assert len(TaskQueue(url).tasks()) == 13


def _dump(file: Path) -> list[str]:
    with sqlite3.connect(file) as connection:
        return list(connection.iterdump())


def _open(url: str, start_at: float, answers: Any) -> None:
    time.sleep(max(0.0, start_at - time.time()))
    try:
        queue = TaskQueue(url)
        answers.put(len(queue.tasks()))
        queue.close()
    except BaseException as error:
        answers.put(repr(error))


def opened_at_once(url: str, count: int = 4) -> list[Any]:
    """What processes found that opened a database at the same moment."""
    context = multiprocessing.get_context("spawn")
    answers: Any = context.Queue()
    start_at = time.time() + 6.0  # spawning and importing takes a second or two each
    processes = [context.Process(target=_open, args=(url, start_at, answers)) for _ in range(count)]
    for process in processes:
        process.start()
    found = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(10)
    return found


def test_processes_that_open_an_old_database_at_once_do_not_break_each_other(tmp_path: Path) -> None:
    url = unpacked("release-0.3", tmp_path)
    assert opened_at_once(url) == [13] * 4
    assert differences(url) == []


def test_processes_that_open_a_new_database_at_once_do_not_break_each_other(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/tasks.db"
    assert opened_at_once(url) == [0] * 4
    assert differences(url) == []
