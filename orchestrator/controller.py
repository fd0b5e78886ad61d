"""The one loop: take what landed, advance the records, give the next orders.

It holds no truth of its own. What it keeps in memory (orders under way, scores that came in) is asked for again
after a restart: orders are idempotent by token, merges by operation key.

Merging waits until the version before is judged, and then takes every task that waits in one version (group
commit). So there is at most one unjudged candidate, and refusing it is one record. A group that the gate refuses
is merged again one by one, which shows the culprit. Tasks that ask for it are refined between merging and judging: one
more version, with the same basis and their coefficients alone replaced; it is that one which is judged.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from configs.errors import Conflict, Corrupt, InvalidInput, NotFound, OnebasisError, Unavailable
from configs.settings import Settings
from configs.task_spec import TaskSpec
from orchestrator.cluster import Cluster, Flight, MachineLost
from orchestrator.fair_share import HALF_LIFE_SECONDS, Waiting, decayed_use, running_order
from orchestrator.gate import PairedDifference, judge, paired_difference
from orchestrator.score_table import ScoreTable, evaluations_due, score_table
from orchestrator.task_lifecycle import (
    Claimed,
    Event,
    Judged,
    MergeBegun,
    Merged,
    MergeRefused,
    MergeUndone,
    Refined,
    RefinementRefused,
    Restored,
    RolledBack,
    Step,
    TrainingDone,
    TrainingFailed,
    needs_training_rows,
    next_step,
)
from orchestrator.task_queue import LOG, TaskQueue
from orchestrator.task_record import TaskRecord, TaskState, results_key, staging_key
from subspace_store import StagedAdapter, Storage, SubspaceStore, digest
from subspace_store.version import CANDIDATE, MAIN, SubspaceState, TaskScore
from workers.orders import BaseLayout, Evaluate, Evaluated, Failed, Progress, Train, Trained
from workers.results import read_results

log = logging.getLogger("onebasis.controller")

POLL_SECONDS = 0.02
"""Longest wait for something to land before the queue is looked at: keeps submit-to-start short."""
IDLE_SECONDS = 0.2
RETRY_SECONDS = 1.0
EVALUATION_TRIES = 3
PREEMPT_SECONDS = 60.0
"""Longest wait for the checkpoints of what trains when the service ends: a step, and an upload."""
HELD_SECONDS = 5.0
"""While `main` is held the log is read this often: somebody may release it without telling this process."""


@dataclass
class Seat:
    """A worker as the controller sees it now."""

    name: str
    ready: bool = False
    order: Train | Evaluate | None = None
    asked_at: float = 0.0
    """When it was last asked what it does."""
    error: str = ""
    """Why its base model cannot be loaded."""
    told: tuple[str, str] = ("", "")
    """(`cancel` or `preempt`, token): the last that it was told to stop."""


@dataclass(frozen=True)
class Errand:
    """What a flight was sent for."""

    kind: str
    """`warm`, `order`, `progress`, `merge`, `refine`, `scores`, `verdict`."""
    seat: Seat | None = None
    task_ids: tuple[str, ...] = ()
    version: int = 0


class Controller:
    """Owns the loop. One per service; `run` it in a thread."""

    def __init__(
        self,
        settings: Settings,
        queue: TaskQueue,
        storage: Storage,
        store: SubspaceStore,
        cluster: Cluster,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            store: A reader; writing goes through the cluster's store actor.
            changed: Called when there is something new to report.
        """
        self._settings = settings
        self._queue = queue
        self._storage = storage
        self._store = store
        self._cluster = cluster
        self._changed = changed
        self._seats = [Seat(name) for name in cluster.workers]
        self._flights: dict[Flight, Errand] = {}
        self._scores: dict[int, dict[str, TaskScore]] = {}
        self._failed_evaluations: dict[int, list[str]] = {}
        self._lost_evaluations: Counter[int] = Counter()
        self._not_before: dict[str, float] = {}
        self._started_at = time.time()
        self._awake = threading.Event()
        self._log_moved = threading.Event()
        self._main_followed = -1
        self._tidy = False
        self.wake(log_moved=True)
        self.alarm = ""
        """Why nothing is merged or published any more; empty while all is well."""
        self.layout: BaseLayout | None = None
        """What the first warm worker said of the base model; None before that."""
        self.healthy_at = 0.0
        """Unix time of the last step that went through."""

    @property
    def ready_workers(self) -> int:
        """Workers whose base model is loaded."""
        return sum(seat.ready for seat in self._seats)

    @property
    def free_workers(self) -> int:
        return sum(seat.ready and seat.order is None for seat in self._seats)

    def describe_workers(self) -> dict[str, str]:
        """Worker to what it does, for people."""
        return {seat.name: _describe(seat) for seat in self._seats}

    def wake(self, log_moved: bool = False) -> None:
        """Something changed that the loop should look at now; `log_moved`: in the version log too. Thread-safe."""
        if log_moved:
            self._log_moved.set()
        self._awake.set()

    def run(self, stop: threading.Event) -> None:
        """Step until told to stop. A step that fails is logged and tried again: the truth is in the records."""
        for seat in self._seats:
            self._send(Errand("warm", seat), partial(self._cluster.warm, seat.name))
        while not stop.is_set():
            try:
                self.step()
                self.healthy_at = time.time()
            except Unavailable as error:
                log.warning("will retry: %s", error)
                stop.wait(RETRY_SECONDS)
                self.wake()
            except Exception:
                log.exception("a step failed; it is tried again")
                stop.wait(RETRY_SECONDS)
                self.wake()
        try:
            self._preempt_all()
        except Exception:
            log.exception("what trains goes on from its last checkpoint")

    def _preempt_all(self) -> None:
        """Have everything that trains write a checkpoint, and wait until it has; nothing new is begun.

        What does not answer in time is still its worker's by the records, and goes on from an older checkpoint.
        """
        training = [seat for seat in self._seats if isinstance(seat.order, Train)]
        for seat in training:
            assert seat.order is not None
            self._tell(seat, "preempt", seat.order.token)
        until = time.monotonic() + PREEMPT_SECONDS
        while any(seat.order is not None for seat in training) and time.monotonic() < until:
            for flight in self._cluster.landed(list(self._flights), POLL_SECONDS):
                self._take(flight, self._flights.pop(flight))
        log.info("%d of %d that trained were stopped", sum(seat.order is None for seat in training), len(training))

    def step(self) -> None:
        """One turn: what landed, who is alive, what is next."""
        if not self._tidy:
            self._delete_leftovers()
            self._tidy = True
        for flight in self._landed():
            errand = self._flights.pop(flight)
            self._take(flight, errand)
            if errand.kind != "progress":
                self.wake()
        self._listen()
        if not self._awake.is_set() and not self._due_again():
            return
        self._awake.clear()
        if self._log_moved.is_set():
            self._log_moved.clear()
            try:
                self._store.refresh()
                self._follow_main()
            except Exception:
                self._log_moved.set()  # an old state must not be acted upon: it would undo what was just merged
                raise
        live = self._queue.live()
        self._merge([r for r in live if next_step(r) is Step.MERGE], live)
        self._refine([r for r in live if r.state in (TaskState.REFINING, TaskState.EVALUATING)])
        self._judge([r for r in live if next_step(r) is Step.JUDGE], live)
        self._resume([r for r in live if next_step(r) is Step.AWAIT_ADAPTER])
        self._train(live)

    # --- what landed -------------------------------------------------------------------------------------------

    def _landed(self) -> list[Flight]:
        if not self._flights:
            self._awake.wait(IDLE_SECONDS)
            return []
        return self._cluster.landed(list(self._flights), 0.0 if self._awake.is_set() else POLL_SECONDS)

    def _take(self, flight: Flight, errand: Errand) -> None:
        take = {
            "warm": self._take_warm,
            "order": self._take_order,
            "progress": self._take_progress,
            "merge": self._take_merge,
            "refine": self._take_store_call,
            "scores": self._take_store_call,
            "verdict": self._take_store_call,
        }[errand.kind]
        take(flight, errand)

    def _take_warm(self, flight: Flight, errand: Errand) -> None:
        assert errand.seat is not None
        try:
            self.layout = self._cluster.result(flight)
            errand.seat.ready, errand.seat.error = True, ""
            log.info("%s is warm", errand.seat.name)
            self._changed()
        except MachineLost as error:
            log.warning("%s is away: %s", errand.seat.name, error)
            self._later(f"warm:{errand.seat.name}")
        except OnebasisError as error:
            log.error("%s cannot load the base model: %s", errand.seat.name, error)
            errand.seat.error = str(error)
            self._later(f"warm:{errand.seat.name}", 30 * RETRY_SECONDS)

    def _take_order(self, flight: Flight, errand: Errand) -> None:
        assert errand.seat is not None
        seat, order = errand.seat, errand.seat.order
        assert order is not None
        seat.order = None
        try:
            outcome = self._cluster.result(flight)
        except MachineLost as error:
            seat.ready = False
            self._later(f"warm:{seat.name}")
            outcome = Failed(order.token, "lost", f"{seat.name} was lost: {error.what}")
        except Unavailable as error:
            # The worker is well, the storage was away. That is nobody's fault and no budget pays for it: the worker
            # has forgotten the order, and what is owed is read off the records again in a moment.
            log.warning("%s: order %s is given again: %s", seat.name, order.token, error)
            self._later(f"order:{seat.name}")
            return
        except Exception as error:
            log.exception("%s: order %s failed outside the worker's own handling", seat.name, order.token)
            outcome = Failed(order.token, "lost", f"{seat.name}: {error}")
        if isinstance(order, Train):
            self._finish_training(order, outcome)
        else:
            self._finish_evaluation(order, outcome)

    def _finish_training(self, order: Train, outcome: object) -> None:
        now = time.time()
        event: Event
        assert isinstance(outcome, Trained | Failed)
        self._queue.append_log(order.task_id, outcome.log_lines)
        if isinstance(outcome, Trained):
            event = TrainingDone(outcome, now)
        else:
            event = TrainingFailed(order.token, outcome.fault, outcome.message, now)
            if outcome.detail:
                log.error("task %s: %s\n%s", order.task_id, outcome.message, outcome.detail)
                self._queue.append(order.task_id, [(LOG, line) for line in outcome.detail.splitlines()])
        record = self._queue.apply(order.task_id, event)
        if not needs_training_rows(record):
            # Strict continual learning: training data is never read again once its task is trained (and refined, if it
            # asks for that) or given up.
            tidy, self._tidy = self._tidy, False
            self._delete_leftovers(f"{order.task_id}/")
            self._tidy = tidy
        self._changed()

    def _delete_leftovers(self, of: str = "") -> None:
        """Files that no task needs any more: of one task, or of all that went on while control plane or storage were
        away."""
        files = [key for place in ("data", "staging", "results") for key in self._storage.keys(f"{place}/{of}")]
        records = {record.task_id: record for record in self._queue.tasks()}
        for key in files:
            record = records.get(key.split("/")[1])  # those of tasks that nobody knows stay
            if record is not None and _is_done_with(record, key):
                self._storage.delete(key)

    def _finish_evaluation(self, order: Evaluate, outcome: object) -> None:
        if isinstance(outcome, Evaluated):
            score = TaskScore(order.task_id, outcome.score, outcome.count)
            self._scores.setdefault(order.version, {})[order.task_id] = score
        elif isinstance(outcome, Failed) and outcome.fault == "lost":
            self._lost_evaluations[order.version] += 1  # under another token: a gang remembers what it answered to this
            log.warning("evaluation of %s at version %d is given out again", order.task_id, order.version)
        elif isinstance(outcome, Failed):
            self._failed_evaluations.setdefault(order.version, []).append(f"{order.task_id}: {outcome.message}")
            log.warning("evaluation of %s at version %d failed: %s", order.task_id, order.version, outcome.message)

    def _take_progress(self, flight: Flight, errand: Errand) -> None:
        assert errand.seat is not None
        seat = errand.seat
        try:
            progress: Progress = self._cluster.result(flight)
        except Unavailable as error:
            if seat.order is None:  # else the order's own flight tells
                log.warning("%s is away: %s", seat.name, error)
                seat.ready = False
                self._later(f"warm:{seat.name}")
            return
        order = seat.order
        if order is None or progress.token != order.token or not isinstance(order, Train):
            return
        numbers = {
            name: None if value != value else value
            for name, value in vars(progress).items()
            if name not in ("token", "log_lines")
        }
        lease_until = time.time() + self._settings.workers.lease_seconds
        if not self._queue.heartbeat(order.task_id, order.token, lease_until, numbers):
            self._cluster.cancel(seat.name, order.token)
        self._queue.append_log(order.task_id, progress.log_lines)

    def _take_merge(self, flight: Flight, errand: Errand) -> None:
        ids = errand.task_ids
        try:
            version = self._cluster.result(flight)
        except Corrupt as error:
            self._sound_alarm(error)
            return
        except (InvalidInput, NotFound) as error:
            alone = len(ids) == 1
            message, self._tidy = str(error), False
            self._apply(ids, MergeRefused(message, time.time()) if alone else MergeUndone(message, alone=True))
            return
        except Conflict as error:
            # Another writer took over (a rollback from outside, a second service): ours must open anew.
            log.warning("the store refused the merge: %s", error)
            self._cluster.replace_store()
            self._later("store")
            return
        except Exception as error:
            # Nobody knows whether it is in: the same operation key is asked again and answers either way.
            log.warning("the merge's outcome is unknown, asking again: %s", error)
            self._later("store")
            return
        self.wake(log_moved=True)
        self._apply(ids, Merged(version.number))
        log.info("version %d: merged %s", version.number, ", ".join(ids))

    def _take_store_call(self, flight: Flight, errand: Errand) -> None:
        self.wake(log_moved=True)
        try:
            self._cluster.result(flight)
        except Corrupt as error:
            self._sound_alarm(error)
        except Conflict as error:
            log.warning("version %d: %s: %s", errand.version, errand.kind, error)
            self._cluster.replace_store()
            self._later("store")
        except Exception as error:
            if errand.kind == "refine" and isinstance(error, InvalidInput | NotFound):
                self._refuse_refinement(errand, error)
                return
            log.warning("version %d: %s will be asked again: %s", errand.version, errand.kind, error)
            self._later("store")

    def _refuse_refinement(self, errand: Errand, error: OnebasisError) -> None:
        """Its task goes on as it was merged; the store names it, and the others are asked for again without it."""
        if self._store.refresh().refs[CANDIDATE] == errand.version:  # else the adapters are well, the version is gone
            culprits = tuple(task_id for task_id in errand.task_ids if f"({task_id})" in error.where)
            self._apply(culprits or errand.task_ids, RefinementRefused(str(error)))
            self._tidy = False

    def _sound_alarm(self, error: Corrupt) -> None:
        """Stored bytes are not what was written: nothing is written any more until a person has looked."""
        self.alarm = str(error)
        log.critical("the store is damaged, nothing will be merged or published: %s", error)

    # --- who is alive ------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        """Heartbeats: ask every worker what it does; one that does not answer for a whole lease is replaced.

        The silence is counted from the question. Counted from the last answer, a loop that was itself held up (by a
        slow storage, a suspended machine) would take its own absence for that of all its workers.
        """
        now = time.time()
        for seat in self._seats:
            if seat.ready and now - seat.asked_at >= self._settings.workers.heartbeat_seconds:
                if not self._under_way("progress", seat):
                    seat.asked_at = now
                    self._send(Errand("progress", seat), partial(self._cluster.progress, seat.name))
                elif now - seat.asked_at > self._settings.workers.lease_seconds:
                    log.warning("%s has been silent for %.0f s: replacing it", seat.name, now - seat.asked_at)
                    self._flights = {f: e for f, e in self._flights.items() if (e.kind, e.seat) != ("progress", seat)}
                    seat.ready = seat.order is not None
                    self._cluster.replace(seat.name)
            if not seat.ready and not self._under_way("warm", seat) and self._may(f"warm:{seat.name}"):
                self._send(Errand("warm", seat), partial(self._cluster.warm, seat.name))

    # --- what is next ------------------------------------------------------------------------------------------

    def _merge(self, merging: Sequence[TaskRecord], live: Sequence[TaskRecord]) -> None:
        unjudged = any(record.state in (TaskState.REFINING, TaskState.EVALUATING) for record in live)
        if not merging or unjudged or self._writing() or not self._may("store"):
            return
        begun = next((record.merge_key for record in merging if record.merge_key), "")
        group = [record for record in merging if record.merge_key == begun] if begun else self._next_group(merging)
        ids = tuple(record.task_id for record in group)
        if not begun:
            if self._drop_orphan() or self._know_again(group):
                return
            begun = f"merge:{secrets.token_hex(8)}"
            if not self._apply(ids, MergeBegun(begun)):
                return
        staged = [StagedAdapter(r.task_id, r.title, r.staging_key, r.adapter_sha256) for r in group]
        self._send(
            Errand("merge", task_ids=ids),
            lambda: self._cluster.store("merge", staged, op_key=begun, actor="controller"),
        )

    def _drop_orphan(self) -> bool:
        """Whether a candidate that no task waits for (a lost database) had to be refused first."""
        refs = self._store.state.refs
        orphan = refs[CANDIDATE] != refs[MAIN]
        if orphan:
            self._send_verdict(refs[CANDIDATE], False, "no task waits for it")
        return orphan

    def _know_again(self, group: Sequence[TaskRecord]) -> bool:
        """Whether some were in the candidate already: the database is older than the log, as after a restore."""
        held = self._store.state.births(self._store.state.refs[CANDIDATE])
        known = [record for record in group if record.task_id in held]
        for record in known:
            self._apply((record.task_id,), Merged(held[record.task_id]))
        return bool(known)

    def _next_group(self, merging: Sequence[TaskRecord]) -> list[TaskRecord]:
        """Everything that waits, in one version; those whose group failed one by one, each when it is the oldest."""
        if merging[0].merge_alone:
            return [merging[0]]
        return [record for record in merging if not record.merge_alone]

    def _refine(self, group: Sequence[TaskRecord]) -> None:
        """Bring the candidate's tasks through their refinement; those of its group that ask for none wait."""
        refining = [record for record in group if record.state is TaskState.REFINING]
        if not refining or self._writing() or not self._may("store"):
            return
        state, version = self._store.state, refining[0].version
        ids = tuple(record.task_id for record in group if record.version == version)
        line = state.lineage(state.refs[CANDIDATE])
        made = next((v.number for v in line if v.parent == version and v.refined), None)
        ready = [record for record in refining if next_step(record) is Step.MERGE_REFINED]
        if made is not None:
            self._apply(ids, Refined(made))
            self._tidy = False
        elif version not in (v.number for v in line):
            self._apply(ids, MergeUndone("a rollback came in between", alone=False))
        elif state.refs[CANDIDATE] != version:  # a database that is older than the log
            refused = RefinementRefused(f"version {version} went on without it")
            self._apply(tuple(record.task_id for record in refining), refused)
        elif len(ready) == len(refining):
            staged = [StagedAdapter(r.task_id, r.title, r.refined_key, r.refined_sha256) for r in ready]
            key = f"refine:{version}:{digest(repr(staged).encode())[:16]}"
            self._send(
                Errand("refine", task_ids=tuple(r.task_id for r in ready), version=version),
                lambda: self._cluster.store("refine", staged, op_key=key, actor="controller"),
            )
        else:
            waiting = [record for record in refining if next_step(record) is Step.REFINE]
            for seat, record in zip(self._unclaimed_seats(refining), waiting, strict=False):
                self._claim(seat, record)

    def _judge(self, evaluating: Sequence[TaskRecord], live: Sequence[TaskRecord]) -> None:
        """Bring the candidate's tasks one step nearer to a verdict; what is missing is read off the log."""
        refining = any(record.state is TaskState.REFINING for record in live)
        if not evaluating or refining or not self._may("store"):
            return
        version = evaluating[0].version
        state = self._store.state
        ids = tuple(record.task_id for record in evaluating if record.version == version)
        on_main = any(v.number == version for v in state.lineage(state.refs[MAIN]))
        if on_main or version in state.published:
            self._apply(ids, Judged(True, f"published in version {version}", time.time()))
            if not on_main:
                # Rolled back before this was seen: to be parked like all that vanish, not to be merged again.
                self._main_followed = -1
                self.wake(log_moved=True)
        elif version in state.rejected:
            self._refused(ids, state.rejected[version])
        elif state.refs[CANDIDATE] != version:
            self._apply(ids, MergeUndone("a rollback came in between", alone=False))
        else:
            if not self._writing():
                self._score_or_decide(version)
            return
        self._scores.pop(version, None)
        self._failed_evaluations.pop(version, None)
        del self._lost_evaluations[version]
        self._tidy = False
        self._changed()
        self.wake()

    def _refused(self, ids: tuple[str, ...], reason: str) -> None:
        if len(ids) > 1:
            self._apply(ids, MergeUndone(f"its group failed the gate: {reason}", alone=True))
        else:
            self._apply(ids, Judged(False, reason, time.time()))

    def _score_or_decide(self, version: int) -> None:
        state, drift_min = self._store.state, self._settings.gate.drift_min
        records = self._records(state.tasks_at(version))
        found = self._scores.get(version, {})
        due = [
            task_id
            for task_id in evaluations_due(state, version, drift_min)
            if task_id in records and records[task_id].eval_key
        ]
        failures = self._failed_evaluations.get(version, [])
        if len(failures) >= EVALUATION_TRIES:
            self._send_verdict(version, False, f"it could not be scored: {failures[-1]}")
        elif missing := [task_id for task_id in due if task_id not in found]:
            self._send_evaluations(version, [records[task_id] for task_id in missing])
        elif due:
            scores = [found[task_id] for task_id in due]
            # With what was written before in it: a restart with a lower gate.drift_min asks for more scores.
            key = f"scores:{version}:{len(state.scores.get(version, {}))}"
            self._send(
                Errand("scores", version=version),
                lambda: self._cluster.store("record_scores", version, scores, op_key=key, actor="controller"),
            )
        else:
            table = score_table(state, version, drift_min)
            decision = judge(table, version, records, self._settings.gate)
            if not decision.passed:  # the rows that made the difference are read for those who are told of it alone
                paired = _paired_differences(self._storage, table, version)
                decision = judge(table, version, records, self._settings.gate, paired)
            if decision.passed and state.held is not None:
                self._log_moved.set()
                self._later("held", HELD_SECONDS)
            else:
                self._send_verdict(version, decision.passed, decision.summary)

    def _send_verdict(self, version: int, passed: bool, reason: str) -> None:
        errand = Errand("verdict", version=version)
        if passed:
            key = f"publish:{version}"
            self._send(errand, lambda: self._cluster.store("publish", version, op_key=key, actor="gate"))
        else:
            key = f"reject:{version}"
            self._send(errand, lambda: self._cluster.store("reject", version, reason, op_key=key, actor="gate"))

    def _send_evaluations(self, version: int, missing: Sequence[TaskRecord]) -> None:
        flying = {
            seat.order.task_id
            for seat in self._seats
            if isinstance(seat.order, Evaluate) and seat.order.version == version
        }
        waiting = [record for record in missing if record.task_id not in flying]
        for seat, record in zip(self._free_seats(), waiting, strict=False):
            tries = len(self._failed_evaluations.get(version, [])) + self._lost_evaluations[version]
            token = f"{version}-{record.task_id}-{tries}"
            results = results_key(record.task_id, version)
            self._order(seat, Evaluate(token, record.task_id, version, record.spec, record.eval_key, results))

    def _resume(self, training: Sequence[TaskRecord]) -> None:
        """Orders that ran when an earlier control plane died are given again under their token."""
        busy = {seat.order.token for seat in self._seats if seat.order}
        by_name = {seat.name: seat for seat in self._seats}
        for record in training:
            seat = by_name.get(record.worker)
            if record.token in busy:
                if seat is not None and (record.cancel_requested or record.preempt_requested):
                    self._tell(seat, "cancel" if record.cancel_requested else "preempt", record.token)
            elif seat is None:
                failed = TrainingFailed(record.token, "lost", f"{record.worker} is no longer there", time.time())
                self._queue.apply(record.task_id, failed)
                self.wake()
            elif seat in self._free_seats():
                self._order(seat, _train_order(record))
            elif not seat.ready:
                self._wait_for_a_lease(record)

    def _tell(self, seat: Seat, what: str, token: str) -> None:
        """Tell a worker to stop, once for each time that it got the order."""
        if seat.told != (what, token):
            seat.told = (what, token)
            (self._cluster.cancel if what == "cancel" else self._cluster.preempt)(seat.name, token)

    def _wait_for_a_lease(self, record: TaskRecord) -> None:
        """A worker that had the task before this control plane began, and is not back: give it one lease."""
        until = max(self._started_at, record.claimed_at or 0.0) + self._settings.workers.lease_seconds
        if time.time() < until:
            self._not_before.setdefault(f"lease:{record.token}", until)
            return
        failed = TrainingFailed(record.token, "lost", f"{record.worker} did not come back", time.time())
        self._queue.apply(record.task_id, failed)
        self.wake()

    def _train(self, live: Sequence[TaskRecord]) -> None:
        queued = [record for record in live if next_step(record) is Step.TRAIN]
        free = self._unclaimed_seats(live)
        scoring = self._under_way("merge") or any(r.state in (TaskState.REFINING, TaskState.EVALUATING) for r in live)
        if scoring and self._store.state.held is None:
            # A version is about to be scored: keep one worker for it, else it waits for a whole training run.
            busy_scoring = any(seat.order is not None and _is_of_a_version(seat.order) for seat in self._seats)
            free = free if busy_scoring else free[1:]
        if not queued or not free:
            return
        by_id = {record.task_id: record for record in queued}
        for seat, task_id in zip(free, self.running_order(live), strict=False):
            self._claim(seat, by_id[task_id])

    def _claim(self, seat: Seat, record: TaskRecord) -> None:
        claim = Claimed(secrets.token_hex(8), seat.name, time.time())
        if claimed := self._apply((record.task_id,), claim):
            self._order(seat, _train_order(claimed[0]))

    def running_order(self, live: Sequence[TaskRecord]) -> tuple[str, ...]:
        """Ids of the queued tasks in the order in which they would start."""
        now = time.time()
        running: dict[str, int] = {}
        for record in live:
            if record.state is TaskState.TRAINING:
                running[record.team] = running.get(record.team, 0) + 1
        waiting = [
            Waiting(r.task_id, r.team, r.spec.priority, r.submitted_at) for r in live if r.state is TaskState.QUEUED
        ]
        use = decayed_use(self._queue.uses(since=now - 10 * HALF_LIFE_SECONDS), now)
        return running_order(waiting, use, running, {t: s.weight for t, s in self._settings.teams.items()})

    def _follow_main(self) -> None:
        """Tasks that `main` no longer holds are parked; those that it holds again, or since another version because it
        was made again without a task, are published there."""
        state = self._store.state
        if state.refs[MAIN] == self._main_followed:
            return
        held = state.births(state.refs[MAIN])
        now = time.time()
        for record in self._queue.tasks((TaskState.PUBLISHED, TaskState.PARKED)):
            if record.state is TaskState.PUBLISHED and record.task_id not in held:
                self._apply((record.task_id,), RolledBack(_why_it_vanished(state, record), now))
                self._changed()
            elif record.version and record.task_id in held:
                birth = held[record.task_id]
                if record.state is TaskState.PARKED or record.version != birth:
                    self._apply((record.task_id,), Restored(f"main holds it since version {birth}", birth))
                    self._changed()
        self._main_followed = state.refs[MAIN]

    # --- helpers -----------------------------------------------------------------------------------------------

    def _records(self, task_ids: Mapping[str, object]) -> dict[str, TaskRecord]:
        """One query, not one for each task. Missing where the database is younger than the store: not to be scored."""
        return {record.task_id: record for record in self._queue.tasks() if record.task_id in task_ids}

    def _free_seats(self) -> list[Seat]:
        return [seat for seat in self._seats if seat.ready and seat.order is None and self._may(f"order:{seat.name}")]

    def _unclaimed_seats(self, live: Sequence[TaskRecord]) -> list[Seat]:
        """Free ones that no task waits for to be taken up again."""
        claimed = {record.worker for record in live if next_step(record) is Step.AWAIT_ADAPTER}
        return [seat for seat in self._free_seats() if seat.name not in claimed]

    def _order(self, seat: Seat, order: Train | Evaluate) -> None:
        # Sent first: an order that could not be sent must not occupy the seat.
        self._send(Errand("order", seat), lambda: self._cluster.run(seat.name, order))
        seat.order, seat.told = order, ("", "")
        seat.asked_at = time.time()

    def _send(self, errand: Errand, start: Callable[[], Flight]) -> None:
        self._flights[start()] = errand

    def _writing(self) -> bool:
        return any(self._under_way(kind) for kind in ("merge", "refine", "scores", "verdict"))

    def _under_way(self, kind: str, seat: Seat | None = None) -> bool:
        return any(e.kind == kind and (seat is None or e.seat is seat) for e in self._flights.values())

    def _apply(self, task_ids: tuple[str, ...], event: Event) -> list[TaskRecord]:
        """Apply, unless somebody (a cancel) came first: then the records are simply read again."""
        self.wake()
        try:
            return self._queue.apply_all(task_ids, event)
        except Conflict as error:
            log.info("read again: %s", error)
            return []

    def _later(self, what: str, seconds: float = RETRY_SECONDS) -> None:
        self._not_before[what] = time.time() + seconds

    def _may(self, what: str) -> bool:
        return time.time() >= self._not_before.get(what, 0.0) and not (what == "store" and self.alarm)

    def _due_again(self) -> bool:
        """Whether something that had to wait may be tried now."""
        now = time.time()
        due = [what for what, at in self._not_before.items() if now >= at]
        for what in due:
            del self._not_before[what]
        return bool(due)


