"""One base model's subspace, as the loop keeps it: its store, its one unjudged version, its writer, its tasks' files.

What goes wrong with one stops no other: each has alarms, waits and a log of its own. In memory is the state of its log,
and no tensor of its bases: those are with the writer, which is a process of its own.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from configs.errors import Corrupt, DatabaseAway, OnebasisError, OwnedByAnother, Unavailable
from configs.settings import Settings
from orchestrator.alarms import LOOP, LOOP_CODES, WRITE_CODES, AlarmCode, Alarms, Ringing
from orchestrator.candidate import Candidate
from orchestrator.cluster import Cluster
from orchestrator.pending_calls import PendingCalls, StoreCalls
from orchestrator.store_writer import StoreWriter
from orchestrator.tasks.task_events import Event, Reason, Replaced, Restored, RolledBack
from orchestrator.tasks.task_queue import TaskQueue
from orchestrator.tasks.task_record import TaskRecord, TaskState
from orchestrator.unused_files import Held, UnusedFiles
from orchestrator.worker_pool import WorkerPool
from subspace_store import Storage, SubspaceReader
from subspace_store.files.presence import check_files
from subspace_store.log.retention import tasks_alive
from subspace_store.log.version import MAIN, Identity, Version
from subspace_store.log.version_log import owned_by_another

log = logging.getLogger("onebasis.controller")

DELETING = "deleting unused files"
DELETE_AGAIN_SECONDS = 10.0


class Subspace:
    """See the module."""

    def __init__(
        self,
        name: str,
        settings: Settings,
        queue: TaskQueue,
        store: SubspaceReader,
        cluster: Cluster,
        pending_calls: PendingCalls,
        pool: WorkerPool,
        alarms: Alarms,
        service: Identity | None,
        changed: Callable[[], None],
        answering: Callable[[], Mapping[str, Any]],
    ) -> None:
        """
        Args:
            name: Of the base model.
            store: A reader; writing goes through the cluster's store actor.
            service: Identity of this service; None where the store has no owner.
            changed: Called when there is something new to report.
            answering: As for the controller.
        """
        self.name = name
        self.store = store
        self.alarms = alarms.of(name)
        self.workers = pool.of_base_model(name)
        self.calls = StoreCalls(pending_calls, cluster, name)
        self._queue = queue
        self._service = service
        self._changed = changed
        self.unused_files = UnusedFiles(name, queue, store.storage, self._held)
        self._held_at: tuple[int, Held] = (-1, Held())
        """Sequence number of the log, and what the versions held then."""
        self.candidate = Candidate(
            settings,
            queue,
            store.storage,
            store,
            cluster,
            self.calls,
            self.workers,
            self.unused_files,
            changed,
            self._look_at_main,
            self.alarms,
            answering,
        )
        self.writer = StoreWriter(cluster, self.calls, self.alarms, _lease_seconds(settings), self.candidate.stop)
        self._main_followed = -1
        self._is_main_looked_at = False
        """Whether the files that `main` needs were looked at, once when the service starts."""
        self.calls.log_moved.set()

    def follow(self, settings: Settings) -> None:
        """Go by new settings from now on."""
        self.writer.lease_seconds = _lease_seconds(settings)
        self.candidate.follow(settings)

    @property
    def storage(self) -> Storage:
        """Where its store lies, and its tasks' files."""
        return self.store.storage

    @property
    def ousted_by(self) -> OwnedByAnother | None:
        """Error with the service that owns the store by now, if this service has stopped for it."""
        return self.candidate.ousted_by

    def mine(self, records: Sequence[TaskRecord]) -> list[TaskRecord]:
        """Those of these tasks that belong to it."""
        return [record for record in records if record.base_model == self.name]

    @contextlib.contextmanager
    def step(self, doing: str) -> Iterator[None]:
        """A part of the loop's step that is about this subspace alone: what goes wrong is told, and tried again in a
        moment, and the loop goes on with the others. That the database is away concerns all of them.

        Args:
            doing: What is done, for people.
        """
        try:
            yield
        except DatabaseAway:
            raise
        except Exception as error:
            tell(error, self.alarms, doing)
            self.calls.later("step")

    @property
    def may_step(self) -> bool:
        """Whether nothing went wrong a moment ago."""
        return self.calls.may("step")

    def is_well(self) -> None:
        """End the alarms about a step that failed: one went through."""
        self.alarms.end_all(LOOP, *LOOP_CODES)

    def listen(self) -> None:
        """Make the writer open the store, and ask it for a sign of life."""
        if self.ousted_by is None:
            self.writer.listen(self.workers.layout)

    def delete_unused(self) -> None:
        """Delete files that nobody needs. A storage that refuses to delete stops nothing else."""
        if self._main_followed < 0 or self.ousted_by is not None or not self.calls.may("delete"):
            # Not before the log was read: files that another service's tasks need are not ours to delete.
            return
        try:
            self.unused_files.delete_due()
        except Unavailable as error:
            self.alarms.ring_for(error, DELETING)
            self.calls.later("delete", DELETE_AGAIN_SECONDS)
        else:
            self.alarms.end_all(DELETING, *WRITE_CODES, AlarmCode.DATABASE_AWAY)

    def read_log(self) -> None:
        """Read the log if it has moved, and see to what follows from it."""
        if not self.calls.log_moved.is_set():
            return
        self.calls.log_moved.clear()
        try:
            expired = self.store.state.expired
            if self.store.refresh().expired != expired:
                self.unused_files.all_due()
            self._look_at_the_owner()
            self._look_at_the_files_of_main()
            self._follow_main()
        except Exception:
            # An old state must not be acted upon: it would undo what was just merged.
            self.calls.log_moved.set()
            raise

    def damaged(self, error: Corrupt) -> None:
        """Stop writing to the store, of which somebody has read bytes that are not what was written. Thread-safe."""
        self.candidate.stop(error)

    def delete_files_of(self, task_id: str) -> None:
        """Delete what a task no longer needs: now, or in a moment where the storage is away."""
        try:
            self.unused_files.delete(task_id)
        except Unavailable:
            self.unused_files.due((task_id,))

    # --- helpers -----------------------------------------------------------------------------------------------

    def _look_at_the_owner(self) -> None:
        owner = self.store.state.owner
        if self._service is not None and owner is not None and owner.is_another_than(self._service):
            self.candidate.stop(owned_by_another(owner, self.storage.url, self._service))

    def _look_at_the_files_of_main(self) -> None:
        if self._is_main_looked_at:
            return
        try:
            check_files(self.storage, self.store.state, self.store.state.refs[MAIN])
        except Corrupt as error:
            self.damaged(error)
        self._is_main_looked_at = True

    def _follow_main(self) -> None:
        """Park tasks that `main` no longer holds, but for those of which it holds another revision: they are replaced.
        Publish those that it holds again, or holds since another version because versions were made again without a
        task."""
        state = self.store.state
        if state.refs[MAIN] == self._main_followed:
            return
        held = state.births(state.refs[MAIN])
        left = {task_id: version for version in state.history(state.refs[MAIN]) for task_id in version.left}
        now = time.time()
        placed = self._queue.placed(self.name)
        replaced = [
            at.task_id
            for at in placed
            if at.task_id in left and at.task_id not in held and at.state is not TaskState.REPLACED
        ]
        gone = [
            at.task_id
            for at in placed
            if at.state is not TaskState.PARKED and at.task_id not in held and at.task_id not in left
        ]
        back = [
            at.task_id
            for at in placed
            if at.task_id in held and (at.state is not TaskState.PUBLISHED or at.version != held[at.task_id])
        ]
        for record in self._queue.among(gone).values():  # first: one that comes back may have the same name
            self._apply(record.task_id, _how_it_vanished(self.store, record, now))
        for record in self._queue.among(replaced).values():
            self._apply(record.task_id, Replaced(_what_took_its_place(left[record.task_id], record), now))
        for task_id in back:
            self._apply(task_id, Restored(f"main holds it since version {held[task_id]}", held[task_id]))
        if gone or replaced or back:
            self.unused_files.due((*gone, *replaced, *back))
            self._changed()
        self._main_followed = state.refs[MAIN]

    def _held(self) -> Held:
        """What the versions hold, for `UnusedFiles`."""
        state = self.store.state
        if self._held_at[0] != state.seq:
            alive = {task.task_id for task in tasks_alive(state)}
            later = {task.task_id for version in state.versions.values() for task in version.added if task.replaces}
            earlier = {one for version in state.versions.values() for one in version.left}
            # Of the others there is nothing to find, and each look goes through all versions.
            scored_on = {one for task_id in alive & (later | earlier) for one in state.revisions(task_id)}
            held = Held(frozenset(alive), frozenset(state.expired), frozenset(scored_on))
            self._held_at = (state.seq, held)
        return self._held_at[1]

    def _look_at_main(self) -> None:
        """Look at `main` again: a task was published in a version that was rolled back before this was seen. It is
        parked like all tasks that vanish."""
        self._main_followed = -1
        self.calls.wake(log_moved=True)

    def _apply(self, task_id: str, event: Event) -> None:
        self.calls.wake()
        self._queue.try_apply((task_id,), event)


