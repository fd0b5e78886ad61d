"""Arrivals are read from a table, or refused with the line that cannot be."""

from __future__ import annotations

import pytest

from configs.errors import InvalidInput
from orchestrator.scheduling.arrivals import Arrival, read_arrivals


def test_arrivals_are_read_from_a_table_in_any_order() -> None:
    lines = ["team,seconds,at_seconds,ranks,max_run_seconds", "red,5,9,,", "blue,6.5,1,2,70"]
    assert read_arrivals(lines, ranks=3) == (
        Arrival(at_seconds=1.0, team="blue", seconds=6.5, ranks=2, max_run_seconds=70.0),
        Arrival(at_seconds=9.0, team="red", seconds=5.0, ranks=3),
    )


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["at_seconds,team"], "has no column seconds"),
        ([], "has no column at_seconds, team, seconds"),
        (["at_seconds,team,seconds,gpus"], "unknown column gpus"),
        (["at_seconds,team,seconds", "1,red,soon"], "line 2 cannot be read: .*soon"),
        (["at_seconds,team,seconds", "1,red"], "line 2 cannot be read"),
        (["at_seconds,team,seconds", "1,red,-5"], "line 2 has a number"),
        (["at_seconds,team,seconds", "1,red,inf"], "line 2 has a number"),
        (["at_seconds,team,seconds,ranks", "1,red,1,0"], "line 2 has a number"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused_with_its_line(lines: list[str], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        read_arrivals(lines)
