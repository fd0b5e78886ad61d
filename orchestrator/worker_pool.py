"""The workers of all pools: which is warm, which is alive, which does what, which starts and which ends.

Which task comes next is not decided here, nor how many workers a pool has: scheduling/pools.py.
"""

from __future__ import annotations

import logging
import math
import secrets
import statistics
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from configs.errors import Corrupt, InvalidInput, OnebasisError, Unavailable
from configs.settings import PoolSettings, Settings
from configs.task_spec import TaskSpec
from orchestrator.alarms import WRITE_CODES, AlarmCode, Alarms
from orchestrator.cluster import Call, Cluster, MachineLost, ProcessEnded
from orchestrator.pending_calls import Asking, AskingForEnd, Ordered, PendingCalls, Warming
from orchestrator.scheduling.fair_share import Running, Use
from orchestrator.scheduling.machines import Worker
from orchestrator.scheduling.pools import Seat, ends_at, number_of, pool_of, resized, size
from orchestrator.scheduling.scheduler import SOON_SECONDS
from orchestrator.tasks.task_events import Claimed
from orchestrator.tasks.task_lifecycle import Step, next_step
from orchestrator.tasks.task_queue import TaskQueue
from orchestrator.tasks.task_record import Drain, TaskRecord, TaskState, local_results, staging_key
from workers.gang import NoPlace, needed
from workers.orders import (
    NOWHERE,
    BaseLayout,
    DoneAt,
    Evaluate,
    EvaluateTogether,
    Failed,
    Order,
    Outcome,
    Phase,
    Progress,
    RankLost,
    Train,
)
from workers.process_monitor import ProcessEnd

log = logging.getLogger("onebasis.controller")

SILENT_SECONDS = 6.0
"""Longest silence before an alarm. A worker answers in milliseconds, and in a second or two where the machine is
crowded; people are told within ten seconds. It is replaced when its lease ends."""
WARM_SLOW_SECONDS = 180.0
"""Longest load without an alarm: a small base model takes ten seconds, one of 7B from a slow disk two minutes."""
WARM_SILENT_SECONDS = 300.0
"""Longest silence of a worker that loads: while it imports its libraries and maps its weights it may leave a question
unanswered, a new process on a crowded machine for minutes."""
SURE_SECONDS = 2.0
"""Time from the loss of a machine until an answer proves that a worker was not on it. A process of Ray looks once a
second whether its raylet lives; a worker whose raylet was killed answers until then."""
LOAD_TRIES = 2
"""Number of ends of a process while it loads that cannot be chance."""
LOAD_AGAIN_SECONDS = 30.0
LOAD_AGAIN_MAX_SECONDS = 240.0
"""Longest wait before a process that ended each time while it loaded is made again; the waits before it are half, a
quarter, an eighth of it."""
CANCEL_GRACE_SECONDS = 10.0
"""Longest wait for a worker that was told to cancel: it looks between two layers, two batches, two tokens. A layer's
work, or an upload to a slow storage, cannot be broken: then its process is ended, and a new one loads the model."""
END_SECONDS = 20.0
"""Longest wait for an answer on how a process ended: its machine may be gone with it."""
LOADS_KEPT = 5
"""Loads of each pool, the last, from which the next is estimated."""
LOOK_SECONDS = 2.0
"""Interval at which it is looked on which machines workers are, and what is free there."""
PLACE_SECONDS = 5.0
"""Time after which a worker without a place waits for room: where there is some, Ray finds it in less."""


AT_AN_ADAPTER: Mapping[str, str] = {Phase.SCORING: "scoring the own adapter of", Phase.SAVING: "storing the adapter of"}
"""What a worker does with a task that it trains, by its phase; else it trains it."""


