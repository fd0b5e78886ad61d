"""A task gets the smallest pool that fits; a pool has as many workers as it has work for, within its limits."""

from __future__ import annotations

import pytest

from configs.errors import InvalidInput
from configs.settings import DEFAULT_POOL, PoolSettings
from configs.task_spec import ResourceSpec
from orchestrator.scheduling.fair_share import Running, Share, Waiting
from orchestrator.scheduling.pools import Change, Seat, chosen_pool, number_of, pool_of, pools_of, resized, worker_name
from orchestrator.scheduling.reasons import Wait, WaitCode
from orchestrator.scheduling.scheduler import Decision, Pool, Situation, decide

NOW = 10_000.0
POOLS = {
    "gang": PoolSettings(max=2, ranks=4),
    "big": PoolSettings(max=1, gpus=1),
    "small": PoolSettings(max=8),
    "gpus": PoolSettings(max=1, ranks=8, gpus=1),
}
ONE = PoolSettings(min=1, max=3, idle_seconds=60)


# --- which pool --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("needs", "pool"),
    [
        (None, "small"),
        (ResourceSpec(), "small"),
        (ResourceSpec(ranks=2), "gang"),  # the smallest that has as many
        (ResourceSpec(ranks=5), "gpus"),
        (ResourceSpec(gpus=0.5), "big"),
        (ResourceSpec(gpus=1, ranks=2), "gpus"),
    ],
)
def test_a_task_gets_the_smallest_pool_that_has_what_it_needs(needs: ResourceSpec | None, pool: str) -> None:
    assert chosen_pool(POOLS, None, needs) == pool


def test_a_task_that_names_a_pool_gets_it_and_what_can_never_fit_is_told_what_would() -> None:
    assert chosen_pool(POOLS, "gpus", None) == "gpus"
    with pytest.raises(InvalidInput, match=r"there is no pool 'huge' .*\n.*'small', 1 rank with 0 GPUs each; 'big', 1"):
        chosen_pool(POOLS, "huge", None)
    with pytest.raises(InvalidInput, match=r"no pool has 9 ranks with 1 GPUs each\n.*'gpus', 8 ranks with 1 GPUs each"):
        chosen_pool(POOLS, None, ResourceSpec(ranks=9, gpus=1))


def test_a_pool_belongs_to_one_base_model() -> None:
    pools = {"a": PoolSettings(max=1, base_model="tiny"), "b": PoolSettings(max=1, base_model="llama")}
    assert (list(pools_of(pools, "llama")), list(pools_of(pools, "tiny"))) == (["b"], ["a"])


def test_a_workers_name_says_its_pool_and_its_number() -> None:
    assert (worker_name(DEFAULT_POOL, 3), worker_name("a-1", 0)) == ("worker-3", "a-1-0")
    assert (pool_of("worker-3"), pool_of("a-1-0"), number_of("a-1-0")) == (DEFAULT_POOL, "a-1", 0)


# --- how many workers --------------------------------------------------------------------------------------------


def idle(number: int, since: float = NOW) -> Seat:
    return Seat(name=f"one-{number}", idle_since=since)


def busy(number: int) -> Seat:
    return Seat(name=f"one-{number}")


def drained(number: int, since: float | None = None) -> Seat:
    return Seat(name=f"one-{number}", idle_since=since, ends=True)


@pytest.mark.parametrize(
    ("seats", "wanted", "change"),
    [
        ([], 0, Change(("one-0",))),  # the least is always there
        ([busy(0)], 0, Change()),
        ([busy(0)], 1, Change(("one-1",))),
        ([busy(0)], 5, Change(("one-1", "one-2"))),  # three at most
        ([busy(0), busy(2)], 1, Change(("one-1",))),  # the first name that is free
        ([busy(0), idle(1)], 1, Change()),  # it is coming, or gets the task
        ([busy(0), idle(1, NOW - 59)], 0, Change()),
        ([busy(0), idle(1, NOW - 60)], 0, Change((), ("one-1",))),
        ([idle(0, NOW - 99), idle(1, NOW - 99)], 0, Change((), ("one-1",))),  # one stays warm
        ([idle(0, NOW - 99), idle(1, NOW - 61)], 0, Change((), ("one-0",))),  # the one that was idle longest ends
        ([idle(0, NOW - 99), idle(1, NOW - 99), idle(2, NOW - 99)], 0, Change((), ("one-2", "one-1"))),
        ([idle(0, NOW - 99), idle(1, NOW - 99)], 1, Change((), ("one-1",))),  # one is enough for the one task
        ([idle(0, NOW - 99), idle(1, NOW - 99)], 2, Change()),
    ],
)
def test_a_pool_grows_for_what_waits_and_gives_back_what_is_idle(
    seats: list[Seat], wanted: int, change: Change
) -> None:
    assert resized("one", ONE, seats, wanted, NOW) == change


