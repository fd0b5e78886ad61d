"""What webhooks are told of, on SQLite and a real Postgres: nothing lost, nothing double, nothing by an old leader."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from configs.errors import NotLeading
from orchestrator.tasks.database import Database
from orchestrator.tasks.happenings import Happening
from orchestrator.tasks.leader_lease import LeaderLease, Member
from orchestrator.tasks.outbox import Outbox
from orchestrator.tasks.task_events import CancelRequested, Claimed
from orchestrator.tasks.task_queue import TaskQueue
from orchestrator.tasks.verdict_book import Verdict, VerdictBook
from tests.builders import task_record
from tests.contracts.task_queue_contract import at_once
from tests.servers.postgres import Postgres


@pytest.fixture
def queue(url: str) -> Iterator[TaskQueue]:
    made = TaskQueue(url)
    yield made
    made.close()


def told(key: str, at: float = 100.0) -> Happening:
    return Happening(key=key, kind="held", at=at, sentence=f"words of {key}", base_model="tiny", version=3)


def test_what_ends_a_task_is_kept_with_it_and_given_out_once(queue: TaskQueue) -> None:
    outbox, now = Outbox(queue.database), time.time()
    queue.add(task_record("red/alpha", task_id="t1"))
    queue.apply("t1", Claimed(token="a", worker="w", at=now))
    assert outbox.give_out(lambda _: ["one"], now) == 0  # nobody is told of a start
    queue.add(task_record("red/beta", task_id="t2"))
    queue.apply("t2", CancelRequested("ann", now))
    queue.apply("t2", CancelRequested("ann", now))
    assert outbox.give_out(lambda happening: ["one", "two"] if happening.kind == "cancelled" else [], now) == 2
    assert outbox.give_out(lambda _: ["one", "two"], now) == 0
    assert outbox.hooks_due(now) == {"one", "two"}
    (delivery,) = outbox.newest(["one"], 10)
    assert delivery.happening.title == "red/beta"
    assert delivery.happening.key == f"task:t2:{queue.get('t2').revision}"
    assert outbox.waiting() == {"one": 1, "two": 1}


def test_a_transaction_that_fails_tells_nobody(queue: TaskQueue) -> None:
    queue.add(task_record("red/alpha", task_id="t1"))

    def cancel_and_fail() -> None:
        with queue.database.writing() as connection:
            queue._apply(connection, "t1", CancelRequested("ann", 1.0))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cancel_and_fail()
    assert Outbox(queue.database).give_out(lambda _: ["one"], 1.0) == 0


def test_what_is_told_again_under_its_key_is_one(queue: TaskQueue) -> None:
    outbox = Outbox(queue.database)
    assert outbox.told_until("tiny") is None
    outbox.tell_log("tiny", 7, [told("log:tiny:6"), told("log:tiny:7")])
    outbox.tell_log("tiny", 9, [told("log:tiny:7"), told("log:tiny:9")])
    outbox.tell([told("log:tiny:9")])
    assert outbox.told_until("tiny") == 9
    assert outbox.told_until("other") is None
    assert outbox.give_out(lambda _: ["one"], 100.0) == 3
    keys = [one.happening.key for one in outbox.newest(["one"], 10)]
    assert keys == ["log:tiny:9", "log:tiny:7", "log:tiny:6"]
    assert outbox.newest(["one"], 10)[0].happening == told("log:tiny:9")


def test_of_two_that_take_at_the_same_moment_each_has_another_delivery(queue: TaskQueue) -> None:
    outbox = Outbox(queue.database)
    outbox.tell([told(str(number)) for number in range(8)])
    outbox.give_out(lambda _: ["one"], 100.0)
    taken = at_once(8, lambda _: outbox.take("one", 100.0))
    assert sorted(one.happening.key for one in taken if one is not None) == sorted(map(str, range(8)))
    assert outbox.take("one", 100.0) is None


def test_a_webhook_that_left_the_settings_is_sent_nothing_more(queue: TaskQueue) -> None:
    outbox, now = Outbox(queue.database), time.time()
    outbox.tell([told("1", now)])
    outbox.give_out(lambda _: ["stays", "leaves"], now)
    outbox.forget(["stays"], now)
    assert outbox.hooks_due(now) == {"stays"}
    (gone,) = outbox.newest(["leaves"], 1)
    assert (gone.status, gone.answer) == ("given up", "the settings have it no more")


def test_an_answer_before_publishing_is_kept_for_ever(queue: TaskQueue) -> None:
    book, said = VerdictBook(queue.database), Verdict(False, "no budget", "pre-publish")
    assert book.get("tiny", 3) is None
    book.keep("tiny", 3, said)
    assert VerdictBook(queue.database).get("tiny", 3) == said
    assert book.get("tiny", 4) is None
    assert book.get("other", 3) is None


def test_a_leader_that_was_overtaken_takes_nothing_to_be_sent(postgres: Postgres) -> None:
    postgres.empty()
    lease, me = LeaderLease(postgres.url), Member("a", "a", "http://a")
    first = lease.take(lease.look(), me, "{}")
    assert first is not None
    database = Database(postgres.url, first)
    old = Outbox(database)
    old.tell([told("1"), told("2")])
    old.give_out(lambda _: ["one"], 100.0)
    under_way = old.take("one", 100.0)
    assert under_way is not None
    lease.give_up(first)
    second = lease.take(lease.look(), Member("b", "b", "http://b"), "{}")
    assert second is not None
    writes: list[Callable[[], object]] = [
        lambda: old.take("one", 100.0),
        lambda: old.taken(under_way, "status 200"),
        lambda: old.tell([told("3")]),
        lambda: old.tell_log("tiny", 5, []),
        lambda: VerdictBook(database).keep("tiny", 1, Verdict(True, "")),
    ]
    for write in writes:
        with pytest.raises(NotLeading):
            write()
    newer = Database(postgres.url, second)
    # What the old one had under way is sent again, after its wait, under the same key.
    again = [Outbox(newer).take("one", at) for at in (100.0, 110.0)]
    assert [(one.happening.key, one.tries) for one in again if one] == [("2", 1), ("1", 2)]
    for made in (database, newer):
        made.close()
    lease.close()