@dataclass
class WorkerStatus:
    """A worker as the control plane sees it now."""

    name: str
    started_at: float = 0.0
    """Unix time at which it was asked for."""
    idle_since: float = 0.0
    """Unix time since which it has had no order."""
    machines: tuple[str, ...] | None = None
    """Addresses of the machines that it is on; none while it waits for a place. None: not known yet."""
    placeless_since: float = 0.0
    """Unix time since which it waits for a place; 0: it has one."""
    looked_at: float = 0.0
    """Unix time at which it was last looked where it is."""
    drain: Drain | None = None
    """Wish of a person that it gets nothing new and ends."""
    avoids: frozenset[str] | None = None
    """Addresses of the machines that were drained when it was asked for, on which it is never placed. None: not known,
    an earlier control plane asked for it."""
    ready: bool = False
    order: Order | None = None
    given_at: float = 0.0
    """When it got its order."""
    asked_at: float = 0.0
    """When it was last asked what it does."""
    error: OnebasisError | None = None
    """Why its base model cannot be loaded."""
    told: tuple[str, str] = ("", "")
    """(`cancel` or `preempt`, token): the last that it was told to stop."""
    told_at: float = 0.0
    """When that was; infinite once its process was ended for it."""
    phase: str = ""
    """What it said last of how far it is with its order; empty: nothing yet."""
    heard_at: float = 0.0
    """Unix time of its last answer."""
    is_silent: bool = False
    """It has left a question unanswered for longer than `SILENT_SECONDS`."""
    sure_at: float = 0.0
    """Unix time of the earliest question whose answer shows that it survived the last loss of a machine; 0: it did.
    Before that it gets no order: one machine may hold several workers, and a task would lose that machine twice."""
    loads_since: float = 0.0
    """Unix time at which it was first asked to load the base model, since it was last ready."""
    ends_at: float | None = None
    """Unix time at which it expects to have done its order; None: it has not said."""
    ends: int = 0
    """How often its process ended while it loaded, since it was last ready."""
    lost: MachineLost | None = None
    """Error by which its process was found to be gone, while it is asked how that ended. Its order stays its own."""
    lost_at: float = 0.0
    """When that was."""

    @property
    def pool(self) -> str:
        """Name of its pool."""
        return pool_of(self.name)

    @property
    def can_begin(self) -> bool:
        """Whether it would begin an order at once."""
        return self.ready and self.order is None and not self.is_silent and not self.sure_at

    @property
    def is_free(self) -> bool:
        """The same, and it may get something new."""
        return self.can_begin and self.drain is None

    @property
    def waits(self) -> bool:
        """Whether its order waits for places for the ranks of a gang."""
        return self.phase == Phase.WAITING

    @property
    def is_placeless(self) -> bool:
        """Whether it, or a rank of it, waits for a place.

        Not so with an order that it had begun: a gang whose supervisor died has no places for a moment, while it is
        asked how that ended.
        """
        if self.order is not None:
            return self.waits
        return not self.ready and (self.machines == () or isinstance(self.error, NoPlace))

    @property
    def is_short(self) -> bool:
        """Whether no machine has room for it, as far as Ray has said by now."""
        return self.is_placeless and self.order is None and time.time() - self._placeless_from > PLACE_SECONDS

    @property
    def _placeless_from(self) -> float:
        return self.placeless_since or self.started_at

    @property
    def comes_soon(self) -> bool:
        """Whether it is not ready and will be: it has a place, or was asked for a moment ago."""
        is_new = time.time() - self.started_at < SOON_SECONDS and not self.is_short
        return not self.ready and (bool(self.machines) or is_new)

    @property
    def is_loading(self) -> bool:
        """Whether it has a place, as far as is known, and is not ready yet."""
        return not self.ready and self.order is None and self.machines != () and self.error is None

    @property
    def state(self) -> str:
        """`drained`, `busy`, `warm` or `starting`: what workers are counted by."""
        if self.drain is not None:
            return "drained"
        return "busy" if self.order is not None else "warm" if self.ready else "starting"

    def __str__(self) -> str:
        does = self._does()
        return does if self.drain is None else f"{does}; {self.drain}"

    def _does(self) -> str:
        before = "waits for places for its ranks, then " if self.waits else ""
        if self.is_silent:
            before = "does not answer; last seen "
        match self.order:
            case Train(task_id=task_id, refine_version=version):
                does = AT_AN_ADAPTER.get(self.phase, "training")
                return before + (f"refining {task_id} at version {version}" if version else f"{does} {task_id}")
            case Evaluate(task_id=task_id, version=version):
                return f"{before}scoring {task_id} at version {version}"
            case EvaluateTogether(orders=orders, version=version):
                return f"{before}scoring {len(orders)} tasks together at version {version}"
        if self.ready:
            return f"{before}free" if not self.sure_at else f"{before}asked whether it was lost with another worker"
        if self.error is not None and not isinstance(self.error, NoPlace):
            return f"cannot load the base model: {self.error.what}"
        if self.is_placeless:
            return f"waiting for a place for {time.time() - self._placeless_from:.0f} s"
        return f"loading the base model for {time.time() - self.loads_since:.0f} s" if self.loads_since else "starting"


@dataclass(frozen=True)
class PoolStatus:
    """A pool as the control plane sees it now."""

    settings: PoolSettings
    workers: tuple[WorkerStatus, ...]

    def count(self, state: str) -> int:
        """Number of its workers in a state, see `WorkerStatus.state`."""
        return sum(worker.state == state for worker in self.workers)

    @property
    def ready(self) -> int:
        """Workers whose base model is loaded, and that are not drained."""
        return self.count("warm") + self.count("busy")


