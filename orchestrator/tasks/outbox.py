"""What webhooks are told of, in SQL: written with what it tells of, given out to webhooks, sent, kept for a while.

A delivery is written to be due again before it is sent. So one that a killed process had under way is sent again, under
the same id, by whoever leads next; and one that was overtaken, which may not write, sends nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy import ColumnElement, Row, Select, delete, func, insert, select, update
from sqlalchemy.engine import Connection

from orchestrator.tasks import tables
from orchestrator.tasks.database import Database
from orchestrator.tasks.followers import move, position_of
from orchestrator.tasks.happenings import Happening, is_last, next_attempt

_happenings, _deliveries = tables.happenings, tables.deliveries
AnyRow = Row[*tuple[Any, ...]]
AT_ONCE = 500
"""Happenings that are given out in one transaction."""
KEPT_SECONDS = 14 * 86_400.0
"""Age at which a happening is deleted, with what was sent of it."""
WAITING = "waiting"
TAKEN = "taken"
GIVEN_UP = "given up"
ANSWER_MAX = 300


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """What one webhook is sent of one happening."""

    happening_id: int
    hook: str
    happening: Happening
    tries: int
    """Attempts so far, with one that is under way."""
    due_at: float | None
    """Unix time of the next attempt; None: there is none."""
    tried_at: float | None
    """Unix time of the last attempt."""
    status: str
    """`waiting`, `taken` or `given up`."""
    answer: str
    """What came of the last attempt, for people; empty before that."""


def put(connection: Connection, happening: Happening) -> None:
    """Keep a happening, in the transaction of what it tells of."""
    connection.execute(insert(_happenings).values(is_given_out=False, **vars(happening)))


class Outbox:
    """The tables. Every method raises DatabaseAway when the database is away, and one that writes NotLeading."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def tell(self, happenings: Iterable[Happening]) -> None:
        """Keep what is not known yet."""
        with self._database.writing() as connection:
            self._put_new(connection, happenings)

    def told_until(self, base_model: str) -> int | None:
        """The last record of a base model's version log that was told of; None: nobody ever looked."""
        with self._database.reading() as connection:
            return position_of(connection, _follower(base_model))

    def tell_log(self, base_model: str, seq: int, happenings: Iterable[Happening]) -> None:
        """Keep what a version log says up to a record, and that it was told of so far, in one transaction."""
        with self._database.writing() as connection:
            self._put_new(connection, happenings)
            move(connection, _follower(base_model), seq)

    def give_out(self, receivers: Callable[[Happening], Sequence[str]], now: float) -> int:
        """Make a delivery of each new happening for each webhook that is told of it.

        Returns:
            Number of deliveries.
        """
        new = _happenings.c.is_given_out.is_(False)
        with self._database.reading() as connection:  # a look takes no lock
            if connection.execute(select(_happenings.c.happening_id).where(new).limit(1)).first() is None:
                return 0
        with self._database.writing() as connection:
            chosen = select(_happenings).where(new).order_by(_happenings.c.happening_id).limit(AT_ONCE)
            rows = connection.execute(chosen).all()
            made = [_fresh(row.happening_id, hook, now) for row in rows for hook in receivers(_happening(row))]
            if made:
                connection.execute(insert(_deliveries), made)
            ids = [row.happening_id for row in rows]
            given = update(_happenings).where(_happenings.c.happening_id.in_(ids)).values(is_given_out=True)
            connection.execute(given)
        return len(made)

    def test(self, happening: Happening, hook: str) -> None:
        """Make a delivery for one webhook alone."""
        with self._database.writing() as connection:
            kept = connection.execute(insert(_happenings).values(is_given_out=True, **vars(happening)))
            assert kept.inserted_primary_key is not None
            connection.execute(insert(_deliveries), [_fresh(kept.inserted_primary_key[0], hook, happening.at)])

    def hooks_due(self, now: float) -> set[str]:
        """Webhooks that have something to be sent by now."""
        with self._database.reading() as connection:
            return set(connection.execute(select(_deliveries.c.hook).where(_is_due(now)).distinct()).scalars())

    def take(self, hook: str, now: float) -> Delivery | None:
        """The oldest delivery of a webhook that is due, its next attempt written down before this one is made: whoever
        is killed from here on has not lost it. None: nothing is due."""
        chosen = _joined().where(_deliveries.c.hook == hook, _is_due(now)).order_by(_deliveries.c.happening_id).limit(1)
        with self._database.writing() as connection:
            row = connection.execute(chosen.with_for_update(of=_deliveries, skip_locked=True)).first()
            if row is None:
                return None
            delivery = _delivery(row)
            tries = delivery.tries + 1
            # The last attempt has a time to be repeated at too: it may be the one that a killed process made.
            values = {"tries": tries, "due_at": next_attempt(tries, now), "tried_at": now}
            connection.execute(update(_deliveries).where(*_same(delivery)).values(**values))
        return Delivery(**vars(delivery) | values)

    def taken(self, delivery: Delivery, answer: str) -> None:
        """Note that it was taken: it is sent no more."""
        self._end(delivery, TAKEN, answer)

    def failed(self, delivery: Delivery, answer: str, is_final: bool = False) -> None:
        """Note why an attempt failed, and give the delivery up after the last one. is_final: There is no use in another
        attempt."""
        if is_final or is_last(delivery.tries):
            self._end(delivery, GIVEN_UP, answer)
        else:
            with self._database.writing() as connection:
                noted = update(_deliveries).where(*_same(delivery)).values(answer=answer[:ANSWER_MAX])
                connection.execute(noted)

    def newest(self, hooks: Collection[str], limit: int) -> list[Delivery]:
        """The newest deliveries of some webhooks, the newest first."""
        chosen = _joined().where(_deliveries.c.hook.in_(sorted(hooks))).order_by(_deliveries.c.happening_id.desc())
        with self._database.reading() as connection:
            return [_delivery(row) for row in connection.execute(chosen.limit(limit))]

    def of(self, hook: str, key: str) -> Delivery:
        """The delivery to a webhook of a happening that is there."""
        chosen = _joined().where(_deliveries.c.hook == hook, _happenings.c.key == key)
        with self._database.reading() as connection:
            return _delivery(connection.execute(chosen).one())

    def waiting(self) -> dict[str, int]:
        """Webhook to number of deliveries that have not been taken or given up."""
        chosen = select(_deliveries.c.hook, func.count()).where(_deliveries.c.due_at.is_not(None))
        with self._database.reading() as connection:
            return {row[0]: row[1] for row in connection.execute(chosen.group_by(_deliveries.c.hook))}

    def forget(self, hooks: Collection[str], now: float) -> None:
        """Give up what webhooks that are gone were to be sent, and delete what is old. hooks: Those that there are."""
        is_gone = (_deliveries.c.due_at.is_not(None), _deliveries.c.hook.not_in(sorted(hooks)))
        old = select(_happenings.c.happening_id).where(_happenings.c.at < now - KEPT_SECONDS)
        with self._database.writing() as connection:
            ended = update(_deliveries).where(*is_gone)
            connection.execute(ended.values(due_at=None, status=GIVEN_UP, answer="the settings have it no more"))
            connection.execute(delete(_deliveries).where(_deliveries.c.happening_id.in_(old)))
            connection.execute(delete(_happenings).where(_happenings.c.happening_id.in_(old)))

    def _put_new(self, connection: Connection, happenings: Iterable[Happening]) -> None:
        for happening in happenings:
            known = select(_happenings.c.happening_id).where(_happenings.c.key == happening.key)
            if connection.execute(known).first() is None:
                put(connection, happening)

    def _end(self, delivery: Delivery, status: str, answer: str) -> None:
        values = {"due_at": None, "status": status, "answer": answer[:ANSWER_MAX]}
        with self._database.writing() as connection:
            connection.execute(update(_deliveries).where(*_same(delivery)).values(**values))


def _follower(base_model: str) -> str:
    """What follows a base model's version log for all webhooks."""
    return f"webhooks of {base_model}"


def _fresh(happening_id: int, hook: str, now: float) -> dict[str, object]:
    facts: dict[str, object] = {"happening_id": happening_id, "hook": hook, "tries": 0, "due_at": now}
    return {**facts, "tried_at": None, "status": WAITING, "answer": ""}


def _is_due(now: float) -> ColumnElement[bool]:
    return _deliveries.c.due_at <= now


def _same(delivery: Delivery) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return _deliveries.c.happening_id == delivery.happening_id, _deliveries.c.hook == delivery.hook


def _joined() -> Select[Any]:
    return select(_deliveries, _happenings).where(_deliveries.c.happening_id == _happenings.c.happening_id)


def _happening(row: AnyRow) -> Happening:
    named = row._mapping
    return Happening(**{field.name: named[_happenings.c[field.name]] for field in fields(Happening)})


def _delivery(row: AnyRow) -> Delivery:
    named = row._mapping
    own = {field.name: named[_deliveries.c[field.name]] for field in fields(Delivery) if field.name != "happening"}
    return Delivery(happening=_happening(row), **own)
