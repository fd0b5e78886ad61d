"""When waiting tasks start, as the service tells it; and how right it was so far.

What was told is kept in memory and compared with when the tasks did start: the next estimates are corrected by it.
After a restart that begins anew, and until then the interval is what the spread of how long tasks take makes it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from orchestrator.scheduling.estimate import KNOWN_MAX, Estimate, Pace, Told, estimate_starts, late, started
from orchestrator.scheduling.fair_share import Running, Waiting
from orchestrator.tasks.task_record import TaskState

if TYPE_CHECKING:
    from orchestrator.tasks.task_queue import TaskQueue

ASKED_MAX = 200
"""Estimates that are remembered until their tasks start."""
LOOK_SECONDS = 5.0
"""Interval at which it is looked which of them have started."""


@dataclass(frozen=True)
class Line:
    """Where tasks stand, and when they start."""

    places: Mapping[str, int] = field(default_factory=dict)
    """Task id to place, from 1."""
    starts: Mapping[str, Estimate] = field(default_factory=dict)
    """Task id to when it starts, where that is known."""
    pace: Pace | None = None
    """How long tasks have a worker here; None: not known."""


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
        free: int,
        pace: Pace | None,
        asked: Collection[str],
        remembered: bool = True,
    ) -> Line:
        """The line, with the estimates of some tasks, which somebody is shown: the first that is shown of each counts.

        Args:
            tasks: Those that stand in line, in their running order.
            free: Places that are free.
            asked: Ids of the tasks.
            remembered: Whether these tasks are there, so that it will be known when they start.
        """
        now = time.time()
        places = {task.task_id: place for place, task in enumerate(tasks, 1)}
        starts = estimate_starts(tasks, running, free, pace, self._known(now), now=now, asked=asked)
        with self._lock:
            for task_id, start in starts.items():
                if remembered and len(self._asked) < ASKED_MAX:
                    self._asked.setdefault(task_id, (now, start))
        return Line(places, starts, pace)

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
            waits = [late(estimate, now - at) for at, estimate in self._asked.values()]
            return [*self._told, *(one for one in waits if one is not None)]
