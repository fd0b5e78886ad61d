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
    with pytest.raises(InvalidInput, match=r"weeks\.csv, line 5: no pool has 5 ranks with 0 GPUs each\n  → ask for"):
        read_arrivals(lines, pools, "weeks.csv")


def test_where_pools_load_several_base_models_a_row_names_one_or_its_pool() -> None:
    pools = {"a": PoolSettings(max=1, base_model="small"), "b": PoolSettings(max=1, base_model="large", cpus=8)}
    lines = ["team,seconds,at_seconds,base_model,pool", "red,5,1,large,", "red,5,2,,a", "red,5,3,small,a"]
    assert [one.pool for one in read_arrivals(lines, pools)] == ["b", "a", "a"]
    for row, said in (
        ("red,5,4,,", "line 2: names neither a pool nor one of the several base models"),
        ("red,5,4,huge,", "there is no base model 'huge'"),
        ("red,5,4,large,a", "there is no pool 'a' for its base model"),
    ):
        with pytest.raises(InvalidInput, match=said):
            read_arrivals([lines[0], row], pools)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["at_seconds,team"], "has no column seconds"),
        ([], "has no column at_seconds, team, seconds"),
        (["at_seconds,team,seconds,wishes"], "unknown column wishes"),
        (["at_seconds,team,seconds,team"], "has the column team twice"),
        (["at_seconds,team,seconds"], "has no arrival"),
        (["at_seconds,team,seconds", "1,red,soon"], "arrivals, line 2: cannot be read: .*soon"),
        (["at_seconds,team,seconds", "1,red"], "line 2: has fewer cells than there are columns"),
        (["at_seconds,team,seconds", "1,red,2", "1,red,2,3"], "line 3: has more cells than there are columns"),
        (["at_seconds,team,seconds", "1,,2"], "line 2: has nothing in the column team"),
        (["at_seconds,team,seconds", "1,red,-5"], "line 2: has a number"),
        (["at_seconds,team,seconds", "1,red,inf"], "line 2: has a number"),
        (["at_seconds,team,seconds,ranks", "1,red,1,0"], "line 2: cannot be read: ranks is 1 or more"),
        (["at_seconds,team,seconds,pool,ranks", "1,red,1,default,1"], "line 2: names a pool, and says what it needs"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused_with_its_line(lines: list[str], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        read_arrivals(lines, fixed(1))
