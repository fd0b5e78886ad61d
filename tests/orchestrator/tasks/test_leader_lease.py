"""The lease of the leader on a real Postgres: one has it, and what an earlier one writes late is refused."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest

from configs.errors import DatabaseAway, NotLeading
from orchestrator.tasks import database, leader_lease
from orchestrator.tasks.leader_lease import LeaderLease, Member
from orchestrator.tasks.task_events import Claimed
from orchestrator.tasks.task_queue import TaskQueue
from tests.builders import task_record
from tests.contracts.task_queue_contract import at_once
from tests.servers.postgres import Postgres

ONE, TWO = (Member(name, f"{name}:/here", f"http://{name}:1") for name in ("one", "two"))
CLAIM = Claimed(token="tok", worker="worker-0", at=1.0)


@pytest.fixture
def lease(postgres: Postgres) -> Iterator[LeaderLease]:
    postgres.empty()
    lease = LeaderLease(postgres.url)
    yield lease
    lease.close()


def run_out(postgres: Postgres) -> None:
    """As if the lease had not been prolonged for long enough."""
    with postgres.connect() as connection:
        connection.execute("UPDATE leadership SET until = 0")


def test_of_those_that_try_at_once_one_leads(lease: LeaderLease) -> None:
    seen = lease.look()
    members = [replace(ONE, member_id=f"m{n}") for n in range(6)]
    found = at_once(6, lambda n: lease.take(seen, members[n], "{}"))
    assert sorted(found, key=str) == [1, None, None, None, None, None]
    holder = members[found.index(1)].member_id
    assert (lease.look().holder, lease.look().fence, lease.look().is_over) == (holder, 1, False)


def test_a_lease_that_holds_is_not_taken_one_that_is_over_is_and_the_first_finds_out(
    lease: LeaderLease, postgres: Postgres
) -> None:
    assert lease.take(lease.look(), ONE, "{}") == 1
    assert lease.take(lease.look(), TWO, "{}") is None
    assert lease.prolong(1)
    run_out(postgres)
    assert lease.prolong(1)  # nobody came in between: it is still the leader
    run_out(postgres)
    assert lease.take(lease.look(), TWO, "{}") == 2
    assert not lease.prolong(1)
    lease.give_up(1)  # as one that was overtaken would
    assert (lease.look().holder, lease.look().is_over) == ("two", False)
    lease.give_up(2)
    assert not lease.prolong(2)
    assert (lease.look().holder, lease.look().is_over) == ("", True)


def test_an_own_lease_is_taken_again_at_once_with_a_new_number(lease: LeaderLease) -> None:
    assert lease.take(lease.look(), ONE, "{}") == 1
    assert lease.take(lease.look(), ONE, "{}") == 2


def test_who_was_seen_a_moment_ago_is_there(lease: LeaderLease, monkeypatch: pytest.MonkeyPatch) -> None:
    lease.beat(ONE)
    lease.beat(TWO)
    lease.beat(replace(ONE, url="http://one:2"))
    assert [(member.member_id, member.url) for member in lease.look().present] == [
        ("one", "http://one:2"),
        ("two", "http://two:1"),
    ]
    lease.leave(ONE)
    assert [member.member_id for member in lease.look().present] == ["two"]
    monkeypatch.setattr(leader_lease, "LEASE_SECONDS", 0.0)
    assert lease.look().present == ()


def test_a_database_belongs_to_the_first_service_that_claims_it(lease: LeaderLease) -> None:
    assert sorted({*at_once(4, lambda n: lease.claim_service(f"s{n}", f'{{"n": {n}}}'))}) == [lease.look().service_id]
    assert lease.claim_service("late", "{}") == lease.look().service_id


def test_what_an_earlier_leader_writes_late_is_refused(lease: LeaderLease, postgres: Postgres) -> None:
    assert lease.take(lease.look(), ONE, "{}") == 1
    first = TaskQueue(postgres.url, fence=1)
    record = task_record()
    first.add(record)
    run_out(postgres)
    assert lease.take(lease.look(), TWO, "{}") == 2
    with pytest.raises(NotLeading):
        first.apply(record.task_id, CLAIM)
    second = TaskQueue(postgres.url, fence=2)
    assert second.get(record.task_id) == record
    second.apply(record.task_id, CLAIM)
    first.close()
    second.close()


def test_the_next_leader_waits_for_a_transaction_of_the_first_and_prolonging_does_not(
    lease: LeaderLease, postgres: Postgres
) -> None:
    assert lease.take(lease.look(), ONE, "{}") == 1
    first, taken = TaskQueue(postgres.url, fence=1), threading.Event()

    def take() -> None:
        assert lease.take(lease.look(), TWO, "{}") == 2
        taken.set()

    with first._database.writing() as connection:
        assert lease.prolong(1)
        run_out(postgres)
        taking = threading.Thread(target=take)
        taking.start()
        assert not taken.wait(0.5)
        first._append(connection, "t", [("log", "still mine")], 1.0)
    taking.join(10)
    assert taken.is_set()
    assert [event.text for event in first.events("t")] == ["still mine"]
    first.close()


def test_a_leader_that_stands_still_inside_a_transaction_does_not_keep_the_next_one_waiting(
    lease: LeaderLease, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "IDLE_SECONDS", 1.0)
    assert lease.take(lease.look(), ONE, "{}") == 1
    first = TaskQueue(postgres.url, fence=1)

    def write_slowly() -> None:
        with first._database.writing() as connection:
            first._append(connection, "t", [("log", "too late")], 1.0)
            run_out(postgres)
            assert lease.take(lease.look(), TWO, "{}") == 2  # after a second, while the first one's code stands here
            first._append(connection, "t", [("log", "later still")], 1.0)

    with pytest.raises(DatabaseAway):
        write_slowly()
    assert first.events("t") == []
    first.close()
