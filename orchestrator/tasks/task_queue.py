"""The tasks in a SQL database: the only place that writes one, and all SQL there is.

SQLite in WAL mode by default, Postgres by URL. A record is read, advanced by the pure function of
task_lifecycle.py and written back under its revision, together with the event, in one transaction; a writer that
was overtaken reads again. Events are only ever appended.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from sqlalchemy import (
    Column,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    func,
    insert,
    select,
    update,
)
from sqlalchemy import event as sqlalchemy_event
from sqlalchemy.engine import Connection, Engine, make_url
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from configs.errors import Conflict, InvalidInput, NotFound, Unavailable
from configs.settings import FailureSettings
from orchestrator.scheduling.fair_share import Use
from orchestrator.tasks.task_events import Event, RefinementRefused, TrainingDone, TrainingFailed
from orchestrator.tasks.task_history import LOG, PROGRESS, TaskEvent, point_of
from orchestrator.tasks.task_lifecycle import advance
from orchestrator.tasks.task_record import AT_WORK, ENDED_WITHOUT_RESULT, LIVE, TaskRecord, TaskState
from workers.orders import LogLine, Point, Trained

log = logging.getLogger("onebasis.controller")

_metadata = MetaData()

_tasks = Table(
    "tasks",
    _metadata,
    Column("task_id", String(40), primary_key=True),
    Column("team", String(63), nullable=False),
    Column("name", String(63), nullable=False),
    Column("client_key", String(120), nullable=False),
    Column("state", String(20), nullable=False),
    Column("token", String(40), nullable=False, default=""),
    Column("revision", Integer, nullable=False),
    Column("submitted_at", Float, nullable=False),
    Column("train_seconds", Float),
    Column("ended_training_at", Float),
    Column("lease_until", Float),
    Column("progress", Text),
    Column("record", Text, nullable=False),
    UniqueConstraint("team", "client_key"),
    Index("tasks_by_state", "state"),
    Index("tasks_by_name", "team", "name"),
)

_events = Table(
    "events",
    _metadata,
    Column("event_id", Integer, primary_key=True, autoincrement=True),
    Column("task_id", String(40), nullable=False),
    Column("at", Float, nullable=False),
    Column("kind", String(40), nullable=False),
    Column("text", Text, nullable=False),
    Index("events_by_task", "task_id", "event_id"),
)


class TaskQueue:
    """The table of tasks and the table of their events. Safe for several threads."""

    def __init__(self, database_url: str, failures: FailureSettings | None = None) -> None:
        """Open, and create the tables if they are not there.

        Raises:
            InvalidInput: No such database driver, or not a URL.
            Unavailable: The database does not answer.
        """
        self._failures = failures or FailureSettings()
        self._engine = _engine(database_url)
        try:
            _metadata.create_all(self._engine)
        except SQLAlchemyError as error:
            raise Unavailable(
                f"the task database does not answer: {error}", _safe(database_url), "check database_url"
            ) from error

    def close(self) -> None:
        """Give the connections back."""
        self._engine.dispose()

    def add(self, record: TaskRecord, note: str = "submitted") -> tuple[TaskRecord, bool]:
        """Take a task in, once per team and client key.

        Returns:
            The task and True; or, if this client key is known, the task of old and False.

        Raises:
            Conflict: Another task of that name is alive or published.
        """
        with self._engine.begin() as connection:
            if self._engine.dialect.name == "postgresql":
                # Two submissions of a team, one after the other: each must see the other's name. SQLite's one writer
                # at a time is that already.
                connection.execute(select(func.pg_advisory_xact_lock(func.hashtext(record.team))))
            known = self._by_client_key(connection, record.team, record.client_key)
            if known is not None:
                return known, False
            self._refuse_taken_name(connection, record)
            try:
                with connection.begin_nested():
                    connection.execute(insert(_tasks).values(task_id=record.task_id, **_columns(record)))
            except IntegrityError as error:  # the same submission came in on another connection meanwhile
                known = self._by_client_key(connection, record.team, record.client_key)
                if known is None:
                    raise Conflict("the task id is taken", record.task_id, "submit again") from error
                return known, False
            self._append(connection, record.task_id, [("submitted", note)], record.submitted_at)
        return record, True

    def get(self, task_id: str) -> TaskRecord:
        """One task by its id. Raises NotFound."""
        with self._engine.connect() as connection:
            return self._get(connection, task_id)

    def find(self, reference: str) -> TaskRecord:
        """One task by id, by the beginning of its id, or by `team/name` (the newest of that name).

        Raises:
            NotFound: None, or several ids that begin like this.
        """
        team, slash, name = reference.partition("/")
        chosen = select(_tasks.c.record).order_by(_tasks.c.submitted_at.desc()).limit(2)
        if slash:
            chosen = chosen.where(_tasks.c.team == team, _tasks.c.name == name)
        else:
            chosen = chosen.where(_tasks.c.task_id.startswith(reference, autoescape=True))
        with self._engine.connect() as connection:
            rows = connection.execute(chosen).scalars().all()
        if not rows or not reference or (len(rows) > 1 and not slash):
            problem = "several tasks begin like this" if len(rows) > 1 else "there is no such task"
            raise NotFound(problem, repr(reference), "`onebasis tasks` lists ids and names")
        return TaskRecord.model_validate_json(rows[0])

    def tasks(self, states: Iterable[TaskState] = (), team: str | None = None) -> list[TaskRecord]:
        """Tasks by age, all or those in some states or of one team."""
        chosen = select(_tasks.c.record).order_by(_tasks.c.submitted_at, _tasks.c.task_id)
        if wanted := [str(state) for state in states]:
            chosen = chosen.where(_tasks.c.state.in_(wanted))
        if team is not None:
            chosen = chosen.where(_tasks.c.team == team)
        with self._engine.connect() as connection:
            return [TaskRecord.model_validate_json(row) for row in connection.execute(chosen).scalars()]

    def among(self, task_ids: Collection[str]) -> dict[str, TaskRecord]:
        """Id to record, of those of these ids that the database knows: it may be younger than the store."""
        return {record.task_id: record for record in self.tasks() if record.task_id in task_ids}

    def counts(self) -> dict[str, int]:
        """State to number of tasks, without reading the tasks; a state without any is left out."""
        chosen = select(_tasks.c.state, func.count()).group_by(_tasks.c.state).order_by(_tasks.c.state)
        with self._engine.connect() as connection:
            return dict(connection.execute(chosen).all())

    def live(self) -> list[TaskRecord]:
        """Tasks that are owed something."""
        return self.tasks(LIVE)

    def apply(self, task_id: str, event: Event) -> TaskRecord:
        """Advance one task by one event and append the event, in one transaction.

        Returns:
            The record afterwards; unchanged, with nothing appended, when a stale worker spoke.

        Raises:
            NotFound, Conflict: No such task; or the event does not belong to its state.
        """
        return self.apply_all([task_id], event)[0]

    def apply_all(self, task_ids: Sequence[str], event: Event) -> list[TaskRecord]:
        """Advance several tasks by the same event: all of them or none."""
        while True:
            try:
                with self._engine.begin() as connection:
                    return [self._apply(connection, task_id, event) for task_id in task_ids]
            except _OvertakenError:
                continue

    def try_apply(self, task_ids: Sequence[str], event: Event) -> list[TaskRecord]:
        """As `apply_all`; nothing when somebody (a cancel) came first: then the records are to be read again."""
        try:
            return self.apply_all(task_ids, event)
        except Conflict as error:
            log.info("read again: %s", error)
            return []

    def heartbeat(self, task_id: str, token: str, lease_until: float, progress: dict[str, Any]) -> bool:
        """Prolong a lease. False: the token is no longer the task's, drop everything."""
        renewed = (
            update(_tasks)
            .where(_tasks.c.task_id == task_id, _tasks.c.token == token, _tasks.c.state.in_(AT_WORK))
            .values(lease_until=lease_until, progress=json.dumps(progress))
        )
        with self._engine.begin() as connection:
            return connection.execute(renewed).rowcount == 1

    def progress(self, task_id: str) -> dict[str, Any]:
        """The last heartbeat's progress; empty before the first."""
        with self._engine.connect() as connection:
            row = connection.execute(select(_tasks.c.progress).where(_tasks.c.task_id == task_id)).scalar()
        return dict(json.loads(row)) if row else {}

    def append(self, task_id: str, lines: Iterable[tuple[str, str]]) -> None:
        """Add (kind, text) lines to a task's history."""
        if found := list(lines):
            with self._engine.begin() as connection:
                self._append(connection, task_id, found, time.time())

    def append_log(self, task_id: str, lines: Iterable[LogLine]) -> None:
        """Add what a worker told of a task's training. It thins the points itself: fifty for each attempt."""
        self.append(
            task_id, [(PROGRESS, _point_text(line)) if isinstance(line, Point) else (LOG, line) for line in lines]
        )

    def curve(self, task_id: str) -> list[Point]:
        """The points of a task's curves, of all its attempts, oldest first."""
        return [point_of(event) for event in self.events(task_id) if event.kind == PROGRESS]

    def events(self, task_id: str, after: int = 0) -> list[TaskEvent]:
        """A task's history after an event id, oldest first."""
        chosen = (
            select(_events.c.event_id, _events.c.at, _events.c.kind, _events.c.text)
            .where(_events.c.task_id == task_id, _events.c.event_id > after)
            .order_by(_events.c.event_id)
        )
        with self._engine.connect() as connection:
            return [TaskEvent(*row) for row in connection.execute(chosen)]

    def uses(self, since: float) -> list[Use]:
        """Worker-seconds spent per team after a time, for fair share."""
        chosen = select(_tasks.c.team, _tasks.c.train_seconds, _tasks.c.ended_training_at).where(
            _tasks.c.train_seconds.is_not(None), _tasks.c.ended_training_at > since
        )
        with self._engine.connect() as connection:
            return [Use(*row) for row in connection.execute(chosen)]

    def _apply(self, connection: Connection, task_id: str, event: Event) -> TaskRecord:
        record = self._get(connection, task_id)
        after = advance(record, event, self._failures)
        if after is record:
            return record
        after = after.model_copy(update={"revision": record.revision + 1})
        written = connection.execute(
            update(_tasks)
            .where(_tasks.c.task_id == task_id, _tasks.c.revision == record.revision)
            .values(**_columns(after))
        )
        if written.rowcount != 1:
            raise _OvertakenError
        self._append(connection, task_id, [(type(event).__name__, _narrate(after, event))], time.time())
        return after

    def _append(self, connection: Connection, task_id: str, lines: Iterable[tuple[str, str]], at: float) -> None:
        rows = [{"task_id": task_id, "at": at, "kind": kind, "text": text} for kind, text in lines]
        if rows:
            connection.execute(insert(_events), rows)

    def _get(self, connection: Connection, task_id: str) -> TaskRecord:
        row = connection.execute(select(_tasks.c.record).where(_tasks.c.task_id == task_id)).scalar()
        if row is None:
            raise NotFound("there is no such task", task_id, "`onebasis tasks` lists them")
        return TaskRecord.model_validate_json(row)

    def _by_client_key(self, connection: Connection, team: str, client_key: str) -> TaskRecord | None:
        row = connection.execute(
            select(_tasks.c.record).where(_tasks.c.team == team, _tasks.c.client_key == client_key)
        ).scalar()
        return TaskRecord.model_validate_json(row) if row else None

    def _refuse_taken_name(self, connection: Connection, record: TaskRecord) -> None:
        """Names are never reused while their task lives: a score called team/name must mean one task."""
        free = [str(state) for state in ENDED_WITHOUT_RESULT]
        taken = connection.execute(
            select(_tasks.c.task_id, _tasks.c.state).where(
                _tasks.c.team == record.team, _tasks.c.name == record.name, _tasks.c.state.not_in(free)
            )
        ).first()
        if taken is not None:
            raise Conflict(
                f"task {taken.task_id} of that name is {taken.state}, and this submission differs from it",
                record.title,
                "choose another name"
                if taken.state == TaskState.PUBLISHED
                else "choose another name, or cancel the old task first",
            )


