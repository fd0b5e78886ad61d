"""Who leads: what a control plane does about the lease, and what one that stood still may not do any more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from configs.errors import DatabaseAway, InvalidInput, NotLeading
from orchestrator import leadership
from orchestrator.leadership import Leadership, Move, next_move, refuse_other_settings, shared_settings
from orchestrator.tasks.leader_lease import LEASE_SECONDS, Member, Seen, Standing
from tests.builders import settings

ME = Member("me", "host:/me", "http://host:1")
OTHER = Standing("other", "host:/other", "http://host:2", 5.0)


def seen(**changes: Any) -> Seen:
    facts: dict[str, Any] = {
        "fence": 3, "holder": "other", "name": OTHER.name, "url": OTHER.url, "since": 7.0, "is_over": False,
        "service_id": "s", "settings": "", "present": (OTHER,),
    }  # fmt: skip
    return Seen(**facts | changes)


@pytest.mark.parametrize(
    ("found", "fence", "move"),
    [
        (seen(), None, Move.STAND_BY),
        (seen(is_over=True), None, Move.TAKE),
        (seen(holder="", is_over=True), None, Move.TAKE),
        (seen(holder="me"), None, Move.TAKE),  # of the process that was here before
        (seen(holder="me"), 3, Move.PROLONG),
        (seen(holder="me", is_over=True), 3, Move.PROLONG),  # late, and nobody came in between
        (seen(fence=4), 3, Move.STEP_DOWN),
        (seen(fence=4, is_over=True), 3, Move.STEP_DOWN),  # the other one has written meanwhile
    ],
)
def test_the_next_move(found: Seen, fence: int | None, move: Move) -> None:
    assert next_move(found, "me", fence) is move


class StandInLease:
    """A lease in memory."""

    def __init__(self) -> None:
        self.now, self.is_away = seen(fence=0, holder="", is_over=True, present=()), False

    def beat(self, member: Member) -> None:
        if self.is_away:
            raise DatabaseAway("away")

    def look(self) -> Seen:
        return self.now

    def take(self, found: Seen, member: Member, shared: str) -> int | None:
        self.now = seen(fence=found.fence + 1, holder=member.member_id)
        return self.now.fence

    def prolong(self, fence: int) -> bool:
        if self.is_away:
            raise DatabaseAway("away")
        return self.now.fence == fence

    def give_up(self, fence: int) -> None:
        self.now = seen(fence=fence, holder="", is_over=True)

    def leave(self, member: Member) -> None: ...


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(leadership.time, "monotonic", lambda: now[0])
    return now


def test_a_leader_gives_no_order_when_it_could_not_prolong_its_lease_and_again_when_it_could(
    clock: list[float],
) -> None:
    lease, told = StandInLease(), []
    one = Leadership(lease, ME, "{}", told.append, lambda: told.append("end"))  # type: ignore[arg-type]
    one.step()
    assert told == [1]
    one.check(1)
    clock[0] += LEASE_SECONDS
    lease.is_away = True
    with pytest.raises(NotLeading):
        one.check(1)
    lease.is_away = False
    one.check(1)  # the database is back: no order waits for the next step
    lease.is_away = True
    clock[0] += LEASE_SECONDS - 0.1
    one.check(1)  # prolonged by that order
    with pytest.raises(NotLeading):
        one.check(0)  # what is left of an earlier time as the leader


def test_a_leader_that_was_overtaken_stands_by_and_names_the_other(clock: list[float]) -> None:
    lease, told = StandInLease(), []
    one = Leadership(lease, ME, "{}", told.append, lambda: told.append("end"))  # type: ignore[arg-type]
    one.step()
    lease.now = seen(fence=2)
    clock[0] += LEASE_SECONDS
    with pytest.raises(NotLeading):
        one.check(1)  # overtaken, and no step has seen it yet
    one.step()
    assert told == [1, "end"]
    with pytest.raises(NotLeading):
        one.check(1)
    one.step()
    assert "host:/other leads (http://host:2)" in str(one.stands_by().refusal)
    assert one.as_dict() == {
        "role": "stands by",
        "leader": {"name": "host:/other", "url": "http://host:2", "since": 7.0, "number": 2},
        "standing_by": [],
    }


def test_only_control_planes_with_the_same_settings_and_one_ray_join(tmp_path: Path) -> None:
    ray = {"address": "head:6379", "auth_token_path": "/token"}
    ours = settings(tmp_path, ray=ray)
    elsewhere = settings(tmp_path, ray=ray | {"auth_token_path": "/other"}, state_dir=str(tmp_path / "b"))
    running = seen(settings=shared_settings(elsewhere))
    refuse_other_settings(running, "me", ours)
    more = settings(tmp_path, ray=ray, workers={"count": 7})
    with pytest.raises(InvalidInput, match="workers: these settings are not those") as caught:
        refuse_other_settings(running, "me", more)
    assert caught.value.where == "pools, workers"  # workers: is one of the pools
    refuse_other_settings(seen(settings=running.settings, present=()), "me", more)  # nobody runs
    with pytest.raises(InvalidInput, match=r"ray\.address"):
        refuse_other_settings(running, "me", settings(tmp_path))
    assert "token" not in json.loads(running.settings)["ray"]
