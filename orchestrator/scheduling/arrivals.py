"""Tasks that will be submitted, as a table that a person writes or takes from a history. Simulations begin here."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from configs.errors import InvalidInput
from configs.settings import DEFAULT_POOL, PoolSettings
from configs.task_spec import ResourceSpec
from orchestrator.scheduling.pools import chosen_pool

COLUMNS = ("at_seconds", "team", "seconds", "ranks", "priority", "max_run_seconds", "pool", "gpus")
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


def read_arrivals(lines: Iterable[str], pools: Mapping[str, PoolSettings]) -> tuple[Arrival, ...]:
    """Arrivals out of the lines of a CSV file, by time, each in the pool that such a task would get.

    Args:
        pools: Pools of the service. A task names one, or what it needs (`ranks`, `gpus`), or nothing.

    Raises:
        InvalidInput: A column is missing or unknown, a cell is no number of its kind, or no pool fits; names the line.
    """
    reader = csv.DictReader(lines)
    names = reader.fieldnames or ()
    if missing := [name for name in COLUMNS[:3] if name not in names]:
        raise InvalidInput(f"has no column {', '.join(missing)}", "arrivals", f"columns: {', '.join(COLUMNS)}")
    if unknown := [name for name in names if name not in COLUMNS]:
        raise InvalidInput(f"has an unknown column {', '.join(unknown)}", "arrivals", f"columns: {', '.join(COLUMNS)}")
    return tuple(sorted((_arrival(row, reader.line_num, pools) for row in reader), key=lambda one: one.at_seconds))


def _arrival(row: Mapping[str, str | None], line: int, pools: Mapping[str, PoolSettings]) -> Arrival:
    given = {name: text for name, text in row.items() if text}
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
        raise InvalidInput(f"line {line}: {error.what}", "arrivals", error.todo) from error
    except (KeyError, ValueError) as error:
        raise InvalidInput(f"line {line} cannot be read: {error}", "arrivals", "correct the line") from error
    numbers = (found.at_seconds, found.seconds, found.max_run_seconds or 0.0)
    if not all(math.isfinite(number) and number >= 0 for number in numbers):
        raise InvalidInput(f"line {line} has a number below its least, or none", "arrivals", "correct the line")
    return found
