"""A task's history: what happened to it, line by line, and the points of its curves. Records alone, no SQL."""

from __future__ import annotations

import json
from dataclasses import dataclass

from workers.orders import Point

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


def point_of(event: TaskEvent) -> Point:
    """The point that an event of kind `progress` keeps; rows of old know neither their time nor any speed."""
    return Point(**{"at": event.at} | json.loads(event.text))