class _OvertakenError(Exception):
    """Another writer changed the record between our read and our write."""


def _columns(record: TaskRecord) -> dict[str, Any]:
    use = record.use
    return {
        "team": record.team,
        "name": record.name,
        "client_key": record.client_key,
        "state": str(record.state),
        "token": record.token,
        "revision": record.revision,
        "submitted_at": record.submitted_at,
        "train_seconds": use.seconds if use else None,
        "ended_training_at": use.ended_at if use else None,
        "record": record.model_dump_json(),
    }


def _narrate(record: TaskRecord, event: Event) -> str:
    """One line for people: what happened and what it led to."""
    facts = [
        f"{name} {getattr(event, name)}"
        for name in ("worker", "fault", "version", "merge_key", "by")
        if hasattr(event, name)
    ]
    message = getattr(event, "message", "")
    if isinstance(event, TrainingDone):
        facts += _trained(event.outcome)
    if isinstance(event, TrainingFailed | RefinementRefused) and record.unrefined:
        message = f"goes on as it was merged: {record.unrefined}"
    return " · ".join([f"now {record.state}", *facts, *([message] if message else [])])


def _trained(outcome: Trained) -> list[str]:
    """How the adapter came about: what `auto` chose, how much was trained, from which step it went on."""
    facts = {
        f"method {outcome.method}": outcome.method,
        f"in the basis of version {outcome.basis_version}": outcome.basis_version,
        f"{outcome.trainable_parameters:,} numbers trained": outcome.trainable_parameters,
        f"went on from step {outcome.resumed_from}": outcome.resumed_from,
        f"own adapter scores {outcome.local_score:.4f}": outcome.local_score == outcome.local_score,
    }
    return [text for text, known in facts.items() if known]


def _point_text(point: Point) -> str:
    return json.dumps({name: value for name, value in vars(point).items() if value == value})  # no NaN in JSON


def _engine(database_url: str) -> Engine:
    try:
        url = make_url(database_url)
        engine = create_engine(url, pool_pre_ping=True)
    except (SQLAlchemyError, ModuleNotFoundError) as error:
        raise InvalidInput(
            f"is not a usable database URL: {error}",
            "database_url",
            "use sqlite:///FILE or postgresql+psycopg://USER@HOST/NAME",
        ) from error
    if url.get_backend_name() == "sqlite":
        sqlalchemy_event.listen(engine, "connect", _prepare_sqlite)
        sqlalchemy_event.listen(engine, "begin", _begin_immediate)
    return engine


def _prepare_sqlite(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # the driver's own BEGIN is deferred: two readers that both write dead-lock
    connection.execute("PRAGMA busy_timeout = 30000")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")  # what was acknowledged survives a power cut


def _begin_immediate(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _safe(database_url: str) -> str:
    try:
        return make_url(database_url).render_as_string(hide_password=True)
    except SQLAlchemyError:
        return "database_url"
