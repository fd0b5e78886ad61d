"""One page: the whole life of a task, as a pure function of its record and what happened.

```
             (a)            (b)            (d)            (f)
   queued ───────▶ training ────▶ merging ────▶ evaluating ────▶ published ◀─(i)─┐
     ▲  ▲             │           │ ▲ │ ▲        ▲ │  │             │            │
     │  └─────(c)─────┘           │ │ │ └──(j)───┼─┘  │(g)          └───(h)──▶ parked
   submitted                   (e)│ │ │(k)    (m)│    ▼
                                  ▼ │ ▼          │  rejected
                             parked └─ refining ─┘
                                  (j)    ↺ (l)
```
(a) claimed by a worker. (b) adapter in staging. (c) machine lost or our own bug, budget left; else parked.
A user's mistake parks at once. Or preempted: that costs no budget, the task keeps its place, and its next attempt goes
on from the checkpoint. (d) merged into a version on `candidate`. (e) the store refused the adapter.
(f) the gate let its version pass: `main` moved. (g) the gate did not. (h) `main` was rolled back behind it, or
made again without it. (i) `main` was rolled forward again. (j) the version it was in is gone (its group failed, or a
rollback came in between): merged again. (k) merged, and to be refined: (l) claimed by workers until one has trained its
coefficients in the version's basis; lost, preempted or stopped by a bug within the budgets of (c), it is claimed again.
(m) the store made the next version with the refined coefficients, and its whole group, which waited in `evaluating`,
moves there. Or it could not be refined: then it goes on as it was merged, and its record says why. A task is refined
once: merged again by (j), it is merged as refined. With `share_full` it is refined again beside the newcomers of later
versions, and stays published meanwhile. Cancelled can be reached until it is part of a merge. A task whose next
revision takes its place in `main` is replaced; put back, it is published again.

A queued task stands in line, or something keeps it from that (`TaskRecord.blocked`): it is paused, it comes after a
task that is not published, its time has not come. (c) leads there too, where it was paused while it ran; and to parked
where it ran for longer than it may. A task behind one that ends without being published is parked.

No Ray, no SQL, no torch in this file.
"""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Any

from configs.errors import Conflict
from configs.settings import FailureSettings
from orchestrator.scheduling.fair_share import Use
from orchestrator.tasks.task_events import (
    CameDue,
    CancelRequested,
    Claimed,
    DeadlineForeseen,
    DependencyEnded,
    Event,
    Judged,
    MergeBegun,
    Merged,
    MergeRefused,
    MergeUndone,
    Paused,
    PoolGiven,
    PreemptRequested,
    Reason,
    Refined,
    RefinedAgain,
    RefinementRefused,
    Replaced,
    Restored,
    Resumed,
    RolledBack,
    RunsTooLong,
    TrainingDone,
    TrainingFailed,
)
from orchestrator.tasks.task_record import Pause, TaskRecord, TaskState, local_results, staging_key
from workers.orders import Trained

CODE_OF_FAULT = {
    "input": Reason.BAD_INPUT,
    "lost": Reason.MACHINE_LOST,
    "died": Reason.WORKER_DIED,
    "bug": Reason.INTERNAL_ERROR,
    "rows": Reason.ROWS_DAMAGED,
    "preempted": Reason.PREEMPTED,
    "damaged": Reason.STORE_DAMAGED,
}
"""Fault of an attempt, see `workers.orders.Failed`, to the reason that the task waits again or is parked for."""


class Step(StrEnum):
    """What the control plane has to do for a task now."""

    TRAIN = "train"
    AWAIT_ADAPTER = "await adapter"
    MERGE = "merge"
    REFINE = "refine"
    MERGE_REFINED = "merge refined"
    JUDGE = "judge"
    NOTHING = "nothing"


def next_step(record: TaskRecord) -> Step:
    """What to do next, read off the record alone: a restart needs no code of its own."""
    if record.state is TaskState.REFINING:
        return Step.AWAIT_ADAPTER if record.token else Step.MERGE_REFINED if record.refined_key else Step.REFINE
    return {
        TaskState.QUEUED: Step.TRAIN,
        TaskState.TRAINING: Step.AWAIT_ADAPTER,
        TaskState.MERGING: Step.MERGE,
        TaskState.EVALUATING: Step.JUDGE,
    }.get(record.state, Step.NOTHING)