class WorkerPool:
    """All workers of the service, whichever pool they belong to."""

    def __init__(
        self,
        cluster: Cluster,
        pending_calls: PendingCalls,
        queue: TaskQueue,
        settings: Settings,
        alarms: Alarms,
    ) -> None:
        self._cluster = cluster
        self._pending_calls = pending_calls
        self._queue = queue
        self._pools = settings.pools
        self._alarms = alarms
        self.workers: dict[str, WorkerStatus] = {}
        """Name to worker. Another thread may go through it, so it is replaced and never changed."""
        self.drains: list[Drain] = []
        """What people have drained."""
        self._drained: frozenset[str] = frozenset()
        """Addresses of the machines among them."""
        for name in cluster.workers:
            self._add(name, None)
        self._loads: dict[str, deque[float]] = {}
        """Pool to the seconds that its last workers took to load the base model once they had a place."""
        self.layouts: dict[str, BaseLayout] = {}
        """Base model to what the first warm worker reported of it; none before that."""

    def follow(self, settings: Settings) -> None:
        """Go by new settings from now on: further pools, and other sizes of those that are there."""
        self._pools = settings.pools

    def base_model_of(self, worker: WorkerStatus) -> str:
        """Name of the base model that a worker loads."""
        return self._pools[worker.pool].base_model or ""

    def of_base_model(self, base_model: str) -> ModelWorkers:
        """The workers that load one base model, of whichever pool."""
        return ModelWorkers(self, base_model)

    # --- who is free -------------------------------------------------------------------------------------------

    @property
    def ready(self) -> int:
        """Workers whose base model is loaded."""
        return sum(worker.ready for worker in self.workers.values())

    @property
    def free(self) -> int:
        return sum(worker.is_free for worker in self.workers.values())

    def of(self, pool: str) -> list[WorkerStatus]:
        """The workers of a pool."""
        return [worker for worker in self.workers.values() if worker.pool == pool]

    def ranks(self, worker: str) -> int:
        """Ranks of a worker: places of whatever it does."""
        return self._pools[pool_of(worker)].ranks

    @property
    def orders(self) -> list[Order]:
        """Orders that are under way."""
        return [worker.order for worker in self.workers.values() if worker.order is not None]

    def free_workers(self) -> list[WorkerStatus]:
        """Workers that may get something new, those of the smallest pool first."""
        free = [worker for worker in self.workers.values() if worker.is_free]
        free.sort(key=lambda worker: (size(worker.pool, self._pools[worker.pool]), number_of(worker.name)))
        return [worker for worker in free if self._pending_calls.may(f"order:{worker.name}")]

    def may_go_on(self, worker: WorkerStatus) -> bool:
        """Whether a worker can be given an order again that it had before; also one that is drained."""
        return worker.can_begin and self._pending_calls.may(f"order:{worker.name}")

    def unclaimed_workers(self, live: Sequence[TaskRecord]) -> list[WorkerStatus]:
        """Free workers, except those that a task waits for because it had them before."""
        claimed = {record.worker for record in live if next_step(record) is Step.AWAIT_ADAPTER}
        return [worker for worker in self.free_workers() if worker.name not in claimed]

    # --- orders ------------------------------------------------------------------------------------------------

    def claim(self, worker: WorkerStatus, task_id: str) -> None:
        """Give a task to a worker under a fresh lease, unless somebody cancelled it first."""
        self._pending_calls.wake()
        token, places = secrets.token_hex(8), self.ranks(worker.name)
        if claimed := self._queue.try_apply(
            (task_id,),
            Claimed(token=token, worker=worker.name, at=time.time(), places=places, gpus=self._pools[worker.pool].gpus),
        ):
            self.give(worker, train_order(claimed[0]))

    def give(self, worker: WorkerStatus, order: Order) -> None:
        # Sent first: an order that could not be sent must not occupy the worker.
        self._pending_calls.send(Ordered(worker.name), lambda: self._cluster.run(worker.name, order))
        worker.order, worker.told, worker.phase, worker.ends_at = order, ("", ""), "", None
        worker.asked_at = worker.given_at = time.time()

    def running(self, live: Sequence[TaskRecord]) -> list[Running]:
        """What fair share charges for while it runs: the attempts of tasks, and what is done for versions."""
        now = time.time()
        attempts = (record for record in live if next_step(record) is Step.AWAIT_ADAPTER)
        for_versions = (worker for worker in self.workers.values() if worker.order and not has_lease(worker.order))
        return [
            *(self._attempt(record, now) for record in attempts),
            *(
                # Tasks of several teams count as the first one's while they are scored; then each pays its own.
                Running(
                    charged(w.order)[0].spec.team,
                    w.given_at,
                    0.0,
                    pool=w.pool,
                    ranks=self.ranks(w.name),
                    gpus=self._pools[w.pool].gpus,
                )
                for w in for_versions
                if w.order
            ),
        ]

    def _attempt(self, record: TaskRecord, now: float) -> Running:
        worker = self.workers.get(record.worker)
        ends_at = worker.ends_at if worker is not None else None
        return Running(
            record.team,
            record.order_at or record.claimed_at or now,
            # A version waits for what is being refined: that is not preempted.
            task_id=record.task_id if record.state is TaskState.TRAINING else "",
            pool=pool_of(record.worker),
            ranks=record.places,
            gpus=record.gpus,
            seconds_left=None if ends_at is None else max(0.0, ends_at - now),
            stops=record.preempt_requested or record.cancel_requested,
            was_preempted=record.gave_back_at is not None,
            seconds_max=record.spec.max_run_seconds,
            rows=record.rows_asked(record.places),
            method=record.spec.method.name,
        )

    def tell(self, worker: WorkerStatus, what: str, token: str) -> None:
        """Tell a worker to stop, once for each time that it got the order. what: `cancel` or `preempt`."""
        if worker.told != (what, token):
            worker.told, worker.told_at = (what, token), time.time()
            (self._cluster.cancel if what == "cancel" else self._cluster.preempt)(worker.name, token)

    def take_order(self, call: Call, pending: Ordered) -> tuple[Order, Outcome] | None:
        """The order with its outcome; None when it is to be given again."""
        worker = self.workers[pending.worker]
        order = worker.order
        assert order is not None
        try:
            outcome: Outcome = self._cluster.result(call)
        except MachineLost as error:
            self._is_away(worker, error)
            if worker.told == ("cancel", order.token) and math.isinf(worker.told_at):
                what = f"cancelled; it did not stop within {CANCEL_GRACE_SECONDS:.0f} s, so {worker.name} was ended"
                return self._done(worker, order, Failed(token=order.token, fault="cancelled", message=what))
            return None if self._asks_for_end(worker, error) else self._lost(worker, order, error, None)
        except Unavailable as error:
            worker.order, worker.idle_since = None, time.time()
            # The worker is well, the storage was away. That is nobody's fault and no budget pays for it: the worker
            # has forgotten the order, and what is owed is read off the records again in a moment.
            log.warning("%s: order %s is given again: %s", worker.name, order.token, error)
            if not isinstance(error, RankLost):
                self._alarms.ring_for(error, worker.name)
            self._pending_calls.later(f"order:{worker.name}")
            if not worker.waits:
                self._charge(worker, order, "away", f"@{worker.given_at:.3f}", time.time() - worker.given_at)
            return None
        except Corrupt as error:  # the worker is well, and no task is to blame
            log.error("%s: order %s met a damaged store: %s", worker.name, order.token, error.sentence)
            outcome = Failed(token=order.token, fault="damaged", message=error.sentence, cause=error)
        except Exception as error:
            log.exception("%s: order %s failed outside the worker's own handling", worker.name, order.token)
            outcome = Failed(token=order.token, fault="lost", message=f"{worker.name}: {error}")
        return self._done(worker, order, outcome)

    def _lost(
        self, worker: WorkerStatus, order: Order, error: MachineLost, end: ProcessEnd | None
    ) -> tuple[Order, Outcome]:
        """An order whose worker is gone. That a process died while its machine went on is put down to its order."""
        fault, what = "lost", f"was lost: {end or error.what}"
        if end is not None and end.is_its_own:
            fault, what = "died", f"(pid {end.pid}) died: {end}"
        return self._done(worker, order, Failed(token=order.token, fault=fault, message=f"{worker.name} {what}"))

    def _done(self, worker: WorkerStatus, order: Order, outcome: Outcome) -> tuple[Order, Outcome]:
        worker.order, worker.idle_since = None, time.time()
        self._alarms.end_all(worker.name, *WRITE_CODES)
        if isinstance(outcome, Failed) and outcome.fault == "lost":  # a gang reports a rank's machine itself
            self._doubt_all()
        if not has_lease(order):  # else its cost is written with the task's event
            seconds = outcome.worker_seconds
            what = "score" if scorings(order) else "refine again"
            seconds = time.time() - worker.given_at if seconds is None else seconds
            self._charge(worker, order, what, "", seconds, outcome.done_at)
        return order, outcome

    def _charge(
        self, worker: WorkerStatus, order: Order, what: str, suffix: str, seconds: float, done_at: DoneAt = NOWHERE
    ) -> None:
        """suffix: Of the token under which it is charged once."""
        places, gpus, parts = self.ranks(worker.name), self._pools[worker.pool].gpus, charged(order)
        for one in parts:
            use = Use(team=one.spec.team, seconds=seconds / len(parts), ended_at=time.time(), places=places, gpus=gpus)
            token = f"{one.token}{suffix}"
            self._queue.charge(one.task_id, use, token=token, what=what, worker=worker.name, done_at=done_at)

    # --- who is alive ------------------------------------------------------------------------------------------

    def take_warm(self, call: Call, pending: Warming) -> None:
        worker = self.workers[pending.worker]
        try:
            self.layouts[self.base_model_of(worker)] = self._cluster.result(call)
        except MachineLost as error:
            self._is_away(worker, error)
            if worker.lost is not None or worker.order is not None or not self._asks_for_end(worker, error):
                self._ended_loading(worker, error, None)
        except NoPlace as error:
            self._waits_for_a_place(worker, error)
        except OnebasisError as error:
            self._cannot_load(worker, error)
        except Exception as error:  # whatever a library raises about the checkpoint
            what = f"{type(error).__name__}: {error}"
            self._cannot_load(worker, InvalidInput(what, "base_model", "the worker's log has the rest"))
        else:
            if worker.avoids is not None and worker.loads_since:  # else it may have been warm before it was asked
                loads = self._loads.setdefault(worker.pool, deque(maxlen=LOADS_KEPT))
                loads.append(time.time() - worker.loads_since)
            worker.ready, worker.error, worker.loads_since, worker.ends = True, None, 0.0, 0
            worker.heard_at, worker.is_silent = time.time(), False
            worker.idle_since, worker.looked_at = time.time(), 0.0
            self._alarms.end_all(worker.name, AlarmCode.LOAD_FAILED, AlarmCode.WORKER_SLOW, AlarmCode.WORKER_SILENT)
            log.info("%s is warm", worker.name)

    def _waits_for_a_place(self, worker: WorkerStatus, error: NoPlace) -> None:
        """A gang asks anew for places: the request in Ray stays, and an autoscaler sees it."""
        if (
            number_of(worker.name) < self._pools[worker.pool].min
        ):  # of the others nobody said that they have to be there
            what = f"{worker.name} cannot load the base model: {error.sentence}"
            self._alarms.ring(AlarmCode.LOAD_FAILED, worker.name, what, error.todo)
        self._alarms.end(AlarmCode.WORKER_SLOW, worker.name)
        worker.error, worker.loads_since, worker.machines = error, 0.0, ()
        self._pending_calls.later(f"warm:{worker.name}")

    def _ended_loading(self, worker: WorkerStatus, error: MachineLost, end: ProcessEnd | None) -> None:
        """Count an end while it loads; after the second that cannot be chance, and is told and waited after."""
        worker.ends += isinstance(error, ProcessEnded) or end is not None
        if worker.ends < LOAD_TRIES or self._alarms.rings(AlarmCode.RAY_DOWN):
            return
        seconds = min(LOAD_AGAIN_SECONDS * 2.0 ** (worker.ends - LOAD_TRIES), LOAD_AGAIN_MAX_SECONDS)
        todo = f"look at the machine's memory and at the worker's log; it is tried again in {seconds:.0f} s"
        self._cannot_load(worker, Unavailable(f"its process ends while it loads: {end or error.what}", todo=todo))
        self._pending_calls.later(f"warm:{worker.name}", seconds)
        self._replace(worker)  # Ray does not restart an actor whose constructor failed

    # --- how a process ended -----------------------------------------------------------------------------------

    def _asks_for_end(self, worker: WorkerStatus, error: MachineLost) -> bool:
        """Ask how a worker's process ended that is gone; False: there is nobody to be asked."""
        call = self._cluster.end_of(worker.name)
        if call is None:
            return False
        worker.lost, worker.lost_at = error, time.time()
        self._pending_calls.send(AskingForEnd(worker.name), lambda: call)
        return True

    def take_end(self, call: Call, pending: AskingForEnd) -> tuple[Order, Outcome] | None:
        """Take the answer on how a process ended: the outcome of the order that it had."""
        end: ProcessEnd | None = None
        try:
            end = self._cluster.result(call)
        except Exception as error:  # whoever saw it is gone as well
            log.warning("nobody knows how %s ended: %s", pending.worker, error)
        return self._has_ended(self.workers[pending.worker], end)

    def unanswered_ends(self) -> Iterator[tuple[Order, Outcome]]:
        """Outcomes of orders of which nobody has said in time how their worker's process ended."""
        for worker in self.workers.values():
            if worker.lost is not None and time.time() - worker.lost_at > END_SECONDS:
                self._pending_calls.forget(AskingForEnd(worker.name))
                if found := self._has_ended(worker, None):
                    yield found

    def _has_ended(self, worker: WorkerStatus, end: ProcessEnd | None) -> tuple[Order, Outcome] | None:
        error, order, worker.lost = worker.lost, worker.order, None
        assert error is not None
        if end is not None:
            log.warning("%s (pid %d): %s", worker.name, end.pid, end)
        else:
            log.warning("nobody has said how %s ended", worker.name)
        if order is not None:
            return self._lost(worker, order, error, end)
        self._ended_loading(worker, error, end)
        return None

    def _cannot_load(self, worker: WorkerStatus, error: OnebasisError) -> None:
        what = f"{worker.name} cannot load the base model: {error.sentence}"
        self._alarms.ring(AlarmCode.LOAD_FAILED, worker.name, what, error.todo)
        self._alarms.end(AlarmCode.WORKER_SLOW, worker.name)
        worker.error, worker.loads_since = error, 0.0
        self._pending_calls.later(f"warm:{worker.name}", LOAD_AGAIN_SECONDS)

    def listen(self) -> None:
        """Heartbeats: ask every worker what it does; one that does not answer for a whole lease is replaced.

        The silence is counted from the question. Counted from the last answer, a loop that was itself held up (by a
        slow storage, a suspended machine) would take its own absence for that of all its workers.
        """
        now = time.time()
        for worker in self.workers.values():
            self._end_if_it_does_not_stop(worker, now)
            warming = Warming(worker.name)
            self._locate(worker, now)
            if not worker.ready and not worker.machines:
                worker.asked_at = worker.loads_since = now  # it does not load yet, and nobody is there to answer
            elif worker.ready or self._pending_calls.under_way(warming):
                self._ask(worker, now)
            if worker.ready or self._pending_calls.under_way(warming):
                loads_for = now - worker.loads_since if worker.loads_since else 0.0
                if loads_for > WARM_SLOW_SECONDS:
                    self._alarms.ring(AlarmCode.WORKER_SLOW, worker.name, f"{worker.name} still loads the base model")
            elif self._pending_calls.may(f"warm:{worker.name}") and now >= worker.sure_at:
                worker.loads_since = worker.loads_since or now
                worker.asked_at = now
                self._pending_calls.send(warming, partial(self._cluster.warm, worker.name))

    def _end_if_it_does_not_stop(self, worker: WorkerStatus, now: float) -> None:
        order = worker.order
        if order is None or worker.told != ("cancel", order.token) or now - worker.told_at <= CANCEL_GRACE_SECONDS:
            return
        if worker.lost is not None:  # it has ended, and Ray has made another process
            return
        log.warning("%s was told to cancel %s and does not stop: ending it", worker.name, order.token)
        worker.told_at = math.inf
        self._replace(worker)

    def _locate(self, worker: WorkerStatus, now: float) -> None:
        """Look on which machines a worker is, while that matters: before it is ready; later, while machines are
        drained, only where that is not known, or where ranks may have found other places."""
        may_move = self._pools[worker.pool].ranks > 1 and any(drain.is_node for drain in self.drains)
        if worker.ready and worker.machines and not may_move:
            return
        if now - worker.looked_at >= LOOK_SECONDS:
            worker.looked_at, before = now, worker.machines
            worker.machines = self._cluster.machines_of(worker.name)
            if worker.machines != before:
                self._pending_calls.wake()
        if worker.machines != ():
            worker.placeless_since = 0.0
            return
        worker.placeless_since = worker.placeless_since or now
        if not worker.is_short:
            self._pending_calls.not_before(f"place:{worker.name}", worker.placeless_since + PLACE_SECONDS)
        is_expected = number_of(worker.name) < self._pools[worker.pool].min
        if is_expected and not worker.ready and now - worker.placeless_since > WARM_SLOW_SECONDS:
            needs = needed(self._pools[worker.pool])
            what = f"{worker.name} waits for a place: no machine has {needs} free for each of its ranks"
            self._alarms.ring(AlarmCode.WORKER_SLOW, worker.name, what)

    def _ask(self, worker: WorkerStatus, now: float) -> None:
        asking, settings = Asking(worker.name), self._pools[worker.pool]
        silence = now - worker.asked_at
        if not self._pending_calls.under_way(asking):
            if silence >= settings.heartbeat_seconds or 0.0 < worker.sure_at <= now:
                worker.asked_at = now
                self._pending_calls.send(asking, partial(self._cluster.progress, worker.name))
            return
        limit = settings.lease_seconds if worker.ready else WARM_SILENT_SECONDS
        if self._alarms.rings(AlarmCode.RAY_DOWN):
            return  # that alarm says why, and a new process could not be made
        if worker.ready and silence > min(SILENT_SECONDS, limit):
            what = f"{worker.name} does not answer, and counts as lost {limit:.0f} s after it was asked"
            self._alarms.ring(AlarmCode.WORKER_SILENT, worker.name, what)
            worker.is_silent = True
        if silence > limit:
            log.warning("%s has been silent for %.0f s: replacing it", worker.name, silence)
            self._pending_calls.forget(asking)
            self._pending_calls.forget(Warming(worker.name))
            worker.ready = worker.order is not None
            worker.asked_at = now
            self._replace(worker)

    def take_progress(self, call: Call, pending: Asking) -> None:
        """Prolong the lease of a task that trains, and keep the progress that its worker reports."""
        worker = self.workers[pending.worker]
        order = worker.order
        try:
            progress: Progress = self._cluster.result(call)
        except Unavailable as error:
            if order is None and worker.ready:  # else its pending order shows the failure
                self._is_away(worker, error)
            return
        self._hear(worker, progress.trouble)
        if order is None or progress.token != order.token:
            return
        worker.phase = progress.phase
        if progress.seconds_left == progress.seconds_left:  # else NaN: it does not know
            worker.ends_at = time.time() + progress.seconds_left
        if not isinstance(order, Train):
            return
        self._queue.append_log(order.task_id, progress.log_lines)
        if order.again:
            return
        numbers = {
            name: None if value != value else value
            for name, value in vars(progress).items()
            if name not in ("token", "log_lines", "trouble")
        }
        lease_until = time.time() + self._pools[worker.pool].lease_seconds
        if not self._queue.heartbeat(order.task_id, order.token, lease_until, numbers):
            self._cluster.cancel(worker.name, order.token)

    def _hear(self, worker: WorkerStatus, trouble: OnebasisError | None) -> None:
        """Note that a worker answered; ring an alarm for the trouble that it reports."""
        was_free = worker.is_free
        worker.heard_at, worker.is_silent = time.time(), False
        if worker.sure_at <= worker.asked_at:
            worker.sure_at = 0.0
        if worker.is_free and not was_free:
            self._pending_calls.wake()
        if isinstance(trouble, RankLost):
            self._alarms.ring(AlarmCode.WORKER_SILENT, worker.name, f"{worker.name}: {trouble.what}")
            return
        self._alarms.end(AlarmCode.WORKER_SILENT, worker.name)
        if trouble is not None:
            self._alarms.ring_for(trouble, worker.name)

    def _is_away(self, worker: WorkerStatus, error: OnebasisError) -> None:
        if worker.ready:
            log.warning("%s is away: %s", worker.name, error)
            self._doubt_all()
        worker.ready, worker.is_silent = False, False
        worker.loads_since = worker.loads_since or time.time()
        self._pending_calls.later(f"warm:{worker.name}")

    # --- how many workers --------------------------------------------------------------------------------------

    def recall(self, worker: str) -> None:
        """Start a worker again that a task was given to. Its pool is in the settings."""
        self._start(worker)

    def resize(
        self,
        wanted: Mapping[str, int],
        claimed: Collection[str] = (),
        growth: Mapping[str, int] | None = None,
        ends: Sequence[str] = (),
    ) -> None:
        """Start workers that there is something to do for, and end idle ones; see `scheduling.pools.resized`.

        Args:
            wanted: Pool to the workers that it could use beside those at work.
            claimed: Workers that tasks wait for because they had them before.
            growth: Pool to the workers that it may start; those that are not named start as many as they want.
            ends: Workers without an order whose room is another pool's.
        """
        now = time.time()
        for one in ends:
            self._end(one, "a task that is before others waits for its room")
        for name, settings in self._pools.items():
            seats = [self._seat(worker, claimed) for worker in self.of(name)]
            taken = [drain.what for drain in self.drains if not drain.is_node and pool_of(drain.what) == name]
            starts_max = (growth or {}).get(name)
            change = resized(name, settings, seats, wanted.get(name, 0), now, taken, starts_max)
            for worker in change.starts:
                self._start(worker)
            for worker in change.ends:
                self._end(worker)
            if (at := ends_at(settings, seats)) is not None and len(seats) > settings.min and at > now:
                self._pending_calls.not_before(f"idle:{name}", at)

    def on_machines(self, idle: Collection[str], claimed: Collection[str]) -> list[Worker]:
        """The workers that are not drained, with the machines that they are on; without those of which that is not
        known.

        Args:
            idle: Names of those that have nothing to do.
            claimed: Names of those that tasks wait for because they had them before: none of them is taken back.
        """
        now = time.time()
        return [
            Worker(
                name=worker.name,
                pool=worker.pool,
                machines=() if worker.is_placeless else worker.machines or (),
                is_idle=worker.name in idle,
                ends_in=None if worker.ends_at is None else max(0.0, worker.ends_at - now),
            )
            for worker in self.workers.values()
            if worker.drain is None
            and (worker.machines or (worker.is_placeless and worker.order is None and worker.name not in claimed))
        ]

    def look_at_drains(self) -> list[tuple[Train, Failed]]:
        """Read what people have drained, and note it on the workers that it is about. Those that wait for a place, and
        were asked for while other machines were drained, are ended, for Ray will never place them elsewhere; they are
        asked for anew where there is something to do for them.

        Returns:
            Orders to train that such a worker had and had not begun, as it waited for places for its ranks.
        """
        self.drains = self._queue.drains()
        self._drained = frozenset(drain.what for drain in self.drains if drain.is_node)
        self._cluster.avoid(self._drained)
        for worker in self.workers.values():
            about = {worker.name, *(worker.machines or ())}
            names = ((drain, drain.what in about) for drain in self.drains)
            worker.drain = next((drain for drain, is_meant in names if is_meant), None)
        back = []
        for worker in [one for one in self.workers.values() if one.is_placeless and one.avoids != self._drained]:
            if isinstance(order := worker.order, Train):
                what = f"{worker.name} waited for places, and is asked for anew: other machines are drained now"
                back.append((order, Failed(token=order.token, fault="preempted", message=what, worker_seconds=0.0)))
            self._end(worker.name, "it waits for a place, and other machines are drained now")
        return back

    def room(self) -> dict[str, dict[str, float]]:
        """What is free on each machine that is not drained."""
        return self._cluster.room()

    def drains_of(self, pool: str) -> list[Drain]:
        """The drains for which no worker of a pool is ready and none will be; none where another is, or may come.

        By name each worker that there may be is drained; or those that the pool asked for wait for a place, and
        machines that have room for them are drained.
        """
        settings, workers = self._pools[pool], self.of(pool)
        if any(worker.ready and worker.drain is None for worker in workers):
            return []
        names = [drain for drain in self.drains if not drain.is_node and pool_of(drain.what) == pool]
        if len(names) >= settings.max:
            return names
        left = [worker for worker in workers if worker.drain is None]
        if not left or not all(worker.is_placeless for worker in left):
            return []
        able = self._cluster.large_enough(pool, self._drained) if self._drained else ()
        machines = [drain for drain in self.drains if drain.is_node and drain.what in able]
        return [*machines, *names] if machines else []

    def load_seconds(self, pool: str) -> float | None:
        """Seconds that a worker of a pool takes until it is ready, once it has a place; None: none has loaded yet."""
        loads = self._loads.get(pool)
        return statistics.median(list(loads)) if loads else None

    def describe(self) -> dict[str, PoolStatus]:
        """Pool to what its workers do."""
        return {name: PoolStatus(settings, tuple(self.of(name))) for name, settings in self._pools.items()}

    def _seat(self, worker: WorkerStatus, claimed: Collection[str]) -> Seat:
        is_idle = worker.order is None and worker.name not in claimed
        return Seat(
            name=worker.name,
            idle_since=worker.idle_since if is_idle else None,
            loads=worker.is_loading,
            ends=worker.drain is not None,
        )

    def _start(self, name: str) -> None:
        log.info("starting %s", name)
        self._cluster.start_worker(name)
        self._add(name, self._drained)

    def _add(self, name: str, avoids: frozenset[str] | None) -> None:
        now = time.time()
        self.workers = self.workers | {name: WorkerStatus(name, started_at=now, idle_since=now, avoids=avoids)}

    def _replace(self, worker: WorkerStatus) -> None:
        self._cluster.replace(worker.name)
        worker.avoids = self._drained

    def _end(self, name: str, why: str = "it has nothing to do") -> None:
        log.info("ending %s: %s", name, self.workers[name].drain or why)
        self.workers = {other: worker for other, worker in self.workers.items() if other != name}
        for pending in (Asking(name), Warming(name), AskingForEnd(name), Ordered(name)):
            self._pending_calls.forget(pending)
        self._alarms.end_all(name, *AlarmCode)
        self._cluster.end_worker(name)

    def _doubt_all(self) -> None:
        """A machine was lost: no worker gets an order before it has shown that it was not on it."""
        for worker in self.workers.values():
            worker.sure_at = time.time() + SURE_SECONDS


