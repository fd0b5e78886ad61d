"""Why a task is where it is: a record for programs, and one sentence for people made from it."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from configs.settings import DEFAULT_POOL
from orchestrator.alarms import AlarmCode
from orchestrator.scheduling.estimate import Estimate, Pace, duration
from orchestrator.scheduling.reasons import Wait, WaitCode, first_of
from orchestrator.tasks.task_lifecycle import Step, next_step
from orchestrator.tasks.task_record import Pause, TaskRecord, TaskState
from subspace_store.log.version import Hold

AWAY = (AlarmCode.STORE_AWAY, AlarmCode.DATABASE_AWAY, AlarmCode.STORE_SILENT)
"""Alarms for which a task waits as for a storage that does not answer."""
STORE_ALARMS = (
    AlarmCode.STORE_DAMAGED,
    AlarmCode.STORE_FULL,
    AlarmCode.STORE_READ_ONLY,
    AlarmCode.NOT_WRITTEN,
    AlarmCode.STORE_UNUSABLE,
    AlarmCode.OUSTED,
)
"""Alarms for which a task waits as for a store that takes nothing."""


@dataclass(frozen=True)
class Surroundings:
    """Facts that the answer is made of, beside the record."""

    is_running: bool
    """Whether there is a control plane."""
    main: int = 0
    """Version that `main` names."""
    is_gone_from_main: bool = False
    """Whether `main` was moved while no service ran, so that it no longer holds this published task."""
    place: int | None = None
    """Place in the queue, from 1."""
    pace: Pace | None = None
    """How long it has a worker; None: not known."""
    start: Estimate | None = None
    """When it starts; None: not known."""
    idle_causes: Collection[str] = ()
    """What the workers of the task's pool do, where none of them is ready."""
    pools: Mapping[str, str] = field(default_factory=dict)
    """Pools that there are, with what each has, for people."""
    phase: str = ""
    """Phase that the task's worker reported last."""
    held: Hold | None = None
    """Hold of `main` that the task waits for."""
    is_version_refined: bool = False
    """Whether workers refine tasks for the task's version."""
    pauses: Mapping[str, Pause] = field(default_factory=dict)
    """Team to its pause; that of the service under an empty name."""
    decided: Wait | None = None
    """Reason that the scheduler gave for a task that stands in line."""
    titles: Mapping[str, str] = field(default_factory=dict)
    """Id to name of tasks that the answer names."""
    alarms: Mapping[AlarmCode, str] = field(default_factory=dict)
    """Code to text of the alarms that ring."""
    trial: tuple[int, str, float] | None = None
    """As `CanaryTrial.waiting`."""
    leader: str = ""
    """Name of the control plane that leads, where the one that answers stands by: it does not know why the other has
    not started a task yet."""


def wait_of(record: TaskRecord, around: Surroundings) -> Wait | None:
    """Why the task waits; None where it does not, or where no service runs."""
    if not around.is_running:
        return None
    queued = record.state is TaskState.QUEUED
    waits = [_held(around.held), _tried(record, around), *(_of_the_queue(record, around) if queued else ())]
    if next_step(record) is Step.AWAIT_ADAPTER and around.phase == "waiting":
        waits.append(Wait(code=WaitCode.GANG_INCOMPLETE, pool=record.pool, about=record.worker))
    if queued or record.state in (TaskState.MERGING, TaskState.REFINING, TaskState.EVALUATING):
        waits += [
            Wait(code=code, about=text)
            for codes, code in ((AWAY, WaitCode.STORAGE_AWAY), (STORE_ALARMS, WaitCode.STORE_ALARM))
            for alarm, text in around.alarms.items()
            if alarm in codes
        ]
    return first_of(*waits)


def _held(held: Hold | None) -> Wait | None:
    return None if held is None else Wait(code=WaitCode.HELD, about=who_holds(held), since=held.time)


def _tried(record: TaskRecord, around: Surroundings) -> Wait | None:
    if around.trial is None or record.state is not TaskState.EVALUATING or around.trial[0] != record.version:
        return None
    _, about, until = around.trial
    return Wait(code=WaitCode.CANARY, about=about, until=until)


def _of_the_queue(record: TaskRecord, around: Surroundings) -> list[Wait | None]:
    spec = record.spec
    pauses = {
        "the service": around.pauses.get(""),
        f"team {record.team}": around.pauses.get(record.team),
        "it": record.paused,
    }
    paused = (
        Wait(
            code=WaitCode.PAUSED,
            about=f"{what} is paused by {pause.by}: {pause.reason or 'no reason given'}",
            since=pause.at,
            is_of_service=what == "the service",
        )
        for what, pause in pauses.items()
        if pause is not None
    )
    awaited = ", ".join(around.titles.get(task_id, task_id) for task_id in record.awaits)
    return [
        next(paused, None),
        Wait(code=WaitCode.DEPENDENCY, about=awaited, since=record.submitted_at) if awaited else None,
        Wait(code=WaitCode.NOT_BEFORE, since=record.submitted_at, until=spec.not_before.timestamp())
        if record.not_due and spec.not_before
        else None,
        around.decided or (None if record.blocked or around.leader else Wait(code=WaitCode.ABOUT_TO_START)),
    ]