def needs_training_rows(record: TaskRecord) -> bool:
    """Whether the task will be trained, or refined, on its rows."""
    waits = record.state is TaskState.MERGING and _is_to_be_refined(record)
    if record.spec.method.share_full:
        ended = record.state in (TaskState.REJECTED, TaskState.CANCELLED, TaskState.PARKED)
        return not ended or bool(record.state is TaskState.PARKED and record.version)
    return waits or next_step(record) in (Step.TRAIN, Step.AWAIT_ADAPTER, Step.REFINE)


def advance(record: TaskRecord, event: Event, settings: FailureSettings) -> TaskRecord:
    """The record after an event.

    Returns:
        The new record; `record` itself when a stale worker reports (its lease token is no longer the task's).

    Raises:
        Conflict: The event does not belong to the record's state; nothing changes.
    """
    state = record.state
    match event:
        case Claimed() if state is TaskState.QUEUED and not record.blocked:
            return _with(
                record,
                state=TaskState.TRAINING,
                attempt=record.attempt + 1,
                token=event.token,
                worker=event.worker,
                places=event.places,
                gpus=event.gpus,
                claimed_at=event.at,
                order_at=event.at,
                first_step_at=None,
                reason="",
                reason_codes=(),
                preempt_requested=False,
            )
        case Claimed() if next_step(record) is Step.REFINE:
            return _with(
                record,
                token=event.token,
                worker=event.worker,
                places=event.places,
                gpus=event.gpus,
                order_at=event.at,
                reason_codes=(),
                preempt_requested=False,
            )
        case TrainingDone() | TrainingFailed() if _is_stale(record, event):
            return record
        case TrainingDone() if record.cancel_requested:  # it finished before it got the request
            return _end(record, TaskState.CANCELLED, "cancelled while it was running", event.at, Reason.CANCELLED)
        case TrainingDone(outcome=outcome) if state is TaskState.REFINING:
            return _with(
                record,
                refined_key=outcome.staging_key or staging_key(record.task_id, record.attempt, record.token),
                refined_sha256=outcome.adapter_sha256,
                refined_seconds=outcome.seconds,
                token="",
                worker="",
                preempt_requested=False,
            )
        case TrainingDone(outcome=outcome):
            return _with(
                record,
                state=TaskState.MERGING,
                staging_key=outcome.staging_key or staging_key(record.task_id, record.attempt, record.token),
                local_results_key=local_results(record),
                adapter_sha256=outcome.adapter_sha256,
                adapter_parameters=outcome.adapter_parameters,
                local_score=_measured(outcome.local_score),
                base_score=_measured(outcome.base_score),
                metrics={name: value for name, value in outcome.metrics.items() if value == value},
                scores_of_rows=dict(outcome.scores_of_rows),
                main_scores_of_rows=dict(outcome.main_scores_of_rows),
                warnings=_warnings(record, outcome),
                method=outcome.method,
                compared=outcome.compared,
                trainable_parameters=outcome.trainable_parameters,
                basis_version=outcome.basis_version,
                resumed_from=outcome.resumed_from,
                steps=outcome.steps,
                train_loss=_measured(outcome.train_loss),
                train_seconds=outcome.seconds,
                first_step_at=outcome.first_step_at or None,
            )
        case TrainingFailed():
            return _after_failure(record, event, settings)
        case MergeBegun() if state is TaskState.MERGING:
            return _with(record, merge_key=event.merge_key)
        case Merged() if state is TaskState.MERGING:
            after = TaskState.REFINING if _is_to_be_refined(record) else TaskState.EVALUATING
            return _with(record, state=after, version=event.version, token="", worker="")
        case Refined() if state in (TaskState.REFINING, TaskState.EVALUATING):
            return _with(record, state=TaskState.EVALUATING, version=event.version, token="", worker="")
        case RefinementRefused() if state is TaskState.REFINING:
            return _unrefined(record, event.message)
        case RefinedAgain(token=token) if state is TaskState.PUBLISHED and token and token == record.again_token:
            return record  # a restarted control plane asked once more, and the worker remembered
        case RefinedAgain() if state is TaskState.PUBLISHED:
            return _refined_again(record, event) if event.token else _with(record)
        case MergeRefused() if state is TaskState.MERGING:
            return _end(record, TaskState.PARKED, event.message, event.at, event.code)
        case MergeUndone() if state in (TaskState.MERGING, TaskState.REFINING, TaskState.EVALUATING):
            return _with(
                record,
                state=TaskState.MERGING,
                merge_key="",
                merge_alone=record.merge_alone or event.alone,
                version=0,
                token="",
                worker="",
                staging_key=record.refined_key or record.staging_key,
                adapter_sha256=record.refined_sha256 or record.adapter_sha256,
            )
        case Judged() if state is TaskState.EVALUATING:
            passed = TaskState.PUBLISHED if event.passed else TaskState.REJECTED
            return _end(record, passed, event.message, event.at, *event.codes)
        case RolledBack() if state in (TaskState.PUBLISHED, TaskState.REPLACED):
            return _end(record, TaskState.PARKED, event.message, event.at, event.code)
        case Replaced() if state is TaskState.PUBLISHED or (state is TaskState.PARKED and record.version):
            return _end(record, TaskState.REPLACED, event.message, event.at)
        case Restored() if state in (TaskState.PUBLISHED, TaskState.REPLACED) or (
            state is TaskState.PARKED and record.version
        ):
            at = event.version
            return _with(record, state=TaskState.PUBLISHED, reason=event.message, reason_codes=(), version=at)
        case CancelRequested():
            return _after_cancel(record, event)
        case PreemptRequested() if next_step(record) in (Step.TRAIN, Step.REFINE) or record.preempt_requested:
            return record
        case PreemptRequested() if next_step(record) is Step.AWAIT_ADAPTER:
            return _with(record, preempt_requested=True, gives_back=event.gives_back)
        case PreemptRequested():
            raise Conflict(f"is {state} and uses no worker that could be taken from it", record.title)
        case Paused() | Resumed() if state in (TaskState.QUEUED, TaskState.TRAINING):
            return _after_pause(record, event)
        case Paused():
            raise Conflict(f"is {state}: only what waits or trains can be paused", record.title)
        case Resumed():  # it has gone on without
            return record
        case PoolGiven() if state is TaskState.QUEUED:
            return _with(record, pool=event.pool)
        case CameDue() if state is TaskState.QUEUED:
            return _with(record, not_due=False) if record.not_due else record
        case DependencyEnded():
            return _after_dependency(record, event)
        case DeadlineForeseen() if state in (TaskState.QUEUED, TaskState.TRAINING):
            same = event.outlook == record.deadline_outlook
            return record if same else _with(record, deadline_outlook=event.outlook)
        case RunsTooLong() if state is TaskState.TRAINING:
            return record if record.ran_too_long else _with(record, ran_too_long=True)
    raise Conflict(
        f"'{type(event).__name__}' cannot happen to a task that is {state}", record.title, "read the task again"
    )


