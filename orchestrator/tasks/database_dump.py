"""A task database as lines of JSON: from SQLite or Postgres, and into either.

One transaction reads all of it, so that it is one state, and nobody waits for it. Only rows are kept, with the
revision of their tables: an older dump is loaded into tables of its time, which are then brought up to date.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from sqlalchemy import column, func, insert, inspect, select, table
from sqlalchemy.engine import Connection

from configs.errors import Conflict, Corrupt, InvalidInput
from orchestrator.tasks import tables
from orchestrator.tasks.database import as_it_is, is_missing_file, revision_of
from orchestrator.tasks.tables import HEAD

FORMAT = 1
OF_THE_MOMENT = frozenset({tables.schema.name, tables.leadership.name, tables.control_planes.name})
"""Tables that say which control planes there are now, and of which release the others are."""
ROWS_AT_ONCE = 1000


def dump(database_url: str) -> Iterator[bytes]:
    """Lines that `load` takes: what it is; each table's name, columns and rows; at the end, how many rows there were.

    The tables are left as they are, those of an earlier release too.

    Raises:
        DatabaseAway, Corrupt: As `Database`.
        InvalidInput: There is no database, or a newer release has written it.
    """
    if is_missing_file(database_url):
        raise InvalidInput("there is no task database", "database_url", "`onebasis up` makes one")
    with as_it_is(database_url) as connection:
        revision, total = revision_of(connection), 0
        if revision is None:
            raise InvalidInput("the database has no tables of onebasis", "database_url", "`onebasis up` makes them")
        if revision > HEAD:
            what = f"the task database has tables of revision {revision}; this release knows those up to {HEAD}"
            raise InvalidInput(what, "database_url", "use the onebasis that wrote it, or a newer one")
        yield _line({"onebasis_database": FORMAT, "revision": revision})
        for name, columns in _ours(connection).items():
            yield _line({"table": name, "columns": columns})
            # By our own types where there are any, so that a truth value is one in SQLite, too.
            types = {one.name: one.type for one in tables.metadata.tables[name].columns}
            chosen = select(*(column(one, types.get(one)) for one in columns)).select_from(table(name))
            for row in connection.execution_options(yield_per=ROWS_AT_ONCE).execute(chosen):
                yield _line([*row])
                total += 1
        yield _line({"rows": total})


def load(database_url: str, lines: Iterable[bytes]) -> int:
    """Fill an empty database, and bring its tables up to date.

    Returns:
        The number of rows.

    Raises:
        Conflict: It has tables of onebasis already.
        Corrupt: The lines are not those of a dump, or not all of them: nothing is kept.
        InvalidInput: A newer release made the dump.
        DatabaseAway: As `Database`.
    """
    # Imported here, as in `Database`: it costs 0.2 s.
    from orchestrator.tasks.migrations import migrate

    read = map(json.loads, lines)
    try:
        head = next(read)
        revision = str(head["revision"])
        is_ours = head["onebasis_database"] == FORMAT
    except (StopIteration, ValueError, KeyError, TypeError) as error:
        raise _not_whole("it does not begin as one") from error
    if not is_ours:
        what = f"the dump has format {head['onebasis_database']}, this release reads {FORMAT}"
        raise InvalidInput(what, "backup", "use a newer onebasis")
    with as_it_is(database_url, writes=True) as connection:
        if revision_of(connection) is not None:
            todo = "name an empty database in database_url, or move away what is there"
            raise Conflict("the database has tables of onebasis already", "database_url", todo)
        migrate(connection, None, revision)
        total = _filled(connection, read)
        _go_on_counting(connection)
        if revision != HEAD:
            migrate(connection, revision)
        return total


def _ours(connection: Connection) -> dict[str, list[str]]:
    """Our tables that are there, each with its columns; MLflow may share the database."""
    present = inspect(connection)
    names = sorted({*present.get_table_names()} & {*tables.metadata.tables} - OF_THE_MOMENT)
    return {name: [str(one["name"]) for one in present.get_columns(name)] for name in names}


def _filled(connection: Connection, lines: Iterator[Any]) -> int:
    """Write the rows. Raises Corrupt if the end is missing, or there are other rows than it says."""
    into, columns, waiting, total = table(""), list[str](), list[dict[str, Any]](), 0

    def write() -> None:
        if waiting:
            connection.execute(insert(into), waiting)
            waiting.clear()

    try:
        for line in lines:
            if isinstance(line, list):
                waiting.append(dict(zip(columns, line, strict=True)))
                total += 1
                if len(waiting) >= ROWS_AT_ONCE:
                    write()
                continue
            write()
            if "rows" in line:
                if line["rows"] != total:
                    raise _not_whole(f"it has {total} rows, and says {line['rows']}")
                return total
            columns = line["columns"]
            into = table(line["table"], *(column(name) for name in columns))
    except (ValueError, KeyError, TypeError) as error:
        raise _not_whole(str(error)) from error
    raise _not_whole("its end is missing")


def _go_on_counting(connection: Connection) -> None:
    """Postgres numbers new rows by a counter of its own, which rows that bring their numbers do not move."""
    if connection.dialect.name != "postgresql":
        return
    present = inspect(connection)
    for name in _ours(connection):
        for one in present.get_columns(name):
            if str(one["default"] or "").startswith("nextval"):
                last = connection.execute(select(func.max(column(one["name"]))).select_from(table(name))).scalar()
                counter = func.pg_get_serial_sequence(name, one["name"])
                connection.execute(select(func.setval(counter, last or 1, last is not None)))


def _not_whole(why: str) -> Corrupt:
    return Corrupt(f"the dump of the task database is damaged: {why}", "backup", "use an earlier backup")


def _line(values: Any) -> bytes:
    return json.dumps(values, separators=(",", ":")).encode() + b"\n"