def _is_done_with(record: TaskRecord, key: str) -> bool:
    """Whether a task will never need one of its files again."""
    trained = not needs_training_rows(record)
    if key == record.train_key:
        return trained
    given_up = record.state in (TaskState.REJECTED, TaskState.CANCELLED)
    parked = record.state is TaskState.PARKED
    if key == record.eval_key or key.startswith("results/"):  # needed while a version may be scored that holds the task
        return given_up or (parked and not record.version)
    # In staging: checkpoints until it is trained, the adapter until no group can fail that has to be merged again.
    return (
        given_up
        or parked
        or record.state is TaskState.PUBLISHED
        or (trained and key not in (record.staging_key, record.refined_key))
    )


def _paired_differences(storage: Storage, table: ScoreTable, version: int) -> dict[str, PairedDifference]:
    """Task id to how its score under a version differs, row by row, from the one that the gate compares it with."""
    found = {}
    for task_id, cell in table.cells[version].items():
        if cell.measured_at != version:
            continue
        first = next(table.cells[v][task_id].measured_at for v, score in table.column(task_id) if score == score)
        before = 0 if table.birth[task_id] == version else first  # 0: with its own adapter, before merging
        try:
            early, late = (read_results(storage, results_key(task_id, number)) for number in (before, version))
        except (NotFound, Corrupt):
            continue  # a score from before results were kept
        if early.comparable(late):
            found[task_id] = paired_difference(early.per_row, late.per_row)
    return found


