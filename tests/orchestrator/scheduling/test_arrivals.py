"""Arrivals are read from a table, or refused with the line that cannot be."""

from __future__ import annotations

import pytest

from configs.errors import InvalidInput
from configs.settings import PoolSettings
from orchestrator.scheduling.arrivals import Arrival, read_arrivals
from tests.builders import fixed


def test_arrivals_are_read_from_a_table_in_any_order() -> None:
    lines = ["team,seconds,at_seconds,max_run_seconds", "red,5,9,", "blue,6.5,1,70"]
    assert read_arrivals(lines, fixed(2, ranks=3)) == (
        Arrival(at_seconds=1.0, team="blue", seconds=6.5, ranks=3, max_run_seconds=70.0),
        Arrival(at_seconds=9.0, team="red", seconds=5.0, ranks=3),
    )


def test_an_arrival_gets_the_pool_that_its_task_would_get() -> None:
    pools = {"small": PoolSettings(max=4), "gang": PoolSettings(max=2, ranks=4)}
    lines = ["team,seconds,at_seconds,ranks,pool", "red,5,1,,", "red,5,2,2,", "red,5,3,,gang", "red,5,4,5,"]
    found = [(one.pool, one.ranks) for one in read_arrivals(lines[:-1], pools)]
    assert found == [("small", 1), ("gang", 4), ("gang", 4)]
    with pytest.raises(InvalidInput, match="line 5: no pool has 5 ranks with 0 GPUs each\n  → ask for what would fit"):
        read_arrivals(lines, pools)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["at_seconds,team"], "has no column seconds"),
        ([], "has no column at_seconds, team, seconds"),
        (["at_seconds,team,seconds,wishes"], "unknown column wishes"),
        (["at_seconds,team,seconds", "1,red,soon"], "line 2 cannot be read: .*soon"),
        (["at_seconds,team,seconds", "1,red"], "line 2 cannot be read"),
        (["at_seconds,team,seconds", "1,red,-5"], "line 2 has a number"),
        (["at_seconds,team,seconds", "1,red,inf"], "line 2 has a number"),
        (["at_seconds,team,seconds,ranks", "1,red,1,0"], "line 2 cannot be read: ranks is 1 or more"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused_with_its_line(lines: list[str], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        read_arrivals(lines, fixed(1))
