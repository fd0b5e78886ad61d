"""The connection to the task database: what is a read, what is a write, and what a driver's error means.

Every statement of the task queue runs inside `reading` or `writing`, so that this is the one place where an error of
SQLAlchemy or of a driver becomes one of ours. On SQLite a read takes no lock and waits for nobody (WAL mode); a write
takes the write lock at its beginning, because two that read first and then write would dead-lock.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Insert, create_engine, event, func, inspect, select
from sqlalchemy.engine import URL, Connection, Engine, make_url
from sqlalchemy.exc import DataError, DBAPIError, SQLAlchemyError

from configs.errors import Corrupt, DatabaseAway, InvalidInput, NotLeading, OnebasisError
from orchestrator.tasks.tables import HEAD, leadership, schema, tasks

WAIT_SECONDS = 5.0
"""Longest wait for a lock that another program holds, and for a server: a person at the command line waits as long."""
MIGRATE_WAIT_SECONDS = 60.0
"""The same where the other program may be bringing the tables up to date, which takes a second for 30,000 tasks."""
NOT_LEADING = "`onebasis status` shows which one leads: ask there"
IDLE_SECONDS = 5.0
"""Longest pause inside a transaction after which Postgres ends it: a process that is stopped, or whose machine is cut
off, must not keep the next leader waiting with what it has locked."""
_MIGRATION_LOCK = 7_065_213
"""Postgres's advisory lock for changing the tables: any number that no other program uses."""
_NUMBERING_LOCK = 7_065_215
"""The same for the rows of `Database.numbered`."""
_NUMBERED = "onebasis numbered"
"""Key of a connection's rows that are written when its transaction ends."""


@dataclass(frozen=True)
class Seen:
    """A database as it was found."""

    revision: str | None
    """Revision of our tables; None: there are none."""
    clock_skew_seconds: float | None
    """How far its clock is ahead of this machine's; None: it is a file."""
    round_trip_seconds: float
    """Time of one question."""

    @property
    def is_newer(self) -> bool:
        """Whether a newer release has written it."""
        return self.revision is not None and self.revision > HEAD


@contextlib.contextmanager
def as_it_is(url: str, writes: bool = False) -> Iterator[Connection]:
    """A transaction on a database whose tables are left as they are: it sees one state; with `writes`, all of what it
    writes is kept at the end, or nothing.

    Raises:
        InvalidInput, DatabaseAway, Corrupt: As `Database`.
    """
    engine = _engine(url).execution_options(writes=writes)
    try:
        if engine.dialect.name == "postgresql":
            engine = engine.execution_options(isolation_level="REPEATABLE READ")
        with _told(_safe(url)), engine.connect() as connection, connection.begin():
            if engine.dialect.name == "postgresql":
                connection.exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = 0")
            yield connection
    finally:
        engine.dispose()


def revision_of(connection: Connection) -> str | None:
    """Revision of the tables; None: there are none. Release 0.3 had no table of it: its tables are the first."""
    present = inspect(connection).get_table_names()
    if schema.name in present:
        return connection.execute(select(schema.c.version_num)).scalar()
    return "0001" if tasks.name in present else None


def look(url: str) -> Seen:
    """Look at a database without making or changing a table.

    Raises:
        InvalidInput, DatabaseAway, Corrupt: As `Database`.
    """
    if is_missing_file(url):
        return Seen(None, None, 0.0)
    with as_it_is(url) as connection:
        revision = revision_of(connection)
        begun = time.time()
        connection.exec_driver_sql("SELECT 1")
        took = time.time() - begun
        if connection.dialect.name != "postgresql":
            return Seen(revision, None, took)
        asked = time.time()
        theirs = float(connection.execute(select(func.extract("epoch", func.clock_timestamp()))).scalar_one())
        return Seen(revision, theirs - (asked + time.time()) / 2, took)


def is_missing_file(url: str) -> bool:
    """Whether the database is a file that is not there: a connection would make it."""
    engine = _engine(url)
    return engine.dialect.name == "sqlite" and not Path(engine.url.database or "").exists()


