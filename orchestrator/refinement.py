"""The refinements that the one unjudged version waits for: given out to workers, and put into one more version.

New tasks that ask for it are refined once, in the basis that they were merged into; older tasks with `share_full` are
refined beside them if the merge moved them. The resulting version has the same basis and only their coefficients
replaced; that version is judged.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from configs.errors import MissingAdapters, OnebasisError, RefusedAdapters
from configs.settings import Settings
from orchestrator.judging.score_table import evaluations_due
from orchestrator.pending_calls import StoreCalls
from orchestrator.tasks.task_events import (
    Event,
    MergeUndone,
    Refined,
    RefinedAgain,
    RefinementRefused,
)
from orchestrator.tasks.task_lifecycle import Step, next_step
from orchestrator.tasks.task_queue import TaskQueue
from orchestrator.tasks.task_record import TaskRecord, TaskState
from orchestrator.unused_files import UnusedFiles
from orchestrator.verdict import VerdictInProgress
from orchestrator.worker_pool import ModelWorkers, again_order
from subspace_store import StagedAdapter, SubspaceReader, digest
from subspace_store.log.version import CANDIDATE
from subspace_store.requests import Refine
from workers.orders import Failed, Outcome, Train, Trained

log = logging.getLogger("onebasis.controller")


class Refinement:
    """Brings the candidate's tasks through their refinement. `verdict` is the candidate's own, shared by both."""

    def __init__(
        self,
        settings: Settings,
        queue: TaskQueue,
        store: SubspaceReader,
        calls: StoreCalls,
        workers: ModelWorkers,
        unused_files: UnusedFiles,
        verdict: VerdictInProgress,
    ) -> None:
        self._settings = settings
        self._queue = queue
        self._store = store
        self._calls = calls
        self._workers = workers
        self._unused_files = unused_files
        self._verdict = verdict

    def follow(self, settings: Settings) -> None:
        """Go by new settings from now on."""
        self._settings = settings

    def call_off(self) -> None:
        """Stop refinements of published tasks for a version that is gone: they hold no lease that would end with it."""
        for worker in self._workers.workers:
            order = worker.order
            if isinstance(order, Train) and order.again and order.refine_version != self._store.state.refs[CANDIDATE]:
                self._workers.tell(worker, "cancel", order.token)

    def advance(self, group: Sequence[TaskRecord], others_wait: Callable[[], bool]) -> bool:
        """Bring the candidate's tasks through their refinement; those of its group that ask for none wait.

        Args:
            others_wait: Whether tasks wait for a worker to be trained.

        Returns:
            Whether judging the version has to wait.
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
            self._unused_files.due(ids)
            return True
        if state.refs[CANDIDATE] == version:
            return self._refine_in(version, refining, others_wait)
        if refining and version not in (v.number for v in line):
            self._apply(ids, MergeUndone("a rollback came in between", alone=False))
        elif refining:  # a database that is older than the log
            refused = RefinementRefused(f"version {version} went on without it")
            self._apply(tuple(record.task_id for record in refining), refused)
        return bool(refining)

    def _refine_in(self, version: int, refining: Sequence[TaskRecord], others_wait: Callable[[], bool]) -> bool:
        """Give out the refinements that the candidate waits for, and put them into one more version."""
        if self._verdict.version != version:
            self._verdict.begin(version, again=() if self._verdict.plain else self._moved(version))
        done, given_up = self._verdict.refined, self._verdict.unrefined
        ready = [record for record in refining if next_step(record) is Step.MERGE_REFINED]
        again = [r for r in self._verdict.again if r.task_id not in done and r.task_id not in given_up]
        if again or len(ready) < len(refining):
            flying = {order.task_id for order in self._workers.orders if isinstance(order, Train) and order.again}
            waiting = [record for record in refining if next_step(record) is Step.REFINE]
            # A merge may move a thousand tasks: while others wait to be trained, they get half of the workers.
            room = max(1, len(self._workers.workers) // 2) if others_wait() else len(self._workers.workers)
            waiting += [record for record in again if record.task_id not in flying][: max(0, room - len(flying))]
            free = self._workers.unclaimed_workers(refining)
            for record in waiting:
                is_anywhere = record.pool not in self._settings.pools
                worker = next((one for one in free if is_anywhere or record.pool == one.pool), None)
                if worker is None:
                    continue
                free.remove(worker)
                if record.state is TaskState.REFINING:
                    self._workers.claim(worker, record.task_id)
                else:
                    self._workers.give(worker, again_order(record, version, self._verdict.tries))
            return True
        own = (
            StagedAdapter(task_id=r.task_id, name=r.title, key=r.refined_key, sha256=r.refined_sha256) for r in ready
        )
        staged = (*own, *done.values())
        if staged:
            key = f"refine:{version}:{digest(repr(staged).encode())[:16]}"
            self._calls.write(Refine(adapters=staged, op_key=key, actor="controller"))
        return bool(staged)

    def _moved(self, version: int) -> tuple[TaskRecord, ...]:
        """The older tasks that the merge of a version moved enough to be scored again, and whose owners let them be
        refined for it. A version that a refinement made moved no task."""
        state, drift_min = self._store.state, self._settings.gate.drift_min
        if state.scores.get(version):
            return ()  # these scores judge it: in one more version its new tasks would count as older ones
        tasks, drift = state.tasks_at(version), state.drift(version)
        moved = {
            task_id
            for task_id in evaluations_due(state, version, drift_min)
            # A task without rows is always due: it must also have moved so far since its coefficients were made.
            if drift.get(task_id) and state.drift_bound(task_id, tasks[task_id].version, version) >= drift_min
        }
        records = self._queue.among(moved) if moved else {}
        return tuple(r for r in records.values() if r.spec.method.share_full and r.task_id not in state.quarantined)

    def take(self, order: Train, outcome: Outcome) -> None:
        """Take the outcome of an order of `again_order`. A task that cannot be refined stays as the merge left it."""
        assert isinstance(outcome, Trained | Failed)
        if self._queue.get(order.task_id).again_token != order.token:  # else they were logged before a restart
            self._queue.append_log(order.task_id, outcome.log_lines)
        if order.refine_version != self._verdict.version:
            self._unused_files.due((order.task_id,))  # the version was judged, or is gone: its staged file goes too
            return
        where = f"version {order.refine_version} (share_full)"
        if isinstance(outcome, Trained):
            title = f"{order.spec.team}/{order.spec.name}"
            staged = StagedAdapter(
                task_id=order.task_id, name=title, key=outcome.staging_key, sha256=outcome.adapter_sha256
            )
            self._verdict.refined[order.task_id] = staged
            told = RefinedAgain(
                message=f"refined again, for {where}", token=order.token, seconds=outcome.seconds, at=time.time()
            )
        else:
            if outcome.detail:
                log.error("task %s: %s\n%s", order.task_id, outcome.message, outcome.detail)
            self._verdict.tries += 1
            if outcome.fault not in ("preempted", "damaged"):
                self._verdict.count(order.task_id, outcome.fault)
            given_up = self._verdict.gives_up(order.task_id, self._settings.failures, "refined")
            hopeless = outcome.fault == "input" or bool(given_up)
            if hopeless:
                self._verdict.unrefined.add(order.task_id)
                self._verdict.lost.pop(order.task_id, None)
                self._verdict.died.pop(order.task_id, None)
            told = RefinedAgain(
                message=f"{'not' if hopeless else 'not yet'} refined again, for {where}: {outcome.message}"
                + (f" ({given_up})" if given_up else "")
            )
        self._apply((order.task_id,), told)

    def refuse(self, request: Refine, error: OnebasisError) -> None:
        """Let the task that the store refused go on as it was merged; the others are asked for again without it."""
        asked = tuple(staged.task_id for staged in request.adapters)
        held = self._store.refresh().refs[CANDIDATE]
        if held != self._verdict.version:
            return  # nothing is wrong with the adapters: the version is gone
        culprits = error.task_ids if isinstance(error, RefusedAdapters | MissingAdapters) else asked
        for task_id in culprits:
            if self._verdict.refined.pop(task_id, None) is None:
                self._apply((task_id,), RefinementRefused(str(error)))
            else:
                self._verdict.unrefined.add(task_id)
                self._apply((task_id,), RefinedAgain(message=f"not refined again: {error}"))
        self._unused_files.due(asked)

    def _apply(self, task_ids: tuple[str, ...], event: Event) -> list[TaskRecord]:
        self._calls.wake()
        return self._queue.try_apply(task_ids, event)
