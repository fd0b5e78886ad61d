"""The one loop: take the results that came back, advance the records, give the next orders.

It holds no truth of its own: what it and its parts (`worker_pool.py` the workers, `candidate.py` the version that is
being made, `pending_calls.py` what is under way) keep in memory is asked for again after a restart.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

from configs.errors import Corrupt, NotLeading, OnebasisError, OwnedByAnother, Unavailable
from configs.settings import Settings
from orchestrator.alarms import WRITE_CODES, AlarmCode, Alarms
from orchestrator.candidate import Candidate
from orchestrator.cluster import Call, Cluster
from orchestrator.pending_calls import (
    POLL_SECONDS,
    RETRY_SECONDS,
    Asking,
    Opening,
    Ordered,
    PendingCall,
    PendingCalls,
    Sign,
    Warming,
    Writing,
)
from orchestrator.scheduling.fair_share import POOL, Running, Waiting, running_order, shares_of
from orchestrator.scheduling.reasons import Wait, WaitCode
from orchestrator.scheduling.scheduler import LOOK, Decision, Pool, Situation, decide
from orchestrator.store_writer import StoreWriter
from orchestrator.tasks.task_events import (
    CameDue,
    Event,
    PreemptRequested,
    Reason,
    Restored,
    RolledBack,
    RunsTooLong,
    TrainingDone,
    TrainingFailed,
)
from orchestrator.tasks.task_lifecycle import Step, needs_training_rows, next_step, seconds_left
from orchestrator.tasks.task_queue import TaskQueue
from orchestrator.tasks.task_record import SERVICE, Pause, TaskRecord, TaskState
from orchestrator.tasks.task_rows import LOG
from orchestrator.unused_files import Held, UnusedFiles
from orchestrator.worker_pool import WorkerPool, is_of_a_version, train_order
from subspace_store import Storage, SubspaceReader
from subspace_store.files.presence import check_files
from subspace_store.log.retention import tasks_alive
from subspace_store.log.version import MAIN, Identity
from subspace_store.log.version_log import owned_by_another
from workers.orders import BaseLayout, Evaluate, Failed, Outcome, Train, Trained

log = logging.getLogger("onebasis.controller")

LOOP = "the control plane's loop"
"""Part of the service that alarms about a failed step name."""
LOOP_CODES = (*WRITE_CODES, AlarmCode.DATABASE_AWAY, AlarmCode.STEP_FAILED)
DELETING = "deleting unused files"
DELETE_AGAIN_SECONDS = 10.0
PREEMPT_SECONDS = 60.0
"""Longest wait for the checkpoints of running tasks when the service ends: a step, and an upload."""


class Controller:
    """Owns the loop. One per service; `run` it in a thread."""

    def __init__(
        self,
        settings: Settings,
        queue: TaskQueue,
        storage: Storage,
        store: SubspaceReader,
        cluster: Cluster,
        service: Identity | None = None,
        changed: Callable[[], None] = lambda: None,
        alarms: Alarms | None = None,
    ) -> None:
        """
        Args:
            store: A reader; writing goes through the cluster's store actor.
            service: Identity of this service; None where the store has no owner.
            changed: Called when there is something new to report.
            alarms: The service's alarms; default: its own.
        """
        self.alarms = Alarms() if alarms is None else alarms
        self._settings = settings
        self._queue = queue
        self._store = store
        self._cluster = cluster
        self._service = service
        self._changed = changed
        self._pending_calls = PendingCalls(cluster)
        self._pool = WorkerPool(cluster, self._pending_calls, queue, settings.workers, self.alarms)
        self._unused_files = UnusedFiles(queue, storage, self._held)
        self._held_at: tuple[int, Held] = (-1, Held())
        """Sequence number of the log, and what the versions held then."""
        self._candidate = Candidate(
            settings,
            queue,
            storage,
            store,
            cluster,
            self._pending_calls,
            self._pool,
            self._unused_files,
            changed,
            self._look_at_main,
            self.alarms,
        )
        lease_seconds = settings.workers.lease_seconds
        self._writer = StoreWriter(cluster, self._pending_calls, self.alarms, lease_seconds, self._candidate.stop)
        self._started_at = time.time()
        self._main_followed = -1
        self._is_main_looked_at = False
        """Whether the files that `main` needs were looked at, once when the service starts."""
        self._set_aside: set[str] = set()
        """Ids of tasks whose training met a damaged store: it would again, until a person has mended the store and
        started the service anew."""
        self._is_ending = False
        self._shares = shares_of(settings.teams)
        self.decision = Decision()
        """The last decision on who starts."""
        self.wake(log_moved=True)
        self.healthy_at = 0.0
        """Unix time of the last step that went through."""
        self.turned_at = self._started_at
        """Unix time of the last step that ended, well or not."""
        self.hands_over = False
        """Whether another control plane goes on when this loop ends, so that what runs is left to run."""
        self.doing = "starting"
        """The part of a step that is under way, for people."""

    @property
    def ousted_by(self) -> OwnedByAnother | None:
        """Error with the service that owns the store by now, if this service has stopped for it."""
        return self._candidate.ousted_by

    @property
    def layout(self) -> BaseLayout | None:
        """What the first warm worker reported of the base model; None before that."""
        return self._pool.layout

    @property
    def ready_workers(self) -> int:
        """Workers whose base model is loaded."""
        return self._pool.ready

    @property
    def free_workers(self) -> int:
        return self._pool.free

    def describe_workers(self) -> dict[str, str]:
        """Worker to what it does, for people."""
        if self.alarms.rings(AlarmCode.RAY_DOWN):
            return dict.fromkeys(self._pool.workers, "out of reach: Ray does not work")
        return {name: str(worker) for name, worker in self._pool.workers.items()}

    @property
    def store_is_open(self) -> bool:
        """Whether the writer has opened the store for the base model that the workers have loaded."""
        return self._writer.is_open

    @property
    def store_error(self) -> OnebasisError | None:
        """Why the writer cannot open the store."""
        return self._writer.error

    @property
    def heard_at(self) -> float:
        """Unix time since which every worker and the store's writer have given a sign of life; 0 before the first."""
        return min(self._writer.heard_at, *(worker.heard_at for worker in self._pool.workers.values()))

    def is_refining(self, version: int) -> bool:
        """Whether workers refine tasks in a version."""
        return any(isinstance(order, Train) and order.refine_version == version for order in self._pool.orders)

    @property
    def load_errors(self) -> dict[str, OnebasisError]:
        """Worker to why it cannot load the base model."""
        return {name: worker.error for name, worker in self._pool.workers.items() if worker.error is not None}

    def wake(self, log_moved: bool = False) -> None:
        """Something changed that the loop should look at now; `log_moved`: in the version log too. Thread-safe."""
        self._pending_calls.wake(log_moved)

    def forget_files(self, task_id: str) -> None:
        """A task ended outside the loop: the next step deletes the files that it no longer needs. Thread-safe."""
        self._unused_files.due((task_id,))

    def submission(self, task_id: str) -> AbstractContextManager[None]:
        """While this context lasts, a task that has no row yet may have files. Thread-safe."""
        return self._unused_files.submission(task_id)

    def run(self, stop: threading.Event) -> None:
        """Step until told to stop. A step that fails is logged and tried again: the truth is in the records."""
        while not stop.is_set():
            try:
                if self.step():
                    self.alarms.end_all(LOOP, *LOOP_CODES)
                self.healthy_at = time.time()
            except NotLeading as error:  # it will lead again, or be ended
                log.warning("%s", error.sentence)
                stop.wait(RETRY_SECONDS)
                self.wake()
            except Exception as error:
                self._tell(error)
                self.turned_at = time.time()
                stop.wait(RETRY_SECONDS)
                self.wake()
            self.turned_at = time.time()
        if self.hands_over:
            return
        try:
            self._preempt_all()
        except Exception:
            log.exception("what trains goes on from its last checkpoint")

    def _tell(self, error: Exception) -> None:
        """Ring an alarm with the reason why a step failed; log it once, however often the step is tried again."""
        if isinstance(error, OnebasisError):
            self.alarms.ring_for(error, LOOP)
            return
        if not self.alarms.rings(AlarmCode.STEP_FAILED):
            log.error("a step failed; it is tried again", exc_info=error)
        what = f"{LOOP} fails while it is {self.doing}: {type(error).__name__}: {error}"
        self.alarms.ring(AlarmCode.STEP_FAILED, LOOP, what)

    def _preempt_all(self) -> None:
        """Make all running tasks write a checkpoint, and wait until they have; nothing new is begun.

        A task whose worker does not answer in time is still that worker's, and goes on from an older checkpoint.
        """
        self._is_ending = True
        training = [worker for worker in self._pool.workers.values() if isinstance(worker.order, Train)]
        for worker in training:
            assert worker.order is not None
            self._pool.tell(worker, "preempt", worker.order.token)
        until = time.monotonic() + PREEMPT_SECONDS
        while any(worker.order is not None for worker in training) and time.monotonic() < until:
            for call, pending in self._pending_calls.landed(POLL_SECONDS):
                self._take(call, pending)
        log.info("%d of %d that trained were stopped", sum(worker.order is None for worker in training), len(training))

    def step(self) -> bool:
        """One turn: take the results that came back, look which workers are alive, begin what is next.

        Returns:
            Whether it looked at everything: the log if it has moved, and the database.
        """
        self._delete_unused()
        self.doing = "taking in what the workers and the store's writer answered"
        for call, pending in self._pending_calls.landed():
            self._take(call, pending)
            if not isinstance(pending, Asking | Sign):
                self.wake()
        self._pool.listen()
        if self._candidate.ousted_by is None:
            self._writer.listen(self._pool.layout)
        if not self._pending_calls.woken():
            return False
        if self._pending_calls.log_moved.is_set():
            self.doing = f"reading the version log at {self._store.storage.url}"
            self._pending_calls.log_moved.clear()
            try:
                expired = self._store.state.expired
                if self._store.refresh().expired != expired:
                    self._unused_files.all_due()
                self._look_at_the_owner()
                self._look_at_the_files_of_main()
                self._follow_main()
            except Exception:
                # An old state must not be acted upon: it would undo what was just merged.
                self._pending_calls.log_moved.set()
                raise
        if self._candidate.ousted_by is not None:
            self._stop_work()
            return True
        self.doing = "reading the task database and giving orders"
        live = self._queue.in_flight()
        # First the orders that workers have already: after a restart any other order would wait behind them.
        self._resume([r for r in live if next_step(r) is Step.AWAIT_ADAPTER])
        pauses = self._queue.pauses()
        self._candidate.advance(live, SERVICE not in pauses and self._queue.is_anyone_waiting(without=pauses))
        self._look_at_the_clock(live)
        self._train(live, pauses)
        return True

    def _delete_unused(self) -> None:
        """Delete files that nobody needs. A storage that refuses to delete stops nothing else."""
        if self._main_followed < 0 or self._candidate.ousted_by is not None or not self._pending_calls.may("delete"):
            # Not before the log was read: files that another service's tasks need are not ours to delete.
            return
        self.doing = "deleting files that no task needs"
        try:
            self._unused_files.delete_due()
        except Unavailable as error:
            self.alarms.ring_for(error, DELETING)
            self._pending_calls.later("delete", DELETE_AGAIN_SECONDS)
        else:
            self.alarms.end_all(DELETING, *WRITE_CODES, AlarmCode.DATABASE_AWAY)

    def _look_at_the_owner(self) -> None:
        owner = self._store.state.owner
        if self._service is not None and owner is not None and owner.is_another_than(self._service):
            self._candidate.stop(owned_by_another(owner, self._store.storage.url, self._service))

    def damaged(self, error: Corrupt) -> None:
        """Stop writing to the store, of which somebody has read bytes that are not what was written. Thread-safe."""
        self._candidate.stop(error)

    def _look_at_the_files_of_main(self) -> None:
        if self._is_main_looked_at:
            return
        self.doing = f"looking whether the files that main needs are at {self._store.storage.url}"
        try:
            check_files(self._store.storage, self._store.state, self._store.state.refs[MAIN])
        except Corrupt as error:
            self.damaged(error)
        self._is_main_looked_at = True

    def _stop_work(self) -> None:
        """Stop, since the store belongs to another service: running tasks write a checkpoint, and nothing is begun."""
        for worker in self._pool.workers.values():
            if isinstance(worker.order, Train):
                self._pool.tell(worker, "preempt", worker.order.token)

    # --- what landed -------------------------------------------------------------------------------------------

    def _take(self, call: Call, pending: PendingCall) -> None:
        match pending:
            case Warming():
                self._pool.take_warm(call, pending)
                self._changed()
            case Asking():
                self._pool.take_progress(call, pending)
            case Sign():
                self._writer.take_sign(call)
            case Opening():
                self._writer.take_opening(call)
            case Ordered():
                match self._pool.take_order(call, pending):
                    case Train(again=True) as order, outcome:
                        self._candidate.take_refinement(order, outcome)
                    case Train() as order, outcome:
                        self._finish_training(order, outcome)
                    case Evaluate() as order, outcome:
                        self._candidate.take_evaluation(order, outcome)
            case Writing():
                self._candidate.take(call, pending)

    def _finish_training(self, order: Train, outcome: Outcome) -> None:
        now = time.time()
        event: Event
        assert isinstance(outcome, Trained | Failed)
        self._queue.append_log(order.task_id, outcome.log_lines)
        if isinstance(outcome, Failed) and outcome.cause is not None:
            self._candidate.stop(outcome.cause)
            self._set_aside.add(order.task_id)
        if isinstance(outcome, Trained):
            event = TrainingDone(outcome, now)
        else:
            is_ours = self._is_ending and outcome.fault == "preempted"  # the worker knows only that it was to stop
            message = "the service ended; it goes on from its last checkpoint" if is_ours else outcome.message
            event = TrainingFailed(
                token=order.token, fault=outcome.fault, message=message, at=now, seconds=outcome.worker_seconds
            )
            if outcome.detail:
                log.error("task %s: %s\n%s", order.task_id, outcome.message, outcome.detail)
                self._queue.append(order.task_id, [(LOG, line) for line in outcome.detail.splitlines()])
        record = self._queue.apply(order.task_id, event)
        if not needs_training_rows(record):
            # Strict continual learning: training data is never read again once its task is trained (and refined, if it
            # asks for that) or given up.
            try:
                self._unused_files.delete(order.task_id)
            except Unavailable:
                self._unused_files.due((order.task_id,))
        self._changed()

    # --- what is next ------------------------------------------------------------------------------------------

    def _resume(self, training: Sequence[TaskRecord]) -> None:
        """Give orders that ran when an earlier control plane died again, under their token."""
        busy = {order.token for order in self._pool.orders}
        for record in training:
            worker = self._pool.workers.get(record.worker)
            if record.token in busy:
                if worker is not None and (what := _stop_for(record)):
                    self._pool.tell(worker, what, record.token)
            elif worker is None:
                failed = TrainingFailed(
                    token=record.token, fault="lost", message=f"{record.worker} is no longer there", at=time.time()
                )
                self._queue.apply(record.task_id, failed)
                self.wake()
            elif worker in self._pool.free_workers():
                self._pool.give(worker, train_order(record))
            elif not worker.ready:
                self._wait_for_a_lease(record)

    def _wait_for_a_lease(self, record: TaskRecord) -> None:
        """Give one lease to a worker that had the task before this control plane began, and is not back."""
        until = (
            max(self._started_at, record.order_at or record.claimed_at or 0.0) + self._settings.workers.lease_seconds
        )
        if time.time() < until:
            self._pending_calls.not_before(f"lease:{record.token}", until)
            return
        failed = TrainingFailed(
            token=record.token, fault="lost", message=f"{record.worker} did not come back", at=time.time()
        )
        self._queue.apply(record.task_id, failed)
        self.wake()

    def _look_at_the_clock(self, live: Sequence[TaskRecord]) -> None:
        """Let tasks stand in line whose time has come; stop those that have run for as long as they may."""
        now = time.time()
        come, following = self._queue.due(now)
        for task_id in come:
            self._apply((task_id,), CameDue())
        if following is not None:
            self._pending_calls.not_before("due", following)
        for record in live:
            left = None if record.ran_too_long else seconds_left(record, now)
            if left is not None and left <= 0:
                self._apply((record.task_id,), RunsTooLong(now))
            elif left is not None:
                self._pending_calls.not_before(f"longest:{record.token}", now + left)

    def _train(self, live: Sequence[TaskRecord], pauses: Mapping[str, Pause]) -> None:
        free = self._pool.unclaimed_workers(live)
        kept = 0
        if self._candidate.is_awaited(live) and not any(is_of_a_version(order) for order in self._pool.orders):
            # A version is about to be scored: keep one worker for it, else it waits for a whole training run.
            kept, free = len(free[:1]), free[1:]
        self.decision = self._decide(live, len(free), kept, pauses)
        if (again_at := self.decision.again_at) is not None:
            self._pending_calls.not_before("decide", again_at)
        for worker, start in zip(free, self.decision.starts, strict=False):
            self._pool.claim(worker, start.task_id)
        for preemption in self.decision.preemptions:
            by = f"team {preemption.for_team}, which is within its quota"
            self._apply((preemption.task_id,), PreemptRequested(by, gives_back=True))

    def _decide(self, live: Sequence[TaskRecord], free: int, kept: int, pauses: Mapping[str, Pause]) -> Decision:
        """Who starts, and who gives a place back.

        Args:
            free, kept: Workers that have nothing to do: those for tasks, those for a version.
            pauses: Team to its pause; that of the service under `SERVICE`.
        """
        now = time.time()
        some = free + LOOK + len(self._set_aside)
        found = [] if SERVICE in pauses else self._queue.waiting(some, ranks=self.ranks, without=pauses)
        waiting = [task for task in found if task.task_id not in self._set_aside]
        if not waiting:
            return Decision()
        return decide(self._situation(now, self._pool_of(free, kept), waiting, self._pool.running(live)))

    def _pool_of(self, free: int, kept: int) -> Pool:
        """The pool with so many workers that have nothing to do."""
        workers = len(self._pool.workers)
        return Pool(
            capacity=self.ranks * workers,
            ready=self.ranks * self._pool.ready,
            free=self.ranks * free,
            kept=self.ranks * kept,
        )

    def _situation(self, now: float, pool: Pool, waiting: Sequence[Waiting], running: Sequence[Running]) -> Situation:
        before = self.decision
        return Situation(
            now=now,
            pools={POOL: pool},
            waiting=waiting,
            running=running,
            use_seconds=self._use_seconds(now),
            shares=self._shares,
            reserved=before.reserved,
            promised=before.promised,
            waits=before.waits,
        )

    def _use_seconds(self, now: float) -> dict[str, float]:
        """Place-seconds of each team: all workers have as many ranks."""
        ranks = self._settings.workers.ranks
        return {team: ranks * seconds for team, seconds in self._queue.use_of_teams(now).items()}

    def wait_in_line(self, record: TaskRecord) -> Wait:
        """Why a task that stands in line does not start, by the last decision. Thread-safe."""
        if not self.ready_workers:
            return Wait(code=WaitCode.BASE_MODEL_LOADING)
        found = self.decision.wait_of(record.task_id, record.team)
        if found is None:  # it came after that
            return Wait(code=WaitCode.ABOUT_TO_START if self.free_workers else WaitCode.NO_FREE_PLACE)
        return found

    def line(self, extra: Waiting | None = None) -> tuple[tuple[Waiting, ...], list[Running]]:
        """The tasks that stand in line for a worker, in their running order, and what runs. Thread-safe.

        Args:
            extra: A task that is not there yet, and is shown where it would stand.

        Cost:
            O(n·log n) for n waiting tasks: 30 ms for 10,000.
        """
        now, pauses = time.time(), self._queue.pauses()
        running = self._pool.running(self._queue.in_flight())
        waiting = [] if SERVICE in pauses else self._queue.waiting(ranks=self.ranks, without=pauses)
        if extra is not None and SERVICE not in pauses and extra.team not in pauses:
            waiting.append(extra)
        by_id = {task.task_id: task for task in waiting}
        order = running_order(waiting, self._use_seconds(now), running, self._shares, now=now)
        return tuple(by_id[task_id] for task_id in order), running

    @property
    def ranks(self) -> int:
        """Places that each task takes: all workers are alike."""
        return self._settings.workers.ranks

    def wait_of_another(self, extra: Waiting) -> Wait | None:
        """Why a task that is not there yet would not start at once; None where it would. Thread-safe."""
        line, running = self.line(extra)
        situation = self._situation(time.time(), self._pool_of(self.free_workers, 0), line, running)
        return decide(situation).waits.get(extra.task_id)

    def _follow_main(self) -> None:
        """Park tasks that `main` no longer holds; publish those that it holds again, or holds since another version
        because versions were made again without a task."""
        state = self._store.state
        if state.refs[MAIN] == self._main_followed:
            return
        held = state.births(state.refs[MAIN])
        now = time.time()
        placed = self._queue.placed()
        gone = [at.task_id for at in placed if at.state is TaskState.PUBLISHED and at.task_id not in held]
        back = [
            at.task_id
            for at in placed
            if at.task_id in held and (at.state is TaskState.PARKED or at.version != held[at.task_id])
        ]
        for record in self._queue.among(gone).values():  # first: one that comes back may have the same name
            self._apply((record.task_id,), _how_it_vanished(self._store, record, now))
        for task_id in back:
            self._apply((task_id,), Restored(f"main holds it since version {held[task_id]}", held[task_id]))
        if gone or back:
            self._unused_files.due((*gone, *back))
            self._changed()
        self._main_followed = state.refs[MAIN]

    def _held(self) -> Held:
        """What the versions hold, for `UnusedFiles`."""
        state = self._store.state
        if self._held_at[0] != state.seq:
            held = Held(frozenset(task.task_id for task in tasks_alive(state)), frozenset(state.expired))
            self._held_at = (state.seq, held)
        return self._held_at[1]

    def _look_at_main(self) -> None:
        """Look at `main` again: a task was published in a version that was rolled back before this was seen. It is
        parked like all tasks that vanish."""
        self._main_followed = -1
        self.wake(log_moved=True)

    def _apply(self, task_ids: tuple[str, ...], event: Event) -> None:
        self.wake()
        self._queue.try_apply(task_ids, event)


def _stop_for(record: TaskRecord) -> str:
    """What a worker is told that has the task: `cancel`, `preempt`, or nothing."""
    if record.cancel_requested or record.ran_too_long:
        return "cancel"
    return "preempt" if record.preempt_requested else ""


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
