"""Tasks that will be submitted, as a table that a person writes or takes from a history. Simulations begin here."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from configs.errors import InvalidInput

COLUMNS = ("at_seconds", "team", "seconds", "ranks", "priority", "max_run_seconds")
"""Columns of a file of arrivals; those from `ranks` on may be missing, and their cells empty."""


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A task that will be submitted."""

    at_seconds: float
    """When, in seconds from the beginning."""
    team: str
    seconds: float
    """How long it has its places."""
    ranks: int = 1
    priority: int = 0
    max_run_seconds: float | None = None
    """Longest that it says it will run; None: it says nothing."""


def read_arrivals(lines: Iterable[str], ranks: int = 1) -> tuple[Arrival, ...]:
    """Arrivals out of the lines of a CSV file, by time.

    Args:
        ranks: Places of a task that names none.

    Raises:
        InvalidInput: A column is missing or unknown, or a cell is no number of its kind; names the line.
    """
    reader = csv.DictReader(lines)
    names = reader.fieldnames or ()
    if missing := [name for name in COLUMNS[:3] if name not in names]:
        raise InvalidInput(f"has no column {', '.join(missing)}", "arrivals", f"columns: {', '.join(COLUMNS)}")
    if unknown := [name for name in names if name not in COLUMNS]:
        raise InvalidInput(f"has an unknown column {', '.join(unknown)}", "arrivals", f"columns: {', '.join(COLUMNS)}")
    return tuple(sorted((_arrival(row, reader.line_num, ranks) for row in reader), key=lambda one: one.at_seconds))


def _arrival(row: Mapping[str, str | None], line: int, ranks: int) -> Arrival:
    given = {name: text for name, text in row.items() if text}
    try:
        found = Arrival(
            at_seconds=float(given["at_seconds"]),
            team=given["team"],
            seconds=float(given["seconds"]),
            ranks=int(given.get("ranks", ranks)),
            priority=int(given.get("priority", "0")),
            max_run_seconds=float(given["max_run_seconds"]) if "max_run_seconds" in given else None,
        )
    except (KeyError, ValueError) as error:
        raise InvalidInput(f"line {line} cannot be read: {error}", "arrivals", "correct the line") from error
    numbers = (found.at_seconds, found.seconds, found.max_run_seconds or 0.0)
    if not all(math.isfinite(number) and number >= 0 for number in numbers) or found.ranks < 1:
        raise InvalidInput(f"line {line} has a number below its least, or none", "arrivals", "correct the line")
    return found