def test_a_pool_of_a_fixed_size_never_changes() -> None:
    fixed = PoolSettings(min=2, max=2, idle_seconds=0)
    for wanted in range(4):
        assert resized("one", fixed, [idle(0, 0.0), busy(1)], wanted, NOW) == Change()


def test_a_drained_worker_ends_when_it_has_nothing_to_do_and_its_place_stays_empty() -> None:
    assert resized("one", ONE, [drained(0)], 0, NOW, taken=["one-0"]) == Change()  # it ends its task first
    assert resized("one", ONE, [drained(0, NOW)], 0, NOW, taken=["one-0"]) == Change((), ("one-0",))
    assert resized("one", ONE, [], 0, NOW, taken=["one-0"]) == Change()
    assert resized("one", ONE, [], 5, NOW, taken=["one-0"]) == Change(("one-1", "one-2"))  # of three, one is out


def test_while_room_is_made_for_another_pool_no_more_start_than_may() -> None:
    assert resized("one", ONE, [], 3, NOW, starts_max=1) == Change(("one-0",))
    assert resized("one", ONE, [], 3, NOW, starts_max=0) == Change()


def test_a_worker_on_a_drained_machine_is_made_up_for_elsewhere() -> None:
    assert resized("one", ONE, [drained(0, NOW)], 0, NOW) == Change(("one-1",), ("one-0",))


# --- several pools in one decision -------------------------------------------------------------------------------


def waits(title: str, pool: str, ranks: int = 1, at: float = 0.0) -> Waiting:
    team, _, _ = title.partition("/")
    return Waiting(task_id=title, team=team, priority=0, submitted_at=at, pool=pool, ranks=ranks)


def decided(
    waiting: list[Waiting], pools: dict[str, Pool], running: tuple[Running, ...] = (), **facts: object
) -> Decision:
    return decide(Situation(now=NOW, pools=pools, waiting=waiting, running=running, **facts))  # type: ignore[arg-type]


FULL = Pool(capacity=4, ready=4, free=0)
FREE = Pool(capacity=4, ready=4, free=4)


def test_a_full_pool_keeps_nobody_from_another_and_a_gang_starts_beside_a_single_worker() -> None:
    first = [waits("red/a", "single", at=1.0), waits("red/b", "gang", ranks=4, at=2.0), waits("blue/c", "single")]
    decision = decided(first, {"single": FULL, "gang": FREE})
    assert [(start.task_id, start.pool) for start in decision.starts] == [("red/b", "gang")]
    assert {name: (wait.code, wait.pool) for name, wait in decision.waits.items()} == {
        "red/a": (WaitCode.NO_FREE_PLACE, "single"),
        "blue/c": (WaitCode.NO_FREE_PLACE, "single"),
    }
    later = decision.wait_of("red/z", "single", "red")
    assert later == Wait(code=WaitCode.NO_FREE_PLACE, pool="single")
    assert decision.wait_of("blue/z", "gang", "blue") is None  # none of blue's was in that line


def test_of_a_pool_that_can_grow_nothing_is_taken_back() -> None:
    shares = {"red": Share(places=0), "blue": Share(places=4)}
    running = (Running("red", 0.0, task_id="r", pool="one", seconds_left=5000.0),)
    can_grow = Pool(capacity=2, ready=1, free=0, coming=1)
    decision = decided([waits("blue/a", "one")], {"one": can_grow}, running, shares=shares)
    assert (decision.preemptions, decision.waits["blue/a"].code) == ((), WaitCode.ABOUT_TO_START)
    cannot = Pool(capacity=1, ready=1, free=0)
    taken = decided([waits("blue/a", "one")], {"one": cannot}, running, shares=shares)
    assert [one.task_id for one in taken.preemptions] == ["r"]


def test_what_stops_in_one_pool_is_no_more_beyond_the_quota_in_another() -> None:
    # Red has two places and a quota of one: what it gives back in one pool is all that it has too many.
    running = tuple(Running("red", 0.0, task_id=name, pool=name, seconds_left=5000.0) for name in ("one", "two"))
    both = [waits("blue/a", "one"), waits("blue/b", "two")]
    full = Pool(capacity=1, ready=1, free=0)
    decision = decided(both, {"one": full, "two": full}, running, shares={"red": Share(places=1)})
    assert len(decision.preemptions) == 1


def test_where_no_gang_has_places_for_its_ranks_its_tasks_say_so() -> None:
    forming = Pool(capacity=4, ready=0, free=0, is_forming=True)
    decision = decided([waits("red/a", "gang", ranks=4)], {"gang": forming})
    assert decision.waits["red/a"] == Wait(code=WaitCode.GANG_INCOMPLETE, pool="gang", since=NOW)