def _why_it_vanished(state: SubspaceState, record: TaskRecord) -> str:
    main = state.refs[MAIN]
    without = next((v.number for v in state.lineage(main) if record.task_id in v.removed), None)
    if without is not None:
        return f"removed from the subspace: version {without} was made again without it; submit it again to merge it"
    # Its version of birth, unless that one was made on the way to another without a task: no gate let it pass.
    usable = (n for n in state.published if n >= record.version and n not in state.expired)
    back = next((n for n in usable if record.task_id in state.tasks_at(n)), record.version)
    return (
        f"main was rolled back to version {main}, before this task's {record.version}; "
        f"`onebasis rollback {back}` brings it back, or submit it again"
    )


def _describe(seat: Seat) -> str:
    match seat.order:
        case Train(task_id=task_id, refine_version=version):
            return f"refining {task_id} at version {version}" if version else f"training {task_id}"
        case Evaluate(task_id=task_id, version=version):
            return f"scoring {task_id} at version {version}"
    return "free" if seat.ready else (seat.error or "loading the base model")


def _is_of_a_version(order: Train | Evaluate) -> bool:
    """Whether a version waits for it."""
    return isinstance(order, Evaluate) or order.refine_version > 0


def _refinement(spec: TaskSpec) -> TaskSpec:
    """The same task, trained for `method.refine_epochs`."""
    length = {"num_train_epochs": spec.method.refine_epochs, "max_steps": -1}
    return spec.model_copy(update={"training": spec.training.model_copy(update=length)})


def _train_order(record: TaskRecord) -> Train:
    refines = record.state is TaskState.REFINING
    return Train(
        token=record.token,
        task_id=record.task_id,
        attempt=record.attempt,
        spec=_refinement(record.spec) if refines else record.spec,
        train_key=record.train_key,
        eval_key="" if refines else record.eval_key,  # refined, it is scored with its version
        staging_key=staging_key(record.task_id, record.attempt, record.token),
        results_key=results_key(record.task_id) if record.eval_key and not refines else "",
        refine_version=record.version if refines else 0,
    )
