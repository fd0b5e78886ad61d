"""What is said of a task beside its figures."""

from __future__ import annotations

import pytest

from orchestrator.api.views import warnings
from tests.builders import task_record


@pytest.mark.parametrize(
    ("in_main", "told"),
    [(0.9, []), (None, []), (0.6, ["in main: accuracy 0.6000 is no better"]), (0.8, [])],
)
def test_a_score_in_main_that_says_nothing_is_told_beside_the_tasks_own_warnings(
    in_main: float | None, told: list[str]
) -> None:
    record = task_record(local_score=0.8, constant_score=0.7, warnings=("said at submission",))
    first, *others = warnings(record, {"score_under_main": in_main})
    assert first == "said at submission"
    assert [said[: len("in main: accuracy 0.6000 is no better")] for said in others] == told
    assert warnings(record, None) == ["said at submission"]


def test_the_same_score_in_main_is_not_told_twice() -> None:
    record = task_record(local_score=0.6, constant_score=0.6, warnings=("own adapter: …",))
    assert warnings(record, {"score_under_main": 0.6}) == ["own adapter: …"]
