"""Who starts, who gives places back, and why the others wait: with the arithmetic."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.settings import DEFAULT_POOL
from orchestrator.scheduling.fair_share import STEADY_WEEKS, Running, Share, Waiting, running_order
from orchestrator.scheduling.machines import Shape, Worker
from orchestrator.scheduling.reasons import Wait, WaitCode
from orchestrator.scheduling.scheduler import (
    PATIENCE_SECONDS,
    SOON_SECONDS,
    SPARED_SECONDS,
    Decision,
    Pool,
    Situation,
    decide,
)

NOW = 10_000.0


def waits(title: str, at: float = 0.0, **fields: Any) -> Waiting:
    """`red/a` is a task of team red."""
    return Waiting(task_id=title, team=title.split("/")[0], submitted_at=at, **{"priority": 0} | fields)


def runs(title: str, since: float = 0.0, **fields: Any) -> Running:
    return Running(title.split("/")[0], since, task_id=title, **fields)


def decided(
    waiting: list[Waiting],
    running: list[Running] | None = None,
    capacity: int = 4,
    quotas: dict[str, int] | None = None,
    **more: Any,
) -> Decision:
    """A decision about one pool whose places are all ready."""
    running = running or []
    free = capacity - sum(order.ranks for order in running)
    shares = {team: Share(places=places) for team, places in (quotas or {}).items()}
    pools = {DEFAULT_POOL: Pool(capacity=capacity, ready=capacity, free=free)}
    return decide(
        Situation(**{"now": NOW, "pools": pools, "waiting": waiting, "running": running, "shares": shares} | more)
    )


def started(decision: Decision) -> list[str]:
    return [start.task_id for start in decision.starts]


def preempted(decision: Decision) -> list[str]:
    return [preemption.task_id for preemption in decision.preemptions]


def codes(decision: Decision) -> dict[str, str]:
    return {task_id: str(wait.code) for task_id, wait in decision.waits.items()}


# --- without quotas ------------------------------------------------------------------------------------------------


def test_as_many_start_as_places_are_free_in_the_order_of_their_turns() -> None:
    tasks = [waits("red/a", 1), waits("red/b", 2), waits("blue/c", 3), waits("blue/d", 4)]
    decision = decided(tasks, [runs("red/x")], capacity=3, use_seconds={"blue": 50.0})
    # red 10,000 s of what runs; blue 50, then 110.
    assert started(decision) == ["blue/c", "blue/d"]
    assert codes(decision) == {"red/a": "no-free-place", "red/b": "no-free-place"}
    assert decision.preemptions == ()
    assert decision.reserved == {}


sizes = st.integers(1, 4)
tasks_of_one_size = st.lists(
    st.builds(
        lambda number, team, priority: waits(f"{team}/{number}", number, priority=priority),
        st.integers(0, 1000),
        st.sampled_from(["red", "blue", "green"]),
        st.integers(-1, 1),
    ),
    max_size=30,
    unique_by=lambda task: task.task_id,
)


@given(tasks_of_one_size, st.integers(0, 6), st.integers(1, 3))
def test_tasks_that_are_all_alike_start_in_their_running_order(tasks: list[Waiting], free: int, ranks: int) -> None:
    tasks = [replace(task, ranks=ranks) for task in tasks]
    decision = decided(tasks, pools={DEFAULT_POOL: Pool(capacity=20, ready=20, free=free * ranks)})
    assert tuple(started(decision)) == running_order(tasks, {}, now=NOW, limit=free)
    assert decision.preemptions == ()
    assert decision.reserved == {}


def test_a_task_larger_than_its_pool_never_fits_and_keeps_nobody_waiting() -> None:
    decision = decided([waits("red/huge", 1, ranks=5), waits("red/small", 2), waits("blue/lost", 3, pool="gpus")])
    assert started(decision) == ["red/small"]
    assert codes(decision) == {"red/huge": "never-fits", "blue/lost": "never-fits"}


def test_while_no_base_model_is_loaded_that_is_the_reason() -> None:
    decision = decided([waits("red/a")], pools={DEFAULT_POOL: Pool(capacity=4, ready=0, free=0)})
    assert codes(decision) == {"red/a": "base-model-loading"}


def test_a_place_that_is_kept_for_a_version_is_the_reason() -> None:
    decision = decided([waits("red/a")], pools={DEFAULT_POOL: Pool(capacity=1, ready=1, free=0, kept=1)})
    assert codes(decision) == {"red/a": "reserved-for"}


def test_a_reason_that_stays_the_same_keeps_its_time() -> None:
    task, full = waits("red/a"), [runs("blue/x", ranks=4)]
    before = decided([task], full).waits
    assert before["red/a"].since == NOW
    assert decided([task], full, now=NOW + 5, waits=before).waits["red/a"].since == NOW
    loading = {DEFAULT_POOL: Pool(capacity=4, ready=0, free=0)}
    assert decided([task], full, now=NOW + 5, waits=before, pools=loading).waits["red/a"].since == NOW + 5


def test_a_task_whose_place_comes_back_within_a_minute_is_about_to_start() -> None:
    full = [runs("red/x", ranks=3), runs("red/y", seconds_left=SOON_SECONDS)]
    decision = decided([waits("blue/a", 1), waits("blue/b", 2)], full)
    assert codes(decision) == {"blue/a": "about-to-start", "blue/b": "no-free-place"}


# --- quotas --------------------------------------------------------------------------------------------------------


def test_a_team_borrows_what_others_leave_idle_and_comes_after_those_within_their_quota() -> None:
    tasks = [waits(f"red/{n}", n) for n in range(4)] + [waits("blue/a", 9)]
    decision = decided(tasks, capacity=4, quotas={"red": 1, "blue": 2}, use_seconds={"blue": 1e6})
    # Blue has used much more, but red's second task is beyond its quota of one.
    assert started(decision) == ["red/0", "blue/a", "red/1", "red/2"]
    assert codes(decision) == {"red/3": "over-quota"}


def test_a_team_beyond_its_week_borrows() -> None:
    week = {"red": Share(place_seconds_a_week=1000.0)}
    used = {"red": 1000.0 * STEADY_WEEKS}
    tasks = [waits("red/a", 1), waits("blue/b", 2)]
    over = decided(tasks, capacity=1, shares=week, use_seconds=used | {"blue": 1e9})
    assert started(over) == ["blue/b"]
    assert codes(over) == {"red/a": "over-quota"}
    under = decided(tasks, capacity=1, shares=week, use_seconds={"red": used["red"] - 1, "blue": 1e9})
    assert started(under) == ["red/a"]
    # One place, in use for ever, adds up to as much as is halved in a week: 1 / ln 2 weeks.
    assert sum(0.5 ** (hour / 168) for hour in range(10_000)) / 168 == pytest.approx(STEADY_WEEKS, rel=0.01)


def test_a_team_beyond_its_gpu_hours_borrows_however_few_places_it_had() -> None:
    week = {"red": Share(gpu_seconds_a_week=1000.0, place_seconds_a_week=1e9)}
    tasks = [waits("red/a", 1), waits("blue/b", 2)]
    used: dict[str, Any] = {"use_seconds": {"red": 1000.0 * STEADY_WEEKS, "blue": 1e9}}
    over = decided(tasks, capacity=1, shares=week, gpu_seconds={"red": 1000.0 * STEADY_WEEKS}, **used)
    assert (started(over), codes(over)) == (["blue/b"], {"red/a": "over-quota"})
    assert started(decided(tasks, capacity=1, shares=week, **used)) == ["red/a"]  # on CPUs alone


BORROWED = [runs("red/old", 1.0), runs("red/mid", 2.0), runs("red/new", 3.0), runs("blue/x", 4.0)]
QUOTAS = {"red": 1, "blue": 3}


def test_what_began_last_is_given_back_and_no_more_than_is_wanted() -> None:
    decision = decided([waits("blue/a")], BORROWED, quotas=QUOTAS)
    assert preempted(decision) == ["red/new"]
    (one,) = decision.preemptions
    assert (one.team, one.for_task, one.for_team) == ("red", "blue/a", "blue")
    assert decision.waits["blue/a"] == Wait(code=WaitCode.ABOUT_TO_START, pool=DEFAULT_POOL, about="red/new", since=NOW)


def test_a_team_gives_back_down_to_its_quota_and_not_below() -> None:
    tasks = [waits(f"blue/{n}", n) for n in range(3)]
    decision = decided(tasks, BORROWED, quotas={"red": 1, "blue": 4})
    assert preempted(decision) == ["red/new", "red/mid"]
    assert codes(decision) == {"blue/0": "about-to-start", "blue/1": "about-to-start", "blue/2": "no-free-place"}


def test_a_team_beyond_its_own_quota_gets_nothing_back() -> None:
    decision = decided([waits("blue/a")], BORROWED, quotas={"red": 1, "blue": 1})
    assert preempted(decision) == []
    assert codes(decision) == {"blue/a": "over-quota"}


def test_without_a_quota_nobody_gives_anything_back() -> None:
    assert preempted(decided([waits("blue/a")], BORROWED)) == []


@pytest.mark.parametrize(
    "spared",
    [
        {"seconds_left": SOON_SECONDS},
        {"was_preempted": True, "since": NOW - SPARED_SECONDS + 1},
        {"was_preempted": True},
        {"task_id": ""},
    ],
    ids=[
        "it ends within a minute",
        "it gave its place back ten minutes ago",
        "it gave its place back the last time, and another did not",
        "a version waits for it",
    ],
)
def test_some_are_left_alone(spared: dict[str, Any]) -> None:
    running = [*BORROWED[:2], replace(BORROWED[2], **spared), BORROWED[3]]
    decision = decided([waits("blue/a")], running, quotas=QUOTAS)
    # What ends within a minute is waited for; else the next one gives back.
    assert preempted(decision) == ([] if "seconds_left" in spared else ["red/mid"])


def test_what_gave_its_place_back_is_left_alone_for_ten_minutes_and_no_longer() -> None:
    again = runs("red/again", NOW - 100.0, was_preempted=True)
    tasks, running = [waits("blue/a")], [runs("red/x"), again]
    spared = decided(tasks, running, capacity=2, quotas={"red": 1, "blue": 2})
    assert preempted(spared) == ["red/x"]  # it began before the other, which is left alone
    alone = [replace(running[0], was_preempted=True, since=NOW - 50.0), again]
    waits_for_it = decided(tasks, alone, capacity=2, quotas={"red": 1, "blue": 2})
    assert preempted(waits_for_it) == []
    assert waits_for_it.again_at == NOW - 100.0 + SPARED_SECONDS
    then = decided(tasks, alone, capacity=2, quotas={"red": 1, "blue": 2}, now=waits_for_it.again_at)
    assert preempted(then) == ["red/again"]


def test_whoever_was_told_to_stop_is_not_told_twice_and_its_place_is_promised_once() -> None:
    running = [*BORROWED[:2], replace(BORROWED[2], stops=True), BORROWED[3]]
    assert preempted(decided([waits("blue/a")], running, quotas=QUOTAS)) == []
    assert preempted(decided([waits("blue/a"), waits("blue/b")], running, quotas=QUOTAS)) == ["red/mid"]


def test_a_team_gets_back_no_more_than_its_quota_however_many_of_its_tasks_wait() -> None:
    running = [runs(f"red/{n}", n) for n in range(4)]
    decision = decided([waits("blue/a", 1), waits("blue/b", 2)], running, quotas={"red": 1, "blue": 1})
    assert preempted(decision) == ["red/3"]
    assert codes(decision) == {"blue/a": "about-to-start", "blue/b": "over-quota"}


def test_what_was_given_back_for_a_task_goes_to_no_other() -> None:
    tasks = [waits("blue/a"), waits("green/first")]
    more = {"quotas": QUOTAS | {"green": 1}, "use_seconds": {"blue": 1e6}}
    before = decided(tasks[:1], BORROWED, **more)
    assert before.promised == ("blue/a",)
    now = decided(tasks, [*BORROWED[:2], BORROWED[3]], promised=before.promised, **more)
    assert started(now) == ["blue/a"]  # though it is green's turn
    assert now.promised == ("green/first",)  # for which red gives its other one back


def test_it_is_decided_anew_when_a_task_may_borrow_again() -> None:
    tasks, running = [waits("red/again", preempted_at=NOW)], [runs("red/x")]
    assert decided(tasks, running, capacity=2, quotas={"red": 1}).again_at == NOW + PATIENCE_SECONDS
    assert decided(tasks, running, capacity=2).again_at is None


def test_nothing_is_given_back_where_it_would_not_be_enough() -> None:
    decision = decided([waits("blue/large", ranks=4)], BORROWED, quotas={"red": 1, "blue": 8})
    assert preempted(decision) == []
    assert codes(decision) == {"blue/large": "no-free-place"}


def test_the_team_furthest_beyond_its_quota_gives_back_first() -> None:
    running = [runs("red/1", 1.0), runs("red/2", 2.0), runs("red/3", 3.0), runs("green/1", 9.0), runs("green/2", 9.5)]
    quotas = {"red": 1, "green": 1, "blue": 9}
    tasks = [waits(f"blue/{n}", n) for n in range(3)]
    # red 2 beyond and green 1: red's newest; then 1 and 1: `red` is the later name; then green's.
    assert preempted(decided(tasks, running, capacity=5, quotas=quotas)) == ["red/3", "red/2", "green/2"]


def test_what_gave_back_does_not_borrow_for_two_minutes_and_nothing_of_its_team_borrows_before_it() -> None:
    tasks = [waits("red/again", 1, preempted_at=NOW), waits("red/fresh", 2)]
    quotas, running = {"red": 1}, [runs("red/x")]
    decision = decided(tasks, running, capacity=2, quotas=quotas)
    assert started(decision) == []
    over = Wait(code=WaitCode.OVER_QUOTA, pool=DEFAULT_POOL, since=NOW, until=NOW + PATIENCE_SECONDS)
    assert decision.waits["red/again"] == over
    assert decision.waits["red/fresh"] == replace(over, about="red/again")
    assert decision.wait_of("red/not-looked-at", DEFAULT_POOL, "red") == replace(over, about="red/again")
    # Priority is before age, as ever; another team and another pool have lines of their own.
    urgent = [*tasks, waits("red/urgent", 3, priority=1)]
    assert started(decided(urgent, running, capacity=2, quotas=quotas)) == ["red/urgent"]
    assert started(decided([*tasks, waits("blue/a", 3)], running, capacity=2, quotas=quotas)) == ["blue/a"]
    later = decided(tasks, running, capacity=2, quotas=quotas, now=NOW + PATIENCE_SECONDS)
    assert started(later) == ["red/again"]
    assert started(decided(tasks[:1], [], capacity=2, quotas=quotas)) == ["red/again"]  # within its quota: at once


# --- room on machines that pools share -----------------------------------------------------------------------------

LARGE = waits("red/large", 1.0, pool="gang", ranks=2)
SMALL, GANG = Shape(needs={"CPU": 1.0}), Shape(ranks=2, needs={"CPU": 1.0})
ASKED = Worker(name="gang-0", pool="gang")
"""A gang for which no machine has room."""


def shared(
    waiting: list[Waiting],
    *left: float | None,
    free: float = 0.0,
    idle: int = 0,
    further: int = 0,
    asked: tuple[Worker, ...] = (ASKED,),
    **more: Any,
) -> Decision:
    """A decision on one machine that small workers and a gang share: small ones with so many seconds left, then idle
    ones, and a gang that waits for room."""
    orders = [runs(f"blue/{n}", pool="small", seconds_left=seconds) for n, seconds in enumerate(left)]
    workers = [
        Worker(name=f"small-{n}", pool="small", machines=("a",), is_idle=n >= len(left), ends_in=seconds)
        for n, seconds in enumerate([*left, *[None] * idle])
    ]
    pools = {
        "small": Pool(
            capacity=9, ready=len(workers), free=idle, coming=further, further=further, shape=SMALL,
            is_short=any(one.pool == "small" for one in asked),
        ),
        "gang": Pool(capacity=2, ready=0, free=0, shape=GANG, is_short=True, is_placeless=True),
    }  # fmt: skip
    machines = {"a": {"CPU": free}}
    return decided(waiting, orders, pools=pools, machines=machines, workers=[*workers, *asked], **more)


def test_room_is_reserved_for_the_first_in_turn_that_waits_for_it_and_short_tasks_fill_the_gap() -> None:
    # Two small workers: one is idle, the other has 500 s left. Then both have to go.
    short = waits("green/short", 3.0, pool="small", seconds_max=500.0)
    long = waits("green/long", 2.0, pool="small", seconds_max=501.0)
    decision = shared([LARGE, long, short], 500.0, idle=1)
    assert started(decision) == ["green/short"]
    assert decision.reserved == {"gang": "red/large"}
    assert codes(decision) == {"red/large": "no-machine", "green/long": "reserved-for"}
    assert decision.waits["green/long"].about == "red/large"
    assert (decision.kept, decision.ends, decision.growth) == ({"small-1"}, (), {"small": 0})
    assert decision.wait_of("green/z", "small", "green") == decision.waits["green/long"]


def test_all_that_has_to_go_ends_at_once_when_it_has_nothing_to_do() -> None:
    decision = shared([LARGE, waits("green/a", 2.0, pool="small")], idle=2)
    assert (started(decision), decision.ends) == ([], ("small-0", "small-1"))
    assert codes(decision)["green/a"] == "reserved-for"


def test_who_waits_for_a_worker_that_has_to_go_is_told_for_whom() -> None:
    decision = shared([LARGE, waits("green/a", 2.0, pool="small")], 500.0, 30.0)  # one is free in 30 s: not for green
    found = decision.waits["green/a"]
    assert (found.code, found.about, decision.ends) == (WaitCode.RESERVED_FOR, "red/large", ())


def test_what_is_not_needed_goes_on_and_takes_tasks_of_any_length() -> None:
    # One CPU is free, and one of two idle workers is enough.
    decision = shared([LARGE, waits("green/a", 2.0, pool="small")], 300.0, free=1.0, idle=2)
    assert (started(decision), decision.kept, decision.ends) == (["green/a"], {"small-1"}, ("small-1",))


def test_workers_of_others_that_wait_for_room_are_taken_back_and_none_is_asked_for() -> None:
    asked = (Worker(name="small-7", pool="small"), ASKED)
    decision = shared([LARGE, waits("green/a", 2.0, pool="small")], 300.0, 400.0, further=1, asked=asked)
    assert (decision.ends, decision.growth) == (("small-7",), {"small": 0})
    assert codes(decision)["green/a"] == "reserved-for"


def test_a_reservation_is_kept_until_the_task_starts_whoever_comes_meanwhile() -> None:
    newcomer = waits("green/first", 0.0, pool="small", seconds_max=1e6)
    more = {"use_seconds": {"red": 1e9}}
    kept = shared([newcomer, LARGE], 500.0, idle=1, reserved={"gang": "red/large"}, **more)
    assert started(kept) == []
    assert kept.reserved == {"gang": "red/large"}
    assert codes(kept)["green/first"] == "reserved-for"
    without = shared([newcomer, LARGE], 500.0, idle=1, **more)
    assert started(without) == ["green/first"]  # it is its turn
    gone = shared([newcomer], 500.0, idle=1, reserved={"gang": "red/gone"}, **more)
    assert (started(gone), gone.reserved) == (["green/first"], {})


def test_a_gap_of_unknown_length_is_not_filled() -> None:
    decision = shared([LARGE, waits("green/short", 2.0, pool="small", seconds_max=1.0)], None, idle=1)
    assert (started(decision), decision.ends) == ([], ())


def test_nothing_is_reserved_beyond_a_quota_nor_where_a_place_of_its_own_pool_comes_first() -> None:
    borrows = shared([LARGE, waits("green/a", 2.0, pool="small")], 500.0, idle=1, shares={"red": Share(places=1)})
    assert (started(borrows), borrows.reserved) == (["green/a"], {})
    own = waits("green/a", 2.0, pool="small")
    asked = (Worker(name="small-7", pool="small"),)
    decision = shared([own], 100.0, 400.0, asked=asked)  # in 100 s a worker of its own is free
    assert (decision.reserved, codes(decision)) == ({}, {"green/a": "no-free-place"})


def test_room_that_ray_does_not_take_is_reserved_for_a_minute_and_no_longer() -> None:
    tasks, reserved = [LARGE, waits("green/a", 2.0, pool="small")], {"gang": "red/large"}
    first = shared(tasks, 500.0, free=2.0, further=1, reserved=reserved)
    assert (first.reserved, first.fits_since, first.growth) == (reserved, NOW, {"small": 0})
    assert first.again_at == NOW + SOON_SECONDS + 1
    later = {"now": NOW + SOON_SECONDS + 1, "fits_since": NOW}
    then = shared(tasks, 500.0, free=2.0, further=1, reserved=reserved, **later)
    assert (then.reserved, then.growth) == ({}, {})
    assert shared(tasks, 500.0, free=2.0, further=1).reserved == {}  # it gets it without


def test_where_machines_can_be_added_nothing_is_reserved() -> None:
    decision = shared([LARGE, waits("green/a", 2.0, pool="small")], 500.0, idle=1)
    assert decision.reserved
    pools = {"small": Pool(capacity=9, ready=2, free=1, shape=SMALL)}
    assert decided([waits("green/a", 2.0, pool="small")], pools=pools).reserved == {}


def test_pools_are_filled_each_for_itself_and_a_team_is_charged_in_all() -> None:
    pools = {"small": Pool(capacity=1, ready=1, free=1), "large": Pool(capacity=4, ready=4, free=4)}
    tasks = [
        waits("red/a", 1.0, pool="large", ranks=4),
        waits("red/b", 2.0, pool="small"),
        waits("blue/c", 3.0, pool="small"),
    ]
    decision = decided(tasks, pools=pools)
    # red's first costs four places: then it is blue's turn.
    assert started(decision) == ["red/a", "blue/c"]
    assert codes(decision) == {"red/b": "no-free-place"}


# --- whatever happens ----------------------------------------------------------------------------------------------


@st.composite
def situations(draw: st.DrawFn) -> Situation:
    teams = ["red", "blue", "green"]
    capacity = draw(st.integers(1, 8))
    shares = {
        team: Share(weight=draw(st.sampled_from([0.5, 1.0, 3.0])), places=draw(st.none() | st.integers(1, 4)))
        for team in teams
    }
    running: list[Running] = []
    for number in range(draw(st.integers(0, 8))):
        ranks = draw(sizes)
        if sum(order.ranks for order in running) + ranks <= capacity:
            running.append(
                runs(
                    f"{draw(st.sampled_from(teams))}/r{number}",
                    float(draw(st.integers(0, 10_000))),
                    ranks=ranks,
                    seconds_left=draw(st.none() | st.integers(0, 500)),
                    stops=draw(st.booleans()),
                    was_preempted=draw(st.booleans()),
                )
            )
    waiting = [
        waits(
            f"{draw(st.sampled_from(teams))}/w{number}",
            float(number),
            ranks=draw(st.integers(1, 9)),
            seconds_max=draw(st.none() | st.floats(1, 1000)),
            preempted_at=draw(st.none() | st.just(NOW - 10)),
        )
        for number in range(draw(st.integers(0, 10)))
    ]
    free = capacity - sum(order.ranks for order in running)
    return Situation(
        now=NOW,
        pools={DEFAULT_POOL: Pool(capacity=capacity, ready=capacity, free=free)},
        waiting=waiting,
        running=running,
        shares=shares,
    )


@given(situations())
def test_whatever_is_handed_in_the_promises_hold(situation: Situation) -> None:
    decision = decide(situation)
    by_id = {task.task_id: task for task in situation.waiting}
    attempts = {order.task_id: order for order in situation.running}
    assert set(started(decision)) | set(decision.waits) == set(by_id)
    assert not set(started(decision)) & set(decision.waits)
    assert sum(by_id[task_id].ranks for task_id in started(decision)) <= situation.pools[DEFAULT_POOL].free
    assert len(set(preempted(decision))) == len(decision.preemptions)
    held: dict[str, int] = {}
    for order in situation.running:
        held[order.team] = held.get(order.team, 0) + order.ranks
    for one in decision.preemptions:
        order, quota = attempts[one.task_id], situation.shares[one.team].places
        assert not order.stops
        assert not order.was_preempted or NOW - order.since >= SPARED_SECONDS
        assert order.seconds_left is None or order.seconds_left > SOON_SECONDS
        mine = sum(by_id[task_id].ranks for task_id in started(decision) if by_id[task_id].team == one.team)
        assert quota is not None
        assert held[one.team] + mine > quota, "only a team beyond its quota gives back"
        reclaims, places = situation.shares[one.for_team].places, by_id[one.for_task].ranks
        assert reclaims is None or held.get(one.for_team, 0) + places <= reclaims, "only to one within its own"


def test_a_task_that_was_not_looked_at_waits_for_what_its_team_waits_for() -> None:
    first = waits("red/a", 1)
    over = decided([first], [runs("red/x")], capacity=1, quotas={"red": 1})
    assert over.wait_of("red/z", DEFAULT_POOL, "red") == Wait(code=WaitCode.OVER_QUOTA, pool=DEFAULT_POOL, since=NOW)
    full = decided([first], [runs("red/x")], capacity=1)
    assert full.wait_of("red/z", DEFAULT_POOL, "red") == Wait(code=WaitCode.NO_FREE_PLACE, pool=DEFAULT_POOL)
    assert full.wait_of("blue/z", DEFAULT_POOL, "blue") is None
    assert decided([first]).wait_of("red/a", DEFAULT_POOL, "red") == Wait(code=WaitCode.ABOUT_TO_START)
