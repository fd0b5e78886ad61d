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
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from configs.errors import Conflict, Corrupt, InvalidInput, NotFound, OnebasisError
from configs.settings import Settings
from orchestrator.cluster import Cluster, Flight
from orchestrator.crew import Crew, again_order
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
    RefinedAgain,
    RefinementRefused,
    Step,
    next_step,
)
from orchestrator.task_queue import TaskQueue
from orchestrator.task_record import TaskRecord, TaskState, results_key
from subspace_store import StagedAdapter, Storage, SubspaceStore, digest
from subspace_store.version import CANDIDATE, MAIN, TaskScore
from workers.orders import Evaluate, Evaluated, Failed, Outcome, Train, Trained
from workers.results import read_results

log = logging.getLogger("onebasis.controller")

EVALUATION_TRIES = 3
UNJUDGED = (TaskState.REFINING, TaskState.EVALUATING)
HELD_SECONDS = 5.0
"""While `main` is held the log is read this often: somebody may release it without telling this process."""


@dataclass
class Round:
    """What the workers said of the one version so far."""

    version: int = 0
    """0: between two versions."""
    plain: bool = False
    """The next version is judged as its merge makes it: the one before was refused for a task refined again."""
    again: tuple[TaskRecord, ...] = ()
    """Older tasks that its merge moved, to be refined first (`share_full`)."""
    refined: dict[str, StagedAdapter] = field(default_factory=dict)
    """Task id to the adapter, of those in `again`."""
    unrefined: set[str] = field(default_factory=set)
    """Ids of those in `again` that stay as the merge left them."""
    read_at: int = -1
    """Sequence number of the log at which the two below were worked out: with a thousand tasks that takes a third of a
    second, and every score that comes in is a step."""
    records: Mapping[str, TaskRecord] = field(default_factory=dict)
    """Task id to record, of all that the version holds."""
    due: tuple[str, ...] = ()
    """Ids of those to be scored."""
    scores: dict[str, TaskScore] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    """Of scoring."""
    lost: Counter[str] = field(default_factory=Counter)
    """Task id to the machines that were lost while they scored it, or refined it."""
    tries: int = 0
    """How many orders brought nothing: the next one needs another token, for a worker remembers its answers."""


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
        self._round = Round()
        self.alarm = ""
        """Why nothing is merged or published any more; empty while all is well."""

    def advance(self, live: Sequence[TaskRecord]) -> None:
        """Begin what is next.

        Args:
            live: The tasks that have not ended.
        """
        if self.alarm or self._errands.writing or not self._errands.may("store"):
            return
        self._call_off()
        unjudged = [record for record in live if record.state in UNJUDGED]
        if not unjudged:
            self._merge([record for record in live if next_step(record) is Step.MERGE])
        elif not self._refine(unjudged, any(next_step(record) is Step.TRAIN for record in live)):
            self._judge(unjudged)

    def is_awaited(self, live: Sequence[TaskRecord]) -> bool:
        """Whether a version is about to be scored, so that a worker should be free for it."""
        unjudged = any(record.state in UNJUDGED for record in live)
        return (unjudged or self._errands.under_way("merge")) and self._store.state.held is None

    # --- merging ----------------------------------------------------------------------------------------------

    def _merge(self, merging: Sequence[TaskRecord]) -> None:
        if not merging:
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

    def _call_off(self) -> None:
        """Stop refinements of published tasks for a version that is gone: no lease of theirs ends with it."""
        for seat in self._crew.seats.values():
            order = seat.order
            if isinstance(order, Train) and order.again and order.refine_version != self._store.state.refs[CANDIDATE]:
                self._crew.tell(seat, "cancel", order.token)

    def _refine(self, group: Sequence[TaskRecord], others_wait: bool) -> bool:
        """Bring the candidate's tasks through their refinement; those of its group that ask for none wait.

        Args:
            others_wait: Whether tasks wait for a worker to be trained.

        Returns:
            Whether the version is not yet to be judged.
        """
        refining = [record for record in group if record.state is TaskState.REFINING]
        state, version = self._store.state, (refining or group)[0].version
        ids = tuple(record.task_id for record in group if record.version == version)
        if not refining and (version in state.published or version in state.rejected):
            return False
        line = state.lineage(state.refs[CANDIDATE])
        made = next((v.number for v in line if v.parent == version and v.refined), None)
        if made is not None:
            self._apply(ids, Refined(made))
            self._leftovers.due = True
            return True
        if state.refs[CANDIDATE] == version:
            return self._refine_in(version, refining, others_wait)
        if refining and version not in (v.number for v in line):
            self._apply(ids, MergeUndone("a rollback came in between", alone=False))
        elif refining:  # a database that is older than the log
            refused = RefinementRefused(f"version {version} went on without it")
            self._apply(tuple(record.task_id for record in refining), refused)
        return bool(refining)

    def _refine_in(self, version: int, refining: Sequence[TaskRecord], others_wait: bool) -> bool:
        """Give out the refinements that the candidate waits for, and put them into one more version."""
        if self._round.version != version:
            self._round = Round(version, again=() if self._round.plain else self._moved(version))
        done, given_up = self._round.refined, self._round.unrefined
        ready = [record for record in refining if next_step(record) is Step.MERGE_REFINED]
        again = [r for r in self._round.again if r.task_id not in done and r.task_id not in given_up]
        if again or len(ready) < len(refining):
            flying = {order.task_id for order in self._crew.orders if isinstance(order, Train) and order.again}
            waiting = [record for record in refining if next_step(record) is Step.REFINE]
            # A merge may move a thousand tasks: while others wait to be trained, half of the workers are theirs.
            room = max(1, len(self._crew.seats) // 2) if others_wait else len(self._crew.seats)
            waiting += [record for record in again if record.task_id not in flying][: max(0, room - len(flying))]
            for record, seat in zip(waiting, self._crew.unclaimed_seats(refining), strict=False):
                if record.state is TaskState.REFINING:
                    self._crew.claim(seat, record)
                else:
                    self._crew.give(seat, again_order(record, version, self._round.tries))
            return True
        own = (StagedAdapter(r.task_id, r.title, r.refined_key, r.refined_sha256) for r in ready)
        staged = [*own, *done.values()]
        if staged:
            key = f"refine:{version}:{digest(repr(staged).encode())[:16]}"
            self._errands.send(
                Errand("refine", task_ids=tuple(adapter.task_id for adapter in staged), version=version),
                lambda: self._cluster.store("refine", staged, op_key=key, actor="controller"),
            )
        return bool(staged)

    def _moved(self, version: int) -> tuple[TaskRecord, ...]:
        """The older tasks that the merge of a version moved enough to be scored again, and whose owners let them be
        refined for it. A version that a refinement made moved nobody."""
        state, drift_min = self._store.state, self._settings.gate.drift_min
        if state.scores.get(version):
            return ()  # it is judged by them: in one more version its newcomers would pass for tasks of old
        tasks, drift, bounds = state.tasks_at(version), state.drift(version), state.error_bounds(version)
        moved = {
            task_id
            for task_id in evaluations_due(state, version, drift_min)
            # One without rows is always due: it must have gone as far since its coefficients were made.
            if drift.get(task_id) and bounds[task_id] - tasks[task_id].error_at_birth >= drift_min
        }
        records = self._records(moved) if moved else {}
        return tuple(r for r in records.values() if r.spec.method.share_full and r.task_id not in state.quarantined)

    def take_refinement(self, order: Train, outcome: Outcome) -> None:
        """Note what came of an order of `again_order`. Whoever cannot be refined stays as the merge left it."""
        assert not isinstance(outcome, Evaluated)
        if self._queue.get(order.task_id).again_token != order.token:  # else they were told before a restart
            self._queue.append_log(order.task_id, outcome.log_lines)
        if order.refine_version != self._round.version:
            self._leftovers.due = True  # the version was judged, or is gone: what it staged goes as well
            return
        where = f"version {order.refine_version} (share_full)"
        if isinstance(outcome, Trained):
            title = f"{order.spec.team}/{order.spec.name}"
            staged = StagedAdapter(order.task_id, title, outcome.staging_key, outcome.adapter_sha256)
            self._round.refined[order.task_id] = staged
            told = RefinedAgain(f"refined again, for {where}", order.token, outcome.seconds, time.time())
        else:
            if outcome.detail:
                log.error("task %s: %s\n%s", order.task_id, outcome.message, outcome.detail)
            self._round.tries += 1
            self._round.lost[order.task_id] += outcome.fault != "preempted"  # the service ended, and found it so
            hopeless = outcome.fault == "input" or self._is_lost_too_often(order.task_id)
            if hopeless:
                self._round.unrefined.add(order.task_id)
                del self._round.lost[order.task_id]
            told = RefinedAgain(f"{'not' if hopeless else 'not yet'} refined again, for {where}: {outcome.message}")
        self._apply((order.task_id,), told)

    # --- judging ----------------------------------------------------------------------------------------------

    def _judge(self, evaluating: Sequence[TaskRecord]) -> None:
        """Bring the candidate's tasks one step nearer to a verdict; what is missing is read off the log."""
        version = evaluating[0].version
        state = self._store.state
        ids = tuple(record.task_id for record in evaluating if record.version == version)
        plain = False
        on_main = any(v.number == version for v in state.lineage(state.refs[MAIN]))
        if on_main or version in state.published:
            self._apply(ids, Judged(True, f"published in version {version}", time.time()))
            if not on_main:
                # Rolled back before this was seen: to be parked like all that vanish, not to be merged again.
                self._main_moved()
        elif version in state.rejected:
            plain = self._refused(ids, version)
        elif state.refs[CANDIDATE] != version:
            self._apply(ids, MergeUndone("a rollback came in between", alone=False))
        else:
            self._score_or_decide(version)
            return
        self._round = Round(plain=plain)
        self._leftovers.due = True
        self._changed()
        self._errands.wake()

    def _refused(self, ids: tuple[str, ...], version: int) -> bool:
        """Returns: whether the task is to be judged once more, in a version that nobody is refined again for."""
        reason = self._store.state.rejected[version]
        again = [t.name for t in self._store.state.versions[version].refined if t.task_id not in ids]
        if len(ids) > 1:
            self._apply(ids, MergeUndone(f"its group failed the gate: {reason}", alone=True))
        elif any(name in reason for name in again):
            # A newcomer does not answer for what an older task made of its own refinement.
            self._apply(ids, MergeUndone(f"once more, with nobody refined again: {reason}", alone=True))
            return True
        else:
            self._apply(ids, Judged(False, reason, time.time()))
        return False

    def _score_or_decide(self, version: int) -> None:
        state, drift_min = self._store.state, self._settings.gate.drift_min
        if self._round.read_at != state.seq:
            known = self._records(state.tasks_at(version))
            unscored = evaluations_due(state, version, drift_min)
            self._round.records, self._round.read_at = known, state.seq
            self._round.due = tuple(task_id for task_id in unscored if task_id in known and known[task_id].eval_key)
        records, due, found = self._round.records, self._round.due, self._round.scores
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
                paired = _paired_differences(self._storage, table, version, records)
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
        if len(self._round.failures) >= EVALUATION_TRIES:
            return self._round.failures[-1]
        worst = next((task_id for task_id in self._round.lost if self._is_lost_too_often(task_id)), None)
        if worst is None:
            return ""
        return f"{records[worst].title}: {self._round.lost[worst]} workers were lost while they scored it"

    def _is_lost_too_often(self, task_id: str) -> bool:
        return self._round.lost[task_id] > self._settings.failures.lost_machines_max

    def _send_evaluations(self, version: int, missing: Sequence[TaskRecord]) -> None:
        flying = {o.task_id for o in self._crew.orders if isinstance(o, Evaluate) and o.version == version}
        waiting = [record for record in missing if record.task_id not in flying]
        for seat, record in zip(self._crew.free_seats(), waiting, strict=False):
            token = f"{version}-{record.task_id}-{self._round.tries}"
            results = results_key(record.task_id, version)
            self._crew.give(seat, Evaluate(token, record.task_id, version, record.spec, record.eval_key, results))

    def take_evaluation(self, order: Evaluate, outcome: Outcome) -> None:
        """Note what came of an order."""
        current = self._round
        if order.version != current.version:
            return  # it was judged, or is gone
        if isinstance(outcome, Evaluated) and math.isfinite(outcome.score):
            current.scores[order.task_id] = TaskScore(order.task_id, outcome.score, outcome.count)
            return
        current.tries += 1
        if isinstance(outcome, Failed) and outcome.fault == "lost":
            current.lost[order.task_id] += 1
            log.warning("evaluation of %s at version %d is given out again", order.task_id, order.version)
            return
        why = outcome.message if isinstance(outcome, Failed) else "its score is not a number"
        current.failures.append(f"{order.task_id}: {why}")
        detail = outcome.detail if isinstance(outcome, Failed) else ""
        log.warning("evaluation of %s at version %d failed: %s\n%s", order.task_id, order.version, why, detail)

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
        if self._store.refresh().refs[CANDIDATE] != errand.version:
            return  # the adapters are well, the version is gone
        culprits = [task_id for task_id in errand.task_ids if f"({task_id})" in error.where] or errand.task_ids
        for task_id in culprits:
            if self._round.refined.pop(task_id, None) is None:
                self._apply((task_id,), RefinementRefused(str(error)))
            else:
                self._round.unrefined.add(task_id)
                self._apply((task_id,), RefinedAgain(f"not refined again: {error}"))
        self._leftovers.due = True

    # --- helpers ----------------------------------------------------------------------------------------------

    def _records(self, task_ids: Collection[str]) -> dict[str, TaskRecord]:
        """One query, not one for each task. Missing where the database is younger than the store: not to be scored."""
        return {record.task_id: record for record in self._queue.tasks() if record.task_id in task_ids}

    def _apply(self, task_ids: tuple[str, ...], event: Event) -> list[TaskRecord]:
        self._errands.wake()
        return self._queue.try_apply(task_ids, event)


def _paired_differences(
    storage: Storage, table: ScoreTable, version: int, records: Mapping[str, TaskRecord]
) -> dict[str, PairedDifference]:
    """Task id to how its score under a version differs, row by row, from the one that the gate compares it with."""
    found = {}
    for task_id, cell in table.cells[version].items():
        record = records.get(task_id)
        if cell.measured_at != version or record is None:
            continue
        first = next(table.cells[v][task_id].measured_at for v, score in table.column(task_id) if score == score)
        is_new = table.birth[task_id] == version  # then with its own adapter, before merging
        before = record.local_results_key if is_new else results_key(task_id, first)
        try:
            early, late = (read_results(storage, key) for key in (before, results_key(task_id, version)))
        except (NotFound, Corrupt):
            continue  # a score from before results were kept
        if early.comparable(late):
            found[task_id] = paired_difference(early.per_row, late.per_row)
    return found
