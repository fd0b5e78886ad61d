"""The one unjudged version: from the tasks that wait to be merged to the gate's verdict.

Merging waits until the version before is judged, and then takes every task that waits in one version (group
commit). So there is at most one unjudged candidate, and refusing it is one record. A group that the gate refuses
is merged again one by one, which shows the culprit. Tasks that ask for it are refined between merging and judging: one
more version, with the same basis and their coefficients alone replaced; it is that one which is judged.

What is kept in memory (scores that came in) is asked for again after a restart: orders are idempotent by token, merges
by operation key.
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from configs.errors import Conflict, Corrupt, InvalidInput, NotFound, OnebasisError
from configs.settings import Settings
from orchestrator.cluster import Cluster, Flight
from orchestrator.crew import Crew
from orchestrator.errands import Errand, Errands
from orchestrator.gate import PairedDifference, judge, paired_difference
from orchestrator.leftovers import Leftovers
from orchestrator.score_table import ScoreTable, evaluations_due, score_table
from orchestrator.task_lifecycle import (
    Event,
    Judged,
    MergeBegun,
    Merged,
    MergeRefused,
    MergeUndone,
    Refined,
    RefinementRefused,
    Step,
    next_step,
)
from orchestrator.task_queue import TaskQueue
from orchestrator.task_record import TaskRecord, TaskState, results_key
from subspace_store import StagedAdapter, Storage, SubspaceStore, digest
from subspace_store.version import CANDIDATE, MAIN, TaskScore
from workers.orders import Evaluate, Evaluated, Failed, Outcome
from workers.results import read_results

log = logging.getLogger("onebasis.controller")

EVALUATION_TRIES = 3
HELD_SECONDS = 5.0
"""While `main` is held the log is read this often: somebody may release it without telling this process."""


@dataclass
class Scoring:
    """What the workers said of one version so far."""

    version: int
    scores: dict[str, TaskScore] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    lost: Counter[str] = field(default_factory=Counter)
    """Task id to the machines that were lost while they scored it."""

    @property
    def tries(self) -> int:
        """How many orders brought no score: the next one needs another token, for a worker remembers its answers."""
        return len(self.failures) + self.lost.total()


class Candidate:
    """Brings tasks through merging, refining and judging."""

    def __init__(
        self,
        settings: Settings,
        queue: TaskQueue,
        storage: Storage,
        store: SubspaceStore,
        cluster: Cluster,
        errands: Errands,
        crew: Crew,
        leftovers: Leftovers,
        changed: Callable[[], None],
        main_moved: Callable[[], None],
    ) -> None:
        """
        Args:
            store: A reader; writing goes through the cluster's store actor.
            changed: Called when there is something new to report.
            main_moved: Called when `main` is elsewhere than a task's verdict says.
        """
        self._settings = settings
        self._queue = queue
        self._storage = storage
        self._store = store
        self._cluster = cluster
        self._errands = errands
        self._crew = crew
        self._leftovers = leftovers
        self._changed = changed
        self._main_moved = main_moved
        self._scoring = Scoring(0)
        self.alarm = ""
        """Why nothing is merged or published any more; empty while all is well."""

    def advance(self, live: Sequence[TaskRecord]) -> None:
        """Begin what is next.

        Args:
            live: The tasks that have not ended.
        """
        self._merge([r for r in live if next_step(r) is Step.MERGE], live)
        self._refine([r for r in live if r.state in (TaskState.REFINING, TaskState.EVALUATING)])
        self._judge([r for r in live if next_step(r) is Step.JUDGE], live)

    def is_awaited(self, live: Sequence[TaskRecord]) -> bool:
        """Whether a version is about to be scored, so that a worker should be free for it."""
        unjudged = any(record.state in (TaskState.REFINING, TaskState.EVALUATING) for record in live)
        return (unjudged or self._errands.under_way("merge")) and self._store.state.held is None

    # --- merging ----------------------------------------------------------------------------------------------

    def _merge(self, merging: Sequence[TaskRecord], live: Sequence[TaskRecord]) -> None:
        unjudged = any(record.state in (TaskState.REFINING, TaskState.EVALUATING) for record in live)
        if not merging or unjudged or not self._may_write():
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
        self._errands.send(
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

    # --- refining ---------------------------------------------------------------------------------------------

    def _refine(self, group: Sequence[TaskRecord]) -> None:
        """Bring the candidate's tasks through their refinement; those of its group that ask for none wait."""
        refining = [record for record in group if record.state is TaskState.REFINING]
        if not refining or not self._may_write():
            return
        state, version = self._store.state, refining[0].version
        ids = tuple(record.task_id for record in group if record.version == version)
        line = state.lineage(state.refs[CANDIDATE])
        made = next((v.number for v in line if v.parent == version and v.refined), None)
        ready = [record for record in refining if next_step(record) is Step.MERGE_REFINED]
        if made is not None:
            self._apply(ids, Refined(made))
            self._leftovers.due = True
        elif version not in (v.number for v in line):
            self._apply(ids, MergeUndone("a rollback came in between", alone=False))
        elif state.refs[CANDIDATE] != version:  # a database that is older than the log
            refused = RefinementRefused(f"version {version} went on without it")
            self._apply(tuple(record.task_id for record in refining), refused)
        elif len(ready) == len(refining):
            staged = [StagedAdapter(r.task_id, r.title, r.refined_key, r.refined_sha256) for r in ready]
            key = f"refine:{version}:{digest(repr(staged).encode())[:16]}"
            self._errands.send(
                Errand("refine", task_ids=tuple(r.task_id for r in ready), version=version),
                lambda: self._cluster.store("refine", staged, op_key=key, actor="controller"),
            )
        else:
            waiting = [record for record in refining if next_step(record) is Step.REFINE]
            for seat, record in zip(self._crew.unclaimed_seats(refining), waiting, strict=False):
                self._crew.claim(seat, record)

    # --- judging ----------------------------------------------------------------------------------------------

    def _judge(self, evaluating: Sequence[TaskRecord], live: Sequence[TaskRecord]) -> None:
        """Bring the candidate's tasks one step nearer to a verdict; what is missing is read off the log."""
        refining = any(record.state is TaskState.REFINING for record in live)
        if not evaluating or refining or not self._errands.may("store") or self.alarm:
            return
        version = evaluating[0].version
        state = self._store.state
        ids = tuple(record.task_id for record in evaluating if record.version == version)
        on_main = any(v.number == version for v in state.lineage(state.refs[MAIN]))
        if on_main or version in state.published:
            self._apply(ids, Judged(True, f"published in version {version}", time.time()))
            if not on_main:
                # Rolled back before this was seen: to be parked like all that vanish, not to be merged again.
                self._main_moved()
        elif version in state.rejected:
            self._refused(ids, state.rejected[version])
        elif state.refs[CANDIDATE] != version:
            self._apply(ids, MergeUndone("a rollback came in between", alone=False))
        else:
            if not self._errands.writing:
                self._score_or_decide(version)
            return
        self._scoring = Scoring(0)
        self._leftovers.due = True
        self._changed()
        self._errands.wake()

    def _refused(self, ids: tuple[str, ...], reason: str) -> None:
        if len(ids) > 1:
            self._apply(ids, MergeUndone(f"its group failed the gate: {reason}", alone=True))
        else:
            self._apply(ids, Judged(False, reason, time.time()))

    def _score_or_decide(self, version: int) -> None:
        state, drift_min = self._store.state, self._settings.gate.drift_min
        records = self._records(state.tasks_at(version))
        if self._scoring.version != version:
            self._scoring = Scoring(version)
        found = self._scoring.scores
        due = [
            task_id
            for task_id in evaluations_due(state, version, drift_min)
            if task_id in records and records[task_id].eval_key
        ]
        if hopeless := self._why_hopeless(records):
            self._send_verdict(version, False, f"it could not be scored: {hopeless}")
        elif missing := [task_id for task_id in due if task_id not in found]:
            self._send_evaluations(version, [records[task_id] for task_id in missing])
        elif due:
            scores = [found[task_id] for task_id in due]
            # With what was written before in it: a restart with a lower gate.drift_min asks for more scores.
            key = f"scores:{version}:{len(state.scores.get(version, {}))}"
            self._errands.send(
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
                self._errands.log_moved.set()
                self._errands.later("held", HELD_SECONDS)
            else:
                self._send_verdict(version, decision.passed, decision.summary)

    def _send_verdict(self, version: int, passed: bool, reason: str) -> None:
        errand = Errand("verdict", version=version)
        if passed:
            key = f"publish:{version}"
            self._errands.send(errand, lambda: self._cluster.store("publish", version, op_key=key, actor="gate"))
        else:
            key = f"reject:{version}"
            self._errands.send(errand, lambda: self._cluster.store("reject", version, reason, op_key=key, actor="gate"))

    def _why_hopeless(self, records: Mapping[str, TaskRecord]) -> str:
        """Why the version will never have its scores; empty while it may."""
        if len(self._scoring.failures) >= EVALUATION_TRIES:
            return self._scoring.failures[-1]
        lost_max = self._settings.failures.lost_machines_max
        worst = max(self._scoring.lost, key=self._scoring.lost.__getitem__, default="")
        if self._scoring.lost[worst] <= lost_max:
            return ""
        return f"{records[worst].title}: {self._scoring.lost[worst]} workers were lost while they scored it"

    def _send_evaluations(self, version: int, missing: Sequence[TaskRecord]) -> None:
        flying = {o.task_id for o in self._crew.orders if isinstance(o, Evaluate) and o.version == version}
        waiting = [record for record in missing if record.task_id not in flying]
        for seat, record in zip(self._crew.free_seats(), waiting, strict=False):
            token = f"{version}-{record.task_id}-{self._scoring.tries}"
            results = results_key(record.task_id, version)
            self._crew.give(seat, Evaluate(token, record.task_id, version, record.spec, record.eval_key, results))

    def take_evaluation(self, order: Evaluate, outcome: Outcome) -> None:
        """Note what came of an order."""
        scoring = self._scoring
        if order.version != scoring.version:
            return  # it was judged, or is gone
        if isinstance(outcome, Failed) and outcome.fault == "lost":
            scoring.lost[order.task_id] += 1
            log.warning("evaluation of %s at version %d is given out again", order.task_id, order.version)
            return
        if isinstance(outcome, Evaluated) and math.isfinite(outcome.score):
            scoring.scores[order.task_id] = TaskScore(order.task_id, outcome.score, outcome.count)
            return
        why = outcome.message if isinstance(outcome, Failed) else "its score is not a number"
        scoring.failures.append(f"{order.task_id}: {why}")
        log.warning("evaluation of %s at version %d failed: %s", order.task_id, order.version, why)

    # --- what the store answered ------------------------------------------------------------------------------

    def take(self, flight: Flight, errand: Errand) -> None:
        """Take what a call of the store brought."""
        self._errands.wake(log_moved=True)
        try:
            answer = self._cluster.result(flight)
        except Corrupt as error:
            # Stored bytes are not what was written: nothing is written any more until a person has looked.
            self.alarm = str(error)
            log.critical("the store is damaged, nothing will be merged or published: %s", error)
        except Conflict as error:
            # Another writer took over (a rollback from outside, a second service): ours must open anew.
            log.warning("the store refused '%s': %s", errand.kind, error)
            self._cluster.replace_store()
            self._errands.later("store")
        except Exception as error:
            refuse = {"merge": self._refuse_merge, "refine": self._refuse_refinement}.get(errand.kind)
            if refuse and isinstance(error, InvalidInput | NotFound):
                refuse(errand, error)
                return
            # Nobody knows whether it is in: the same operation key is asked again and answers either way.
            log.warning("the outcome of '%s' is unknown, asking again: %s", errand.kind, error)
            self._errands.later("store")
        else:
            if errand.kind == "merge":
                self._apply(errand.task_ids, Merged(answer.number))
                log.info("version %d: merged %s", answer.number, ", ".join(errand.task_ids))

    def _refuse_merge(self, errand: Errand, error: OnebasisError) -> None:
        message, alone = str(error), len(errand.task_ids) == 1
        self._leftovers.due = True
        refused = MergeRefused(message, time.time()) if alone else MergeUndone(message, alone=True)
        self._apply(errand.task_ids, refused)

    def _refuse_refinement(self, errand: Errand, error: OnebasisError) -> None:
        """Its task goes on as it was merged; the store names it, and the others are asked for again without it."""
        if self._store.refresh().refs[CANDIDATE] == errand.version:  # else the adapters are well, the version is gone
            culprits = tuple(task_id for task_id in errand.task_ids if f"({task_id})" in error.where)
            self._apply(culprits or errand.task_ids, RefinementRefused(str(error)))
            self._leftovers.due = True

    # --- helpers ----------------------------------------------------------------------------------------------

    def _records(self, task_ids: Mapping[str, object]) -> dict[str, TaskRecord]:
        """One query, not one for each task. Missing where the database is younger than the store: not to be scored."""
        return {record.task_id: record for record in self._queue.tasks() if record.task_id in task_ids}

    def _may_write(self) -> bool:
        return not (self._errands.writing or self.alarm) and self._errands.may("store")

    def _apply(self, task_ids: tuple[str, ...], event: Event) -> list[TaskRecord]:
        self._errands.wake()
        return self._queue.try_apply(task_ids, event)


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