def used_by(record: TaskRecord, event: Event, heard_until: float | None = None) -> Use | None:
    """Cost, for the task's team, of the attempt that an event ends, however it ended; None: the event ends none.

    Args:
        record: The task before the event.
        heard_until: When its worker's last lease ended. A worker that was lost while no control plane ran used no more.
    """
    if not isinstance(event, TrainingDone | TrainingFailed) or _is_stale(record, event):
        return None
    seconds = event.outcome.worker_seconds if isinstance(event, TrainingDone) else event.seconds
    # Release 0.3 did not note when a refinement began.
    started = next(at for at in (record.order_at, record.claimed_at, event.at) if at is not None)
    ended = event.at if heard_until is None else min(event.at, max(started, heard_until))
    return Use(
        team=record.team,
        seconds=max(0.0, ended - started) if seconds is None else seconds,
        ended_at=ended,
        places=record.places,
        gpus=record.gpus,
    )


def _after_failure(record: TaskRecord, event: TrainingFailed, settings: FailureSettings) -> TaskRecord:
    """Requeue or give up, by whose fault it was. Each fault has a budget of its own."""
    refines = record.state is TaskState.REFINING
    if not refines and (record.cancel_requested or (event.fault == "cancelled" and not record.ran_too_long)):
        return _end(record, TaskState.CANCELLED, event.message, event.at, Reason.CANCELLED)
    lost = record.lost_machines + (event.fault == "lost")
    deaths = record.worker_deaths + (event.fault == "died")
    bugs = record.own_bugs + (event.fault == "bug")
    preemptions = record.preemptions + (event.fault == "preempted")
    counted = _with(
        record,
        ran_seconds=record.ran_seconds + _ran(record, event),
        ran_too_long=False,
        lost_machines=lost,
        worker_deaths=deaths,
        own_bugs=bugs,
        preemptions=preemptions,
        preempt_requested=False,
        gives_back=False,
        gave_back_at=event.at if record.gives_back and event.fault == "preempted" else None,
        token="",
        worker="",
    )
    reason, code = "", CODE_OF_FAULT.get(event.fault, Reason.INTERNAL_ERROR)
    if event.fault in ("input", "rows"):
        reason = event.message
    elif record.ran_too_long:
        reason, code = f"ran for longer than its max_run_seconds, {_seconds_max(record):g}", Reason.RAN_TOO_LONG
    elif deaths > settings.worker_deaths_max:
        reason = f"gave up after {deaths} workers that died while they did it; last: {event.message}"
    elif lost > settings.lost_machines_max or bugs > settings.own_bugs_max:
        reason = f"gave up after {lost} lost machines and {bugs} internal errors; last: {event.message}"
    if refines:
        return _unrefined(counted, reason) if reason else _with(counted, reason=event.message, reason_codes=(code,))
    if reason:
        return _end(counted, TaskState.PARKED, reason, event.at, code)
    return _with(counted, state=TaskState.QUEUED, reason=event.message, reason_codes=(code,))


