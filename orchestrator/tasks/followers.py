"""How far those who follow something numbered have come, in SQL: events, requests, records of a version log."""

from __future__ import annotations

from sqlalchemy import delete, insert, select
from sqlalchemy.engine import Connection

from orchestrator.tasks.tables import followers


def position_of(connection: Connection, name: str) -> int | None:
    """Number of the last that a follower has dealt with; None: it never began."""
    found = connection.execute(select(followers.c.number).where(followers.c.name == name)).scalar()
    return None if found is None else int(found)


def move(connection: Connection, name: str, number: int) -> None:
    """Note that a follower has dealt with all up to a number, in the transaction of what it did."""
    connection.execute(delete(followers).where(followers.c.name == name))
    connection.execute(insert(followers).values(name=name, number=number))