def why(record: TaskRecord, around: Surroundings) -> str:
    """One sentence on why the task is where it is."""
    wait = wait_of(record, around)
    if record.state is TaskState.QUEUED:
        return _why_queued(record, around, wait)
    if wait is not None:
        gang = f"{wait.about}{_of(wait)} waits for places for its ranks"
        return {
            WaitCode.GANG_INCOMPLETE: f"{gang}; the task's log says for what",
            WaitCode.HELD: f"{_what_waits(record)} waits: {wait.about}",
            WaitCode.CANARY: f"{_what_waits(record)} passed the gate, and {wait.about}; it is published at "
            f"{_clock(wait.until)} at the latest",
        }.get(wait.code, f"waits for the store: {wait.about}")
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


def _what_waits(record: TaskRecord) -> str:
    return f"version {record.version}" if record.version else "its adapter, behind the version before it,"


def _why_queued(record: TaskRecord, around: Surroundings, wait: Wait | None) -> str:
    if wait is None and around.leader:
        return f"stands in line; {around.leader} leads, and says there why it has not started it yet"
    if wait is None:
        return "the service is not running; `onebasis up` starts it"
    note = f"; last attempt: {record.reason}" if record.reason else ""
    start = f"; {_start(around)}" if around.start is not None else ""
    if record.blocked or wait.code in (WaitCode.PAUSED, WaitCode.NEVER_FITS, WaitCode.DRAINED):
        is_timed = wait.code in (WaitCode.DEPENDENCY, WaitCode.NOT_BEFORE)
        return _cause(wait, around) + (start if is_timed else "") + note
    if wait.code in (WaitCode.GANG_INCOMPLETE, WaitCode.NO_MACHINE):
        return _cause(wait, around)
    if wait.code is WaitCode.BASE_MODEL_LOADING:
        return _cause(wait, around) + start
    ahead = f"place {around.place}, {around.place - 1} before it" if around.place else "its turn is coming"
    return f"{_cause(wait, around)}; {ahead}; {_start(around)}{note}"


def _cause(wait: Wait, around: Surroundings) -> str:
    about = around.titles.get(wait.about, wait.about)
    at = _clock(wait.until)
    return {
        WaitCode.PAUSED: about,
        WaitCode.DEPENDENCY: f"comes after {about}",
        WaitCode.NOT_BEFORE: f"is not started before {at}",
        WaitCode.NEVER_FITS: _never_fits(wait, around),
        WaitCode.DRAINED: f"no worker{_of(wait)} is left: {about}",
        WaitCode.OVER_QUOTA: _over_quota(about, at),
        WaitCode.NO_FREE_PLACE: f"all places{_of(wait)} are in use",
        WaitCode.RESERVED_FOR: f"free places are kept for {about or 'a version that is about to be scored'}",
        WaitCode.GANG_INCOMPLETE: f"no worker{_of(wait)} has a place for each of its ranks{_idle(around)}",
        WaitCode.NO_MACHINE: f"no machine has room for a worker{_of(wait)}{_idle(around)}",
        WaitCode.BASE_MODEL_LOADING: f"no worker{_of(wait)} is ready{_idle(around)}",
        WaitCode.ABOUT_TO_START: "is about to start" + (f", when {about} has written its checkpoint" if about else ""),
    }.get(wait.code, f"waits for the store: {about}")


def _clock(at: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at)) if at is not None else ""


def _over_quota(about: str, at: str) -> str:
    if about:
        return (
            f"its team has its quota; before it borrows {about}, which gave its place back and borrows none before {at}"
        )
    if at:
        return f"gave its place back, and borrows none before {at}"
    return "its team has its quota, and others leave it nothing to borrow"


def _of(wait: Wait) -> str:
    """The pool of a reason, where there is more than the default one to tell it from."""
    return f" of pool {wait.pool}" if wait.pool not in ("", DEFAULT_POOL) else ""


def _never_fits(wait: Wait, around: Surroundings) -> str:
    if wait.pool in around.pools:
        return "asks for more places than there are"
    there_are = "; ".join(f"'{name}', {has}" for name, has in around.pools.items())
    if not wait.pool:
        return f"no pool of its base model takes it; there are: {there_are}"
    return f"its pool '{wait.pool}' is no longer in the settings; there are: {there_are}"


def _idle(around: Surroundings) -> str:
    causes = "; ".join(sorted(set(around.idle_causes)))
    return f": {causes or 'one is started for the first task that waits'}"


def _start(around: Surroundings) -> str:
    start, pace = around.start, around.pace
    if pace is None or start is None:
        return (
            "its start cannot be estimated: no task has been trained here yet"
            if pace is None
            else "its start is not known"
        )
    before = "the one task before" if pace.count == 1 else f"the last {pace.count} tasks like it"
    basis = f"it takes about {duration(pace.seconds)}, by {before}"
    about = "at once" if start.seconds < 1 else f"in about {duration(start.seconds)}"
    return f"starts {about}, in four of five cases {span(start)} ({basis})"


def span(estimate: Estimate) -> str:
    """The interval of an estimate, for people."""
    return f"between {duration(estimate.earliest)} and {duration(estimate.latest)}"
