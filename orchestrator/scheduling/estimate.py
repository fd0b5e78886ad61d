"""When a waiting task would start, from how long tasks took here. Pure, and an estimate: None rather than a guess.

Tasks differ, and fair share may let later ones pass: the estimate is when a task at this place starts if every task
before it takes the median time of the last ones.
"""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Pace:
    """How long a task has its worker here."""

    seconds: float
    """The median, from the claim to the adapter."""
    count: int
    """Number of tasks that it is the median of."""


def pace_of(spans: Iterable[float]) -> Pace | None:
    """The pace of tasks that ended. None without any: then it is not known.

    Args:
        spans: Seconds that each task had its worker.
    """
    known = [span for span in spans if span >= 0]
    return Pace(statistics.median(known), len(known)) if known else None


def starts_in(place: int, left: Sequence[float], free: int, pace: Pace | None) -> float | None:
    """Seconds until the task at a place of the queue gets a worker.

    Args:
        place: From 1.
        left: For each worker that has a task, the seconds until it is done.
        free: Workers that have none.

    Returns:
        None where it is not known: no worker, or no task to know the pace from.
    """
    workers = [0.0] * free + [max(0.0, seconds) for seconds in left]
    if not workers or pace is None:
        return None
    heapq.heapify(workers)
    for _ in range(place - 1):
        heapq.heappush(workers, heapq.heappop(workers) + pace.seconds)
    return workers[0]


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, as precise as an estimate is."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