class Database:
    """One task database, its tables those of this release."""

    def __init__(self, url: str, fence: int | None = None) -> None:
        """Open; make the tables, or bring older ones up to date, if they are not those of this release.

        Args:
            fence: Number of the leader for which everything is written: under another leader nothing is. None: for a
                person, or where there is one control plane alone.

        Raises:
            InvalidInput: No such database driver, or not a URL; or a newer release has written to it.
            DatabaseAway: It does not answer, or another program holds it.
            Corrupt: It is no database, or a damaged one.
        """
        self._where = _safe(url)
        self._fence = fence
        self.engine = _engine(url)
        self._writer = self.engine.execution_options(writes=True)
        try:
            with self.reading() as connection:
                known = revision_of(connection)
            if known != HEAD:
                self._migrate()
        except BaseException:
            self.close()
            raise

    @property
    def is_postgres(self) -> bool:
        return self.engine.dialect.name == "postgresql"

    def close(self) -> None:
        """Give the connections back."""
        with contextlib.suppress(SQLAlchemyError):
            self.engine.dispose()

    @contextlib.contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that only reads: one state of the database, and no lock.

        Raises:
            DatabaseAway, Corrupt, InvalidInput: See `_told`; so does `writing`.
        """
        with _told(self._where), self.engine.connect() as connection:
            yield connection

    @contextlib.contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that writes: all of it is kept when the block ends, or nothing.

        Raises:
            NotLeading: Another control plane leads by now, so nothing is written.
        """
        with _told(self._where), self._writer.begin() as connection:
            connection.info[_NUMBERED] = []
            if self._fence is not None:
                self._hold_the_fence(connection, self._fence)
            yield connection
            self._write_numbered(connection)

    def numbered(self, connection: Connection, statement: Insert, rows: Sequence[Mapping[str, Any]]) -> None:
        """Insert rows that the database numbers when `writing` ends, so that their numbers grow in the order in which
        transactions are committed: who has read up to a number has missed none below it."""
        connection.info[_NUMBERED].append((statement, rows))

    def _write_numbered(self, connection: Connection) -> None:
        waiting = connection.info.pop(_NUMBERED)
        if waiting and self.is_postgres:
            # Held from the first number to the commit. It is the last lock that a transaction takes, so none that has
            # it waits for another one. SQLite has one writer at a time anyway.
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_NUMBERING_LOCK})")
        for statement, rows in waiting:
            connection.execute(statement, rows)

    def _hold_the_fence(self, connection: Connection, fence: int) -> None:
        """Keep the leader's number as it is until this transaction ends: the next leader waits that long, and a
        transaction that begins later is refused here. So nothing that an earlier leader writes comes after a read of
        the next one."""
        mine = select(leadership.c.fence).where(leadership.c.fence == fence)
        if connection.execute(mine.with_for_update(read=True, key_share=True)).first() is None:
            raise NotLeading("another control plane leads by now, and this one wrote nothing", self._where, NOT_LEADING)

    def _migrate(self) -> None:
        """Bring the tables up to date, one process at a time: one that waited for the lock finds everything done."""
        patient = self.engine.execution_options(writes=True, wait_seconds=MIGRATE_WAIT_SECONDS)
        with _told(self._where), patient.begin() as connection:
            if self.is_postgres:
                connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{MIGRATE_WAIT_SECONDS:.0f}s'")
                connection.exec_driver_sql("SET LOCAL idle_in_transaction_session_timeout = 0")
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})")
            known = revision_of(connection)
            if known != HEAD:
                # Imported here: it costs 0.2 s, and most processes find the tables as they are to be.
                from orchestrator.tasks.migrations import migrate

                migrate(connection, known)
        self.engine.dispose()  # SQLite: the connection would keep its long wait for locks


