"""The one loop: take the results that came back, advance the records, give the next orders.

It holds no truth of its own: what it and its parts (`worker_pool.py` the workers, `subspace.py` what belongs to one
base model, `pending_calls.py` what is under way) keep in memory is asked for again after a restart.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue

from configs.errors import OnebasisError, Unavailable
from configs.settings import Settings
from orchestrator.alarms import LOOP, LOOP_CODES, AlarmCode, Alarms
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
from orchestrator.scheduling.fair_share import Running, Waiting, running_order, shares_of
from orchestrator.scheduling.reasons import Wait, WaitCode
from orchestrator.scheduling.scheduler import LOOK, Decision, Pool, Situation, decide
from orchestrator.subspace import Subspace, tell
from orchestrator.tasks.task_events import (
    CameDue,
    Event,
    PreemptRequested,
    RunsTooLong,
    TrainingDone,
    TrainingFailed,
)
from orchestrator.tasks.task_lifecycle import Step, needs_training_rows, next_step, seconds_left
from orchestrator.tasks.task_queue import TaskQueue
from orchestrator.tasks.task_record import SERVICE, Pause, TaskRecord
from orchestrator.tasks.task_rows import LOG
from orchestrator.worker_pool import WorkerPool, is_of_a_version, train_order
from subspace_store import SubspaceReader
from subspace_store.log.version import Identity
from workers.orders import BaseLayout, Evaluate, Failed, Outcome, Train, Trained

log = logging.getLogger("onebasis.controller")

PREEMPT_SECONDS = 60.0
"""Longest wait for the checkpoints of running tasks when the service ends: a step, and an upload."""


@dataclass(frozen=True)
class Growth:
    """New settings on their way to the loop."""

    settings: Settings
    stores: Mapping[str, SubspaceReader]
    """Further base model to a reader of its store."""
    is_done: threading.Event = field(default_factory=threading.Event)


class Controller:
    """Owns the loop. One per service; `run` it in a thread."""

    def __init__(
        self,
        settings: Settings,
        queue: TaskQueue,
        stores: Mapping[str, SubspaceReader],
        cluster: Cluster,
        service: Identity | None = None,
        changed: Callable[[], None] = lambda: None,
        alarms: Alarms | None = None,
    ) -> None:
        """
        Args:
            stores: Base model to a reader of its store; writing goes through the cluster's store actors.
            service: Identity of this service; None where the stores have no owner.
            changed: Called when there is something new to report.
            alarms: The service's alarms; default: its own.
        """
        self.alarms = Alarms() if alarms is None else alarms
        self._settings = settings
        self._queue = queue
        self._cluster = cluster
        self._service = service
        self._changed = changed
        self._pending_calls = PendingCalls(cluster)
        self._pool = WorkerPool(cluster, self._pending_calls, queue, settings.workers, self.alarms)
        self.subspaces: dict[str, Subspace] = {}
        """Base model to its subspace. Replaced as a whole when there is another one: other threads read it."""
        self._take_in(stores)
        self._growing: SimpleQueue[Growth] = SimpleQueue()
        self._started_at = time.time()
        self._set_aside: set[str] = set()
        """Ids of tasks whose training met a damaged store: it would again, until a person has mended the store and
        started the service anew."""
        self._is_ending = False
        self._shares = shares_of(settings.teams)
        self.decision = Decision()
        """The last decision on who starts."""
        self.wake()
        self.healthy_at = 0.0
        """Unix time of the last step that went through."""
        self.turned_at = self._started_at
        """Unix time of the last step that ended, well or not."""
        self.doing = "starting"
        """The part of a step that is under way, for people."""

    def _take_in(self, stores: Mapping[str, SubspaceReader]) -> None:
        made = {
            name: Subspace(
                name,
                self._settings,
                self._queue,
                store,
                self._cluster,
                self._pending_calls,
                self._pool,
                self.alarms,
                self._service,
                self._changed,
            )
            for name, store in stores.items()
        }
        self.subspaces = self.subspaces | made
        self.alarms.names_base_models = len(self.subspaces) > 1

    def layout_of(self, base_model: str) -> BaseLayout | None:
        """What the first warm worker reported of a base model; None before that."""
        return self._pool.layouts.get(base_model)

    @property
    def ready_workers(self) -> int:
        """Workers whose base model is loaded."""
        return self._pool.ready

    @property
    def free_workers(self) -> int:
        """Those that would begin an order at once."""
        return self._pool.free

    def ready_workers_of(self, base_model: str) -> int:
        """The same of one base model."""
        return self._pool.of(base_model).ready

    def free_workers_of(self, base_model: str) -> int:
        """Those of one base model that would begin an order at once."""
        return self._pool.of(base_model).free

    def describe_workers(self, base_model: str | None = None) -> dict[str, str]:
        """Worker to what it does, for people. base_model: Those of this one alone."""
        workers = [w for w in self._pool.workers.values() if base_model in (None, w.base_model)]
        if self.alarms.rings(AlarmCode.RAY_DOWN):
            return dict.fromkeys((worker.name for worker in workers), "out of reach: Ray does not work")
        return {worker.name: str(worker) for worker in workers}

    @property
    def stores_are_open(self) -> bool:
        """Whether the writers have opened the stores for the base models that the workers have loaded."""
        return all(subspace.writer.is_open for subspace in self.subspaces.values())

    @property
    def store_error(self) -> OnebasisError | None:
        """Why a writer cannot open its store: the first such error."""
        errors = (subspace.writer.error for subspace in self.subspaces.values())
        return next((error for error in errors if error is not None), None)

    @property
    def heard_at(self) -> float:
        """Unix time since which every worker and the stores' writers have given a sign of life; 0 before the first."""
        writers = (subspace.writer.heard_at for subspace in self.subspaces.values())
        return min(*writers, *(worker.heard_at for worker in self._pool.workers.values()))

    def is_refining(self, base_model: str, version: int) -> bool:
        """Whether workers refine tasks in a version."""
        orders = self._pool.of(base_model).orders
        return any(isinstance(order, Train) and order.refine_version == version for order in orders)

    @property
    def load_errors(self) -> dict[str, OnebasisError]:
        """Worker to why it cannot load the base model."""
        return {name: worker.error for name, worker in self._pool.workers.items() if worker.error is not None}

    def wake(self, log_moved: bool = False) -> None:
        """Something changed that the loop should look at now; `log_moved`: in the version logs too. Thread-safe."""
        for subspace in self.subspaces.values():
            subspace.calls.wake(log_moved)
        self._pending_calls.wake()

    def grow(self, settings: Settings, stores: Mapping[str, SubspaceReader], timeout_seconds: float) -> None:
        """Go on with new settings: further base models and their workers, other teams, another gate. Thread-safe.

        Args:
            stores: Further base model to a reader of its store.

        Raises:
            Unavailable: The loop did not come to it in time; it will.
        """
        growth = Growth(settings, stores)
        self._growing.put(growth)
        self.wake()
        if not growth.is_done.wait(timeout_seconds):
            raise Unavailable("the loop has not taken the settings yet", todo="`onebasis status` shows when it has")

    def run(self, stop: threading.Event) -> None:
        """Step until told to stop. A step that fails is logged and tried again: the truth is in the records."""
        while not stop.is_set():
            try:
                if self.step():
                    self.alarms.end_all(LOOP, *LOOP_CODES)
                self.healthy_at = time.time()
            except Exception as error:
                tell(error, self.alarms, self.doing)
                self.turned_at = time.time()
                stop.wait(RETRY_SECONDS)
                self.wake()
            self.turned_at = time.time()
        try:
            self._preempt_all()
        except Exception:
            log.exception("what trains goes on from its last checkpoint")

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
        self._grow()
        for subspace in self.subspaces.values():
            self.doing = "deleting files that no task needs"
            with subspace.step(self.doing):
                subspace.delete_unused()
        self.doing = "taking in what the workers and the stores' writers answered"
        for call, pending in self._pending_calls.landed():
            self._take(call, pending)
            if not isinstance(pending, Asking | Sign):
                self.wake()
        self._pool.listen()
        for subspace in self.subspaces.values():
            subspace.listen()
        if not self._pending_calls.woken():
            return False
        at_work = [subspace for subspace in self.subspaces.values() if self._is_read(subspace)]
        self.doing = "reading the task database and giving orders"
        live = self._queue.in_flight()
        # First the orders that workers have already: after a restart any other order would wait behind them.
        self._resume([r for r in live if next_step(r) is Step.AWAIT_ADAPTER and self._goes_on(r.base_model)])
        pauses = self._queue.pauses()
        for subspace in at_work:
            with subspace.step(self.doing):
                others_wait = SERVICE not in pauses and self._queue.is_anyone_waiting(pauses, subspace.name)
                subspace.candidate.advance(subspace.mine(live), others_wait)
                subspace.is_well()
        self._look_at_the_clock(live)
        self._train(live, pauses)
        return True

    def _is_read(self, subspace: Subspace) -> bool:
        """Whether the log was read, so that something can be done for the subspace: not where its store is away, or
        belongs to another service by now; then running tasks write a checkpoint, and nothing is begun."""
        if not subspace.may_step:
            return False
        self.doing = f"reading the version log at {subspace.storage.url}"
        with subspace.step(self.doing):
            subspace.read_log()
            if subspace.ousted_by is None:
                return True
            for worker in subspace.workers.workers:
                if isinstance(worker.order, Train):
                    self._pool.tell(worker, "preempt", worker.order.token)
        return False

    def _goes_on(self, base_model: str) -> bool:
        """Whether this service has the base model, and its store is not another service's."""
        subspace = self.subspaces.get(base_model)
        return subspace is not None and subspace.ousted_by is None

    def _grow(self) -> None:
        """Take what `grow` was handed."""
        while not self._growing.empty():
            growth = self._growing.get()
            self.doing = "taking new settings"
            self._settings, self._shares = growth.settings, shares_of(growth.settings.teams)
            self._cluster.follow(growth.settings)
            self._pool.follow_cluster()
            self._take_in(growth.stores)
            for subspace in self.subspaces.values():
                subspace.candidate.follow(growth.settings)
            self.wake()
            growth.is_done.set()

    # --- what landed -------------------------------------------------------------------------------------------

    def _take(self, call: Call, pending: PendingCall) -> None:
        match pending:
            case Warming():
                self._pool.take_warm(call, pending)
                self._changed()
            case Asking():
                self._pool.take_progress(call, pending)
            case Sign(base_model):
                self.subspaces[base_model].writer.take_sign(call)
            case Opening(base_model):
                self.subspaces[base_model].writer.take_opening(call)
            case Ordered():
                match self._pool.take_order(call, pending):
                    case Train(again=True) as order, outcome:
                        self.subspaces[order.spec.base_model].candidate.take_refinement(order, outcome)
                    case Train() as order, outcome:
                        self._finish_training(order, outcome)
                    case Evaluate() as order, outcome:
                        self.subspaces[order.spec.base_model].candidate.take_evaluation(order, outcome)
            case Writing(base_model):
                self.subspaces[base_model].candidate.take(call, pending)

    def _finish_training(self, order: Train, outcome: Outcome) -> None:
        now = time.time()
        event: Event
        assert isinstance(outcome, Trained | Failed)
        subspace = self.subspaces[order.spec.base_model]
        self._queue.append_log(order.task_id, outcome.log_lines)
        if isinstance(outcome, Failed) and outcome.cause is not None:
            subspace.candidate.stop(outcome.cause)
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
            subspace.delete_files_of(order.task_id)
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
        free, kept = {}, {}
        for name, subspace in self.subspaces.items():
            mine = subspace.workers.unclaimed_workers(live) if subspace.ousted_by is None else []
            is_awaited = subspace.candidate.is_awaited(subspace.mine(live))
            # A version is about to be scored: keep one worker for it, else it waits for a whole training run.
            keep = 1 if is_awaited and not any(is_of_a_version(order) for order in subspace.workers.orders) else 0
            kept[name], free[name] = len(mine[:keep]), mine[keep:]
        self.decision = self._decide(live, {name: len(workers) for name, workers in free.items()}, kept, pauses)
        if (again_at := self.decision.again_at) is not None:
            self._pending_calls.not_before("decide", again_at)
        for start in self.decision.starts:
            self._pool.claim(free[start.pool].pop(0), start.task_id)
        for preemption in self.decision.preemptions:
            by = f"team {preemption.for_team}, which is within its quota"
            self._apply((preemption.task_id,), PreemptRequested(by, gives_back=True))

    def _decide(
        self,
        live: Sequence[TaskRecord],
        free: Mapping[str, int],
        kept: Mapping[str, int],
        pauses: Mapping[str, Pause],
    ) -> Decision:
        """Who starts, and who gives a place back.

        Args:
            free, kept: Base model to its workers that have nothing to do: those for tasks, those for a version.
            pauses: Team to its pause; that of the service under `SERVICE`.
        """
        now = time.time()
        served = [name for name in self.subspaces if self._goes_on(name)]
        some = max(free.values(), default=0) + LOOK + len(self._set_aside)
        found = [] if SERVICE in pauses else self._queue.waiting(some, self.ranks, pauses, served)
        waiting = [task for task in found if task.task_id not in self._set_aside]
        if not waiting:
            return Decision()
        pools = {name: self._pool_of(name, free[name], kept[name]) for name in self.subspaces}
        return decide(self._situation(now, pools, waiting, self._pool.running(live)))

    def _pool_of(self, base_model: str, free: int, kept: int) -> Pool:
        """The pool of a base model's workers, so many of which have nothing to do."""
        workers = self._pool.of(base_model)
        return Pool(
            capacity=self.ranks * len(workers.workers),
            ready=self.ranks * workers.ready,
            free=self.ranks * free,
            kept=self.ranks * kept,
        )

    def _situation(
        self, now: float, pools: Mapping[str, Pool], waiting: Sequence[Waiting], running: Sequence[Running]
    ) -> Situation:
        before = self.decision
        return Situation(
            now=now,
            pools=pools,
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
        if record.base_model not in self.subspaces:
            return Wait(code=WaitCode.NEVER_FITS, about=record.base_model)
        if not self.ready_workers_of(record.base_model):
            return Wait(code=WaitCode.BASE_MODEL_LOADING)
        found = self.decision.wait_of(record.task_id, record.team)
        if found is None:  # it came after that
            is_free = self.free_workers_of(record.base_model) > 0
            return Wait(code=WaitCode.ABOUT_TO_START if is_free else WaitCode.NO_FREE_PLACE)
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
        served = None if extra is None else [extra.pool]
        waiting = [] if SERVICE in pauses else self._queue.waiting(None, self.ranks, pauses, served)
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
        pools = {name: self._pool_of(name, self.free_workers_of(name), 0) for name in self.subspaces}
        situation = self._situation(time.time(), pools, line, running)
        return decide(situation).waits.get(extra.task_id)

    def _apply(self, task_ids: tuple[str, ...], event: Event) -> None:
        self.wake()
        self._queue.try_apply(task_ids, event)


def _stop_for(record: TaskRecord) -> str:
    """What a worker is told that has the task: `cancel`, `preempt`, or nothing."""
    if record.cancel_requested or record.ran_too_long:
        return "cancel"
    return "preempt" if record.preempt_requested else ""