class ModelWorkers:
    """The workers of one base model: those that can do something for a version of its subspace."""

    def __init__(self, pool: WorkerPool, base_model: str) -> None:
        self._pool = pool
        self._base_model = base_model

    @property
    def base_model(self) -> str:
        """Name of the base model."""
        return self._base_model

    @property
    def workers(self) -> list[WorkerStatus]:
        return self._mine(self._pool.workers.values())

    @property
    def layout(self) -> BaseLayout | None:
        """What the first warm worker reported of the base model; None before that."""
        return self._pool.layouts.get(self._base_model)

    @property
    def orders(self) -> list[Order]:
        """Orders that are under way."""
        return [worker.order for worker in self.workers if worker.order is not None]

    def free_workers(self) -> list[WorkerStatus]:
        return self._mine(self._pool.free_workers())

    def unclaimed_workers(self, live: Sequence[TaskRecord]) -> list[WorkerStatus]:
        """As `WorkerPool.unclaimed_workers`."""
        return self._mine(self._pool.unclaimed_workers(live))

    def _mine(self, workers: Iterable[WorkerStatus]) -> list[WorkerStatus]:
        return [worker for worker in workers if self._pool.base_model_of(worker) == self._base_model]

    def claim(self, worker: WorkerStatus, task_id: str) -> None:
        """As `WorkerPool.claim`."""
        self._pool.claim(worker, task_id)

    def give(self, worker: WorkerStatus, order: Order) -> None:
        """As `WorkerPool.give`."""
        self._pool.give(worker, order)

    def tell(self, worker: WorkerStatus, what: str, token: str) -> None:
        """As `WorkerPool.tell`."""
        self._pool.tell(worker, what, token)