@contextlib.contextmanager
def _told(where: str) -> Iterator[None]:
    """Turn errors of the driver into ours, with the next step.

    Raises:
        DatabaseAway: It was away, locked, full or not allowed; nothing of the transaction is kept.
        Corrupt: What it has stored is damaged.
        InvalidInput: It cannot hold such a value.
    """
    try:
        yield
    except (DataError, OverflowError, UnicodeEncodeError) as error:
        raise InvalidInput(
            f"holds what the task database cannot keep: {_first_line(error)}", "task", "change the value"
        ) from error
    except SQLAlchemyError as error:
        raise _as_ours(error, where) from error


def _as_ours(error: SQLAlchemyError, where: str) -> OnebasisError:
    """Our error for an error of the database."""
    cause = error.orig if isinstance(error, DBAPIError) else None
    sqlite = getattr(cause, "sqlite_errorname", "") or ""
    state = getattr(cause, "sqlstate", "") or ""
    if sqlite.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")) or state.startswith("XX"):
        return Corrupt(
            f"the task database is damaged: {_first_line(error)}", where, "stop, and restore it from a backup"
        )
    todo = "try again; if it stays so, check database_url and that the database runs"
    if sqlite.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")) or state in ("55P03", "57014", "40P01"):
        todo = "another program holds it: try again, or find that program and end its transaction"
    elif sqlite.startswith("SQLITE_FULL") or state.startswith("53"):
        todo = "make space on its disk (or in its limits), then try again"
    elif sqlite.startswith(("SQLITE_READONLY", "SQLITE_PERM", "SQLITE_CANTOPEN", "SQLITE_AUTH")) or state == "42501":
        todo = "let this user read and write it (a SQLite file: its folder too), then try again"
    elif sqlite.startswith("SQLITE_IOERR"):
        todo = "look at its disk, then try again"
    return DatabaseAway(f"the task database does not answer: {_first_line(error)}", where, todo)


def _first_line(error: Exception) -> str:
    cause = error.orig if isinstance(error, DBAPIError) and error.orig is not None else error
    return next(iter(str(cause).splitlines()), type(cause).__name__)


def _engine(database_url: str) -> Engine:
    try:
        url = make_url(database_url)
        engine = create_engine(url, pool_pre_ping=True, connect_args=_connect_args(url))
    except (SQLAlchemyError, ModuleNotFoundError, ValueError) as error:
        # Of a URL that cannot be taken apart (a port that is none) the error quotes a part, which may be the password.
        what = "is not a usable database URL" + ("" if isinstance(error, ValueError) else f": {error}")
        todo = "use sqlite:///FILE or postgresql+psycopg://USER@HOST/NAME, other signs in a password as %XX"
        raise InvalidInput(what, "database_url", todo) from None
    if url.get_backend_name() == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    else:
        event.listen(engine, "connect", _prepare_postgres)
    return engine


def _connect_args(url: URL) -> dict[str, Any]:
    if url.get_backend_name() == "sqlite":
        return {"timeout": WAIT_SECONDS}
    # A server whose machine is gone says nothing: without these, a question waits for it for a quarter of an hour.
    patience = {"connect_timeout": int(WAIT_SECONDS), "tcp_user_timeout": int(1000 * 2 * WAIT_SECONDS)}
    patience |= {"keepalives_idle": 5, "keepalives_interval": 2, "keepalives_count": 3}
    return {name: value for name, value in patience.items() if name not in url.query}


def _prepare_sqlite(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # the driver's own BEGIN is deferred, see `_begin_sqlite`
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")  # what was acknowledged survives a power cut


def _prepare_postgres(connection: Any, _: Any) -> None:
    connection.execute(f"SET lock_timeout = '{WAIT_SECONDS:.0f}s'")
    connection.execute(f"SET idle_in_transaction_session_timeout = '{IDLE_SECONDS:.0f}s'")
    connection.commit()


def _begin_sqlite(connection: Connection) -> None:
    options = connection.get_execution_options()
    if "wait_seconds" in options:
        connection.exec_driver_sql(f"PRAGMA busy_timeout = {1000 * options['wait_seconds']:.0f}")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if options.get("writes") else "BEGIN")


def _safe(database_url: str) -> str:
    try:
        return make_url(database_url).render_as_string(hide_password=True)
    except (SQLAlchemyError, ValueError):
        return "database_url"
