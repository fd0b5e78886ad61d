"""What traces are made of, in SQL: the events that changed tasks, and how far they were told."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from sqlalchemy import func, select

from orchestrator.tasks import tables
from orchestrator.tasks.database import Database
from orchestrator.tasks.followers import move, position_of
from orchestrator.tasks.task_rows import LifeEvent

_events = tables.events
TASKS, REQUESTS = "traces", "traces of requests"
"""What is told of: events of tasks by their numbers, and rows of the audit log by theirs."""


class TraceBook:
    """The table of events as traces read it. Every method raises DatabaseAway when the database is away."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def newest(self) -> int:
        """Number of the newest event; 0: there is none."""
        with self._database.reading() as connection:
            return int(connection.execute(select(func.max(_events.c.event_id))).scalar() or 0)

    def told_until(self, what: str = TASKS) -> int | None:
        """Number of the last that was told; None: nobody ever began."""
        with self._database.reading() as connection:
            return position_of(connection, what)

    def told(self, number: int, what: str = TASKS) -> None:
        """Note that all is told up to a number. Raises NotLeading."""
        with self._database.writing() as connection:
            move(connection, what, number)

    def changed(self, after: int, limit: int) -> list[tuple[int, str, bool]]:
        """(number, task, whether it came into another state) of the events behind a number that changed a task, oldest
        first."""
        chosen = select(_events.c.event_id, _events.c.task_id, _events.c.facts)
        chosen = chosen.where(_events.c.event_id > after, _events.c.facts.is_not(None))
        with self._database.reading() as connection:
            rows = connection.execute(chosen.order_by(_events.c.event_id).limit(limit)).all()
        return [(int(event_id), task_id, _moves(json.loads(facts))) for event_id, task_id, facts in rows]

    def lives(self, task_ids: Collection[str], until: int) -> dict[str, list[LifeEvent]]:
        """Id to a task's events up to a number, those that have facts, oldest first.

        Args:
            task_ids: No more than events were asked for at once.
        """
        found: dict[str, list[LifeEvent]] = {task_id: [] for task_id in task_ids}
        chosen = select(_events.c.event_id, _events.c.at, _events.c.kind, _events.c.facts, _events.c.task_id)
        theirs = (_events.c.task_id.in_(sorted(task_ids)), _events.c.event_id <= until, _events.c.facts.is_not(None))
        with self._database.reading() as connection:
            for event_id, at, kind, facts, task_id in connection.execute(
                chosen.where(*theirs).order_by(_events.c.event_id)
            ):
                found[task_id].append(LifeEvent(event_id, at, kind, json.loads(facts)))
        return found


def _moves(facts: dict[str, Any]) -> bool:
    return bool(facts["state"] != facts["was"])
