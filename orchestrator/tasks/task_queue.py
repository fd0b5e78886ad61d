"""The tasks in a SQL database: the only place that reads and writes them.

SQLite in WAL mode by default, Postgres by URL. A record is read, advanced by the pure function of
task_lifecycle.py and written back under its revision, together with the event and what it cost its team, in one
transaction; a writer that was overtaken reads again. Events are only ever appended.

No method costs more because many tasks ended long ago, except `tasks`, which has no limit, and `counts`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy import BigInteger, ColumnElement, Row, Select, and_, delete, func, insert, literal, or_, select, update
from sqlalchemy.engine import Connection
from sqlalchemy.exc import IntegrityError

from configs.errors import Conflict, InvalidInput, NameTaken, NotFound, QueueFull, UnreadableTask
from configs.settings import FailureSettings
from orchestrator.scheduling.fair_share import DecayedSum, Use, Waiting
from orchestrator.scheduling.reasons import WaitCode
from orchestrator.tasks import tables
from orchestrator.tasks.database import Database
from orchestrator.tasks.happenings import of_task
from orchestrator.tasks.outbox import put
from orchestrator.tasks.task_events import Claimed, DependencyEnded, Event, Restored
from orchestrator.tasks.task_lifecycle import advance, used_by
from orchestrator.tasks.task_record import (
    AT_WORK,
    BLOCKS,
    ENDED_WITHOUT_RESULT,
    IN_FLIGHT,
    LIVE,
    OUT_OF_LINE,
    Drain,
    Pause,
    TaskRecord,
    TaskState,
)
from orchestrator.tasks.task_rows import (
    LOG,
    PROGRESS,
    NamedEvent,
    TaskEvent,
    columns_of,
    done_at_in,
    done_at_text,
    facts_of,
    narrate,
    point_text,
    points_of,
    record_of,
)
from workers.orders import NOWHERE, DoneAt, LogLine, Point

log = logging.getLogger("onebasis.controller")

_tasks, _events, _uses, _team_uses = tables.tasks, tables.events, tables.uses, tables.team_uses
_awaits, _pauses, _drains = tables.awaits, tables.pauses, tables.drains
_RECORD = (_tasks.c.task_id, _tasks.c.team, _tasks.c.name, _tasks.c.record)
_ENDED = [str(state) for state in ENDED_WITHOUT_RESULT]
_OUT_OF_LINE = [str(state) for state in OUT_OF_LINE]
_REPLACED = str(TaskState.REPLACED)
_QUEUED = str(TaskState.QUEUED)
_IN_LINE = (_tasks.c.state == _QUEUED, _tasks.c.blocked == "")
_BLOCKED = [str(code) for code in BLOCKS]
DUE_AT_ONCE = 100
"""Tasks that one `due` names."""

AnyRow = Row[*tuple[Any, ...]]

NOBODY = -1
"""Number that no leader has."""
IDS_AT_ONCE = 500
"""Ids in one query: SQLite takes 32,766 values at most, and longer queries are not faster."""
EVENT_ID_MAX = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What one order cost a task's team."""

    task_id: str
    token: str
    team: str
    what: str
    """`train`, `refine`, `refine again`, `score` or `away`: the worker was well, but the storage was not."""
    seconds: float
    ended_at: float
    places: int = 1
    """Places of the worker, each of which is charged."""
    gpus: float = 0.0
    """GPUs of each of them."""
    worker: str = ""
    """Worker that had it; empty where an older release wrote it."""
    done_at: str | None = None
    """Where and when it did its parts, see `task_rows.done_at_of`."""


@dataclass(frozen=True)
class Placed:
    """Where a published task, or one that `main` may bring back, is in the lineage."""

    task_id: str
    state: TaskState
    version: int


@dataclass(frozen=True)
class SameContent:
    """Earlier submissions of a team with the same content."""

    alive: TaskRecord | None
    """The task that has not ended without a result; None if there is none."""
    count: int
    """Number of all of them, however they ended."""


def _chosen(states: Iterable[TaskState], team: str | None, base_model: str | None = None) -> Select[Any]:
    chosen = select(*_RECORD)
    if wanted := [str(state) for state in states]:
        chosen = chosen.where(_tasks.c.state.in_(wanted))
    if base_model is not None:
        chosen = chosen.where(_tasks.c.base_model == base_model)
    return chosen if team is None else chosen.where(_tasks.c.team == team)