def _ran(record: TaskRecord, event: TrainingFailed) -> float:
    """Seconds for which a worker had the attempt that an event ends."""
    return max(0.0, event.at - (record.order_at or event.at)) if event.seconds is None else event.seconds


def seconds_left(record: TaskRecord, now: float) -> float | None:
    """Seconds for which a worker may still have a task that trains; None where it names no longest time."""
    if record.spec.max_run_seconds is None or record.state is not TaskState.TRAINING:
        return None
    return _seconds_max(record) - record.ran_seconds - (now - (record.order_at or now))


def _seconds_max(record: TaskRecord) -> float:
    return record.spec.max_run_seconds or math.inf


def _after_pause(record: TaskRecord, event: Paused | Resumed) -> TaskRecord:
    if isinstance(event, Resumed):
        return _with(record, paused=None) if record.paused else record
    if record.paused:
        return record
    pause = Pause(by=event.by, reason=event.message, at=event.at)
    runs = record.state is TaskState.TRAINING
    return _with(record, paused=pause, preempt_requested=record.preempt_requested or runs)


def _after_dependency(record: TaskRecord, event: DependencyEnded) -> TaskRecord:
    if record.state is not TaskState.QUEUED or event.task_id not in record.awaits:
        return record
    if event.is_published:
        return _with(record, awaits=tuple(other for other in record.awaits if other != event.task_id))
    reason = f"comes after {event.title} ({event.task_id}), which is {event.state}"
    return _end(record, TaskState.PARKED, reason, event.at, Reason.DEPENDENCY_FAILED)


def _after_cancel(record: TaskRecord, event: CancelRequested) -> TaskRecord:
    reason = f"cancelled by {event.by}"
    if record.state is TaskState.TRAINING:
        return _with(record, cancel_requested=True)
    if record.state is TaskState.QUEUED or (record.state is TaskState.MERGING and not record.merge_key):
        return _end(record, TaskState.CANCELLED, reason, event.at, Reason.CANCELLED)
    if record.state is TaskState.CANCELLED:
        return record
    merged = record.state in (TaskState.MERGING, TaskState.REFINING, TaskState.EVALUATING, TaskState.PUBLISHED)
    raise Conflict(
        f"is {record.state} and cannot be cancelled",
        record.title,
        "it is part of a version: `onebasis rollback V --preview` shows how to undo one" if merged else "",
    )


def _is_stale(record: TaskRecord, event: TrainingDone | TrainingFailed) -> bool:
    token = event.outcome.token if isinstance(event, TrainingDone) else event.token
    return next_step(record) is not Step.AWAIT_ADAPTER or token != record.token


def _is_to_be_refined(record: TaskRecord) -> bool:
    """Whether its coefficients are to be trained in the basis that it was merged into: once."""
    return bool(record.spec.method.refine_epochs) and not (record.refined_key or record.unrefined)


def _unrefined(record: TaskRecord, reason: str) -> TaskRecord:
    return _with(record, state=TaskState.EVALUATING, unrefined=reason, reason_codes=(), token="", worker="")


def _refined_again(record: TaskRecord, event: RefinedAgain) -> TaskRecord:
    refined = (record.refined_seconds or 0.0) + event.seconds
    return _with(record, refined_seconds=refined, again_token=event.token)


def _end(record: TaskRecord, state: TaskState, reason: str, at: float, *codes: str) -> TaskRecord:
    return _with(record, state=state, reason=reason, reason_codes=codes, ended_at=at)


def _warnings(record: TaskRecord, outcome: Trained) -> tuple[str, ...]:
    """The task's warnings with those that training adds, each once."""
    doubt = record.doubt(outcome.local_score, outcome.base_score)
    return tuple(dict.fromkeys((*record.warnings, *outcome.warnings, *([f"own adapter: {doubt}"] if doubt else []))))


def _measured(value: float) -> float | None:
    return None if value != value else value  # NaN is the only number unequal to itself


def _with(record: TaskRecord, **changes: Any) -> TaskRecord:
    return record.model_copy(update=changes)
