"""Tasks that will be submitted, as a table that a person writes or takes from a history. Simulations begin here."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from configs.errors import InvalidInput
from configs.settings import DEFAULT_POOL, PoolSettings
from configs.task_spec import ResourceSpec
from orchestrator.scheduling.pools import chosen_pool, pools_of

COLUMNS = ("at_seconds", "team", "seconds", "ranks", "priority", "max_run_seconds", "pool", "gpus", "base_model")
"""Columns of a file of arrivals; those from `ranks` on may be missing, and their cells empty."""


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A task that will be submitted."""

    at_seconds: float
    """When, in seconds from the beginning."""
    team: str
    seconds: float
    """How long it has its places."""
    pool: str = DEFAULT_POOL
    """Pool whose places it takes."""
    ranks: int = 1
    """Places that it takes, all at once."""
    priority: int = 0
    max_run_seconds: float | None = None
    """Longest that it says it will run; None: it says nothing."""


def read_arrivals(
    lines: Iterable[str], pools: Mapping[str, PoolSettings], file: str = "arrivals"
) -> tuple[Arrival, ...]:
    """Arrivals out of the lines of a CSV file, by time, each in the pool that such a task would get.

    Args:
        pools: Pools of the service. A task names one, or what it needs (`ranks`, `gpus`), or nothing; where pools load
            several base models, it names one of these, or its pool.
        file: Name of the file, for errors.

    Raises:
        InvalidInput: A column is missing, unknown or there twice, there is no row, a row has not one cell for each
            column or says two things at once, a cell is no number of its kind, or no pool fits; names the line.
    """
    reader = csv.DictReader(lines)
    names, columns = reader.fieldnames or (), f"columns: {', '.join(COLUMNS)}"
    if missing := [name for name in COLUMNS[:3] if name not in names]:
        raise InvalidInput(f"has no column {', '.join(missing)}", file, columns)
    if unknown := [name for name in names if name not in COLUMNS]:
        raise InvalidInput(f"has an unknown column {', '.join(unknown)}", file, columns)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InvalidInput(f"has the column {', '.join(twice)} twice", file, "leave one of them out")
    found = [_arrival(row, f"{file}, line {reader.line_num}", pools) for row in reader]
    if not found:
        raise InvalidInput("has no arrival", file, "write a line for each task below the names of the columns")
    return tuple(sorted(found, key=lambda one: one.at_seconds))


def _arrival(row: Mapping[str | None, str | None], line: str, pools: Mapping[str, PoolSettings]) -> Arrival:
    if None in row:
        raise InvalidInput("has more cells than there are columns", line, "quote a cell that has a comma in it")
    if None in row.values():
        raise InvalidInput(
            "has fewer cells than there are columns", line, "write each comma, also before an empty cell"
        )
    given = {name: text for name, text in row.items() if name is not None and text}
    if "pool" in given and (beside := [name for name in ("ranks", "gpus") if name in given]):
        what = f"names a pool, and says what it needs ({', '.join(beside)})"
        raise InvalidInput(what, line, "leave one of them out, as in a task file")
    pools = _of_base_model(given, line, pools)
    try:
        ranks, gpus = int(given.get("ranks", 1)), float(given.get("gpus", 0))
        if ranks < 1 or not 0 <= gpus <= 1:
            raise ValueError("ranks is 1 or more, and gpus from 0 to 1")
        pool = chosen_pool(pools, given.get("pool"), ResourceSpec(ranks=ranks, gpus=gpus))
        found = Arrival(
            at_seconds=float(given["at_seconds"]),
            team=given["team"],
            seconds=float(given["seconds"]),
            pool=pool,
            ranks=pools[pool].ranks,
            priority=int(given.get("priority", "0")),
            max_run_seconds=float(given["max_run_seconds"]) if "max_run_seconds" in given else None,
        )
    except InvalidInput as error:
        raise InvalidInput(error.what, line, error.todo) from error
    except KeyError as error:
        raise InvalidInput(f"has nothing in the column {error.args[0]}", line, "correct the line") from error
    except ValueError as error:
        raise InvalidInput(f"cannot be read: {error}", line, "correct the line") from error
    numbers = (found.at_seconds, found.seconds, found.max_run_seconds or 0.0)
    if not all(math.isfinite(number) and number >= 0 for number in numbers):
        raise InvalidInput("has a number below its least, or none", line, "correct the line")
    return found


def _of_base_model(
    given: Mapping[str, str], line: str, pools: Mapping[str, PoolSettings]
) -> Mapping[str, PoolSettings]:
    """The pools among which a row chooses."""
    names = sorted({pool.base_model or "" for pool in pools.values()})
    named = given.get("base_model")
    if named is not None and named not in names:
        raise InvalidInput(f"there is no base model '{named}'", line, f"base models: {', '.join(names)}")
    if named is None and "pool" not in given and len(names) > 1:
        todo = f"add a column base_model: one of {', '.join(names)}; or name the pool"
        raise InvalidInput("names neither a pool nor one of the several base models", line, todo)
    return pools if named is None else pools_of(pools, named)