def tell(error: Exception, alarms: Ringing, doing: str) -> None:
    """Ring an alarm with the reason why a step of the loop failed, and log what nobody expected once.

    Args:
        doing: What the loop was doing, for people.
    """
    if isinstance(error, OnebasisError):
        alarms.ring_for(error, LOOP)
        return
    if not alarms.rings(AlarmCode.STEP_FAILED):
        log.error("a step failed; it is tried again", exc_info=error)
    what = f"{LOOP} fails while it is {doing}: {type(error).__name__}: {error}"
    alarms.ring(AlarmCode.STEP_FAILED, LOOP, what)


def _what_took_its_place(version: Version, record: TaskRecord) -> str:
    by = next(task.task_id for task in version.added if task.replaces == record.task_id)
    return (
        f"revision {record.number}: version {version.number} holds {by} in its place; "
        f"`onebasis rollback-task {record.title} --to {record.number}` brings it back"
    )


def _how_it_vanished(store: SubspaceReader, record: TaskRecord, now: float) -> RolledBack:
    state = store.state
    main = state.refs[MAIN]
    without = next((v.number for v in state.lineage(main) if record.task_id in v.removed), None)
    lost = store.lost_by(record.task_id)
    if without is not None:
        what = f"version {without} was made again without it"
    elif lost is not None and lost.op == "remove":  # the newest task: nothing had to be made again
        what = f"main is version {main} again"
    else:
        # Its version of birth, unless that one was made on the way to another without a task: no gate let it pass.
        usable = (n for n in state.published if n >= record.version and n not in state.expired)
        back = next((n for n in usable if record.task_id in state.tasks_at(n)), record.version)
        message = (
            f"main was rolled back to version {main}, before this task's {record.version}; "
            f"`onebasis rollback {back}` brings it back, or submit it again"
        )
        return RolledBack(message, now)
    return RolledBack(f"removed from the subspace: {what}; submit it again to merge it", now, Reason.REMOVED)


def _lease_seconds(settings: Settings) -> float:
    """How long a store's writer may be silent: as long as the worker that may be so the longest."""
    return max(pool.lease_seconds for pool in settings.pools.values())