class TaskQueue:
    """The table of tasks and the table of their events. Safe for several threads.

    Every method raises Unavailable when the database is away, locked, full or forbidden: nothing is half done then.
    """

    def __init__(self, database_url: str, failures: FailureSettings | None = None, fence: int | None = None) -> None:
        """Open; see `Database`.

        Args:
            fence: See `Database`; NOBODY: nothing can be written.

        Raises:
            InvalidInput: No such database driver, or not a URL; or a newer release has written to it.
            Unavailable: The database does not answer.
        """
        self._failures = failures or FailureSettings()
        self._database = Database(database_url, fence)
        self._unreadable: dict[str, UnreadableTask] = {}

    @property
    def database(self) -> Database:
        """The database that the tasks are in."""
        return self._database

    def close(self) -> None:
        """Give the connections back."""
        self._database.close()

    # --- taking in ---------------------------------------------------------------------------------------------

    def add(
        self, record: TaskRecord, note: str = "submitted", queued_max: int | None = None
    ) -> tuple[TaskRecord, bool]:
        """Take a task in, once per team and client key.

        Args:
            queued_max: Most tasks that the team may have waiting, this one included; default: any number.

        Returns:
            The task and True; or, if this client key is known, the earlier task and False.

        Raises:
            NameTaken: Another task of that name is alive or published.
            QueueFull: The team has `queued_max` tasks waiting.
            InvalidInput: It comes after a task that is not there, or that ended without being published.
        """
        with self._database.writing() as connection:
            self._lock_team(connection, record.team)
            known = self._by_client_key(connection, record.team, record.client_key)
            if known is not None:
                return known, False
            self._refuse_taken_name(connection, record)
            if queued_max is not None:
                self._refuse_full_queue(connection, record.team, queued_max)
            record = record.model_copy(update={"awaits": self._before(connection, record.spec.after)})
            try:
                connection.execute(insert(_tasks).values(task_id=record.task_id, **columns_of(record)))
            except IntegrityError as error:  # name and key are free, and no other writer of this team is at work
                raise Conflict("the task id is taken", record.task_id, "submit again") from error
            rows = [{"after_id": other, "task_id": record.task_id} for other in record.awaits]
            if rows:
                connection.execute(insert(_awaits), rows)
            self._append(connection, record.task_id, [("submitted", note)], record.submitted_at, facts_of(record))
        return record, True

    def by_client_key(self, team: str, client_key: str) -> TaskRecord | None:
        """The task of a team that was submitted with this key."""
        with self._database.reading() as connection:
            return self._by_client_key(connection, team, client_key)

    def same_content(self, team: str, content_sha256: str) -> SameContent:
        """What a team has submitted before under the same `TaskRecord.content_sha256`."""
        same = (_tasks.c.team == team, _tasks.c.content_sha256 == content_sha256)
        with self._database.reading() as connection:
            count = connection.execute(select(func.count()).where(*same)).scalar_one()
            alive = connection.execute(select(*_RECORD).where(*same, _tasks.c.state.not_in(_ENDED))).first()
        return SameContent(self._read(alive) if alive else None, count)

    def check(self, record: TaskRecord, queued_max: int, beside: Collection[str] = ()) -> tuple[str, ...]:
        """Refuse what `add` will refuse, before anything is uploaded.

        Args:
            beside: Tasks (`team/name`) that are submitted before it and are not there yet.

        Returns:
            Ids of the tasks that it comes after and that are not published.

        Raises:
            NameTaken, QueueFull, InvalidInput: As `add`.
        """
        with self._database.reading() as connection:
            self._refuse_taken_name(connection, record)
            self._refuse_full_queue(connection, record.team, queued_max)
            return self._before(connection, [title for title in record.spec.after if title not in beside])

    # --- reading -----------------------------------------------------------------------------------------------

    def get(self, task_id: str) -> TaskRecord:
        """One task by its id. Raises NotFound, UnreadableTask."""
        with self._database.reading() as connection:
            return self._get(connection, task_id)

    def find(self, reference: str, of_teams: Collection[str] | None = None) -> TaskRecord:
        """One task by id, by the beginning of its id, by `team/name` (the newest of that name that no other revision
        has replaced), or by `team/name@2`, its second revision.

        Args:
            of_teams: Teams whose tasks there are for who asks; None: all. A task of another team is not found, as one
                that does not exist.

        Raises:
            NotFound: None, or several ids that begin like this.
            UnreadableTask: This release cannot read it.
        """
        team, slash, name = reference.partition("/")
        if named := re.fullmatch(r"([^/@]+/[^/@]+)@(\d{1,9})", reference):
            return self._revision(named[1], int(named[2]), of_teams)
        here = () if of_teams is None else (_tasks.c.team.in_(sorted(of_teams)),)
        chosen = select(_tasks.c.task_id).where(*here)
        if slash:
            chosen = chosen.where(_tasks.c.team == team, _tasks.c.name == name)
            replaced_last = (_tasks.c.state == _REPLACED, _tasks.c.submitted_at.desc(), _tasks.c.task_id.desc())
            chosen = chosen.order_by(*replaced_last).limit(1)
        else:
            chosen = chosen.where(_tasks.c.task_id.startswith(reference, autoescape=True)).limit(2)
        with self._database.reading() as connection:
            found = connection.execute(chosen).scalars().all()
            if len(found) > 1 and reference in found:
                found = [reference]  # another id begins with the whole of this one
            if not reference or len(found) != 1:
                problem = "several tasks begin like this" if len(found) > 1 else "there is no such task"
                of_name = select(_tasks.c.team).distinct().where(_tasks.c.name == reference, *here).limit(3)
                teams = [] if found or slash else sorted(connection.execute(of_name).scalars())
                meant = " or ".join(repr(f"{team}/{reference}") for team in teams)
                todo = f"did you mean {meant}?" if meant else "`onebasis tasks` lists ids and names"
                raise NotFound(problem, repr(reference), todo)
            return self._get(connection, found[0])

    def revisions(self, record: TaskRecord) -> list[TaskRecord]:
        """A task's revisions, oldest first, those that came to nothing among them: all of its name that one of the
        others takes the place of, or that take the place of one."""
        named = select(*_RECORD).where(_tasks.c.team == record.team, _tasks.c.name == record.name)
        same_name = sorted(self._records(named), key=lambda one: (one.submitted_at, one.task_id))
        found, before = {record.task_id}, 0
        while len(found) > before:
            before = len(found)
            found |= {one.revises for one in same_name if one.revises and one.task_id in found}
            found |= {one.task_id for one in same_name if one.revises in found}
        return [one for one in same_name if one.task_id in found]

    def _revision(self, title: str, number: int, of_teams: Collection[str] | None) -> TaskRecord:
        """A revision by its number; of several with it, of which one alone can have come to something, that one, else
        the newest. Raises NotFound."""
        revisions = self.revisions(self.find(title, of_teams))
        tried = [one for one in revisions if one.number == number]
        if not tried:
            numbers = sorted({one.number for one in revisions})
            raise NotFound(f"there is no revision {number}", title, f"there are: {', '.join(map(str, numbers))}")
        return max(tried, key=lambda one: (one.came_to_something, one.submitted_at, one.task_id))

    def tasks(
        self, states: Iterable[TaskState] = (), team: str | None = None, base_model: str | None = None
    ) -> list[TaskRecord]:
        """Tasks by age, all or those in some states, of one team or base model. What cannot be read is left out:
        `unreadable`."""
        return self._records(_chosen(states, team, base_model).order_by(_tasks.c.submitted_at, _tasks.c.task_id))

    def page(
        self,
        states: Iterable[TaskState] = (),
        team: str | None = None,
        before: str = "",
        limit: int = 200,
        pool: str | None = None,
        base_model: str | None = None,
        of_teams: Collection[str] | None = None,
    ) -> list[TaskRecord]:
        """The newest tasks, or the newest of those that are older than one, by age.

        Args:
            before: Id of the oldest task of the page that was shown before.
            limit: Most rows to look at. Where one cannot be read, a page has fewer tasks.
            pool: Only tasks of this pool.
            of_teams: As for `find`.

        Raises:
            NotFound: There is no task `before`.
        """
        chosen = _chosen(states, team, base_model).limit(limit)
        chosen = chosen.order_by(_tasks.c.submitted_at.desc(), _tasks.c.task_id.desc())
        if pool is not None:
            chosen = chosen.where(_tasks.c.pool == pool)
        here = () if of_teams is None else (_tasks.c.team.in_(sorted(of_teams)),)
        chosen = chosen.where(*here)
        if before:
            named = select(_tasks.c.submitted_at).where(_tasks.c.task_id == before, *here)
            with self._database.reading() as connection:
                at = connection.execute(named).scalar()
            if at is None:
                raise NotFound("there is no such task", before, "begin again with the newest")
            older = and_(_tasks.c.submitted_at == at, _tasks.c.task_id < before)
            # The first condition says nothing new; with it the database starts in the middle of an index.
            chosen = chosen.where(_tasks.c.submitted_at <= at, or_(_tasks.c.submitted_at < at, older))
        return self._records(chosen)[::-1]

    def _records(self, chosen: Select[Any]) -> list[TaskRecord]:
        with self._database.reading() as connection:
            return [record for row in connection.execute(chosen) if (record := self._try_read(row)) is not None]

    def among(self, task_ids: Collection[str]) -> dict[str, TaskRecord]:
        """Id to record, for those of these ids that the database knows and can read. The database may be younger than
        the store."""
        found = {}
        with self._database.reading() as connection:
            for ids in _batches(task_ids):
                rows = connection.execute(select(*_RECORD).where(_tasks.c.task_id.in_(ids)))
                found.update({row.task_id: record for row in rows if (record := self._try_read(row))})
        return found

    def teams_of(self, task_ids: Collection[str]) -> dict[str, str]:
        """Id to team, for those of these ids that the database knows; no record is read."""
        with self._database.reading() as connection:
            chosen = select(_tasks.c.task_id, _tasks.c.team)
            found = (connection.execute(chosen.where(_tasks.c.task_id.in_(ids))) for ids in _batches(task_ids))
            return {task_id: team for rows in found for task_id, team in rows}

    def changes(self, after: int) -> tuple[list[TaskRecord], int]:
        """The tasks to which something happened since an earlier answer, some of them perhaps returned before.

        Args:
            after: Number that the previous call returned; 0: all tasks.

        Returns:
            The tasks, and the `after` of the next call.

        Cost:
            As many rows as there were events since.
        """
        newest = select(func.max(_events.c.event_id))
        since = _events.c.event_id > after
        chosen = select(_events.c.task_id).where(since, _events.c.kind.not_in((LOG, PROGRESS))).distinct()
        with self._database.reading() as connection:
            last = int(connection.execute(newest).scalar() or 0)
            ids = connection.execute(chosen).scalars().all() if after else []
        return (list(self.among(ids).values()) if after else self.tasks()), max(after, last)

    def known(self, task_ids: Collection[str]) -> set[str]:
        """Those of these ids that have a row, readable or not."""
        found: set[str] = set()
        with self._database.reading() as connection:
            for ids in _batches(task_ids):
                found.update(connection.execute(select(_tasks.c.task_id).where(_tasks.c.task_id.in_(ids))).scalars())
        return found

    def teams(self) -> set[str]:
        """Teams that have, or had, a task."""
        with self._database.reading() as connection:
            return set(connection.execute(select(_tasks.c.team).distinct()).scalars())

    def counts(self) -> dict[str, int]:
        """State to number of tasks, from an index alone; a state without any is left out."""
        chosen = select(_tasks.c.state, func.count()).group_by(_tasks.c.state).order_by(_tasks.c.state)
        with self._database.reading() as connection:
            return {row[0]: row[1] for row in connection.execute(chosen)}

    def alive_of_base_models(self) -> dict[str, int]:
        """Base model to number of its tasks that have not ended without a result, published ones too."""
        chosen = select(_tasks.c.base_model, func.count()).where(_tasks.c.state.not_in(_ENDED))
        with self._database.reading() as connection:
            return {row[0]: row[1] for row in connection.execute(chosen.group_by(_tasks.c.base_model))}

    def alive_of_teams(self) -> dict[str, int]:
        """Team to number of its tasks that have not ended."""
        alive = _tasks.c.state.in_([str(state) for state in LIVE])
        chosen = select(_tasks.c.team, func.count()).where(alive).group_by(_tasks.c.team)
        with self._database.reading() as connection:
            return {row[0]: row[1] for row in connection.execute(chosen)}

    def queued(self) -> list[tuple[str, str, str, int]]:
        """(team, pool, what blocks them, number) of queued tasks, from an index alone; see `TaskRecord.blocked`."""
        by = (_tasks.c.team, _tasks.c.pool, _tasks.c.blocked)
        chosen = select(*by, func.count()).where(_tasks.c.state == _QUEUED)
        grouped = chosen.group_by(_tasks.c.blocked, _tasks.c.team, _tasks.c.pool).order_by(*by)
        with self._database.reading() as connection:
            return [(team, pool, blocked, count) for team, pool, blocked, count in connection.execute(grouped)]

    def unreadable(self) -> tuple[UnreadableTask, ...]:
        """Rows that this process met and could not read. They are left out of every list, and nothing is done for
        them; each says what to do."""
        return tuple(self._unreadable.values())

    # --- what the loop asks ------------------------------------------------------------------------------------

    def in_flight(self) -> list[TaskRecord]:
        """Tasks that are not done and do not wait for a worker to train them, by age: as many as are at work."""
        return self.tasks(IN_FLIGHT)

    def is_anyone_waiting(self, pools: Collection[str], without: Collection[str] = ()) -> bool:
        """Whether a task of any other team than these stands in line for a worker of one of these pools."""
        with self._database.reading() as connection:
            teams = [team for team in connection.execute(_teams_that_wait()).scalars() if team not in without]
            first = (_in_line(team, pool).limit(1) for team in teams for pool in pools)
            return any(connection.execute(chosen).first() is not None for chosen in first)

    def waiting(
        self,
        limits: Mapping[str, int | None],
        ranks: Mapping[str, int] | None = None,
        without: Collection[str] = (),
    ) -> list[Waiting]:
        """The tasks that stand in line for a worker, without their records: those that nothing blocks.

        Args:
            limits: Pool to the number of tasks of each team, the first ones in its order; None: all of them.
            ranks: Pool to the places that each of its tasks takes; default: one.
            without: Teams that are left out.

        Cost:
            One read of an index for each team and pool, as long as what it brings.
        """
        aside = {*self._unreadable}
        found = []
        with self._database.reading() as connection:
            teams = [team for team in connection.execute(_teams_that_wait()).scalars() if team not in without]
            for pool, limit in limits.items():
                for team in teams:
                    chosen = _in_line(team, pool)
                    if limit is not None:
                        chosen = chosen.limit(limit + len(aside))
                    found += [
                        Waiting(
                            task_id=task_id,
                            team=team,
                            priority=priority,
                            submitted_at=submitted_at,
                            pool=pool,
                            ranks=(ranks or {}).get(pool, 1),
                            preempted_at=gave_back_at,
                            seconds_max=seconds_max,
                        )
                        for task_id, priority, submitted_at, gave_back_at, seconds_max in connection.execute(chosen)
                        if task_id not in aside
                    ]
        return found

    def pools_in_line(self) -> list[str]:
        """Pools that queued tasks have, whatever blocks them; empty for those that have none yet.

        Cost:
            A step in an index for each of them.
        """
        with self._database.reading() as connection:
            return list(connection.execute(_pools_of_queued()).scalars())

    def queued_for(self, pool: str, after: str = "", but_of: str | None = None, limit: int = 500) -> list[TaskRecord]:
        """Queued tasks of a pool by their ids.

        Args:
            after: Id of the last one that was returned before.
            but_of: Base model whose tasks are left out.
        """
        mine = [_tasks.c.state == _QUEUED, _tasks.c.pool == pool, _tasks.c.task_id > after]
        if but_of is not None:
            mine.append(_tasks.c.base_model != but_of)
        return self._records(select(*_RECORD).where(*mine).order_by(_tasks.c.task_id).limit(limit))

    def due(self, now: float) -> tuple[list[str], float | None]:
        """Ids of tasks whose `not_before` has come and that do not stand in line yet, a hundred at most; and the Unix
        time at which the next one's comes, None where none waits for its time.

        Cost:
            As many rows of an index as have come due.
        """
        timed = (_tasks.c.state == _QUEUED, _tasks.c.blocked == str(WaitCode.NOT_BEFORE))
        chosen = select(_tasks.c.task_id, _tasks.c.not_before).where(*timed).order_by(_tasks.c.not_before)
        with self._database.reading() as connection:
            rows = list(connection.execute(chosen.limit(DUE_AT_ONCE + 1)))
        come = [task_id for task_id, at in rows[:DUE_AT_ONCE] if at <= now]
        return come, next((float(at) for _, at in rows[len(come) :]), None)

    def with_deadline(self) -> list[str]:
        """Ids of the tasks that wait or train and have a deadline.

        Cost:
            Reads the records of all of them: once, when a service starts.
        """
        untrained = _tasks.c.state.in_([_QUEUED, str(TaskState.TRAINING)])
        has_one = _tasks.c.record.not_like('%"deadline":null%')
        with self._database.reading() as connection:
            return list(connection.execute(select(_tasks.c.task_id).where(untrained, has_one)).scalars())

    # --- pauses ------------------------------------------------------------------------------------------------

    def pauses(self) -> dict[str, Pause]:
        """Team to its pause; that of the whole service under `SERVICE`."""
        with self._database.reading() as connection:
            rows = connection.execute(select(_pauses.c.team, _pauses.c.by, _pauses.c.reason, _pauses.c.at))
            return {team: Pause(by=by, reason=reason, at=at) for team, by, reason, at in rows}

    def set_pause(self, team: str, pause: Pause | None) -> Pause | None:
        """Start nothing of a team, or of the service (`SERVICE`), from now on; None: start its tasks again.

        Returns:
            The pause that was in force before: paused twice, the first pause counts.
        """
        mine = _pauses.c.team == team
        with self._database.writing() as connection:
            self._lock_team(connection, team)
            row = connection.execute(select(_pauses.c.by, _pauses.c.reason, _pauses.c.at).where(mine)).first()
            before = Pause(by=row.by, reason=row.reason, at=row.at) if row else None
            if pause is None:
                connection.execute(delete(_pauses).where(mine))
            elif before is None:
                connection.execute(insert(_pauses).values(team=team, by=pause.by, reason=pause.reason, at=pause.at))
        return before

    # --- drained workers ---------------------------------------------------------------------------------------

    def drains(self) -> list[Drain]:
        """Workers and machines that are drained, those that were first asked for first."""
        columns = (getattr(_drains.c, name).label(name) for name in Drain.model_fields)
        with self._database.reading() as connection:
            rows = connection.execute(select(*columns).order_by(_drains.c.at, _drains.c.what))
            return [Drain(**row._mapping) for row in rows]

    def set_drain(self, what: str, is_node: bool, drain: Drain | None) -> Drain | None:
        """Drain a worker or a machine from now on; None: no longer.

        Returns:
            The drain that was in force before. Asked for twice, the newer one counts: what trains may no longer be let
            end.
        """
        mine = (_drains.c.what == what, _drains.c.is_node == is_node)
        columns = [getattr(_drains.c, name).label(name) for name in Drain.model_fields]
        with self._database.writing() as connection:
            row = connection.execute(select(*columns).where(*mine)).first()
            connection.execute(delete(_drains).where(*mine))
            if drain is not None:
                connection.execute(insert(_drains).values(**drain.model_dump()))
        return Drain(**row._mapping) if row else None

    def placed(self, base_model: str) -> list[Placed]:
        """The published and the replaced tasks of a base model, and the parked ones that are in a version, without
        their records."""
        columns, mine = (_tasks.c.task_id, _tasks.c.state, _tasks.c.version), _tasks.c.base_model == base_model
        published = select(*columns).where(mine, _tasks.c.state == str(TaskState.PUBLISHED))
        replaced = select(*columns).where(mine, _tasks.c.state == _REPLACED)
        parked = select(*columns).where(mine, _tasks.c.state == str(TaskState.PARKED), _tasks.c.version > 0)
        with self._database.reading() as connection:
            rows = [row for chosen in (published, replaced, parked) for row in connection.execute(chosen)]
        return [Placed(task_id, TaskState(state), version) for task_id, state, version in rows]

    def is_anyone_unjudged(self, base_model: str) -> bool:
        """Whether a version of this base model's subspace is being refined or scored."""
        mine = _tasks.c.base_model == base_model
        unjudged = _tasks.c.state.in_([str(TaskState.REFINING), str(TaskState.EVALUATING)])
        chosen = select(literal(1)).where(mine, unjudged)
        with self._database.reading() as connection:
            return connection.execute(chosen.limit(1)).first() is not None

    def living_of_names(self, titles: Collection[str]) -> dict[str, list[TaskRecord]]:
        """Which of these names (`team/name`) are taken: name to the tasks that are alive or published; more than one
        where a revision is on its way."""
        found: dict[str, list[TaskRecord]] = {}
        with self._database.reading() as connection:
            for title in titles:
                team, _, name = title.partition("/")
                for taken in self._alive(connection, team, name):
                    found.setdefault(title, []).append(self._get(connection, taken.task_id))
        return found

    # --- advancing ---------------------------------------------------------------------------------------------

    def apply(self, task_id: str, event: Event) -> TaskRecord:
        """Advance one task by one event and append the event, in one transaction.

        Returns:
            The record afterwards; unchanged, with nothing appended, when a stale worker spoke.

        Raises:
            NotFound, Conflict: No such task; or the event does not belong to its state.
            NameTaken: `main` holds it again, and its name meanwhile belongs to another that is alive.
            UnreadableTask: This release cannot read it.
        """
        return self.apply_all([task_id], event)[0]

    def apply_all(self, task_ids: Sequence[str], event: Event) -> list[TaskRecord]:
        """Advance several tasks by the same event: all of them or none."""
        while True:
            try:
                with self._database.writing() as connection:
                    return [self._apply(connection, task_id, event) for task_id in task_ids]
            except _OvertakenError:
                continue

    def try_apply(self, task_ids: Sequence[str], event: Event) -> list[TaskRecord]:
        """As `apply_all`; an empty list when another event (a cancel) came first: then read the records again."""
        try:
            return self.apply_all(task_ids, event)
        except (Conflict, UnreadableTask) as error:
            log.info("read again: %s", error)
            return []

    def heartbeat(self, task_id: str, token: str, lease_until: float, progress: dict[str, Any]) -> bool:
        """Prolong a lease. False: the token is no longer the task's, and the order must be cancelled."""
        renewed = (
            update(_tasks)
            .where(_tasks.c.task_id == task_id, _tasks.c.token == token, _tasks.c.state.in_(AT_WORK))
            .values(lease_until=lease_until, progress=json.dumps(progress))
        )
        with self._database.writing() as connection:
            return connection.execute(renewed).rowcount == 1

    def progress(self, task_id: str) -> dict[str, Any]:
        """The last heartbeat's progress; empty before the first of an attempt."""
        with self._database.reading() as connection:
            row = connection.execute(select(_tasks.c.progress).where(_tasks.c.task_id == task_id)).scalar()
        try:
            found = json.loads(row) if row else {}
        except ValueError:
            return {}
        return dict(found) if isinstance(found, dict) else {}

    # --- history -----------------------------------------------------------------------------------------------

    def append(self, task_id: str, lines: Iterable[tuple[str, str]]) -> None:
        """Add (kind, text) lines to a task's history."""
        if found := list(lines):
            with self._database.writing() as connection:
                self._append(connection, task_id, found, time.time())

    def append_log(self, task_id: str, lines: Iterable[LogLine]) -> None:
        """Add what a worker reported of a task's training. The worker thins the points: fifty for each attempt."""
        self.append(
            task_id, [(PROGRESS, point_text(line)) if isinstance(line, Point) else (LOG, line) for line in lines]
        )

    def curve(self, task_id: str) -> list[Point]:
        """The points of a task's curves, of all its attempts, oldest first."""
        return points_of(self.events(task_id))

    def events(self, task_id: str, after: int = 0) -> list[TaskEvent]:
        """A task's history after an event id, oldest first."""
        chosen = (
            select(_events.c.event_id, _events.c.at, _events.c.kind, _events.c.text)
            .where(_events.c.task_id == task_id, _events.c.event_id > _number(after))
            .order_by(_events.c.event_id)
        )
        with self._database.reading() as connection:
            return [TaskEvent(*row) for row in connection.execute(chosen)]

    def told(
        self,
        after: int,
        limit: int,
        *,
        until: int = EVENT_ID_MAX,
        task_id: str | None = None,
        of_teams: Collection[str] | None = None,
        kinds: Collection[str] = (),
    ) -> list[NamedEvent]:
        """The events behind a number, oldest first. Whoever goes on behind the last one misses none.

        Args:
            limit: Events at most.
            until: Number of the last event that may be among them.
            task_id: Only events of this task.
            of_teams: Only events of these teams' tasks; None: of all.
            kinds: Only events of these kinds; empty: of all.
        """
        title = (_tasks.c.team + "/" + _tasks.c.name).label("title")
        chosen = select(_events.c.event_id, _events.c.at, _events.c.kind, _events.c.text, _tasks.c.task_id, title)
        chosen = chosen.join_from(_events, _tasks, _events.c.task_id == _tasks.c.task_id)
        chosen = chosen.where(_events.c.event_id > _number(after), _events.c.event_id <= _number(until))
        if task_id is not None:
            chosen = chosen.where(_events.c.task_id == task_id)
        if of_teams is not None:
            chosen = chosen.where(_tasks.c.team.in_(sorted(of_teams)))
        if kinds:
            chosen = chosen.where(_events.c.kind.in_(sorted(kinds)))
        with self._database.reading() as connection:
            rows = connection.execute(chosen.order_by(_events.c.event_id).limit(limit))
            return [NamedEvent(**row._mapping) for row in rows]

    def newest_event(self) -> int:
        """Number of the newest event; 0: there is none."""
        with self._database.reading() as connection:
            return int(connection.execute(select(func.max(_events.c.event_id))).scalar() or 0)

    # --- what was used -----------------------------------------------------------------------------------------

    def charge(
        self, task_id: str, use: Use, *, token: str, what: str, worker: str = "", done_at: DoneAt = NOWHERE
    ) -> None:
        """Add the cost of an order that is no step in a task's life (scoring it, refining it again), once per token."""
        where: dict[str, Any] = {"worker": worker, "done_at": done_at_text(done_at)}
        with self._database.writing() as connection:
            self._charge(connection, Spent(task_id=task_id, token=token, what=what, **where, **vars(use)))

    def use_of_teams(self, now: float) -> dict[str, float]:
        """Place-seconds per team, halved for every seven days since each was used.

        Cost:
            One row for each team.
        """
        return {team: used.at_time(now) for team, used in self._team_uses().items()}

    def gpu_use_of_teams(self, now: float) -> dict[str, float]:
        """The same in GPU-seconds."""
        return {team: used.gpus_at_time(now) for team, used in self._team_uses().items()}

    def _team_uses(self) -> dict[str, DecayedSum]:
        chosen = select(_team_uses.c.team, _team_uses.c.seconds, _team_uses.c.at, _team_uses.c.gpu_seconds)
        with self._database.reading() as connection:
            return {team: DecayedSum(*sums) for team, *sums in connection.execute(chosen)}

    def spent(self, task_id: str) -> list[Spent]:
        """What a task's orders cost its team, oldest first."""
        return self.spent_by([task_id])[task_id]

    def spent_by(self, task_ids: Collection[str]) -> dict[str, list[Spent]]:
        """The same of several tasks, each by its id."""
        found: dict[str, list[Spent]] = {task_id: [] for task_id in task_ids}
        chosen = select(*(getattr(_uses.c, field.name) for field in fields(Spent)))
        chosen = chosen.order_by(_uses.c.ended_at, _uses.c.token)
        with self._database.reading() as connection:
            for ids in _batches(task_ids):
                for row in connection.execute(chosen.where(_uses.c.task_id.in_(ids))):
                    found[row.task_id].append(Spent(**row._mapping))
        return found

    # --- helpers -----------------------------------------------------------------------------------------------

    def _apply(self, connection: Connection, task_id: str, event: Event) -> TaskRecord:
        row = self._row(connection, task_id)
        record = self._read(row, task_id)
        after = advance(record, event, self._failures)
        if after is record:
            return record
        if isinstance(event, Restored) and record.state is not TaskState.PUBLISHED:
            self._lock_team(connection, record.team)
            self._refuse_taken_name(connection, record)
        after = after.model_copy(update={"revision": record.revision + 1})
        assert row is not None
        values = columns_of(after, row.record)
        if isinstance(event, Claimed):  # the progress of an earlier attempt is not this one's
            values |= {"lease_until": None, "progress": None}
        written = connection.execute(
            update(_tasks).where(_tasks.c.task_id == task_id, _tasks.c.revision == record.revision).values(**values)
        )
        if written.rowcount != 1:
            raise _OvertakenError
        now = time.time()
        told = (type(event).__name__, narrate(after, event, record.warnings))
        self._append(connection, task_id, [told], now, facts_of(after, event, record))
        if happening := of_task(record, after, now):
            put(connection, happening)
        if after.state is not record.state:
            self._tell_those_behind(connection, after)
        if use := used_by(record, event, row.lease_until):
            what = "refine" if record.state is TaskState.REFINING else "train"
            where: dict[str, Any] = {"worker": record.worker, "done_at": done_at_text(done_at_in(event))}
            self._charge(connection, Spent(task_id=task_id, token=record.token, what=what, **where, **vars(use)))
        return after

    def _before(self, connection: Connection, titles: Sequence[str]) -> tuple[str, ...]:
        """Ids of the newest tasks of these names, without those that are published; what ended without a result counts
        where there is nothing else. Raises InvalidInput."""
        found = []
        for title in titles:
            team, _, name = title.partition("/")
            named = select(_tasks.c.task_id, _tasks.c.state).where(_tasks.c.team == team, _tasks.c.name == name)
            ended_last = (_tasks.c.state.in_(_OUT_OF_LINE), _tasks.c.submitted_at.desc(), _tasks.c.task_id.desc())
            newest = named.order_by(*ended_last).limit(1)
            row = connection.execute(newest).first()
            if row is None:
                raise InvalidInput(f"there is no task {title}", "after", "submit that one first, or leave it out")
            if row.state in _ENDED:
                todo = f"`onebasis retry {title}` first, or leave it out"
                raise InvalidInput(f"{title} is {row.state}, so this task could never start", "after", todo)
            if row.state != TaskState.PUBLISHED:
                found.append(row.task_id)
        return tuple(found)

    def _tell_those_behind(self, connection: Connection, record: TaskRecord) -> None:
        """Tasks that come after one that is published, or ended otherwise, stand in line or are parked: with it, in one
        transaction."""
        is_published = record.state is TaskState.PUBLISHED
        if not is_published and record.state not in ENDED_WITHOUT_RESULT:
            return
        behind = _awaits.c.after_id == record.task_id
        ids = connection.execute(select(_awaits.c.task_id).where(behind).order_by(_awaits.c.task_id)).scalars().all()
        if not ids:
            return
        told = DependencyEnded(
            task_id=record.task_id,
            title=record.title,
            state=str(record.state),
            is_published=is_published,
            at=time.time(),
        )
        connection.execute(delete(_awaits).where(behind))
        for task_id in ids:
            with contextlib.suppress(UnreadableTask):
                self._apply(connection, task_id, told)

    def _charge(self, connection: Connection, spent: Spent) -> None:
        team = _team_uses.c.team == spent.team
        # Locked on Postgres, so that of two that charge at once each sees the other's; SQLite has one writer anyway.
        mine = select(_team_uses.c.seconds, _team_uses.c.at, _team_uses.c.gpu_seconds).where(team).with_for_update()
        before = connection.execute(mine).first()
        if before is None:
            self._lock_team(connection, spent.team)
            before = connection.execute(mine).first()
        told = select(literal(1)).where(_uses.c.task_id == spent.task_id, _uses.c.token == spent.token)
        if connection.execute(told).first() is not None:
            return
        connection.execute(insert(_uses).values(**vars(spent)))
        total = DecayedSum(*before) if before else DecayedSum()
        total = total.plus(
            Use(team=spent.team, seconds=spent.seconds, ended_at=spent.ended_at, places=spent.places, gpus=spent.gpus)
        )
        if before is None:
            connection.execute(insert(_team_uses).values(team=spent.team, **vars(total)))
        else:
            connection.execute(update(_team_uses).where(team).values(**vars(total)))

    def _append(
        self,
        connection: Connection,
        task_id: str,
        lines: Iterable[tuple[str, str]],
        at: float,
        facts: str | None = None,
    ) -> None:
        rows = [{"task_id": task_id, "at": at, "kind": kind, "text": text, "facts": facts} for kind, text in lines]
        if rows:
            self._database.numbered(connection, insert(_events), rows)

    def _get(self, connection: Connection, task_id: str) -> TaskRecord:
        return self._read(self._row(connection, task_id), task_id)

    def _row(self, connection: Connection, task_id: str) -> AnyRow | None:
        return connection.execute(select(*_RECORD, _tasks.c.lease_until).where(_tasks.c.task_id == task_id)).first()

    def _by_client_key(self, connection: Connection, team: str, client_key: str) -> TaskRecord | None:
        row = connection.execute(
            select(*_RECORD).where(_tasks.c.team == team, _tasks.c.client_key == client_key)
        ).first()
        return self._read(row) if row else None

    def _lock_team(self, connection: Connection, team: str) -> None:
        """Make writers of one team wait for each other: each must see the other's rows. SQLite has one writer at a time
        anyway."""
        if self._database.is_postgres:
            connection.execute(select(func.pg_advisory_xact_lock(func.hashtext(team))))

    def _alive(self, connection: Connection, team: str, name: str) -> Sequence[AnyRow]:
        """The living task of this name, and the next revision of it that is on its way, if there is one. While they
        live, no other gets the name: team/name of a score means one task."""
        named = (_tasks.c.team == team, _tasks.c.name == name, _tasks.c.state.not_in(_OUT_OF_LINE))
        chosen = select(*_RECORD, _tasks.c.state, _tasks.c.content_sha256, _tasks.c.submitted_at).where(*named)
        # Sorted here: told to sort, SQLite reads all of the team's tasks by age rather than those of this name.
        found = connection.execute(chosen).all()
        return sorted(found, key=lambda row: (row.submitted_at, row.task_id))

    def _refuse_taken_name(self, connection: Connection, record: TaskRecord) -> None:
        alive = self._alive(connection, record.team, record.name)
        if record.version:  # it comes back: a revision on its way waits for its merge, which finds out
            alive = [row for row in alive if row.state == TaskState.PUBLISHED or not self._read(row).revises]
        elif record.revises:
            self._refuse_revision(alive, record)
            return
        taken = next(iter(alive), None)
        if taken is None:
            return
        same = bool(record.content_sha256) and taken.content_sha256 == record.content_sha256
        if record.version:
            what, todo = "so it cannot come back", "cancel or remove that task first"
        elif same:
            what, todo = (
                "and is this very submission, under another client_key",
                "leave client_key out to get that task",
            )
        elif taken.content_sha256 and record.content_sha256:
            what, todo = "and this submission differs from it", "choose another name"
        else:
            what, todo = "and nobody knows whether it is the same submission", "choose another name"
        if taken.state != TaskState.PUBLISHED and not same and not record.version:
            todo += ", or cancel the old task first"
        elif taken.state == TaskState.PUBLISHED and not same and not record.version:
            todo += (
                "; if these are new rows for that task, `onebasis submit --revise FILE` (or revises: true) makes its "
                f"next revision of them; or take the old task out first: `onebasis store remove {record.title}`"
            )
        raise NameTaken(
            f"task {taken.task_id} of that name is {taken.state}, {what}",
            record.title,
            todo,
            record.task_id,
            taken.task_id,
        )

    def _refuse_revision(self, alive: Sequence[AnyRow], record: TaskRecord) -> None:
        """Refuse a revision of what is not published (any more), or that would not be the only one on its way."""
        if under_way := next((row for row in alive if row.state != TaskState.PUBLISHED), None):
            what = f"{self._read(under_way).exact_title} ({under_way.task_id}) is {under_way.state}"
            todo = f"wait until it has ended, or `onebasis cancel {under_way.task_id}`, then submit this one"
            raise NameTaken(what, record.title, todo, record.task_id, under_way.task_id)
        if record.revises not in [row.task_id for row in alive]:
            raise Conflict(
                "another revision of it was published, or it was taken out, in this very moment",
                record.title,
                "submit it again",
            )

    def _refuse_full_queue(self, connection: Connection, team: str, queued_max: int) -> None:
        mine = select(literal(1)).where(_tasks.c.state == _QUEUED, _tasks.c.team == team)
        mine = mine.where(_tasks.c.blocked.in_(("", *_BLOCKED))).limit(queued_max)  # so that an index has them together
        if connection.execute(select(func.count()).select_from(mine.subquery())).scalar_one() >= queued_max:
            raise QueueFull(
                f"team '{team}' has {queued_max} tasks waiting, its limit",
                "teams.queued_max",
                "wait until some of them have begun, then submit again",
                team,
                queued_max,
            )

    def _read(self, row: AnyRow | None, task_id: str = "") -> TaskRecord:
        """A row as a record; what cannot be read is remembered for `unreadable`. Raises NotFound, UnreadableTask."""
        if row is None:
            raise NotFound("there is no such task", task_id, "`onebasis tasks` lists them")
        try:
            record = record_of(row.task_id, f"{row.team}/{row.name}", row.record)
        except UnreadableTask as error:
            if row.task_id not in self._unreadable:
                log.error("%s", error)
            self._unreadable[row.task_id] = error
            raise
        self._unreadable.pop(record.task_id, None)
        return record

    def _try_read(self, row: AnyRow) -> TaskRecord | None:
        try:
            return self._read(row)
        except UnreadableTask:
            return None


