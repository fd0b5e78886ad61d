"""Why a task is where it is, in one sentence for people."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from orchestrator.scheduling.estimate import Pace, duration
from orchestrator.tasks.task_lifecycle import Step, next_step
from orchestrator.tasks.task_record import TaskRecord, TaskState
from subspace_store.log.version import Hold


@dataclass(frozen=True)
class Surroundings:
    """Facts that the sentence is made of, beside the record."""

    is_running: bool
    """Whether there is a control plane."""
    main: int = 0
    """Version that `main` names."""
    is_gone_from_main: bool = False
    """Whether `main` was moved while no service ran, so that it no longer holds this published task."""
    place: int | None = None
    """Place in the queue, from 1."""
    pace: Pace | None = None
    """How long tasks have a worker here; None: not known."""
    starts_in_seconds: float | None = None
    """Estimate; None: not known."""
    free_workers: int = 0
    idle_causes: Collection[str] = ()
    """What the workers do, where none of them is ready."""
    phase: str = ""
    """Phase that the task's worker reported last."""
    held: Hold | None = None
    """Hold of `main` that the task waits for."""
    is_version_refined: bool = False
    """Whether workers refine tasks for the task's version."""


def why(record: TaskRecord, around: Surroundings) -> str:
    """One sentence on why the task is where it is."""
    if record.state is TaskState.QUEUED:
        return _why_queued(record, around)
    if next_step(record) is Step.AWAIT_ADAPTER and around.phase == "waiting":
        return f"{record.worker} waits for places for its ranks; the task's log says for what"
    if around.held is not None:
        what = f"version {record.version}" if record.version else "its adapter, behind the version before it,"
        return f"{what} waits: {who_holds(around.held)}"
    if record.state is TaskState.EVALUATING and around.is_version_refined:
        return f"version {record.version} is scored when tasks of it have been refined on their own rows"
    if around.is_gone_from_main:
        return f"main (version {around.main}) no longer holds it; the next `onebasis up` parks it"
    return {
        TaskState.TRAINING: f"{record.worker} is fine-tuning its adapter (attempt {record.attempt})",
        TaskState.MERGING: "its adapter waits for the version before to be judged, then it is merged",
        TaskState.REFINING: f"its coefficients in version {record.version} are trained on its own rows",
        TaskState.EVALUATING: f"version {record.version} is being scored on every task it could have changed",
        TaskState.PUBLISHED: f"main holds it since version {record.version}",
    }.get(record.state, record.reason)


def who_holds(held: Hold) -> str:
    """Who holds `main`, and why."""
    return f"main is held by {held.actor}: {held.reason or 'no reason given'}"


def _why_queued(record: TaskRecord, around: Surroundings) -> str:
    if not around.is_running:
        return "the service is not running; `onebasis up` starts it"
    if around.idle_causes:
        return f"no worker is ready: {'; '.join(sorted(set(around.idle_causes)))}"
    ahead = f"{around.place - 1} before it" if around.place else "its turn is coming"
    workers = "1 worker" if around.free_workers == 1 else f"{around.free_workers} workers"
    note = f"; last attempt: {record.reason}" if record.reason else ""
    return f"place {around.place}: {ahead}, {workers} free; {_start(around)}{note}"


def _start(around: Surroundings) -> str:
    if around.pace is None or around.starts_in_seconds is None:
        return "its start cannot be estimated: no task has been trained here yet"
    if around.pace.count == 1:
        basis = f"the one task before took {duration(around.pace.seconds)}"
    else:
        basis = f"the median of the last {around.pace.count} tasks is {duration(around.pace.seconds)}"
    start = "at once" if around.starts_in_seconds < 1 else f"in about {duration(around.starts_in_seconds)}"
    return f"starts {start} ({basis})"