def has_lease(order: Order) -> bool:
    """Whether it is an attempt in a task's life, with a lease of its own; else it is done for a version's sake."""
    return isinstance(order, Train) and not order.again


def is_of_a_version(order: Order) -> bool:
    """Whether a version waits for it."""
    return not isinstance(order, Train) or order.refine_version > 0


def scorings(order: Order) -> tuple[Evaluate, ...]:
    """The scorings of single tasks that an order consists of; none of one that trains."""
    return order.orders if isinstance(order, EvaluateTogether) else (order,) if isinstance(order, Evaluate) else ()


def charged(order: Order) -> tuple[Train | Evaluate, ...]:
    """What of it is charged, each to its own team."""
    return (order,) if isinstance(order, Train) else scorings(order)


def train_order(record: TaskRecord) -> Train:
    """The order to train a task, or to refine it, under the lease that its record holds."""
    refines = record.state is TaskState.REFINING
    return Train(
        token=record.token,
        task_id=record.task_id,
        attempt=record.attempt,
        spec=_refinement(record.spec) if refines else record.spec,
        train_key=record.train_key,
        eval_key="" if refines else record.eval_key,  # refined, it is scored with its version
        revises="" if refines else record.revises,
        earlier_rows={} if refines else keys_of_earlier_rows(record),
        staging_key=staging_key(record.task_id, record.attempt, record.token),
        results_key="" if refines else local_results(record),
        refine_version=record.version if refines else 0,
    )


def keys_of_earlier_rows(record: TaskRecord) -> dict[str, str]:
    """Id of each revision before a task to the key of its evaluation rows, oldest first."""
    return {rows.task_id: rows.eval_key for rows in record.earlier_rows}


def again_order(record: TaskRecord, version: int, tries: int) -> Train:
    """The order to refine a published task in a version of others (`share_full`)."""
    token = f"{version}-{record.task_id}-again-{tries}"
    return Train(
        token=token,
        task_id=record.task_id,
        attempt=record.attempt,
        spec=_refinement(record.spec),
        train_key=record.train_key,
        eval_key="",
        staging_key=staging_key(record.task_id, record.attempt, token),
        refine_version=version,
        again=True,
    )


def _refinement(spec: TaskSpec) -> TaskSpec:
    """The same task, trained for `method.refine_epochs`."""
    length = {"num_train_epochs": spec.method.refine_epochs, "max_steps": -1}
    return spec.model_copy(update={"training": spec.training.model_copy(update=length)})