class _OvertakenError(Exception):
    """Another writer changed the record between our read and our write."""


def _teams_that_wait() -> Select[Any]:
    """Teams with a waiting task, found by steps from team to team in the index, not by reading all its rows."""
    first = select(func.min(_tasks.c.team).label("team")).where(*_IN_LINE).cte("teams", recursive=True)
    following = select(func.min(_tasks.c.team)).where(*_IN_LINE, _tasks.c.team > first.c.team).scalar_subquery()
    teams = first.union_all(select(following).where(first.c.team.is_not(None)))
    return select(teams.c.team).where(teams.c.team.is_not(None))


def _pools_of_queued() -> Select[Any]:
    """As `_teams_that_wait`, of pools."""
    first = select(func.min(_tasks.c.pool).label("pool")).where(_tasks.c.state == _QUEUED).cte("pools", recursive=True)
    more = select(func.min(_tasks.c.pool)).where(_tasks.c.state == _QUEUED, _tasks.c.pool > first.c.pool)
    pools = first.union_all(select(more.scalar_subquery()).where(first.c.pool.is_not(None)))
    return select(pools.c.pool).where(pools.c.pool.is_not(None))


def _in_line(team: str, pool: str) -> Select[Any]:
    """The tasks of a team that stand in line for a pool, in the team's order."""
    columns = (
        _tasks.c.task_id,
        -_tasks.c.priority,
        _tasks.c.submitted_at,
        _tasks.c.gave_back_at,
        _tasks.c.max_run_seconds,
    )
    mine = select(*columns).where(*_IN_LINE, _tasks.c.team == team, _tasks.c.pool == pool)
    return mine.order_by(_tasks.c.priority, _tasks.c.submitted_at, _tasks.c.task_id)


def _number(event_id: int) -> ColumnElement[int]:
    """Number of an event as a value: in Postgres, one column's type is smaller than what may be asked."""
    return literal(min(max(event_id, 0), EVENT_ID_MAX), BigInteger)


def _batches(task_ids: Collection[str]) -> Iterator[list[str]]:
    ids = sorted(task_ids)
    for start in range(0, len(ids), IDS_AT_ONCE):
        yield ids[start : start + IDS_AT_ONCE]
