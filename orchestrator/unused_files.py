"""Files that no task needs any more: rows, staged adapters, checkpoints, results of single rows; and files that killed
processes left.

Which go is one pure function, `is_unused`. What a task's record does not tell it (what the versions still hold) is
handed in, so that nothing here reads the log.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

from configs.errors import OnebasisError
from orchestrator.tasks.task_lifecycle import needs_training_rows
from orchestrator.tasks.task_queue import TaskQueue
from orchestrator.tasks.task_record import ENDED_WITHOUT_RESULT, TaskRecord, TaskState, born_at
from subspace_store import Storage
from subspace_store.log.garbage import IDLE_SECONDS

log = logging.getLogger("onebasis.controller")

PLACES = ("data", "staging", "results")
"""Folders of the storage in which each task has one of its own, named by its id."""
SUBMISSION_SECONDS = 600.0
"""Age at which files of an id without a row, which no submission of this process is writing, may be deleted. It allows
for a second control plane, which should not be: that writes a row some seconds after the id, with gigabytes of rows
some minutes."""
LOOK_SECONDS = 3600.0
"""Interval at which all files are looked at, for what killed processes left."""


@dataclass(frozen=True)
class Held:
    """What the versions still hold."""

    task_ids: Collection[str] = ()
    """Ids of the tasks that some version holds that has not expired."""
    expired: Collection[int] = ()
    """Numbers of the versions that have expired."""
    scored_on: Collection[str] = ()
    """Ids of those tasks that are revisions, and of all others of the same task: they are scored on the evaluation rows
    of all of them."""


def is_unused(key: str, record: TaskRecord, held: Held) -> bool:
    """Whether a task will never need one of its files again.

    Args:
        key: `data/<task>/…`, `staging/<task>/…` or `results/<task>/…`.
    """
    given_up = record.state in (TaskState.REJECTED, TaskState.CANCELLED)
    parked = record.state in (TaskState.PARKED, TaskState.REPLACED)
    is_held = record.task_id in held.task_ids
    if key == record.eval_key and record.version and not given_up and record.task_id in held.scored_on:
        return False  # a later revision of it is scored on these rows, whatever became of this one
    if given_up or (parked and not (record.version and is_held)):
        return True  # nothing can bring the task back: no version that is left holds it
    trained = not needs_training_rows(record)
    if key == record.train_key:
        return trained
    if key == record.eval_key:  # needed while a version may be scored that holds the task
        return False
    if key.startswith("results/"):
        return _is_old_result(key, record, held)
    # In staging: checkpoints until it is trained, the adapter until no group can fail that has to be merged again.
    is_merged = parked or record.state is TaskState.PUBLISHED
    return is_merged or (trained and key not in (record.staging_key, record.refined_key))


def _is_old_result(key: str, record: TaskRecord, held: Held) -> bool:
    """Whether results are those of an attempt that did not count, or of a version that has expired. Those at the task's
    birth are kept: all later ones are compared with them, row by row."""
    name = key.rpartition("/")[2]
    if name.startswith("local-"):
        return record.state not in (TaskState.QUEUED, TaskState.TRAINING) and key != record.local_results_key
    version = name.removesuffix(".safetensors")
    return version.isdecimal() and int(version) in held.expired and int(version) != record.version


def nobodys_at(task_id: str) -> float:
    """Unix time from which files may be deleted of a task that is in no database and in no version, and that no
    submission is writing; infinity if the id is not one of ours: then they are somebody else's."""
    born = born_at(task_id)
    return math.inf if born is None else born + SUBMISSION_SECONDS


class UnusedFiles:
    """Deletes unused files of one base model's tasks: of those to which something happened, and now and then of all.

    Args:
        base_model: Name of the base model.
        storage: Where its store lies, and the files of its tasks.
        held: What the versions hold now.
    """

    def __init__(self, base_model: str, queue: TaskQueue, storage: Storage, held: Callable[[], Held]) -> None:
        self._base_model = base_model
        self._queue = queue
        self._storage = storage
        self._held = held
        self._due: set[str] = set()
        self._put_off: set[str] = set()
        """Ids of tasks that the version under way may refine again: their files are looked at when it is judged."""
        self._look_at_all = 0.0
        """Unix time of the next look at all files."""
        self._submissions: set[str] = set()
        """Ids of tasks whose files are being written, and which have no row yet."""

    @contextlib.contextmanager
    def submission(self, task_id: str) -> Iterator[None]:
        """While this context lasts, the files of this id count as in use. Thread-safe."""
        self._submissions.add(task_id)
        try:
            yield
        finally:
            self._submissions.discard(task_id)

    def due(self, task_ids: Iterable[str]) -> None:
        """Something happened to these tasks: their files are looked at in the next step. Thread-safe."""
        self._due.update(task_ids)

    def all_due(self) -> None:
        """Something happened that may concern any task: versions expired, or were made again without one."""
        self._look_at_all = 0.0

    def delete_due(self) -> None:
        """Delete what is due. When the storage is away, it is due again."""
        now = time.time()
        if now >= self._look_at_all:
            self._look_at_all = min(now + LOOK_SECONDS, self.delete_all(now))
        elif self._due:
            self._due |= self._put_off
            self._put_off.clear()
        while self._due:
            task_id = self._due.pop()
            try:
                self.delete(task_id)
            except Exception:
                self._due.add(task_id)
                raise

    def delete(self, task_id: str) -> None:
        """Delete one task's unused files. The files of no other task are looked at."""
        self._delete([key for place in PLACES for key in self._storage.keys(f"{place}/{task_id}/")], time.time())

    def delete_all(self, now: float) -> float:
        """Delete all tasks' unused files, and abort the writes that killed processes have begun.

        Returns:
            Unix time at which more files may be deleted; infinity if none are known.
        """
        due = self._delete([key for place in PLACES for key in self._storage.keys(f"{place}/")], now)
        try:
            self._storage.abandon("", IDLE_SECONDS)
        except OnebasisError as error:  # some servers do not list such writes
            log.warning("what killed processes have begun to write stays: %s", error)
        return due

    def _delete(self, keys: Collection[str], now: float) -> float:
        if not keys:
            return math.inf
        # In this order: a submission that is not under way any more has its row by now, if it was taken in.
        under_way, due = {*self._submissions}, math.inf
        held, by_task = self._held(), {key: key.split("/")[1] for key in keys}
        ids = set(by_task.values())
        records, known = self._queue.among(ids), self._queue.known(ids)
        unjudged = self._queue.is_anyone_unjudged(self._base_model)
        for key, task_id in by_task.items():
            record = records.get(task_id)
            if record is None:  # a row that cannot be read keeps its files
                if task_id in known or task_id in held.task_ids or task_id in under_way:
                    continue
                if now > nobodys_at(task_id):
                    self._storage.delete(key)
                else:
                    due = min(due, nobodys_at(task_id) + 1)
            elif unjudged and record.spec.method.share_full and record.state not in ENDED_WITHOUT_RESULT:
                self._put_off.add(task_id)  # it may be in work, to be refined again
            elif is_unused(key, record, held):
                self._storage.delete(key)
        return due
