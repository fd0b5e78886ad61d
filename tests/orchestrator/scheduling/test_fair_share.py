"""Which waiting task goes next, with the arithmetic."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest

from orchestrator.scheduling.fair_share import (
    CHARGE_SECONDS,
    GPU_WORTH,
    HALF_LIFE_SECONDS,
    DecayedSum,
    Running,
    Share,
    Use,
    Waiting,
    running_order,
    running_seconds,
)

WEEK = HALF_LIFE_SECONDS


def waiting(*ids: str, priority: int = 0) -> list[Waiting]:
    """`red1` is the task 1 of team red, submitted at second 1."""
    return [
        Waiting(
            task_id=i,
            team=i.rstrip("0123456789"),
            priority=priority,
            submitted_at=float(i.lstrip("abcdefghijklmnopqrstuvwxyz")),
        )
        for i in ids
    ]


def total(seconds: float, *ends: float) -> DecayedSum:
    """Uses of one team, of the same length, that ended then."""
    found = DecayedSum()
    for end in ends:
        found = found.plus(Use(team="red", seconds=seconds, ended_at=end))
    return found


def order(
    tasks: list[Waiting],
    use: dict[str, float] | None = None,
    running: Sequence[Running] = (),
    weights: dict[str, float] | None = None,
    now: float = 0.0,
) -> list[str]:
    shares = {team: Share(weight=weight) for team, weight in (weights or {}).items()}
    return list(running_order(tasks, use or {}, running, shares, now=now))


def test_use_halves_every_seven_days() -> None:
    assert WEEK == 7 * 24 * 3600
    # 100 s now + 100 s a week ago + 100 s two weeks ago = 100 + 50 + 25
    assert total(100.0, *(10 * WEEK - age * WEEK for age in (0, 1, 2))).at_time(10 * WEEK) == pytest.approx(175.0)


def test_a_sum_is_the_same_in_whatever_order_its_uses_come_in_and_whenever_it_is_asked() -> None:
    ends = [3 * WEEK, WEEK, 2.5 * WEEK, 0.25 * WEEK]
    direct = sum(7.0 * 0.5 ** ((4 * WEEK - end) / WEEK) for end in ends)
    for order_of_ends in itertools.permutations(ends):
        assert total(7.0, *order_of_ends).at_time(4 * WEEK) == pytest.approx(direct)


def test_a_clock_that_went_back_counts_use_whole() -> None:
    assert total(20.0, 200.0).at_time(100.0) == 20.0


def test_what_runs_weighs_as_long_as_it_has_run_and_at_least_a_short_task() -> None:
    hours = 10 * 3600.0
    running = [Running("red", 0.0), Running("blue", hours - 5.0), Running("blue", hours - 5.0, least_seconds=0.0)]
    assert running_seconds(running, now=hours) == {"red": hours, "blue": CHARGE_SECONDS + 5.0}
    # Ten hours that are not over: blue's four start before red's second.
    tasks = waiting("red1", "blue2", "blue3", "blue4", "blue5")
    assert order(tasks, running=running, now=hours)[-1] == "red1"


def test_the_team_that_used_least_goes_first() -> None:
    # red 100 s, blue 30 s: blue starts, is charged 60 and stands at 90 < 100, starts again (150), then red.
    tasks = waiting("red1", "red2", "blue3", "blue4", "blue5")
    assert order(tasks, {"red": 100.0, "blue": 30.0}) == ["blue3", "blue4", "red1", "blue5", "red2"]


def test_each_admission_is_charged_so_that_a_hundred_tasks_do_not_all_go_before_another_teams_first() -> None:
    assert CHARGE_SECONDS == 60.0
    tasks = waiting(*(f"red{n}" for n in range(1, 5)), "blue5", "blue6")
    assert order(tasks) == ["red1", "blue5", "red2", "blue6", "red3", "red4"]


def test_what_runs_already_is_charged_too() -> None:
    # red runs two: 120 against 0, so blue's two go first (0, 60), then at 120 = 120 the older first task: red.
    tasks = waiting("red1", "red2", "blue3", "blue4", "blue5")
    assert order(tasks, running=[Running("red", 0.0)] * 2) == ["blue3", "blue4", "red1", "blue5", "red2"]


def test_a_team_of_twice_the_weight_goes_twice_as_often() -> None:
    # Loads over weights after each start: red 60/2 = 30, 60, 90, 120; blue 60, 120.
    tasks = waiting("red1", "red2", "red3", "red4", "blue5", "blue6")
    # red (0 = 0, older) → 30; blue 0 → 60; red 30 → 60; red (60 = 60, older) → 90; blue 60 → 120; red.
    assert order(tasks, weights={"red": 2.0, "blue": 1.0}) == ["red1", "blue5", "red2", "red3", "blue6", "red4"]


def test_priority_counts_inside_a_team_only() -> None:
    tasks = [*waiting("red1"), *waiting("red2", priority=5), *waiting("blue3")]
    # Inside red 2 before 1. Between the teams at equal load the older head: blue's 3 or red's 2: red's.
    assert order(tasks) == ["red2", "blue3", "red1"]


def test_age_decides_at_equal_priority_and_the_id_at_equal_age() -> None:
    tasks = [
        Waiting(task_id="b", team="red", priority=0, submitted_at=7.0),
        Waiting(task_id="a", team="red", priority=0, submitted_at=7.0),
        Waiting(task_id="c", team="red", priority=0, submitted_at=6.0),
    ]
    assert order(tasks) == ["c", "a", "b"]


def test_a_team_that_is_no_longer_in_the_settings_counts_with_weight_one() -> None:
    assert order(waiting("red1", "gone2"), weights={"red": 1.0}) == ["red1", "gone2"]


def test_the_first_few_are_the_same_when_only_the_head_of_each_line_is_known() -> None:
    teams = {"red": 50.0, "blue": 0.0, "green": 500.0}
    tasks = [
        Waiting(task_id=f"{team}{n:03d}", team=team, priority=n % 3, submitted_at=float(n))
        for team in teams
        for n in range(200)
    ]
    running, shares = [Running("blue", 0.0)], {"red": Share(weight=2.0)}
    everything = running_order(tasks, teams, running, shares, now=90.0)
    assert sorted(everything) == sorted(task.task_id for task in tasks)
    heads = [
        task
        for team in teams
        for task in sorted((t for t in tasks if t.team == team), key=lambda t: (-t.priority, t.submitted_at))[:7]
    ]
    assert running_order(heads, teams, running, shares, now=90.0, limit=7) == everything[:7]


def test_a_place_counts_by_its_gpus_in_the_past_and_while_it_runs_and_at_the_start() -> None:
    tasks = waiting("red1", "blue2")
    # Red had a CPU for 500 s, blue a GPU for 60: that is 60 + 9 · 60.
    assert running_order(tasks, {"red": 500.0, "blue": 60.0}, now=0.0, gpu_seconds={"blue": 60.0}) == ("red1", "blue2")
    assert running_order(tasks, {"red": 700.0, "blue": 60.0}, now=0.0, gpu_seconds={"blue": 60.0}) == ("blue2", "red1")
    runs = [Running("red", 0.0, 0.0), Running("blue", 0.0, 0.0, gpus=0.5)]
    assert running_order(waiting("blue1", "red2"), {}, runs, now=100.0) == ("red2", "blue1")
    # Two of red's on a GPU against one of blue's: the first is charged ten times as much as one without.
    first, second = (replace(task, gpus=1.0) for task in waiting("red1", "red2"))
    blue = {"blue": CHARGE_SECONDS * (1 + GPU_WORTH) - 1}
    assert running_order([first, second, *waiting("blue3")], blue, now=0.0) == ("red1", "blue3", "red2")
    assert running_order(waiting("red1", "red2", "blue3"), blue, now=0.0) == ("red1", "red2", "blue3")


def test_gpu_seconds_decay_like_place_seconds() -> None:
    used = DecayedSum().plus(Use(team="red", seconds=100.0, ended_at=0.0, places=4, gpus=0.5))
    used = used.plus(Use(team="red", seconds=10.0, ended_at=WEEK))
    assert (used.at_time(WEEK), used.gpus_at_time(WEEK)) == (210.0, 100.0)
    assert used.gpus_at_time(2 * WEEK) == 50.0


def test_nothing_waits() -> None:
    assert order([], {"red": 5.0}) == []
