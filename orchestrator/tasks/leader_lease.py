"""The lease in SQL of the control plane that leads, and the list of those that stand by. What it means: leadership.py.

On Postgres alone: only there can control planes of several machines meet. Every time is one of the database's clock,
so that the machines' clocks do not matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Float, Select, cast, delete, insert, inspect, literal_column, or_, select, update

from orchestrator.tasks import tables
from orchestrator.tasks.database import Database, as_it_is

_lease, _members = tables.leadership, tables.control_planes
_NOW = cast(literal_column("extract(epoch FROM clock_timestamp())"), Float)
LEASE_SECONDS = 5.0
"""How long a lease holds after it was prolonged, and a member counts as there after it was seen. A leader prolongs it
every second, so that a database that is slow once does not end its time; of a killed one, people notice within ten."""
FORGOTTEN_SECONDS = 24 * 3600.0
"""Age at which a member that was not seen any more is deleted."""


@dataclass(frozen=True)
class Member:
    """One control plane."""

    member_id: str
    name: str
    """Machine and state folder, for people."""
    url: str
    """Address of its API."""


@dataclass(frozen=True)
class Standing:
    """A member that was seen a moment ago, and since when it is there."""

    member_id: str
    name: str
    url: str
    since: float
    """Unix time."""


@dataclass(frozen=True)
class Seen:
    """The lease as one look found it."""

    fence: int
    """Number of the leader: each has a higher one than those before it."""
    holder: str
    """Its member id; empty where nobody leads, or the last one gave its lease up."""
    name: str
    url: str
    since: float
    """Unix time since which it leads."""
    is_over: bool
    """The lease has not been prolonged in time, or was given up."""
    service_id: str
    """Id of the service that this database belongs to; empty before its first control plane."""
    settings: str
    """Settings that all its control planes have alike, as JSON."""
    present: tuple[Standing, ...]
    """All control planes that were seen a moment ago, by age, the leader too."""


def others_there(database_url: str, member_id: str) -> list[str]:
    """Names of other control planes that were seen a moment ago. Tables of an earlier release stay as they are.

    Raises:
        DatabaseAway, InvalidInput: As `Database`.
    """
    if not database_url.startswith("postgresql"):
        return []
    with as_it_is(database_url) as connection:
        if _members.name not in inspect(connection).get_table_names():
            return []
        found = [Standing(*row) for row in connection.execute(_present())]
    return [one.name for one in found if one.member_id != member_id]


class LeaderLease:
    """The two tables. Every method raises DatabaseAway when the database is away."""

    def __init__(self, database_url: str) -> None:
        self._database = Database(database_url)

    def close(self) -> None:
        self._database.close()

    def look(self) -> Seen:
        """Who leads, and who is there."""
        with self._database.reading() as connection:
            row = connection.execute(select(_lease, (_lease.c.until < _NOW).label("is_over"))).one()
            present = tuple(Standing(*found) for found in connection.execute(_present()))
        return Seen(
            fence=row.fence,
            holder=row.holder,
            name=row.name,
            url=row.url,
            since=row.since,
            is_over=row.is_over,
            service_id=row.service_id,
            settings=row.settings,
            present=present,
        )

    def claim_service(self, service_id: str, settings: str) -> str:
        """Id of the service that the database belongs to: this one, if it belonged to none; its settings are kept
        then."""
        free = update(_lease).where(_lease.c.service_id == "").values(service_id=service_id, settings=settings)
        with self._database.writing() as connection:
            connection.execute(free)
            return str(connection.execute(select(_lease.c.service_id)).scalar_one())

    def keep_settings(self, fence: int, settings: str) -> None:
        """Write down with which settings a leader leads now, if it still does."""
        with self._database.writing() as connection:
            connection.execute(update(_lease).where(_lease.c.fence == fence).values(settings=settings))

    def beat(self, member: Member) -> None:
        """Say that a member is there."""
        mine = _members.c.member_id == member.member_id
        values: dict[str, Any] = {"name": member.name, "url": member.url, "seen_at": _NOW}
        with self._database.writing() as connection:
            if connection.execute(update(_members).where(mine).values(**values)).rowcount == 0:
                connection.execute(insert(_members).values(member_id=member.member_id, since=_NOW, **values))
                connection.execute(delete(_members).where(_members.c.seen_at < _NOW - FORGOTTEN_SECONDS))

    def take(self, seen: Seen, member: Member, settings: str) -> int | None:
        """Lead from now on, if the lease is free, or is this member's own from before it was started again.

        From when this returns, no transaction under an earlier number is kept: one that was under way is waited for.

        Returns:
            The new number; None if somebody came first.
        """
        usable = or_(_lease.c.until < _NOW, _lease.c.holder == member.member_id)
        taken = (
            update(_lease)
            .where(_lease.c.fence == seen.fence, usable)
            .values(
                fence=seen.fence + 1,
                holder=member.member_id,
                name=member.name,
                url=member.url,
                since=_NOW,
                until=_NOW + LEASE_SECONDS,
                settings=settings,
            )
        )
        with self._database.writing() as connection:
            return seen.fence + 1 if connection.execute(taken).rowcount == 1 else None

    def prolong(self, fence: int) -> bool:
        """Prolong the lease. False: somebody else leads by now, or it was given up."""
        mine = (_lease.c.fence == fence) & (_lease.c.holder != "")
        with self._database.writing() as connection:
            prolonged = update(_lease).where(mine).values(until=_NOW + LEASE_SECONDS)
            return connection.execute(prolonged).rowcount == 1

    def give_up(self, fence: int) -> None:
        """End the lease now, so that another may lead at once."""
        with self._database.writing() as connection:
            mine = _lease.c.fence == fence
            connection.execute(update(_lease).where(mine).values(holder="", name="", url="", until=0.0))

    def leave(self, member: Member) -> None:
        """Say that a member is there no more."""
        with self._database.writing() as connection:
            connection.execute(delete(_members).where(_members.c.member_id == member.member_id))


def _present() -> Select[Any]:
    columns = (_members.c.member_id, _members.c.name, _members.c.url, _members.c.since)
    recently = _members.c.seen_at > _NOW - LEASE_SECONDS
    return select(*columns).where(recently).order_by(_members.c.since, _members.c.member_id)
