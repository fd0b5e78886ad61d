"""When a waiting task starts: by arithmetic on what is known, and None where nothing is."""

from __future__ import annotations

import pytest

from orchestrator.scheduling.estimate import Pace, pace_of, starts_in

PACE = Pace(10.0, 3)


def test_the_pace_is_the_median_of_what_tasks_took() -> None:
    assert pace_of([1.0, 100.0, 10.0]) == PACE
    assert pace_of([]) is None


@pytest.mark.parametrize(
    ("place", "left", "free", "seconds"),
    [
        (1, (), 1, 0.0),
        (1, (4.0, 7.0), 0, 4.0),
        (2, (4.0, 7.0), 0, 7.0),
        (3, (4.0, 7.0), 0, 14.0),  # the worker that is free after 4 s takes the first, for 10 s
        (4, (4.0, 7.0), 0, 17.0),
        (2, (4.0,), 1, 4.0),
        (1, (-5.0,), 0, 0.0),  # it takes longer than usual: it may be done at any moment
        (21, (), 2, 100.0),
    ],
)
def test_each_task_before_it_takes_what_is_usual_on_the_worker_that_is_free_first(
    place: int, left: tuple[float, ...], free: int, seconds: float
) -> None:
    assert starts_in(place, left, free, PACE) == seconds


def test_nobody_can_say_without_a_worker_or_a_task_that_ended() -> None:
    assert starts_in(1, (), 0, PACE) is None
    assert starts_in(1, (1.0,), 1, None) is None
