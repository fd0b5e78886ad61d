"""The one unjudged version of a subspace: from the tasks that wait to be merged to the gate's verdict.

Merging waits until the version before is judged, and then takes every task that waits in one version (group
commit). So there is at most one unjudged candidate, and refusing it is one record. A group that the gate refuses is
merged again one by one, which shows the task at fault. Tasks that ask for it are refined between merging and judging:
one more version, with the same basis and only their coefficients replaced; that version is judged.

What is kept in memory (scores that came in) is asked for again after a restart: orders are idempotent by token, merges
by operation key.
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

from configs.errors import (
    Conflict,
    Corrupt,
    Fenced,
    InvalidInput,
    NameTaken,
    NotFound,
    NotWritten,
    OnebasisError,
    OwnedByAnother,
    Unavailable,
    UnusableStore,
)
from configs.log_lines import busy_with
from configs.settings import Settings
from orchestrator.alarms import WRITE_CODES, WRITING, AlarmCode, Ringing
from orchestrator.canary_trial import LOOK_SECONDS, CanaryTrial
from orchestrator.cluster import Call, Cluster, MachineLost
from orchestrator.general_text import general_text
from orchestrator.judging.gate import Decision, PairedDifference, compared_with, judge, paired_difference
from orchestrator.judging.score_table import ScoreTable, evaluations_due, score_table
from orchestrator.judging.scoring_groups import groups
from orchestrator.pending_calls import StoreCalls, Writing
from orchestrator.pre_publish import GRACE_SECONDS, PrePublish, question_of
from orchestrator.refinement import Refinement
from orchestrator.tasks.task_events import (
    Event,
    Judged,
    MergeBegun,
    Merged,
    MergeRefused,
    MergeUndone,
    Reason,
)
from orchestrator.tasks.task_lifecycle import Step, next_step
from orchestrator.tasks.task_queue import TaskQueue
from orchestrator.tasks.task_record import TaskRecord, TaskState, results_key
from orchestrator.tasks.verdict_book import VerdictBook
from orchestrator.unused_files import UnusedFiles
from orchestrator.verdict import ScoringFailure, VerdictInProgress
from orchestrator.worker_pool import ModelWorkers, keys_of_earlier_rows, scorings
from subspace_store import StagedAdapter, Storage, SubspaceReader
from subspace_store.digests import digest
from subspace_store.log.version import CANDIDATE, MAIN, RowsScore, TaskScore
from subspace_store.requests import Merge, Publish, RecordScores, Refine, Reject, StoreRequest
from subspace_store.strict import as_text
from workers.orders import Evaluate, Evaluated, EvaluatedTogether, EvaluateTogether, Failed, Outcome, Train
from workers.results import read_results

log = logging.getLogger("onebasis.controller")

EVALUATION_TRIES = 3
FULL_SECONDS = 5.0
"""Interval at which a full store is asked again: there is no space until a person makes some."""
SLOW_SECONDS = 10.0
"""A write of one small record that takes longer rings: it is two or three requests to the storage."""
UNJUDGED = (TaskState.REFINING, TaskState.EVALUATING)
HELD_SECONDS = 5.0
"""Interval at which the log is read while `main` is held: somebody may release it without telling this process."""


class Candidate:
    """Brings tasks through merging, refining and judging."""

    def __init__(
        self,
        settings: Settings,
        queue: TaskQueue,
        storage: Storage,
        store: SubspaceReader,
        cluster: Cluster,
        calls: StoreCalls,
        workers: ModelWorkers,
        unused_files: UnusedFiles,
        changed: Callable[[], None],
        main_moved: Callable[[], None],
        alarms: Ringing,
        answering: Callable[[], Mapping[str, Any]],
    ) -> None:
        """
        Args:
            store: A reader; writing goes through the cluster's store actor.
            changed: Called when there is something new to report.
            main_moved: Called when `main` is at another version than a task's verdict says.
            answering: As for the controller.
        """
        self._settings = settings
        # Of a base model that has left the settings nothing is scored.
        is_there = workers.base_model in settings.base_names
        self._general_text = general_text(settings.base(workers.base_model)) if is_there else ""
        self._queue = queue
        self._storage = storage
        self._store = store
        self._cluster = cluster
        self._calls = calls
        self._workers = workers
        self._unused_files = unused_files
        self._changed = changed
        self._main_moved = main_moved
        self._alarms = alarms
        self.trial = CanaryTrial(workers.base_model, answering, calls.wake)
        """What a version that passed the gate waits for."""
        self._verdict = VerdictInProgress()
        self._refinement = Refinement(settings, queue, store, calls, workers, unused_files, self._verdict)
        self._scores_main = False
        """Whether `main` holds tasks that are to be scored before anything is merged."""
        self._is_stopped = False
        """Whether an error that only a person can end stops all writes: nothing is merged or published any more."""
        self.ousted_by: OwnedByAnother | None = None
        """Error with the service that owns the store by now: nothing is begun any more."""

    def follow(self, settings: Settings) -> None:
        """Judge by new settings from now on."""
        self._settings = settings
        self._refinement.follow(settings)

    def advance(self, live: Sequence[TaskRecord], others_wait: Callable[[], bool]) -> None:
        """Begin the next piece of work.

        Args:
            live: The tasks that have not ended and do not wait for a worker.
            others_wait: Whether tasks wait for a worker to be trained.
        """
        if self._is_stopped or self._calls.writing or not self._calls.may("store"):
            return
        self._refinement.call_off()
        unjudged = [record for record in live if record.state in UNJUDGED]
        if not unjudged:
            merging = [record for record in live if next_step(record) is Step.MERGE]
            # What nobody has scored, the next verdict cannot compare with. One that is to be reached once more, with no
            # task refined again, goes on from what it knows.
            goes_on = bool(merging) and self._verdict.plain
            if (goes_on or not self._score_main()) and merging:
                self._merge(merging)
        elif not self._refinement.advance(unjudged, others_wait):
            self._judge(unjudged)

    def is_awaited(self, live: Sequence[TaskRecord]) -> bool:
        """Whether a version is about to be scored, so that a worker should be free for it."""
        unjudged = any(record.state in UNJUDGED for record in live)
        is_soon = unjudged or isinstance(self._calls.writing, Merge)
        if self._is_stopped:
            return False  # what is trained waits, and the workers go on training
        return (is_soon and self._store.state.held is None) or self._scores_main

    # --- merging ----------------------------------------------------------------------------------------------

    def _merge(self, merging: Sequence[TaskRecord]) -> None:
        begun = next((record.merge_key for record in merging if record.merge_key), "")
        group = [record for record in merging if record.merge_key == begun] if begun else self._next_group(merging)
        ids = tuple(record.task_id for record in group)
        if not begun:
            if self._drop_orphan() or self._know_again(group):
                return
            begun = f"merge:{secrets.token_hex(8)}"
            if not self._apply(ids, MergeBegun(begun)):
                return
        staged = tuple(
            StagedAdapter(
                task_id=r.task_id,
                name=r.title,
                key=r.staging_key,
                sha256=r.adapter_sha256,
                replaces=r.revises or None,
            )
            for r in group
        )
        self._calls.write(Merge(adapters=staged, op_key=begun, actor="controller"))

    def _drop_orphan(self) -> bool:
        """Reject a candidate that no task waits for (a lost database). Returns whether there was one."""
        refs = self._store.state.refs
        orphan = refs[CANDIDATE] != refs[MAIN]
        if orphan:
            self._reject(refs[CANDIDATE], "no task waits for it", ())
        return orphan

    def _know_again(self, group: Sequence[TaskRecord]) -> bool:
        """Move on tasks that the candidate holds already: the database is older than the log, as after a restore.
        Returns whether there were any."""
        held = self._store.state.births(self._store.state.refs[CANDIDATE])
        known = [record for record in group if record.task_id in held]
        for record in known:
            version = self._store.state.versions[held[record.task_id]]
            self._apply((record.task_id,), Merged(version.number, version.merge_seconds, version.bytes_written))
        return bool(known)

    def _next_group(self, merging: Sequence[TaskRecord]) -> list[TaskRecord]:
        """The tasks to merge into one version: all that wait, but one by one if their group failed, the oldest
        first."""
        if merging[0].merge_alone:
            return [merging[0]]
        return [record for record in merging if not record.merge_alone]

    # --- judging ----------------------------------------------------------------------------------------------

    def _judge(self, evaluating: Sequence[TaskRecord]) -> None:
        """Bring the candidate's tasks one step nearer to a verdict; what is missing is read off the log."""
        version = evaluating[0].version
        state = self._store.state
        ids = tuple(record.task_id for record in evaluating if record.version == version)
        plain = False
        on_main = any(v.number == version for v in state.lineage(state.refs[MAIN]))
        if on_main or version in state.published:
            asked = self._pre_publish.told(version) if self._settings.gate.pre_publish is not None else ""
            said = (f"published in version {version}", self.trial.told(version), asked)
            told = "; ".join(filter(None, said))
            self._apply(ids, Judged(True, told, time.time()))
            if not on_main:
                # Rolled back before this was seen: the tasks are parked like all that vanish, not merged again.
                self._main_moved()
        elif version in state.rejected:
            plain = self._refused(ids, version)
        elif state.refs[CANDIDATE] != version:
            self._apply(ids, MergeUndone("a rollback came in between", alone=False))
        else:
            self._score_or_decide(version)
            return
        refined = state.versions[version].refined if version in state.versions else ()
        self._unused_files.due((*ids, *(task.task_id for task in refined)))
        self._verdict.begin(plain=plain)
        self._changed()
        self._calls.wake()

    def _refused(self, ids: tuple[str, ...], version: int) -> bool:
        """Returns: Whether the task is to be judged once more, in a version for which no task is refined again."""
        reason = self._store.state.rejected[version]
        again = {t.task_id for t in self._store.state.versions[version].refined} - {*ids}
        culprits = self._store.state.rejected_for.get(version, ())
        if len(ids) > 1:
            self._apply(ids, MergeUndone(f"its group failed the gate: {reason}", alone=True))
        elif again.intersection(culprits):
            # A new task is not to blame if an older task became worse through its own refinement.
            self._apply(ids, MergeUndone(f"once more, with no task refined again: {reason}", alone=True))
            return True
        else:
            codes = self._store.state.rejected_by.get(version, ())
            self._apply(ids, Judged(False, reason, time.time(), codes))
        return False

    def _score_or_decide(self, version: int) -> None:
        state, drift_min = self._store.state, self._settings.gate.drift_min
        self._read_due(version)
        records = self._verdict.records
        if hopeless := self._why_hopeless(records):
            self._reject(version, f"it could not be scored: {hopeless.text}", (hopeless.task_id,), (Reason.NOT_SCORED,))
        elif self._verdict.due:
            self._score(version)
        else:
            table = score_table(state, version, drift_min)
            errors = {task_id: task.error_at_birth for task_id, task in state.tasks_at(version).items()}
            decision = judge(table, version, records, self._settings.gate, errors=errors)
            if not decision.passed:  # the rows are compared only for the message
                paired = _paired_differences(self._storage, table, version, records)
                decision = judge(table, version, records, self._settings.gate, paired, errors)
            if decision.passed and state.held is not None:
                self._calls.log_moved.set()
                self._calls.later("held", HELD_SECONDS)
            elif decision.passed:
                self._publish(version, table, decision)
            else:
                culprits = tuple(rule.task_id for rule in decision.broken)
                self._reject(version, decision.summary, culprits, decision.codes)

    def _publish(self, version: int, table: ScoreTable, decision: Decision) -> None:
        """Publish a version that passed, once its canary has answered enough, unless the settings name somebody who
        refuses, or has not answered yet."""
        made = self._store.state.versions[version]
        revised = tuple(task.name for task in made.added if task.replaces)
        if not self.trial.is_over(version, revised, made.created_at, self._settings.gate):
            self._calls.later("canary", LOOK_SECONDS)
            return
        settings = self._settings.gate.pre_publish
        if settings is not None:
            main, records = self._store.state.refs[MAIN], self._verdict.records
            question = partial(question_of, version, main, table, records, decision, self.trial.figures(version))
            found = self._pre_publish.verdict(version, settings, question)
            if found is None:
                self._calls.later("pre_publish", settings.timeout_seconds + 2 * GRACE_SECONDS)
                return
            if not found.is_passed:
                self._reject(version, found.reason, (), (found.code,))
                return
        self._calls.write(Publish(version=version, op_key=f"publish:{version}", actor="gate"))

    @cached_property
    def _pre_publish(self) -> PrePublish:
        return PrePublish(self._workers.base_model, VerdictBook(self._queue.database), self._calls.wake)

    def _score_main(self) -> bool:
        """Score the tasks that `main` holds without a score: a removal makes versions again that no gate judges.

        A task that cannot be scored stays without a score.

        Returns:
            Whether there is something to score.
        """
        refs = self._store.state.refs
        version, self._scores_main = refs[MAIN], False
        if not version or refs[CANDIDATE] != version:
            return False
        if self._verdict.version != version:
            self._verdict.begin(version)
        self._read_due(version)
        if self._verdict.due and not self._why_hopeless(self._verdict.records):
            self._scores_main = True
            self._score(version)
        return self._scores_main

    def _read_due(self, version: int) -> None:
        """Find out which tasks of the version have no score there, if the log has changed since that was last done."""
        state = self._store.state
        if self._verdict.read_at == state.seq:
            return
        known = self._queue.among(state.tasks_at(version))
        unscored = evaluations_due(state, version, self._settings.gate.drift_min)
        self._verdict.records, self._verdict.read_at = known, state.seq
        self._verdict.due = tuple(task_id for task_id in unscored if task_id in known and known[task_id].is_scored)

    def _score(self, version: int) -> None:
        """Give out the evaluations that are due; once all are there, write their scores to the log."""
        due, found = self._verdict.due, self._verdict.scores
        if missing := [task_id for task_id in due if task_id not in found]:
            self._send_evaluations(version, [self._verdict.records[task_id] for task_id in missing])
            return
        scores = tuple(found[task_id] for task_id in due)
        # The key counts the scores written before: a restart with a lower gate.drift_min asks for more.
        key = f"scores:{version}:{len(self._store.state.scores.get(version, {}))}"
        self._calls.write(RecordScores(version=version, scores=scores, op_key=key, actor="controller"))

    def _reject(self, version: int, reason: str, culprits: tuple[str, ...], codes: tuple[str, ...] = ()) -> None:
        """
        Args:
            culprits: Ids of the tasks whose scores, or whose lack of one, is the reason.
            codes: The reason for programs; see `TaskRecord.reason_codes`.
        """
        # A worker's message may hold any text, and text that cannot be written would be tried for ever.
        rejection = Reject(
            version=version,
            reason=as_text(reason),
            codes=codes,
            task_ids=culprits,
            op_key=f"reject:{version}",
            actor="gate",
        )
        self._calls.write(rejection)

    def _why_hopeless(self, records: Mapping[str, TaskRecord]) -> ScoringFailure | None:
        """Why the version will never have its scores; None while it may."""
        if len(self._verdict.failures) >= EVALUATION_TRIES:
            return self._verdict.failures[-1]
        for task_id in (*self._verdict.lost, *self._verdict.died):
            if why := self._verdict.gives_up(task_id, self._settings.failures, "scored"):
                text = f"{records[task_id].title}: {why}; last: {self._verdict.lost_as}"
                return ScoringFailure(task_id, text)
        return None

    def _send_evaluations(self, version: int, missing: Sequence[TaskRecord]) -> None:
        flying = {one.task_id for order in self._workers.orders for one in scorings(order) if one.version == version}
        waiting = [record for record in missing if record.task_id not in flying]
        free = self._workers.free_workers()
        if not waiting or not free:
            return
        base = self._settings.base(waiting[0].base_model)
        for worker, group in zip(free, groups(waiting, base, len(free), self._verdict.apart), strict=False):
            orders = tuple(self._evaluation(version, record) for record in group)
            if len(orders) == 1:
                self._workers.give(worker, orders[0])
            else:
                token = f"{version}-{digest(' '.join(one.token for one in orders).encode())[:16]}"
                self._workers.give(worker, EvaluateTogether(token=token, version=version, orders=orders))

    def _evaluation(self, version: int, record: TaskRecord) -> Evaluate:
        return Evaluate(
            token=f"{version}-{record.task_id}-{self._verdict.tries}",
            task_id=record.task_id,
            version=version,
            spec=record.spec,
            eval_key=record.eval_key,
            results_key=results_key(record.task_id, version),
            earlier_rows=keys_of_earlier_rows(record),
            general_text=self._general_text if record.spec.kind == "causal_lm" else "",
        )

    def take_refinement(self, order: Train, outcome: Outcome) -> None:
        """Take the outcome of an order to refine a published task again."""
        if isinstance(outcome, Failed) and outcome.cause is not None and order.refine_version == self._verdict.version:
            self.stop(outcome.cause)
        self._refinement.take(order, outcome)

    def take_evaluation(self, order: Evaluate | EvaluateTogether, outcome: Outcome) -> None:
        """Take the outcome of a scoring order."""
        if isinstance(order, Evaluate):
            with busy_with(task_id=order.task_id):
                self._take_score(order, outcome)
        elif isinstance(outcome, EvaluatedTogether):
            for one, its in zip(order.orders, outcome.outcomes, strict=True):
                with busy_with(task_id=one.task_id):
                    self._take_score(one, its)
        elif isinstance(outcome, Failed) and outcome.cause is not None:
            self.stop(outcome.cause)
        elif isinstance(outcome, Failed) and order.version == self._verdict.version:
            # Nobody knows which of them it was: each has a worker to itself now, and a budget of its own.
            self._verdict.apart |= {one.task_id for one in order.orders}
            self._verdict.tries += 1
            what = "scoring %d tasks together at version %d came to nothing, each is scored alone: %s\n%s"
            log.warning(what, len(order.orders), order.version, outcome.message, outcome.detail)

    def _take_score(self, order: Evaluate, outcome: Outcome) -> None:
        current = self._verdict
        if order.version != current.version:
            return  # it was judged, or is gone
        if isinstance(outcome, Evaluated) and math.isfinite(outcome.score):
            of_rows = tuple(
                RowsScore(task_id=brought_by, score=score, count=count)
                for brought_by, (score, count) in outcome.of_rows.items()
            )
            current.scores[order.task_id] = TaskScore(
                task_id=order.task_id,
                score=outcome.score,
                count=outcome.count,
                of_rows=of_rows,
                general_loss=outcome.general_loss,
            )
            return
        current.tries += 1
        current.apart.add(order.task_id)
        if isinstance(outcome, Failed) and outcome.fault in ("lost", "died"):
            current.count(order.task_id, outcome.fault)
            current.lost_as = outcome.message
            log.warning("evaluation of %s at version %d is given out again", order.task_id, order.version)
            return
        if isinstance(outcome, Failed) and outcome.cause is not None:
            self.stop(outcome.cause)
            return
        why = outcome.message if isinstance(outcome, Failed) else "its score is not a number"
        current.failures.append(ScoringFailure(order.task_id, f"{order.task_id}: {why}"))
        detail = outcome.detail if isinstance(outcome, Failed) else ""
        log.warning("evaluation of %s at version %d failed: %s\n%s", order.task_id, order.version, why, detail)

    # --- what the store answered ------------------------------------------------------------------------------

    def take(self, call: Call, pending: Writing) -> None:
        """Take what the store's writer answered."""
        request = pending.request
        self._calls.wake(log_moved=True)
        try:
            answer = self._cluster.result(call)
        except (Corrupt, UnusableStore, OwnedByAnother) as error:
            self.stop(error)
        except Fenced as error:
            # Another writer took over (a rollback from outside): ours must open anew.
            log.warning("'%s' was fenced: %s", request.operation, error)
            self._calls.replace_writer()
            self._calls.later("store")
        except Exception as error:
            match request, error:
                case Merge(), InvalidInput() | NotFound():
                    self._refuse_merge(request, error)
                case Refine(), InvalidInput() | NotFound():
                    self._refinement.refuse(request, error)
                case Merge(), NameTaken():
                    self._park_double(request, error)
                case Merge(), Conflict():
                    # Nothing was written: somebody moved the candidate, or the database is older than the log.
                    log.info("merging is begun anew: %s", error)
                    self._apply(_tasks(request), MergeUndone(error.what, alone=False))
                    self._calls.later("store")
                case _, Conflict():
                    log.info("'%s' is out of date, the log is read again: %s", request.operation, error)
                    self._calls.later("store")
                case _, NotWritten():
                    # Nothing was written, and no task is to blame: the same request is repeated until there is space.
                    self._alarms.ring_for(error, WRITING, f"'{request.operation}' was refused")
                    self._calls.later("store", FULL_SECONDS)
                case _, MachineLost():
                    # Nobody knows whether it is in: the same operation key is asked again and answers either way.
                    log.warning("the outcome of '%s' is unknown, asking again: %s", request.operation, error)
                    self._calls.later("store")
                case _, Unavailable():
                    self._alarms.ring_for(error, WRITING)
                    self._calls.later("store")
                case _, OnebasisError():
                    self._alarms.ring_for(error, WRITING)
                    self._calls.later("store", FULL_SECONDS)
                case _:
                    what = f"'{request.operation}' failed inside the store's writer: {type(error).__name__}: {error}"
                    if not self._alarms.rings(AlarmCode.STEP_FAILED):
                        log.error("%s", what, exc_info=error)
                    self._alarms.ring(AlarmCode.STEP_FAILED, WRITING, what)
                    self._calls.later("store", FULL_SECONDS)
        else:
            self._alarms.end_all(WRITING, *WRITE_CODES, AlarmCode.STEP_FAILED)
            self._hear_how_long(request, time.monotonic() - pending.asked_at)
            if isinstance(request, Merge):
                self._apply(_tasks(request), Merged(answer.number, answer.merge_seconds, answer.bytes_written))
                log.info("version %d: merged %s", answer.number, ", ".join(_tasks(request)))

    def _hear_how_long(self, request: StoreRequest[Any], seconds: float) -> None:
        """Ring if a small record took long; merging and refining compute, and may."""
        if isinstance(request, Merge | Refine):
            return
        if seconds > SLOW_SECONDS:
            what = (
                f"'{request.operation}', one small record, took {seconds:.0f} s: the storage is slow, or the store's "
                "writer had something else to do first"
            )
            self._alarms.ring(AlarmCode.STORE_SLOW, WRITING, what)
        else:
            self._alarms.end(AlarmCode.STORE_SLOW, WRITING)

    def stop(self, error: OnebasisError) -> None:
        """Stop writing, for errors that only a person can end: stored bytes are not what was written, or the store
        belongs to another service or does not fit this one. No task is to blame. Other errors are ignored here."""
        if not isinstance(error, Corrupt | UnusableStore | OwnedByAnother):
            return
        self._is_stopped = True
        if isinstance(error, Corrupt):
            what = f"the store is damaged, nothing is merged or published: {error.sentence}"
            self._alarms.ring(AlarmCode.STORE_DAMAGED, "store", what)
        elif isinstance(error, OwnedByAnother):
            self.ousted_by = error
            self._alarms.ring(AlarmCode.OUSTED, "store", f"this service has stopped: {error.what}", error.todo)
        else:
            self._alarms.ring_for(error, WRITING)
        self._changed()

    def _park_double(self, request: Merge, error: NameTaken) -> None:
        """Park a task if `main` came back to an older one of its name meanwhile: the others go on without it."""
        self._unused_files.due((error.task_id,))
        self._apply((error.task_id,), MergeRefused(str(error), time.time(), Reason.NAME_TAKEN))
        others = tuple(task_id for task_id in _tasks(request) if task_id != error.task_id)
        self._apply(others, MergeUndone(error.what, alone=False))

    def _refuse_merge(self, request: Merge, error: OnebasisError) -> None:
        task_ids = _tasks(request)
        self._unused_files.due(task_ids)
        message, alone = str(error), len(task_ids) == 1
        refused = MergeRefused(message, time.time()) if alone else MergeUndone(message, alone=True)
        self._apply(task_ids, refused)

    # --- helpers ----------------------------------------------------------------------------------------------

    def _apply(self, task_ids: tuple[str, ...], event: Event) -> list[TaskRecord]:
        self._calls.wake()
        return self._queue.try_apply(task_ids, event)


def _tasks(request: Merge) -> tuple[str, ...]:
    return tuple(staged.task_id for staged in request.adapters)


def _paired_differences(
    storage: Storage, table: ScoreTable, version: int, records: Mapping[str, TaskRecord]
) -> dict[str, PairedDifference]:
    """Task id to how its score under a version differs, row by row, from the one that the gate compares it with."""
    found = {}
    for task_id, cell in table.cells[version].items():
        record = records.get(task_id)
        if cell.measured_at != version or record is None:
            continue
        _, before = compared_with(record, table, version)
        try:
            early, late = (read_results(storage, key) for key in (before, results_key(task_id, version)))
        except (NotFound, Corrupt):
            continue  # a score from before results were kept
        if early.comparable(late):
            found[task_id] = paired_difference(early.per_row, late.per_row)
    return found
