"""A long history costs the task queue nothing: counted in the instructions of SQLite's machine, not in time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, insert

from orchestrator.tasks import tables
from orchestrator.tasks.task_events import Claimed
from orchestrator.tasks.task_queue import TaskQueue
from orchestrator.tasks.task_record import TaskState
from orchestrator.tasks.task_rows import columns_of
from tests.builders import task_record

SHORT, LONG = 30, 1000
EACH = 10
"""Instructions from one count to the next."""
STATES = (TaskState.QUEUED, TaskState.CANCELLED, TaskState.PARKED, TaskState.PUBLISHED)


class Counted:
    """A queue in which one team has so many tasks."""

    def __init__(self, folder: Path, count: int) -> None:
        self.queue = TaskQueue(f"sqlite:///{folder}/{count}.db")
        self._instructions = 0
        template = task_record("red/template")
        found = []
        for number in range(count):
            name = f"task-{number}"
            fields = {
                "task_id": f"t-{number:05d}",
                "name": name,
                "client_key": f"key-{number}",
                "submitted_at": 1.0 * number,
            }
            record = template.model_copy(
                update={**fields, "state": STATES[number % len(STATES)], "content_sha256": f"{number:064x}"}
            )
            found.append({"task_id": record.task_id, **columns_of(record)})
        with self.queue._database.writing() as connection:
            connection.execute(insert(tables.tasks), found)
        event.listen(self.queue._database.engine, "checkout", self._watch)

    def _watch(self, connection: Any, *_: object) -> None:
        connection.set_progress_handler(self._count, EACH)

    def _count(self) -> int:
        self._instructions += EACH
        return 0

    def cost(self, work: Callable[[TaskQueue], object]) -> int:
        before = self._instructions
        work(self.queue)
        return self._instructions - before


@pytest.fixture(scope="module")
def queues(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Counted, Counted]]:
    folder = tmp_path_factory.mktemp("queues")
    short, long = Counted(folder, SHORT), Counted(folder, LONG)
    yield short, long
    short.queue.close()
    long.queue.close()


WORKS: dict[str, Callable[[TaskQueue], object]] = {
    "a submission": lambda queue: queue.add(task_record("red/new", content_sha256="ab" * 32)),
    "a claim": lambda queue: queue.apply("t-00004", Claimed(token="tok", worker="worker-0", at=1.0)),
    "a task by its name": lambda queue: queue.find("red/task-8"),
    "a task's revisions": lambda queue: queue.revisions(queue.get("t-00003")),
    "the newest page": lambda queue: queue.page(limit=10),
    "a page of the middle": lambda queue: queue.page(before="t-00020", limit=10),
    "a team's page": lambda queue: queue.page(team="red", limit=10),
    "whether anyone waits": lambda queue: queue.is_anyone_waiting(("default",)),
    "who is next": lambda queue: queue.waiting({"default": 1}),
    "what is at work": lambda queue: queue.in_flight(),
}


@pytest.mark.parametrize("what", WORKS)
def test_a_long_history_costs_nothing_more(what: str, queues: tuple[Counted, Counted]) -> None:
    short, long = (queue.cost(WORKS[what]) for queue in queues)
    assert 0 < long <= 1.5 * short, f"{long} instructions with {LONG} tasks of a team, {short} with {SHORT}"
