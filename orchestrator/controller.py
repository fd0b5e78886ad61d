"""The one loop: take the results that came back, advance the records, give the next orders.

It holds no truth of its own: what it and its parts (`worker_pool.py` the workers, `subspace.py` what belongs to one
base model, `pending_calls.py` what is under way) keep in memory is asked for again after a restart.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from queue import SimpleQueue
from typing import Any

from configs.errors import InvalidInput, NotLeading, OnebasisError, Unavailable
from configs.log_lines import busy_with
from configs.settings import Settings
from orchestrator.alarms import LOOP, LOOP_CODES, AlarmCode, Alarms
from orchestrator.cluster import Call, Cluster
from orchestrator.pending_calls import (
    POLL_SECONDS,
    RETRY_SECONDS,
    Asking,
    AskingForEnd,
    Opening,
    Ordered,
    PendingCall,
    PendingCalls,
    Sign,
    Warming,
    Writing,
)
from orchestrator.scheduling.fair_share import Running, Share, Waiting, running_order, shares_of
from orchestrator.scheduling.pools import chosen_pool, pool_of, pools_of, shape_of, size
from orchestrator.scheduling.reasons import Wait, WaitCode
from orchestrator.scheduling.scheduler import (
    LOOK,
    Decision,
    Pool,
    Situation,
    decide,
    of_a_pool_without_workers,
)
from orchestrator.subspace import Subspace, tell
from orchestrator.tasks.task_events import (
    CameDue,
    Event,
    PoolGiven,
    PreemptRequested,
    RunsTooLong,
    TrainingDone,
    TrainingFailed,
)
from orchestrator.tasks.task_lifecycle import Step, needs_training_rows, next_step, seconds_left
from orchestrator.tasks.task_queue import TaskQueue
from orchestrator.tasks.task_record import SERVICE, Drain, Pause, TaskRecord, TaskState
from orchestrator.tasks.task_rows import LOG
from orchestrator.worker_pool import (
    LOOK_SECONDS,
    PoolStatus,
    WorkerPool,
    WorkerStatus,
    is_of_a_version,
    scorings,
    train_order,
)
from subspace_store import SubspaceReader
from subspace_store.log.version import Identity
from workers.orders import BaseLayout, Evaluate, EvaluateTogether, Failed, Order, Outcome, Train, Trained

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
        answering: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        """
        Args:
            stores: Base model to a reader of its store; writing goes through the cluster's store actors.
            service: Identity of this service; None where the stores have no owner.
            changed: Called when there is something new to report.
            alarms: The service's alarms; default: its own.
            answering: What answers over HTTP, as `Deployment.facts` says it; may wait, and raise anything.
        """
        self.alarms = Alarms() if alarms is None else alarms
        self._settings = settings
        self._queue = queue
        self._cluster = cluster
        self._service = service
        self._changed = changed
        self._answering = answering
        self._pending_calls = PendingCalls(cluster)
        self._pool = WorkerPool(cluster, self._pending_calls, queue, settings, self.alarms)
        self.subspaces: dict[str, Subspace] = {}
        """Base model to its subspace. Replaced as a whole when there is another one: other threads read it."""
        self._take_in(stores)
        self._growing: SimpleQueue[Growth] = SimpleQueue()
        self._started_at = time.time()
        self._set_aside: set[str] = set()
        """Ids of tasks whose training met a damaged store: it would again, until a person has mended the store and
        started the service anew."""
        self._is_ending = False
        self._is_pools_given = False
        """Whether every waiting task has a pool, as far as there is one for it."""
        self._looked_for_pools: dict[str, str | None] = {}
        """Pool that is not in the settings to the last of its tasks that another one was looked for; None: all were."""
        self._shares = shares_of(settings.teams)
        self.decision = Decision()
        """The last decision on who starts."""
        self.wake()
        self.healthy_at = 0.0
        """Unix time of the last step that went through."""
        self.turned_at = self._started_at
        """Unix time of the last step that ended, well or not."""
        self.hands_over = False
        """Whether another control plane goes on when this loop ends, so that what runs is left to run."""
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
                self._answering,
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

    def describe_pools(self) -> dict[str, PoolStatus]:
        """Pool to what its workers do."""
        return self._pool.describe()

    @property
    def machines(self) -> tuple[str, ...]:
        """Addresses of the machines that are up. Thread-safe."""
        return self._cluster.machines

    @property
    def workers(self) -> tuple[WorkerStatus, ...]:
        """All workers, whatever they do."""
        return tuple(self._pool.workers.values())

    @property
    def drains(self) -> Sequence[Drain]:
        """What people have drained, when it was last looked at."""
        return self._pool.drains

    def describe_workers(self, base_model: str | None = None) -> dict[str, str]:
        """Worker to what it does, for people. base_model: Those of this one alone."""
        workers = self.workers if base_model is None else self._pool.of_base_model(base_model).workers
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
        """Unix time since which every worker that is ready, and the stores' writers, have given a sign of life; 0
        before the first."""
        writers = (subspace.writer.heard_at for subspace in self.subspaces.values())
        return min([*writers, *(worker.heard_at for worker in self.workers if worker.ready)])

    def is_refining(self, base_model: str, version: int) -> bool:
        """Whether workers refine tasks in a version."""
        orders = self._pool.of_base_model(base_model).orders
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
            except NotLeading as error:  # it will lead again, or be ended
                log.warning("%s", error.sentence)
                stop.wait(RETRY_SECONDS)
                self.wake()
            except Exception as error:
                tell(error, self.alarms, self.doing)
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
        for found in self._pool.unanswered_ends():
            self._take_outcome(found)
            self.wake()
        self._pool.listen()
        for subspace in self.subspaces.values():
            subspace.listen()
        if not self._pending_calls.woken():
            return False
        at_work = [subspace for subspace in self.subspaces.values() if self._is_read(subspace)]
        self.doing = "reading the task database and giving orders"
        self._give_pools()
        for given_back in self._pool.look_at_drains():
            self._take_outcome(given_back)
        live = self._queue.in_flight()
        # First the orders that workers have already: after a restart any other order would wait behind them.
        self._resume([r for r in live if next_step(r) is Step.AWAIT_ADAPTER and self._goes_on(r.base_model)])
        pauses = self._queue.pauses()
        for subspace in at_work:
            with subspace.step(self.doing):
                pools = pools_of(self._settings.pools, subspace.name)
                others_wait = partial(self._queue.is_anyone_waiting, pools, pauses)
                subspace.candidate.advance(subspace.mine(live), (lambda: False) if SERVICE in pauses else others_wait)
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
        """Take what `grow` was handed; again in the next step, if Ray does not answer."""
        while not self._growing.empty():
            growth = self._growing.get()
            self.doing = "taking new settings"
            try:
                self._cluster.follow(growth.settings)
            except Exception:
                self._growing.put(growth)
                raise
            self._settings, self._shares = growth.settings, shares_of(growth.settings.teams)
            self._pool.follow(growth.settings)
            self._look_for_pools()
            self._take_in(growth.stores)
            for subspace in self.subspaces.values():
                subspace.follow(growth.settings)
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
                self._take_outcome(self._pool.take_order(call, pending))
            case AskingForEnd():
                self._take_outcome(self._pool.take_end(call, pending))
            case Writing(base_model):
                self.subspaces[base_model].candidate.take(call, pending)

    def _take_outcome(self, found: tuple[Order, Outcome] | None) -> None:
        match found:
            case Train(again=True) as order, outcome:
                self.subspaces[order.spec.base_model].candidate.take_refinement(order, outcome)
            case Train() as order, outcome:
                with busy_with(task_id=order.task_id):
                    self._finish_training(order, outcome)
            case (Evaluate() | EvaluateTogether()) as order, outcome:
                self.subspaces[scorings(order)[0].spec.base_model].candidate.take_evaluation(order, outcome)

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
            fault, message = self._told(order, outcome)
            event = TrainingFailed(
                token=order.token,
                fault=fault,
                message=message,
                at=now,
                seconds=outcome.worker_seconds,
                done_at=outcome.done_at,
            )
            if outcome.detail:
                log.error("task %s: %s\n%s", order.task_id, outcome.message, outcome.detail)
                self._queue.append(order.task_id, [(LOG, line) for line in outcome.detail.splitlines()])
        record = self._queue.apply(order.task_id, event)
        self._look_for_a_pool(record)
        if not needs_training_rows(record):
            # Strict continual learning: training data is never read again once its task is trained (and refined, if it
            # asks for that) or given up.
            subspace.delete_files_of(order.task_id)
        self._changed()

    def _told(self, order: Train, outcome: Failed) -> tuple[str, str]:
        """Fault and message of an attempt that failed. The worker knows only that it was to stop, not why; and if it is
        lost while its machine is maintained, that is nobody's fault."""
        record = self._queue.get(order.task_id)
        worker = self._pool.workers.get(record.worker)
        if record.ran_too_long and not record.cancel_requested and outcome.fault == "cancelled":
            return "too-long", f"stopped: it ran for longer than its max_run_seconds, {order.spec.max_run_seconds:g}"
        if worker is not None and worker.drain is not None and outcome.fault in ("preempted", "lost", "died"):
            return "preempted", f"{worker.drain}; it goes on from its last checkpoint"
        if self._is_ending and outcome.fault == "preempted":
            return "preempted", "the service ended; it goes on from its last checkpoint"
        return outcome.fault, outcome.message

    # --- what is next ------------------------------------------------------------------------------------------

    def _resume(self, training: Sequence[TaskRecord]) -> None:
        """Give orders that ran when an earlier control plane died again, under their token."""
        busy = {order.token for order in self._pool.orders}
        for record in training:
            worker = self._pool.workers.get(record.worker)
            if worker is not None and worker.drain is not None and not worker.drain.lets_end and not _stop_for(record):
                self._apply((record.task_id,), PreemptRequested(str(worker.drain)))
            if record.token in busy:
                if worker is not None and (what := _stop_for(record)):
                    self._pool.tell(worker, what, record.token)
            elif not self._has_workers_for(record, pool_of(record.worker)):
                what = "its pool is no longer in the settings, or another base model's"
                self._has_failed(record, "preempted", f"{record.worker} is no longer there: {what}")
            elif worker is None:
                self._pool.recall(record.worker)
                self.wake()
            elif self._pool.may_go_on(worker):
                self._pool.give(worker, train_order(record))
            elif not worker.ready:
                self._wait_for_a_lease(record)

    def _wait_for_a_lease(self, record: TaskRecord) -> None:
        """Give one lease to a worker that had the task before this control plane began, and is not back."""
        lease_seconds = self._settings.pools[pool_of(record.worker)].lease_seconds
        until = max(self._started_at, record.order_at or record.claimed_at or 0.0) + lease_seconds
        if time.time() < until:
            self._pending_calls.not_before(f"lease:{record.token}", until)
            return
        self._has_failed(record, "lost", f"{record.worker} did not come back")

    def _has_failed(self, record: TaskRecord, fault: str, message: str) -> None:
        """Note that an attempt ended of which no worker tells."""
        failed = TrainingFailed(token=record.token, fault=fault, message=message, at=time.time())
        self._look_for_a_pool(self._queue.apply(record.task_id, failed))
        self.wake()

    def _has_workers_for(self, record: TaskRecord, pool: str) -> bool:
        """Whether there is such a pool, with the task's base model."""
        return pool in self._settings.pools and self._settings.pools[pool].base_model == record.base_model

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
        base_of = self._pool.base_model_of
        free = [worker for worker in self._pool.unclaimed_workers(live) if self._goes_on(base_of(worker))]
        kept, unscored = dict.fromkeys(self._settings.pools, 0), set()
        for name, subspace in self.subspaces.items():
            is_awaited = subspace.candidate.is_awaited(subspace.mine(live))
            if not is_awaited or any(map(is_of_a_version, subspace.workers.orders)):
                continue
            # A version is about to be scored: keep one worker for it, else it waits for a whole training run.
            worker = next((one for one in free if base_of(one) == name), None)
            if worker is None:
                unscored.add(name)
            else:
                free.remove(worker)
                kept[worker.pool] += 1
        by_pool = {name: [worker for worker in free if worker.pool == name] for name in self._settings.pools}
        pools = {name: self._places(name, len(by_pool[name]), kept[name]) for name in by_pool}
        waiting = self._looked_at(pools, pauses)
        machines = self._room(pools) if waiting else {}
        claimed = {record.worker for record in live if next_step(record) is Step.AWAIT_ADAPTER}
        workers = self._pool.on_machines([worker.name for worker in free], claimed) if machines else ()
        situation = self._situation(pools, waiting, self._pool.running(live))
        situation = replace(situation, machines=machines, workers=workers, fits_since=self.decision.fits_since)
        self.decision = decide(situation) if waiting else Decision()
        for found in by_pool.values():  # the others' room may be needed: they are given out last
            found.sort(key=lambda worker: worker.name in self.decision.kept)
        if (again_at := self.decision.again_at) is not None:
            self._pending_calls.not_before("decide", again_at)
        for start in self.decision.starts:
            self._pool.claim(by_pool[start.pool].pop(0), start.task_id)
        for preemption in self.decision.preemptions:
            by = f"team {preemption.for_team}, which is within its quota"
            self._apply((preemption.task_id,), PreemptRequested(by, gives_back=True))
        wanted = self._wanted(live, waiting, unscored)
        given = {worker.name for worker in self._pool.workers.values() if worker.order is not None}
        self._pool.resize(
            wanted,
            claimed,
            self.decision.growth,
            [name for name in self.decision.ends if name not in given],
        )

    def _room(self, pools: Mapping[str, Pool]) -> dict[str, dict[str, float]]:
        """What is free on the machines, where workers of a pool wait for room that those of others may have."""
        if len(pools) < 2 or self._settings.ray.adds_machines or not any(pool.is_short for pool in pools.values()):
            return {}
        self._pending_calls.later("room", LOOK_SECONDS)
        return self._pool.room()

    def _looked_at(self, pools: Mapping[str, Pool], pauses: Mapping[str, Pause]) -> list[Waiting]:
        """Of each team and pool as many of those in line as could start, with workers that the pool may still get, and
        a few more: what a decision is made from costs as much however many wait."""
        if SERVICE in pauses:
            return []
        limits = {
            name: (pool.free + pool.coming) // self.ranks[name] + LOOK + len(self._set_aside)
            for name, pool in pools.items()
            if self._goes_on(self._settings.pools[name].base_model or "")
        }
        found = self._with_gpus(self._queue.waiting(limits, self.ranks, pauses))
        return [task for task in found if task.task_id not in self._set_aside]

    def _with_gpus(self, waiting: Sequence[Waiting]) -> list[Waiting]:
        """Tasks with the GPUs of their pools."""
        gpus = {name: pool.gpus for name, pool in self._settings.pools.items() if pool.gpus}
        return [replace(task, gpus=gpus[task.pool]) if task.pool in gpus else task for task in waiting]

    def _gpu_seconds(self, now: float) -> dict[str, float]:
        """GPU-seconds per team; none are read where no pool has GPUs."""
        has_gpus = any(pool.gpus for pool in self._settings.pools.values())
        return self._queue.gpu_use_of_teams(now) if has_gpus else {}

    def _places(self, name: str, free: int, kept: int) -> Pool:
        """A pool with so many workers that have nothing to do, for tasks and for a version."""
        settings, workers = self._settings.pools[name], self._pool.of(name)
        in_use = [worker for worker in workers if worker.drain is None]
        coming = sum(worker.comes_soon for worker in in_use)
        is_short = any(worker.is_short for worker in in_use)
        gone = sum(not drain.is_node and pool_of(drain.what) == name for drain in self._pool.drains)
        drains = self._pool.drains_of(name)
        is_placeless = bool(in_use) and all(worker.is_placeless for worker in in_use)
        further = 0 if drains or is_placeless or is_short else max(0, settings.max - gone - len(in_use))
        return Pool(
            capacity=settings.ranks * settings.max,
            ready=settings.ranks * sum(worker.ready for worker in in_use),
            free=settings.ranks * free,
            kept=settings.ranks * kept,
            coming=settings.ranks * (coming + further),
            further=settings.ranks * further,
            shape=shape_of(settings),
            is_short=is_short,
            is_forming=settings.ranks > 1 and any(worker.machines == () for worker in in_use),
            is_placeless=is_placeless,
            drained="; ".join(drain.told for drain in drains),
            drained_since=min((drain.at for drain in drains), default=None),
        )

    def _wanted(
        self, live: Sequence[TaskRecord], waiting: Sequence[Waiting], unscored: Collection[str]
    ) -> dict[str, int]:
        """Pool to the workers that it could use beside those at work, those included that just got an order.

        Args:
            unscored: Base models of which a version is about to be scored, and no worker is free for that.
        """
        starts = {start.task_id for start in self.decision.starts}
        waits = self.decision.waits
        found = dict.fromkeys(self._settings.pools, 0)
        for task in waiting:
            wait = waits.get(task.task_id)
            if task.task_id not in starts and wait is not None and wait.code is not WaitCode.NEVER_FITS:
                found[task.pool] += wait.until is None  # else it borrows nothing before that
        for record in live:
            if next_step(record) is Step.REFINE and record.pool in found:
                found[record.pool] += 1
        for name, subspace in self.subspaces.items():
            pools, needs_scorer = pools_of(self._settings.pools, name), name in unscored
            # While no worker has loaded the base model, nobody knows what may be submitted.
            if needs_scorer or (subspace.workers.layout is None and not any(found[pool] for pool in pools)):
                able = [pool for pool in pools if not needs_scorer or len(self._pool.of(pool)) < pools[pool].max]
                if smallest := min(able, key=lambda pool: size(pool, pools[pool]), default=""):
                    found[smallest] += 1
        return found

    def _situation(
        self, pools: Mapping[str, Pool], waiting: Sequence[Waiting], running: Sequence[Running]
    ) -> Situation:
        now, before = time.time(), self.decision
        return Situation(
            now=now,
            pools=pools,
            waiting=waiting,
            running=running,
            use_seconds=self._queue.use_of_teams(now),
            gpu_seconds=self._gpu_seconds(now),
            shares=self._shares,
            reserved=before.reserved,
            promised=before.promised,
            waits=before.waits,
        )

    def _look_for_pools(self) -> None:
        """Look from now on for tasks that wait without a pool of theirs."""
        self._is_pools_given, self._looked_for_pools = False, {}

    def _look_for_a_pool(self, record: TaskRecord) -> None:
        """The same where a task that was at work waits again, and its pool has gone meanwhile."""
        if record.state is TaskState.QUEUED and not self._has_workers_for(record, record.pool):
            self._look_for_pools()

    def _give_pools(self) -> None:
        """Give waiting tasks a pool that have none, or whose pool is no longer in the settings or another base model's:
        once, when the service starts, and some at each step. Where none takes one it waits, and its reason says so; it
        is in no pool of another base model then."""
        if self._is_pools_given:
            return
        pools = self._settings.pools
        for old in self._queue.pools_in_line():
            after, is_there = self._looked_for_pools.get(old, ""), old in pools
            if after is None:
                continue
            found = self._queue.queued_for(old, after, but_of=pools[old].base_model if is_there else None)
            given: dict[str, list[str]] = {}
            for record in found:
                spec, pool = record.spec, "" if is_there else old
                with contextlib.suppress(InvalidInput):
                    pool = chosen_pool(pools_of(pools, spec.base_model), spec.pool, spec.resources)
                if pool != old:
                    given.setdefault(pool, []).append(record.task_id)
            for pool, task_ids in given.items():
                self._queue.try_apply(task_ids, PoolGiven(pool))
            self._looked_for_pools[old] = found[-1].task_id if found else None
            if found:
                self.wake()
                return
        self._is_pools_given = True

    def wait_in_line(self, record: TaskRecord) -> Wait:
        """Why a task that stands in line does not start, by the last decision. Thread-safe."""
        pool = self.describe_pools().get(record.pool)
        if pool is None:
            return Wait(code=WaitCode.NEVER_FITS, pool=record.pool)
        found = self.decision.wait_of(record.task_id, record.pool, record.team)
        if found is not None:
            return found
        is_free = any(worker.is_free for worker in pool.workers)  # it came after that
        if not pool.ready:
            return of_a_pool_without_workers(record.pool, self._places(record.pool, 0, 0))
        return Wait(code=WaitCode.ABOUT_TO_START if is_free else WaitCode.NO_FREE_PLACE, pool=record.pool)

    def line(self, extra: Waiting | None = None) -> tuple[tuple[Waiting, ...], list[Running]]:
        """The tasks that stand in line for workers of any pool, in their running order, and what runs. Thread-safe.

        Args:
            extra: A task that is not there yet, and is shown where it would stand.

        Cost:
            O(n·log n) for n waiting tasks: 30 ms for 10,000.
        """
        now, pauses = time.time(), self._queue.pauses()
        running = self._pool.running(self._queue.in_flight())
        everyone = dict.fromkeys(self._settings.pools)
        waiting = [] if SERVICE in pauses else self._queue.waiting(everyone, self.ranks, pauses)
        if extra is not None and SERVICE not in pauses and extra.team not in pauses:
            waiting.append(extra)
        waiting = self._with_gpus(waiting)
        by_id = {task.task_id: task for task in waiting}
        used, gpus = self._queue.use_of_teams(now), self._gpu_seconds(now)
        order = running_order(waiting, used, running, self._shares, now=now, gpu_seconds=gpus)
        return tuple(by_id[task_id] for task_id in order), running

    @property
    def ranks(self) -> dict[str, int]:
        """Pool to the places that each of its tasks takes."""
        return {name: pool.ranks for name, pool in self._settings.pools.items()}

    @property
    def shares(self) -> Mapping[str, Share]:
        """What each team may have."""
        return self._shares

    def seconds_until_free(self, pool: str) -> list[float]:
        """For each place of a pool that is free, or that it can get when tasks wait, the seconds until it is. Places of
        a pool that is cold are left out while nobody knows how long it takes to load. Thread-safe."""
        found = self.describe_pools().get(pool)
        if found is None:
            return []
        ranks, free = found.settings.ranks, sum(worker.is_free for worker in found.workers)
        load = self._pool.load_seconds(pool)
        seconds = [0.0] * (ranks * free)
        if load is None and not found.ready:
            return seconds
        now = time.time()
        loading = [
            worker for worker in found.workers if worker.drain is None and worker.loads_since and not worker.ready
        ]
        seconds += [
            max(0.0, (load or 0.0) - (now - worker.loads_since))
            for worker in loading
            if not worker.is_placeless
            for _ in range(ranks)
        ]
        coming = self._places(pool, free, 0).coming
        return seconds + [load or 0.0] * max(0, coming - (len(seconds) - ranks * free))

    def idle_causes(self, pool: str) -> tuple[str, ...]:
        """What the workers of a pool do, where none of them is ready."""
        found = self.describe_pools().get(pool)
        return tuple(map(str, found.workers)) if found is not None and not found.ready else ()

    def wait_of_another(self, extra: Waiting) -> Wait | None:
        """Why a task that is not there yet would not start at once; None where it would. Thread-safe."""
        pauses = self._queue.pauses()
        if SERVICE in pauses or extra.team in pauses:
            return None
        free = {name: sum(w.is_free for w in pool.workers) for name, pool in self.describe_pools().items()}
        pools = {name: self._places(name, count, 0) for name, count in free.items()}
        waiting = [*self._looked_at(pools, pauses), *self._with_gpus([extra])]
        running = self._pool.running(self._queue.in_flight())
        return decide(self._situation(pools, waiting, running)).waits.get(extra.task_id)

    def _apply(self, task_ids: tuple[str, ...], event: Event) -> None:
        self.wake()
        self._queue.try_apply(task_ids, event)


def _stop_for(record: TaskRecord) -> str:
    """What a worker is told that has the task: `cancel`, `preempt`, or nothing."""
    if record.cancel_requested or record.ran_too_long:
        return "cancel"
    return "preempt" if record.preempt_requested else ""
