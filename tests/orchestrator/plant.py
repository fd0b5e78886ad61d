"""A whole control plane without machines: real SQLite, real version log in memory, stand-in cluster."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.controller import Controller
from orchestrator.tasks.task_queue import TaskQueue
from orchestrator.tasks.task_record import TaskRecord
from subspace_store import SubspaceReader, SubspaceState, SubspaceStore, open_storage
from subspace_store.log.version import Identity
from tests.builders import BASE, LAYOUT, settings, task_record
from tests.orchestrator.stand_in_cluster import StandInCluster

_places, _services = itertools.count(), itertools.count()
ENDED = ("published", "replaced", "rejected", "parked", "cancelled")


class Plant:
    """Everything that a control plane consists of; the controller is made at the first step.

    Args:
        wrap: Put around queue, storage and cluster before a controller gets them, by their names.
        changes: Of the settings.
    """

    def __init__(self, folder: Path, workers: int = 2, **changes: Any) -> None:
        if "pools" not in changes:
            changes["workers"] = {"count": workers} | changes.get("workers", {})
        self.settings = settings(folder, **{"storage": {"url": f"memory:plant-{next(_places)}"}} | changes)
        self.queue = self._open_queue()
        self.storages = {name: open_storage(self.settings.storage, name) for name in self.settings.base_names}
        self.storage = self.storages[self.settings.base_names[0]]
        self.service = Identity(f"service-{next(_services)}", "here:/folder")
        self.cluster = StandInCluster(self.settings, self.storages, self.service)
        self.wrap: Callable[[str, Any], Any] = lambda name, part: part
        self._controller: Controller | None = None
        self._ages = itertools.count()

    @property
    def controller(self) -> Controller:
        if self._controller is None:
            queue, cluster = (self.wrap(name, getattr(self, name)) for name in ("queue", "cluster"))
            stores = {
                name: SubspaceReader.open(self.wrap("storage", storage), settings=self.settings.subspace)
                for name, storage in self.storages.items()
            }
            self._controller = Controller(self.settings, queue, stores, cluster, self.service)
        return self._controller

    def kill(self) -> None:
        """The control plane is gone with everything it had in memory, and is started again."""
        self._controller = None
        self.queue.close()
        self.queue = self._open_queue()

    def _open_queue(self) -> TaskQueue:
        queue = TaskQueue(self.settings.database_url, self.settings.failures)
        with (
            queue._database.engine.connect() as connection
        ):  # the one connection of the pool: a disk's fsync tests nothing here
            connection.exec_driver_sql("COMMIT")
            connection.exec_driver_sql("PRAGMA synchronous = OFF")
            connection.exec_driver_sql("BEGIN")
        return queue

    def submit(self, *titles: str, **fields: Any) -> tuple[TaskRecord, ...]:
        """Tasks in the queue with their data in the storage, each a second younger than the one before."""
        records = []
        for title in titles:
            record = task_record(title, **{"submitted_at": 1000.0 + next(self._ages)} | fields)
            storage = self.storages[record.base_model]
            storage.write(record.train_key, b"training rows")
            if record.eval_key:
                storage.write(record.eval_key, b"evaluation rows")
            self.queue.add(record)
            records.append(record)
        if self._controller is not None:
            self._controller.wake()
        return tuple(records)

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self.controller.step()

    def open_store(self, base_model: str = BASE) -> SubspaceStore:
        """The writer, as after the first worker has loaded the base model."""
        self.cluster.open_store(base_model, LAYOUT.sha256).result()
        return self.cluster._stores[base_model]

    def run(self, until: Callable[[], bool] | None = None, limit_seconds: float = 10.0) -> None:
        """Step until something is so; default: until every task has ended."""
        done = until or (lambda: all(record.state in ENDED for record in self.queue.tasks()))
        stop_at = time.monotonic() + limit_seconds
        while not done():
            if time.monotonic() > stop_at:
                raise AssertionError(f"still not there: {self.states()}, refs {self.state.refs}")
            self.controller.step()

    def get(self, title: str) -> TaskRecord:
        return self.queue.find(title)

    def states(self) -> dict[str, str]:
        """Title to state."""
        return {record.title: str(record.state) for record in self.queue.tasks()}

    @property
    def state(self) -> SubspaceState:
        """What the version log says, of the first base model."""
        return self.state_of(self.settings.base_names[0])

    def state_of(self, base_model: str) -> SubspaceState:
        """What a base model's version log says."""
        return SubspaceReader.open(self.storages[base_model]).state

    def held(self, ref: str = "main", base_model: str | None = None) -> list[str]:
        """Titles that a branch holds, sorted, doubles and all."""
        state = self.state_of(base_model or self.settings.base_names[0])
        return sorted(task.name for version in state.lineage(state.refs[ref]) for task in version.added)

    def merges(self) -> list[list[str]]:
        """Titles that each version added, oldest version first, whatever became of it."""
        return [sorted(task.name for task in version.added) for _, version in sorted(self.state.versions.items())]
