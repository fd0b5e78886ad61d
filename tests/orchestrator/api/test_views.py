"""What is said of a task beside its figures."""

from __future__ import annotations

import pytest

from orchestrator.api.views import deadline, warnings
from orchestrator.scheduling.estimate import Estimate
from orchestrator.tasks.task_record import TaskState
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


@pytest.mark.parametrize(
    ("now", "earliest", "latest", "outlook"),
    [
        (100.0, 10.0, 20.0, "met"),
        (185.0, 10.0, 20.0, "may be missed"),
        (195.0, 10.0, 20.0, "cannot be met"),
        (200.0, 0.0, 0.0, "missed"),
    ],
)
def test_a_deadline_is_told_by_the_interval_in_which_the_task_ends(
    now: float, earliest: float, latest: float, outlook: str
) -> None:
    record = task_record(spec={"deadline": "1970-01-01T00:03:20Z"})
    end = Estimate(15.0, earliest, latest, 15.0)
    assert deadline(record, end, now) == {"at": 200.0, "outlook": outlook}
    if earliest == latest:
        return
    assert deadline(record, None, now) == {"at": 200.0, "outlook": "unknown"}
    training = record.model_copy(update={"state": TaskState.TRAINING})
    assert deadline(training, None, now, seconds_left=200.0 - now) == {"at": 200.0, "outlook": "met"}
    assert deadline(training, None, now, seconds_left=201.0 - now) == {"at": 200.0, "outlook": "cannot be met"}


def test_there_is_nothing_to_say_of_a_deadline_that_is_not_there_or_of_a_task_that_is_trained() -> None:
    assert deadline(task_record(), None, 1.0) is None
    assert deadline(task_record(spec={"deadline": "1970-01-01T00:03:20Z"}, state=TaskState.MERGING), None, 1.0) is None
