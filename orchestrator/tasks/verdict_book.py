"""What was answered before publishing, in SQL: one answer for each version, so that nobody is asked twice."""

from __future__ import annotations

import time
from dataclasses import dataclass

from sqlalchemy import insert, select

from orchestrator.tasks import tables
from orchestrator.tasks.database import Database

_verdicts = tables.verdicts


@dataclass(frozen=True)
class Verdict:
    """Whether a version may be published, by what was asked before."""

    is_passed: bool
    reason: str
    """For people; empty where nothing was said."""
    code: str = ""
    """Reason of a refusal, for programs: one of `Reason`."""


class VerdictBook:
    """The table. Every method raises DatabaseAway when the database is away; `keep` NotLeading, too."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def get(self, base_model: str, version: int) -> Verdict | None:
        """What was answered; None: nothing yet."""
        columns = (_verdicts.c.is_passed, _verdicts.c.reason, _verdicts.c.code)
        mine = (_verdicts.c.base_model == base_model, _verdicts.c.version == version)
        with self._database.reading() as connection:
            row = connection.execute(select(*columns).where(*mine)).first()
        return None if row is None else Verdict(*row)

    def keep(self, base_model: str, version: int, verdict: Verdict) -> None:
        """Keep an answer."""
        with self._database.writing() as connection:
            row = {"base_model": base_model, "version": version, "at": time.time(), **vars(verdict)}
            connection.execute(insert(_verdicts).values(**row))
