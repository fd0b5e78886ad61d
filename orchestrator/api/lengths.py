"""How long tasks have their worker, from those that ended in the same pool; and what keeps a task from the line for a
time that is known. Estimates (estimates.py) are made from both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from orchestrator.api.sources import Sources
from orchestrator.scheduling.estimate import Pace, Span, pace_of
from orchestrator.scheduling.fair_share import Waiting
from orchestrator.tasks.task_record import TaskRecord, TaskState

PACE_TASKS = 50
"""Number of tasks, the newest that ended, from which the next ones are estimated."""
READ_AT_ONCE = 200
"""Records that are read for one answer, to count the rows of waiting tasks: those of later ones are counted by later
answers."""
KEPT_MAX = 20_000
"""Tasks whose rows are remembered: they never change."""


@dataclass(frozen=True)
class Known:
    """What the last tasks of a pool took."""

    pace: Pace | None
    """None: none has been trained there."""
    settles_seconds: float
    """Median from being trained to being published or rejected."""


class Lengths:
    """Reads what is known of lengths off the records. Thread-safe."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._rows: dict[str, tuple[float, str]] = {}
        """Task id to the rows that it is to be trained on, and its method."""

    def known(self, pool: str) -> Known:
        """What the last tasks of a pool took."""
        queue = self._sources.queue
        ended = queue.page((TaskState.PUBLISHED, TaskState.REPLACED, TaskState.REJECTED), limit=PACE_TASKS, pool=pool)
        spans = [(record, span) for record in ended if (span := span_of(record)) is not None]
        settled = [
            max(0.0, record.ended_at - record.claimed_at - span.seconds)
            for record, span in spans
            if record.ended_at is not None and record.claimed_at is not None
        ]
        pace = pace_of(span for _, span in spans) or pace_of(self._running_spans(pool))
        return Known(pace, statistics.median(settled) if settled else 0.0)

    def _running_spans(self, pool: str) -> Iterable[Span]:
        """What those that train there now will have taken, as they say: all that is known before the first ends."""
        for record in self._sources.queue.page((TaskState.TRAINING,), limit=PACE_TASKS, pool=pool):
            left = self._sources.queue.progress(record.task_id).get("seconds_left")
            if left is None or record.claimed_at is None:
                continue
            took = record.ran_seconds + time.time() - record.claimed_at + left
            yield Span(seconds=took, rows=record.rows_asked(record.places), method=record.spec.method.name)

    def with_rows(self, line: Sequence[Waiting]) -> list[Waiting]:
        """The same tasks with the rows that they are to be trained on, as far as they were counted."""
        if len(self._rows) > KEPT_MAX:
            self._rows = {}
        unknown = [task.task_id for task in line if task.task_id not in self._rows][:READ_AT_ONCE]
        ranks = {task.task_id: task.ranks for task in line}
        for task_id, record in (self._sources.queue.among(unknown) if unknown else {}).items():
            self._rows[task_id] = record.rows_asked(ranks[task_id]), record.spec.method.name
        return [
            replace(task, rows=found[0], method=found[1]) if (found := self._rows.get(task.task_id)) else task
            for task in line
        ]

    def comes_in(self, blocked: Collection[TaskRecord], known: Callable[[str], Known]) -> dict[str, float]:
        """Task id to the seconds until it stands in line, of queued tasks that something else keeps from it; left out
        where that is not known.

        Args:
            known: `known` of this object, remembered for one answer: many tasks come after tasks of one pool.
        """
        now, awaited = time.time(), {task_id for record in blocked for task_id in record.awaits}
        before = self._sources.queue.among(awaited) if awaited else {}
        published = {task_id: self._published_in(record, known) for task_id, record in before.items()}
        found: dict[str, float] = {}
        for record in blocked:
            seconds = [published[task_id] for task_id in record.awaits if task_id in published]
            seconds.append(due_in(record, now))
            if record.paused is None and None not in seconds:
                found[record.task_id] = max([0.0, *(one for one in seconds if one is not None)])
        return found

    def _published_in(self, record: TaskRecord, known: Callable[[str], Known]) -> float | None:
        """Seconds until a task is published that trains, or is trained; None: not known."""
        if record.state is TaskState.QUEUED:
            return None
        of_pool = known(record.pool)
        if record.state is not TaskState.TRAINING:
            return of_pool.settles_seconds
        left = self._sources.queue.progress(record.task_id).get("seconds_left")
        if left is None and of_pool.pace is not None and record.claimed_at is not None:
            length = of_pool.pace.of(in_line(record, record.places)).seconds
            left = max(0.0, length - (time.time() - record.claimed_at))
        return None if left is None else left + of_pool.settles_seconds


def due_in(record: TaskRecord, now: float) -> float:
    """Seconds until its `not_before` has come; 0 where it has none, or it has."""
    not_before = record.spec.not_before if record.not_due else None
    return 0.0 if not_before is None else max(0.0, not_before.timestamp() - now)


def in_line(record: TaskRecord, ranks: int) -> Waiting:
    """A task as one that stands in line, with the rows that it is to be trained on.

    Args:
        ranks: Places that a task takes in its pool.
    """
    return Waiting(
        task_id=record.task_id,
        team=record.team,
        priority=record.spec.priority,
        submitted_at=record.submitted_at,
        pool=record.pool,
        ranks=ranks,
        seconds_max=record.spec.max_run_seconds,
        preempted_at=record.gave_back_at,
        rows=record.rows_asked(ranks),
        method=record.spec.method.name,
    )


def span_of(record: TaskRecord) -> Span | None:
    """How long a task that ended had its worker, from the claim to the adapter; None: it was not trained here."""
    if record.train_seconds is None or record.spec.method.name == "import":
        return None
    start = max(0.0, record.first_step_at - record.claimed_at) if record.first_step_at and record.claimed_at else 0.0
    return Span(
        seconds=start + record.train_seconds,
        rest=start,
        rows=0.0 if record.resumed_from else record.rows_asked(record.places),  # the last attempt did not take them all
        method=record.spec.method.name,
    )


def with_later(line: Sequence[Waiting], later: Iterable[Waiting]) -> list[Waiting]:
    """A line with tasks that will stand in it, each before those of its team and pool that it goes before."""
    found = list(line)
    for task in later:
        behind = (
            place
            for place, other in enumerate(found)
            if (other.team, other.pool) == (task.team, task.pool)
            and (-other.priority, other.submitted_at) > (-task.priority, task.submitted_at)
        )
        found.insert(next(behind, len(found)), task)
    return found


def least_seconds(record: TaskRecord, length: Pace | None, lead: float) -> float | None:
    """Seconds until a waiting task is trained, at the least; None: nothing is known of that.

    Args:
        length: How long it has its worker.
        lead: Seconds until it stands in line.
    """
    if record.state is not TaskState.QUEUED or length is None or not length.spans:
        return None
    return lead + length.spans[int(0.1 * (len(length.spans) - 1))]
