"""When waiting tasks start, as the service tells it; and how right it was so far.

What was told is kept in memory and compared with when the tasks did start: the next estimates are corrected by it.
After a restart that begins anew, and until then the interval is what the spread of how long tasks take makes it.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from orchestrator.scheduling.estimate import KNOWN_MAX, Estimate, Pace, Told, estimate_starts, started, waiting
from orchestrator.scheduling.fair_share import Running, Waiting
from orchestrator.tasks.task_record import TaskRecord, TaskState

if TYPE_CHECKING:
    from orchestrator.tasks.task_queue import TaskQueue

ASKED_MAX = 200
"""Estimates that are remembered until their tasks start."""
LOOK_SECONDS = 5.0
"""Interval at which it is looked which of them have started."""


LINE_QUICK_SECONDS = 0.1
"""Time within which a line is put in order that is put in order anew for everybody who asks: some 10,000 tasks."""
LINE_KEPT = 10.0
"""How many times as long as it took a longer one is kept: people who watch the list then take a tenth of a processor at
most, however many tasks wait and however many people watch."""

InLine = tuple[Sequence[Waiting], Sequence[Running]]
"""The tasks that stand in line, in their running order, and what runs."""


class KeptLine:
    """A line that takes long to be put in order is kept for a while. Thread-safe.

    Args:
        read: Puts it in order.
    """

    def __init__(self, read: Callable[[], InLine]) -> None:
        self._read = read
        self._lock = threading.Lock()
        self._kept: InLine = ((), ())
        self._until = -math.inf

    def __call__(self) -> InLine:
        """The line, in a long one as it was some seconds ago."""
        with self._lock:
            began = time.monotonic()
            if began >= self._until:
                self._kept = self._read()
                took = time.monotonic() - began
                self._until = began + took * (LINE_KEPT + 1) if took > LINE_QUICK_SECONDS else -math.inf
            return self._kept


@dataclass(frozen=True)
class Line:
    """Where tasks stand, and when they start."""

    places: Mapping[str, int] = field(default_factory=dict)
    """Task id to place, from 1."""
    starts: Mapping[str, Estimate] = field(default_factory=dict)
    """Task id to when it starts, where that is known."""
    paces: Mapping[str, Pace | None] = field(default_factory=dict)
    """Pool to how long tasks have a worker there; None: not known. Of the pools of the tasks that were asked for."""
    lengths: Mapping[str, Pace] = field(default_factory=dict)
    """Task id to how long that one has a worker, of those that were asked for."""
    leads: Mapping[str, float] = field(default_factory=dict)
    """Task id to the seconds until it stands in line, of those that do not yet."""

    def length_of(self, record: TaskRecord) -> Pace | None:
        """How long a task has a worker; None: not known."""
        return self.lengths.get(record.task_id) or self.paces.get(record.pool)


def places_in(tasks: Sequence[Waiting]) -> dict[str, int]:
    """Task id to its place in the line of its pool, from 1."""
    seen: dict[str, int] = {}
    found = {}
    for task in tasks:
        found[task.task_id] = seen[task.pool] = seen.get(task.pool, 0) + 1
    return found


class Estimates:
    """Tells starts, and remembers what it told. Thread-safe."""

    def __init__(self, queue: Callable[[], TaskQueue]) -> None:
        """queue: Called when it is first needed."""
        self._queue = queue
        self._lock = threading.Lock()
        self._asked: dict[str, tuple[float, Estimate]] = {}
        """Task id to when it was told first, and what."""
        self._told: deque[Told] = deque(maxlen=KNOWN_MAX)
        self._looked_at = 0.0

    def tell(
        self,
        tasks: Sequence[Waiting],
        running: Sequence[Running],
        free: Mapping[str, Sequence[float]],
        paces: Mapping[str, Pace | None],
        asked: Collection[str],
        remembered: bool = True,
        kept: Mapping[str, float] | None = None,
        expected: Mapping[str, float] | None = None,
    ) -> Line:
        """The line, with the estimates of some tasks, which somebody is shown: the first that is shown of each counts.

        Args:
            tasks: Those that stand in line, in their running order.
            free: Pool to the seconds until each place is free that nothing runs on.
            paces: Pool to how long tasks have a worker there, of all that are asked about.
            asked: Ids of the tasks.
            remembered: Whether these tasks are there, so that it will be known when they start.
            kept: Task id to the seconds for which it cannot start though there are places.
            expected: The same where it is not sure.
        """
        now = time.time()
        starts: dict[str, Estimate] = {}
        known = self._known(now)
        for pool, pace in paces.items():
            line = [task for task in tasks if task.pool == pool]
            there = [order for order in running if order.pool == pool]
            coming = free.get(pool, ())
            starts |= estimate_starts(
                line, there, 0, pace, known, now=now, asked=asked, coming=coming, kept=kept, expected=expected
            )
        with self._lock:
            for task_id, start in starts.items():
                if remembered and len(self._asked) < ASKED_MAX:
                    self._asked.setdefault(task_id, (now, start))
        among = {task.task_id: task for task in tasks if task.task_id in asked}
        lengths = {task_id: pace.of(task) for task_id, task in among.items() if (pace := paces.get(task.pool))}
        return Line(places_in(tasks), starts, paces, lengths)

    def _known(self, now: float) -> list[Told]:
        with self._lock:
            asked, due = dict(self._asked), now - self._looked_at > LOOK_SECONDS
            self._looked_at = now if due else self._looked_at
        if due and asked:
            found = self._queue().among(asked)
            with self._lock:
                for task_id, (at, estimate) in asked.items():
                    record = found.get(task_id)
                    if record is not None and record.state is TaskState.QUEUED and not record.blocked:
                        continue
                    self._asked.pop(task_id, None)
                    # Of a later attempt, or of one that was kept from the line, the wait is another one.
                    if record is not None and record.attempt == 1 and record.claimed_at is not None:
                        self._told.append(started(estimate, record.claimed_at - at))
        with self._lock:
            return [*self._told, *(waiting(estimate, now - at) for at, estimate in self._asked.values())]
