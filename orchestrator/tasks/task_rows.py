"""A task's record and its events as rows of the tables, and back: tolerant of what other releases wrote."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from pydantic import ValidationError

from configs.errors import UnreadableTask
from orchestrator.tasks.task_events import Event, RefinementRefused, TrainingDone, TrainingFailed
from orchestrator.tasks.task_record import TaskRecord
from workers.orders import NOWHERE, DoneAt, Phase, PhaseTime, Point, Trained

LOG = "log"
"""Kind of the events that are lines of a task's training log."""
PROGRESS = "progress"
"""Kind of the events that are points of a task's curves, as JSON."""


@dataclass(frozen=True)
class TaskEvent:
    """One line of a task's history."""

    event_id: int
    at: float
    kind: str
    text: str


@dataclass(frozen=True, kw_only=True)
class NamedEvent(TaskEvent):
    """One line of a task's history, with the task's name."""

    task_id: str
    title: str

    @property
    def team(self) -> str:
        return self.title.partition("/")[0]


@dataclass(frozen=True)
class LifeEvent:
    """What an event made of a task, for programs."""

    event_id: int
    at: float
    kind: str
    facts: Mapping[str, Any]
    """See `facts_of`."""


def facts_of(after: TaskRecord, event: Event | None = None, before: TaskRecord | None = None) -> str:
    """What an event made of a task, as JSON.

    Args:
        after: The task after the event.
        event: None: its submission.
        before: The task before it; None: it was not there.
    """
    facts: dict[str, Any] = {
        "state": str(after.state),
        "was": str(before.state) if before else "",
        "revision": after.revision,
        "attempt": after.attempt,
        "version": after.version,
    }
    for name in ("token", "worker", "merge_key", "merge_seconds", "bytes_written"):
        if (fact := getattr(event, name, None)) is not None:
            facts[name] = fact
    if after.reason_codes:
        facts["codes"] = list(after.reason_codes)
    return json.dumps(facts)


def done_at_in(event: Event) -> DoneAt:
    """Where and when the order was done that an event ends."""
    match event:
        case TrainingDone(outcome=outcome):
            return outcome.done_at
        case TrainingFailed(done_at=done_at):
            return done_at
    return NOWHERE


def done_at_text(done_at: DoneAt) -> str | None:
    """As the tables keep it; None where nobody can say."""
    return None if done_at == NOWHERE else json.dumps(asdict(done_at))


def done_at_of(text: str | None) -> DoneAt:
    """The reverse; what this release cannot read is left out."""
    try:
        told = json.loads(text or "{}")
        phases = tuple(PhaseTime(**one | {"phase": Phase(one["phase"])}) for one in told.get("phases", ()))
        return DoneAt(node=told.get("node", ""), phases=phases)
    except (ValueError, TypeError, KeyError, AttributeError):
        return NOWHERE


def points_of(events: Iterable[TaskEvent]) -> list[Point]:
    """The points that events of kind `progress` keep. Rows of older releases have neither time nor speeds; what a newer
    release added is left out, and so is an unreadable row."""
    return [point for event in events if event.kind == PROGRESS and (point := _point(event))]


def record_of(task_id: str, title: str, text: str) -> TaskRecord:
    """A stored record. Fields that this release does not know are ignored, those that are missing have their defaults.

    Raises:
        UnreadableTask: A value that this release does not know, or no record at all.
    """
    try:
        return TaskRecord.model_validate_json(text, extra="ignore")
    except (ValidationError, RecursionError) as error:
        raise UnreadableTask(
            f"its row in the task database cannot be read: {_mistake_in(error)}",
            f"task {title} ({task_id})",
            "if a newer onebasis wrote it, use that one, else restore it from a backup; all other tasks go on",
            task_id,
        ) from error


def columns_of(record: TaskRecord, before: str = "") -> dict[str, Any]:
    """A record as a row. `before`: the stored record that it follows, whose fields of other releases are kept."""
    text = record.model_dump_json()
    if before:
        old, new = json.loads(before), json.loads(text)
        others = {name: value for name, value in old.items() if name not in TaskRecord.model_fields}
        if others or old["spec"] != new["spec"]:  # the document never changes: kept as it came
            text = json.dumps(others | new | {"spec": old["spec"]})
    return {
        "team": record.team,
        "name": record.name,
        "client_key": record.client_key,
        "state": str(record.state),
        "token": record.token,
        "revision": record.revision,
        "submitted_at": record.submitted_at,
        "priority": -record.spec.priority,
        "version": record.version,
        "content_sha256": record.content_sha256,
        "blocked": record.blocked,
        "base_model": record.base_model,
        "pool": record.pool,
        "not_before": record.spec.not_before.timestamp() if record.spec.not_before else None,
        "gave_back_at": record.gave_back_at,
        "max_run_seconds": record.spec.max_run_seconds,
        "record": text,
    }


def _mistake_in(error: Exception) -> str:
    """The first thing that is wrong with a record, in one line."""
    if not isinstance(error, ValidationError):
        return type(error).__name__
    first = error.errors(include_url=False, include_input=False)[0]
    return ".".join(str(part) for part in first["loc"]) + f": {first['msg']}"


def _point(event: TaskEvent) -> Point | None:
    names = {field.name for field in fields(Point)}
    try:
        told = json.loads(event.text)
        return Point(**{"at": event.at} | {name: value for name, value in told.items() if name in names})
    except (ValueError, TypeError, AttributeError):
        return None


def narrate(record: TaskRecord, event: Event, known: Collection[str] = ()) -> str:
    """One line for people: what happened and what it led to.

    Args:
        record: The task after the event.
        known: Warnings that it had before: nobody is told twice.
    """
    facts = [
        f"{name} {getattr(event, name)}"
        for name in ("worker", "fault", "version", "merge_key", "by", "title", "pool")
        if hasattr(event, name)
    ]
    message = getattr(event, "message", "")
    if isinstance(event, TrainingDone):
        facts += _trained(event.outcome)
        doubt = record.doubt(event.outcome.local_score, event.outcome.base_score)
        new = (warning for warning in event.outcome.warnings if warning not in known)
        message = "; ".join(filter(None, (*new, doubt)))
    if isinstance(event, TrainingFailed | RefinementRefused) and record.unrefined:
        message = f"goes on as it was merged: {record.unrefined}"
    return " · ".join([f"now {record.state}", *facts, *([message] if message else [])])


def _trained(outcome: Trained) -> list[str]:
    """How the adapter came about: what `auto` chose, how much was trained, from which step it went on."""
    facts = {
        f"method {outcome.method}": outcome.method,
        f"in the basis of version {outcome.basis_version}": outcome.basis_version,
        f"{outcome.trainable_parameters:,} numbers trained": outcome.trainable_parameters,
        f"went on from step {outcome.resumed_from}": outcome.resumed_from,
        f"own adapter scores {outcome.local_score:.4f}": outcome.local_score == outcome.local_score,
    }
    return [text for text, known in facts.items() if known]


def point_text(point: Point) -> str:
    return json.dumps({name: value for name, value in vars(point).items() if value == value})  # no NaN in JSON
