"""When a waiting task starts: by arithmetic on what is known, and nothing where nothing is."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.scheduling import estimate
from orchestrator.scheduling.estimate import (
    GRAIN_SECONDS,
    KNOWN_MIN,
    NEAR_TASKS,
    Estimate,
    Pace,
    Span,
    Told,
    estimate_starts,
    kept_from_borrowing,
    pace_of,
)
from orchestrator.scheduling.fair_share import Running, Share, Waiting

NOW = 1000.0
TENS = pace_of([10.0] * 5)


def line(*ranks: int) -> list[Waiting]:
    """Tasks `1`, `2` … that take so many places each."""
    return [
        Waiting(task_id=str(number), team="red", priority=0, submitted_at=number, ranks=places)
        for number, places in enumerate(ranks, 1)
    ]


def runs(left: float | None, since: float = NOW, ranks: int = 1) -> Running:
    return Running("red", since, seconds_left=left, ranks=ranks)


def starts(
    tasks: Sequence[Waiting], running: Sequence[Running], free: int, pace: Pace | None = TENS, told: Sequence[Told] = ()
) -> dict[str, Estimate]:
    return estimate_starts(tasks, running, free, pace, told, now=NOW)


def test_the_pace_is_the_median_of_what_tasks_took() -> None:
    assert pace_of([1.0, 100.0, 10.0]) == Pace(10.0, 3, (1.0, 10.0, 100.0))
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
        (1, (-5.0,), 0, 0.0),  # it takes longer than it said: it may be done at any moment
        (21, (), 2, 100.0),
    ],
)
def test_each_task_before_it_takes_what_is_usual_on_the_place_that_is_free_first(
    place: int, left: tuple[float, ...], free: int, seconds: float
) -> None:
    found = starts(line(*[1] * place), [runs(one) for one in left], free)[str(place)]
    assert (found.seconds, found.drawn) == (pytest.approx(seconds), seconds)
    # Before anything is known of how right estimates are: from a third to three times of it.
    assert found.earliest == pytest.approx(max(0.0, (seconds + GRAIN_SECONDS) / 3 - GRAIN_SECONDS))
    assert found.latest == pytest.approx((seconds + GRAIN_SECONDS) * 3)


def test_a_large_task_waits_for_all_its_places_and_one_that_never_fits_keeps_nobody_waiting() -> None:
    # Places free at 0, 0, 6: three at 6, until 16; then one.
    found = starts(line(3, 9, 1), [runs(6.0)], 2)
    assert {task_id: one.drawn for task_id, one in found.items()} == {"1": 6.0, "3": 16.0}


def test_what_does_not_say_when_it_ends_takes_as_long_as_those_that_took_longer() -> None:
    pace = pace_of([10.0, 900.0, 9000.0])
    # It has run for 15: it is one of those of 900 or 9000.
    found = starts(line(1), [runs(None, since=NOW - 15)], 0, pace)["1"]
    assert found.drawn in (885.0, 8985.0)
    assert found.earliest <= 885.0
    assert found.latest >= 8985.0 + GRAIN_SECONDS
    assert starts(line(1), [runs(None, since=NOW - 9001)], 0, pace)["1"].drawn == 0.0  # longer than any: at any moment


def test_nobody_can_say_without_a_place_or_a_task_that_ended() -> None:
    assert starts(line(1), [], 0) == {}
    assert starts(line(1), [runs(1.0)], 1, None) == {}


def test_behind_a_thousand_tasks_nothing_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "DEPTH_MAX", 2)
    assert set(starts(line(1, 1, 1), [], 1)) == {"1", "2"}


def test_only_what_is_asked_for_is_told() -> None:
    assert set(estimate_starts(line(1, 1), [], 1, TENS, now=NOW, asked=["2", "gone"])) == {"2"}


def known(*rows_and_seconds: tuple[float, float], method: str = "lora", rest: float = 4.0) -> Pace:
    found = pace_of(Span(seconds=rest + s, rest=rest, rows=rows, method=method) for rows, s in rows_and_seconds)
    assert found is not None
    return found


def test_a_task_takes_what_its_own_rows_take_and_no_longer_than_it_may() -> None:
    pace = known((100, 10.0), (100, 10.0), (100, 30.0))
    (plain,) = line(1)
    assert pace.of(plain) is pace
    ten = replace(plain, rows=1000.0, method="lora")
    assert pace.of(ten).spans == (104.0, 104.0, 304.0)  # the start takes no longer for more rows
    assert pace.of(ten).seconds == 104.0
    assert pace.of(replace(ten, seconds_max=200.0)).spans == (104.0, 104.0, 200.0)
    assert pace.of(replace(plain, seconds_max=20.0)).spans == (14.0, 14.0, 20.0)
    # The second one starts when the first, of its own length, has ended.
    found = starts([ten, replace(plain, task_id="2")], [], 1, known((100, 10.0)))
    assert found["2"].drawn == 104.0


def test_of_all_that_ended_those_count_that_ran_the_same_method_on_about_as_many_rows() -> None:
    small, large = [(100.0, 10.0)] * NEAR_TASKS, [(10_000.0, 500.0)] * NEAR_TASKS
    auto = pace_of([*known(*small, *large).known, *known((100.0, 70.0), method="auto").known, Span(seconds=1.0)])
    assert auto is not None
    (task,) = line(1)
    assert auto.of(replace(task, rows=9000.0, method="lora")).seconds == pytest.approx(4 + 450.0)
    assert auto.of(replace(task, rows=200.0, method="lora")).seconds == pytest.approx(4 + 20.0)
    assert auto.of(replace(task, rows=200.0, method="auto")).seconds == pytest.approx(4 + 140.0)
    assert auto.of(replace(task, rows=200.0, method="codyra")).count == NEAR_TASKS  # none of its own: any
    assert auto.of(task).spans == auto.spans


def test_places_that_come_are_there_once_their_workers_have_loaded() -> None:
    found = estimate_starts(line(1, 1), [], 0, TENS, now=NOW, coming=[30.0])
    assert [found[name].drawn for name in "12"] == [30.0, 40.0]


def test_others_go_first_while_a_task_may_not_start_and_it_goes_first_when_it_may() -> None:
    found = estimate_starts(line(1, 1, 1, 1), [], 1, TENS, now=NOW, kept={"1": 15.0})
    assert [found[name].drawn for name in "1234"] == [20.0, 0.0, 10.0, 30.0]
    alone = estimate_starts(line(1), [], 1, TENS, now=NOW, kept={"1": 15.0})
    assert alone["1"].drawn == 15.0


def test_what_gave_its_places_back_starts_when_its_team_is_within_its_quota_or_its_time_is_over() -> None:
    gave = replace(line(1)[0], preempted_at=NOW - 20.0)
    behind, other = replace(gave, task_id="2", preempted_at=None), replace(gave, task_id="3", team="blue")
    shares = {"red": Share(places=2)}
    tasks = [gave, behind, other]

    def kept(running: Sequence[Running]) -> dict[str, float]:
        return kept_from_borrowing(tasks, running, shares, NOW)

    assert kept([runs(50.0), runs(70.0), runs(900.0)]) == {"1": 70.0, "2": 70.0}  # then two of red's are left, and one
    assert kept([runs(None), runs(None)]) == {"1": 100.0, "2": 100.0}
    assert kept([runs(50.0)]) == {}
    assert kept_from_borrowing(tasks, [runs(50.0)] * 2, {}, NOW) == {}


def test_estimates_are_moved_by_what_those_like_them_missed() -> None:
    # Those of about 100 s took three times as long, those of about 10,000 s what they were estimated at.
    told = [Told(100.0, 300.0, False)] * 60 + [Told(10_000.0, 10_000.0, True)] * 60
    rest = GRAIN_SECONDS
    near = starts(line(1), [runs(100.0)], 0, told=told)["1"]
    assert (near.seconds, near.drawn) == (pytest.approx(105.0 * (300 + rest) / (100 + rest) - rest), 100.0)
    far = starts(line(1), [runs(10_000.0)], 0, told=told)["1"]
    assert (far.earliest, far.latest) == (pytest.approx(10_000.0), pytest.approx(10_000.0 + rest))
    few = starts(line(1), [runs(100.0)], 0, told=told[:5])["1"]  # ten that nobody measured count beside them
    assert few.seconds == pytest.approx(105.0 * 1.5 - rest)
    sure = starts(line(1), [runs(100.0)], 0, told=told[:KNOWN_MIN])["1"]
    assert sure.earliest == sure.seconds == near.seconds


def test_what_still_waits_counts_as_longer_than_it_has_waited() -> None:
    # A hundred of 100 s: forty took 100, forty 200, and twenty have waited for 150 s.
    started = [Told(100.0, 100.0, True)] * 40 + [Told(100.0, 200.0, True)] * 40
    waiting = [Told(100.0, 150.0, waits=True)] * 20
    # At 100 are 40 of 100 shares, and what waits has not been among them: the other 60 are at 200.
    assert estimate._shares([(miss, False) for miss in (1.0, 2.0)] + [(1.5, True)])[-1] == (2.0, 1.0)
    with_them = starts(line(1), [runs(100.0)], 0, told=[*started[20:], *waiting])["1"]  # 20 at 100, then 40 at 200
    assert with_them.seconds == pytest.approx(200.0)
    without = starts(line(1), [runs(100.0)], 0, told=started)["1"]
    assert without.seconds == pytest.approx(100.0)


def test_nothing_starts_before_it_can_and_only_the_rest_is_corrected() -> None:
    told = [Told(0.0, 95.0, True)] * KNOWN_MIN  # all of them took 95 s, where none was expected
    found = estimate_starts(line(1), [], 1, TENS, told, now=NOW, kept={"1": 9720.0})["1"]
    assert (found.earliest, found.seconds) == (pytest.approx(9815.0), pytest.approx(9815.0))
    assert found.least == 9720.0
    unknown = estimate_starts(line(1), [], 1, TENS, now=NOW, kept={"1": 9720.0})["1"]
    assert (unknown.earliest, unknown.seconds) == (9720.0, 9720.0)
    # What is only expected, as the end of a task that it comes after, may come earlier as well.
    hoped = estimate_starts(line(1), [], 1, TENS, now=NOW, expected={"1": 9720.0})["1"]
    assert hoped.earliest == pytest.approx(9725.0 / 3 - GRAIN_SECONDS)


def test_the_interval_is_what_four_of_five_of_those_before_were_in() -> None:
    rng = random.Random(3)
    took = [100.0 * math.exp(rng.gauss(0.5, 1.0)) for _ in range(60)]
    told = [Told(100.0, seconds) for seconds in took]
    found = starts(line(1), [runs(100.0)], 0, told=told)["1"]
    # 61 · 0.1 - 1 → the sixth of each end is the end: 50 of 60 are inside, ends and all.
    assert sum(found.earliest - 1e-6 <= seconds <= found.latest for seconds in took) in (50, 51)


def test_while_too_few_starts_are_inside_the_interval_is_wider() -> None:
    hits = [Told(1.0, 1.0, inside=number % 10 < 8) for number in range(60)]  # 0.80, where 0.86 is aimed at
    assert estimate.tail_of(hits) == pytest.approx(0.1 - estimate.GAIN * 0.06)
    better = [Told(1.0, 1.0, inside=number % 20 < 17) for number in range(60)]  # 0.85
    assert estimate.tail_of(better) == pytest.approx(0.1 - estimate.GAIN * 0.01)
    assert estimate.tail_of([Told(1.0, 1.0, True)] * 60) == pytest.approx(0.1)
    assert estimate.tail_of([Told(1.0, 1.0, False)] * 60) == 0.0
    assert estimate.tail_of([Told(1.0, 1.0)] * 60) == pytest.approx(0.1)  # nobody knows yet


def test_what_has_started_is_inside_or_not_and_what_waits_may_yet_be_or_is_late() -> None:
    told = Estimate(20.0, 10.0, 30.0, 18.0)
    assert [estimate.started(told, waited).inside for waited in (9.0, 10.0, 30.0, 31.0)] == [False, True, True, False]
    assert estimate.waiting(told, 29.0) == Told(18.0, 29.0, waits=True)
    assert estimate.waiting(told, 31.0) == Told(18.0, 31.0, inside=False, waits=True)
    sure = Estimate(120.0, 110.0, 130.0, 118.0, least=100.0)
    assert estimate.started(sure, 109.0) == Told(18.0, 9.0, inside=False)
    assert estimate.waiting(sure, 50.0) == Told(18.0, 0.0, waits=True)


def test_a_task_ends_a_usual_time_after_its_start() -> None:
    pace = pace_of([float(span) for span in range(11)])
    assert pace is not None
    assert estimate.ends(Estimate(20.0, 10.0, 30.0, 20.0), pace) == Estimate(25.0, 11.0, 39.0, 25.0)


spans = st.floats(0, 1e6)


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=12),
    st.lists(st.none() | spans, max_size=4),
    st.integers(0, 3),
    st.lists(spans, min_size=1, max_size=9),
    st.lists(st.builds(Told, spans, spans, st.none() | st.booleans(), st.booleans()), max_size=40),
    spans,
)
def test_an_interval_is_an_interval(
    ranks: list[int], left: list[float | None], free: int, took: list[float], told: list[Told], kept: float
) -> None:
    found = estimate_starts(
        line(*ranks), [runs(one) for one in left], free, pace_of(took), told, now=NOW, kept={"1": kept}
    )
    for task_id, one in found.items():
        assert (kept if task_id == "1" else 0) <= one.earliest <= one.seconds <= one.latest < math.inf
