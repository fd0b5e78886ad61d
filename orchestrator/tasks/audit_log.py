"""Every request that writes, in SQL: who asked, with which token, for what, when, and what came of it.

Rows are only ever appended. Each holds the digest of the one before it, so a row that was changed, taken out or put in
between later is found by whoever reads the chain from its beginning. What was cut off at the end is found by who kept
the digest of a later row elsewhere (`onebasis audit --verify` prints it).

A request has two rows: one before it is carried out, one with its outcome. If a process dies in between, the first one
is there.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, insert, select
from sqlalchemy.engine import Connection

from orchestrator.tasks import tables
from orchestrator.tasks.database import Database

_audit = tables.audit
FIRST = "0" * 64
"""Stands for the digest of the row before the first one."""
ASKED = "asked"
"""Outcome of a request that is not known yet: in its first row."""
DONE = "done"
ROWS_AT_ONCE = 1000
_APPEND_LOCK = 7_065_214
"""Postgres's advisory lock for appending a row: any number that no other program uses."""


@dataclass(frozen=True)
class AuditRow:
    """One row."""

    seq: int
    """Its number: 1, 2, 3, … without a gap."""
    at: float
    """Unix time."""
    name: str
    """Who asked."""
    token_id: str
    request: str
    """Name of the route."""
    about: str
    """The request's fields, as JSON; empty in the row of an outcome."""
    outcome: str
    """`asked`, `done`, or the code of the error."""
    of: int
    """Number of the row in which this request was asked: its own, or an earlier one."""
    previous_sha256: str
    sha256: str
    """Digest of all other fields."""


@dataclass(frozen=True)
class Verified:
    """What reading the whole chain has shown."""

    rows: int
    """Number of rows from the first one on that are as they were written."""
    head: str
    """Digest of the last of them."""
    problem: str
    """What is wrong with the next row; empty: nothing, and there is no other."""
    holds_known: bool | None
    """Whether a digest that was noted earlier is one of theirs; None: none was given."""


class AuditLog:
    """The table. Every method raises DatabaseAway when the database is away."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def asked(self, name: str, token_id: str, request: str, about: dict[str, Any]) -> AuditRow:
        """Write down that a request is about to be carried out."""
        return self._append(name, token_id, request, json.dumps(about, sort_keys=True), ASKED, None)

    def ended(self, asked: AuditRow, outcome: str) -> AuditRow:
        """Write down what came of it."""
        return self._append(asked.name, asked.token_id, asked.request, "", outcome, asked.seq)

    def page(self, after: int = 0, limit: int = ROWS_AT_ONCE) -> list[AuditRow]:
        """The rows behind a number, the oldest first."""
        chosen = select(_audit).where(_audit.c.seq > after).order_by(_audit.c.seq).limit(limit)
        with self._database.reading() as connection:
            return [_row(found) for found in connection.execute(chosen)]

    def among(self, numbers: Collection[int]) -> list[AuditRow]:
        """The rows of some numbers."""
        with self._database.reading() as connection:
            chosen = select(_audit).where(_audit.c.seq.in_(sorted(numbers)))
            return [_row(found) for found in connection.execute(chosen)]

    def newest(self, limit: int) -> list[AuditRow]:
        """The newest rows, the oldest of them first."""
        chosen = select(_audit).order_by(_audit.c.seq.desc()).limit(limit)
        with self._database.reading() as connection:
            return [_row(found) for found in connection.execute(chosen)][::-1]

    def verify(self, known: str = "") -> Verified:
        """Read the whole chain.

        Args:
            known: Digest of a row that was noted earlier.

        Cost:
            A digest for each row, some 100,000 in a second.
        """
        return verified(self._all(), known)

    def _all(self) -> Iterator[AuditRow]:
        last = 0
        while rows := self.page(last):
            yield from rows
            last = rows[-1].seq

    def _append(self, name: str, token_id: str, request: str, about: str, outcome: str, of: int | None) -> AuditRow:
        with self._database.writing() as connection:
            if self._database.is_postgres:  # SQLite's writers wait for each other anyway
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_APPEND_LOCK})")
            seq, previous = _last(connection)
            facts = (seq + 1, time.time(), name, token_id, request, about, outcome, of or seq + 1, previous)
            row = AuditRow(*facts, sha256=_digest(*facts))
            connection.execute(insert(_audit).values(**vars(row)))
        return row


def verified(rows: Iterator[AuditRow], known: str = "") -> Verified:
    """Whether rows are the chain from its beginning; those of an exported file can be read, too."""
    count, head, holds = 0, FIRST, known == FIRST
    for row in rows:
        facts = (
            row.seq,
            row.at,
            row.name,
            row.token_id,
            row.request,
            row.about,
            row.outcome,
            row.of,
            row.previous_sha256,
        )
        problem = (
            f"row {count + 1} is missing" if row.seq != count + 1 else
            f"row {row.seq} does not follow the row before it" if row.previous_sha256 != head else
            f"row {row.seq} was changed" if row.sha256 != _digest(*facts) else ""
        )  # fmt: skip
        if problem:
            return Verified(count, head, problem, holds if known else None)
        count, head = row.seq, row.sha256
        holds = holds or head == known
    return Verified(count, head, "", holds if known else None)


def _last(connection: Connection) -> tuple[int, str]:
    newest = select(_audit.c.seq, _audit.c.sha256).order_by(_audit.c.seq.desc()).limit(1)
    found = connection.execute(newest).first()
    return (0, FIRST) if found is None else (int(found.seq), str(found.sha256))


def _digest(*facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _row(found: Row[*tuple[Any, ...]]) -> AuditRow:
    return AuditRow(**found._mapping)
