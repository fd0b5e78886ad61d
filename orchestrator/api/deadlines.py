"""Which tasks cannot be trained by their deadline any more: told once in their history and in the log, and taken back
when they can again. Looked at every few seconds; between two looks a start of the service and nothing else may pass.

Estimates waver. What cannot be met is told when the earliest end that is likely comes too late, and taken back only
when the median does not.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orchestrator.api.estimates import Line
from orchestrator.api.lengths import least_seconds
from orchestrator.scheduling.estimate import Estimate, duration, ends
from orchestrator.tasks.task_events import DeadlineForeseen
from orchestrator.tasks.task_record import TaskRecord, TaskState

if TYPE_CHECKING:
    from orchestrator.tasks.task_queue import TaskQueue

log = logging.getLogger("onebasis.service")

UNTRAINED = (TaskState.QUEUED, TaskState.TRAINING)
MISSED, CANNOT = "missed", "cannot be met"


@dataclass(frozen=True)
class Told:
    """A task that is, or will be, late."""

    title: str
    at: float
    """Its deadline, in Unix seconds."""
    outlook: str
    """`missed` or `cannot be met`."""

    def as_dict(self) -> dict[str, Any]:
        return {"title": self.title, "at": self.at, "outlook": self.outlook}


class Deadlines:
    """Watches the tasks that have one and are not trained yet. `late` and `add` may be called from any thread."""

    def __init__(self, queue: Callable[[], TaskQueue], line: Callable[[Sequence[TaskRecord]], Line]) -> None:
        """
        Args:
            queue: Called when it is first needed.
            line: The line, with the estimates of some tasks.
        """
        self._queue, self._line = queue, line
        self._lock = threading.Lock()
        self._watched: set[str] | None = None
        """Ids of tasks; None until the database was asked once, which reads all that wait."""
        self.late: tuple[Told, ...] = ()
        """Tasks that are late, as of the last look."""

    def add(self, task_id: str) -> None:
        """A task with a deadline was taken in."""
        with self._lock:
            if self._watched is not None:
                self._watched.add(task_id)

    def look(self) -> None:
        """Look at all of them, and write down what has changed.

        Cost:
            One read for each hundred of them; nothing where no task has a deadline.
        """
        if self._watched is None:
            known = set(self._queue().with_deadline())
            with self._lock:
                self._watched = known
        with self._lock:
            asked = sorted(self._watched)
        if not asked:
            self.late = ()
            return
        found = self._queue().among(asked)
        records = {i: record for i, record in found.items() if record.state in UNTRAINED and record.spec.deadline}
        with self._lock:
            self._watched -= set(asked) - set(records)
        line = self._line([record for record in records.values() if record.state is TaskState.QUEUED])
        now, late = time.time(), []
        for task_id, record in sorted(records.items(), key=lambda one: one[1].submitted_at):
            outlook, message = foreseen(record, line, self._progress(record), now)
            foresees = DeadlineForeseen(outlook=outlook, message=message)
            if outlook != record.deadline_outlook and self._queue().try_apply((task_id,), foresees):
                (log.warning if outlook else log.info)("%s: %s", record.title, message)
            if outlook and record.spec.deadline is not None:
                late.append(Told(record.title, record.spec.deadline.timestamp(), outlook))
        self.late = tuple(late)

    def _progress(self, record: TaskRecord) -> Mapping[str, Any]:
        return self._queue().progress(record.task_id) if record.state is TaskState.TRAINING else {}


def foreseen(record: TaskRecord, line: Line, progress: Mapping[str, Any], now: float) -> tuple[str, str]:
    """What is foreseen of a task's deadline, given what was foreseen before (`record.deadline_outlook`).

    Args:
        line: With the task's estimate, where it waits and that is known.
        progress: What its worker reported last, where it trains.

    Returns:
        `missed`, `cannot be met`, or an empty text; and a sentence.
    """
    assert record.spec.deadline is not None
    at = record.spec.deadline.timestamp()
    day = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
    if at <= now:
        return MISSED, f"its deadline, {day}, has passed, and it is not trained"
    end = _end(record, line, progress)
    least = least_seconds(record, line.length_of(record), line.leads.get(record.task_id, 0.0))
    if end is None and least is not None and now + least > at:
        return CANNOT, f"its deadline, {day}, cannot be met: it takes {duration(least)} at the least"
    if end is None:
        return record.deadline_outlook, ""  # nothing new is known
    if now + end.earliest > at:
        return CANNOT, f"its deadline, {day}, cannot be met: it is trained in {duration(end.earliest)} at the earliest"
    if record.deadline_outlook and now + end.seconds > at:
        return record.deadline_outlook, ""
    return "", f"its deadline, {day}, can be met again: it is trained in about {duration(end.seconds)}"


def _end(record: TaskRecord, line: Line, progress: Mapping[str, Any]) -> Estimate | None:
    if record.state is TaskState.TRAINING:
        left = progress.get("seconds_left")
        return None if left is None else Estimate(left, left, left, left)
    start, length = line.starts.get(record.task_id), line.length_of(record)
    return ends(start, length) if start and length else None
