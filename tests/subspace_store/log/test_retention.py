"""Tags, holds, quarantine, pins and expiry: who may name what, and what a name keeps."""

import pytest

from configs.errors import Conflict, InvalidInput, NotFound, RefusedAdapters
from subspace_store import SubspaceReader, SubspaceStore
from subspace_store.log.retention import expirable, named_by
from tests.subspace_store.builders import merged, opened, random_adapter, reading


def published(count: int) -> SubspaceStore:
    """So many versions, each with a task of its own (`t1`, …), all published."""
    store = opened()
    for number in range(1, count + 1):
        merged(store, {f"t{number}": random_adapter(number)})
        store.publish(number, op_key=f"publish {number}", actor="test")
    return store


@pytest.fixture
def store() -> SubspaceStore:
    return published(3)


def again(store: SubspaceStore) -> SubspaceStore:
    """What another process sees, with the next epoch."""
    return opened(store.storage, writer="successor")


def last_op(store: SubspaceReader) -> tuple[str, str]:
    entry = store.history()[-1]
    return entry.op, entry.summary


# Tags and names


def test_a_branch_a_tag_and_a_number_name_a_version(store: SubspaceStore) -> None:
    store.tag("before-summer", 2, actor="ann")
    assert last_op(store) == ("tag", "version 2: before-summer")
    reader = reading(store.storage)
    assert [reader.resolve(ref) for ref in ("main", "candidate", "before-summer", "1", 1, "0")] == [3, 3, 2, 1, 1, 0]
    for unknown in ("after-summer", "4", 4, -1, "-1", ""):
        with pytest.raises(NotFound, match="there is no version"):
            reader.resolve(unknown)


def test_a_tag_stays_where_it_was_put(store: SubspaceStore) -> None:
    store.tag("v1.0", 2, actor="ann")
    seq = store.state.seq
    store.tag("v1.0", 2, actor="bob")
    assert store.state.seq == seq
    with pytest.raises(Conflict, match=r"tag 'v1\.0' is version 2, for ever"):
        again(store).tag("v1.0", 3, actor="ann")


@pytest.mark.parametrize("name", ["v3", "main", "candidate", "12", "", "Upper", "-dash", "a b", "a/b", "x" * 64, "a\n"])
def test_a_name_that_is_another_kind_of_name_is_no_tag(store: SubspaceStore, name: str) -> None:
    with pytest.raises(InvalidInput, match=r"cannot be a tag|must be one line"):
        store.tag(name, 1, actor="ann")


def test_only_a_version_that_can_be_used_is_tagged(store: SubspaceStore) -> None:
    merged(store, {"bad": random_adapter(9)})
    store.reject(4, "it forgot", op_key="r", actor="gate")
    with pytest.raises(InvalidInput, match="version 4 was rejected: it forgot"):
        store.tag("x", 4, actor="ann")
    with pytest.raises(NotFound, match="no version 5"):
        store.tag("x", 5, actor="ann")
    store.expire([1], actor="ann")
    with pytest.raises(InvalidInput, match="version 1 has expired"):
        store.tag("x", 1, actor="ann")


# Holding main


def test_while_main_is_held_nothing_is_published_and_the_candidate_waits(store: SubspaceStore) -> None:
    store.hold("customers complain", actor="ann")
    merged(store, {"t4": random_adapter(4)})
    with pytest.raises(Conflict, match=r"main is held by ann: customers complain\n.*release"):
        store.publish(4, op_key="p4", actor="gate")
    successor = again(store)
    assert successor.state.refs == {"main": 3, "candidate": 4}
    with pytest.raises(Conflict, match="held by ann"):
        successor.publish(4, op_key="p4", actor="gate")
    successor.release(actor="bob")
    successor.publish(4, op_key="p4", actor="gate")
    assert successor.state.refs == {"main": 4, "candidate": 4}


def test_a_publication_that_was_done_is_answered_though_main_is_held_since(store: SubspaceStore) -> None:
    store.hold("why", actor="ann")
    store.publish(3, op_key="publish 3", actor="test")
    assert store.state.held is not None


def test_a_hold_says_who_why_and_when_and_is_taken_once(store: SubspaceStore) -> None:
    store.hold("audit", actor="ann")
    held, seq = store.state.held, store.state.seq
    assert held is not None
    assert (held.actor, held.reason, held.time) == ("ann", "audit", store.history()[-1].time)
    store.hold("audit", actor="ann")
    assert store.state.seq == seq
    with pytest.raises(Conflict, match="main is held by ann: audit"):
        store.hold("holiday", actor="bob")
    store.release(actor="bob")
    store.release(actor="bob")
    assert (store.state.held, store.state.seq) == (None, seq + 1)


def test_a_rollback_and_its_hold_are_one_record(store: SubspaceStore) -> None:
    seq = store.state.seq
    store.rollback(1, op_key="back", actor="ann", reason="worse", hold=True)
    assert store.state.seq == seq + 1
    assert store.state.refs == {"main": 1, "candidate": 1}
    held = again(store).state.held
    assert held is not None
    assert (held.actor, held.reason) == ("ann", "worse")


def test_a_person_may_roll_back_while_main_is_held_and_it_stays_held(store: SubspaceStore) -> None:
    store.hold("audit", actor="ann")
    store.rollback(2, op_key="back", actor="bob")
    assert store.state.refs["main"] == 2
    assert store.state.held is not None
    assert store.state.held.actor == "ann"


def test_a_request_with_an_op_key_is_done_once_whatever_happened_since(store: SubspaceStore) -> None:
    store.hold("audit", actor="ann", op_key="h")
    store.release(actor="ann")
    again(store).hold("audit", actor="ann", op_key="h")
    assert again(store).state.held is None


# Quarantine


def test_a_quarantined_task_is_not_merged_until_it_is_let_go(store: SubspaceStore) -> None:
    store.quarantine("t4", "poisoned data", actor="ann")
    for opened_anew in (lambda: store, lambda: again(store)):
        with pytest.raises(RefusedAdapters, match=r"(?s)task team/t4 \(t4\): is quarantined: poisoned data") as caught:
            merged(opened_anew(), {"t5": random_adapter(5), "t4": random_adapter(4)})
        assert caught.value.task_ids == ("t4",)
    successor = again(store)
    assert 4 not in successor.state.versions
    successor.unquarantine("t4", actor="ann")
    assert merged(successor, {"t4": random_adapter(4)}).number == 4


def test_a_quarantine_has_a_reason_and_is_written_once(store: SubspaceStore) -> None:
    with pytest.raises(InvalidInput, match="needs a task and a reason"):
        store.quarantine("t1", "", actor="ann")
    store.quarantine("t1", "why", actor="ann")
    seq = store.state.seq
    store.quarantine("t1", "why", actor="ann")
    store.unquarantine("t2", actor="ann")
    assert store.state.seq == seq
    assert store.state.quarantined == {"t1": "why"}


# Pins


def test_a_pin_keeps_a_version_until_its_time_and_again_moves_it(
    store: SubspaceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def clock(shows: float) -> None:
        monkeypatch.setattr("subspace_store.refs.time.time", lambda: shows)

    clock(99.0)  # the writer's own: nobody tells it the time
    store.pin(1, "serving", 100.0, actor="ann")
    with pytest.raises(Conflict, match="version 1 is needed: serving pinned it"):
        store.expire([1], actor="ann")
    store.pin(1, "serving", 200.0, actor="ann")
    clock(150.0)
    with pytest.raises(Conflict, match="serving pinned it"):
        again(store).expire([1], actor="ann")
    successor = again(store)
    clock(200.0)
    successor.expire([1], actor="ann")
    assert (successor.state.expired, successor.state.pins) == ((1,), {})


def test_of_two_owners_each_keeps_the_version(store: SubspaceStore) -> None:
    store.pin(1, "serving", actor="ann")
    store.pin(1, "audit", 50.0, actor="ann")
    store.unpin(1, "serving", actor="ann")
    assert store.state.pins == {1: {"audit": 50.0}}
    assert named_by(store.state, 1, now=49.0) == ["audit pinned it"]
    assert named_by(store.state, 1, now=50.0) == []
    store.unpin(1, "audit", actor="ann")
    assert again(store).state.pins == {}


@pytest.mark.parametrize(("owner", "until"), [("", None), ("x", float("nan")), ("x", float("inf"))])
def test_a_pin_without_owner_or_without_a_real_end_is_refused(
    store: SubspaceStore, owner: str, until: float | None
) -> None:
    with pytest.raises(InvalidInput):
        store.pin(1, owner, until, actor="ann")


# Expiring


def test_what_a_branch_or_a_tag_names_does_not_expire_and_nothing_of_the_request_is_done(store: SubspaceStore) -> None:
    merged(store, {"t4": random_adapter(4)})
    store.tag("gold", 2, actor="ann")
    for number, name in ((2, "tagged gold"), (3, "it is main"), (4, "it is candidate")):
        with pytest.raises(Conflict, match=f"version {number} is needed: .*{name}"):
            store.expire([1, number], actor="ann")
    with pytest.raises(InvalidInput, match="version 0"):
        store.expire([0], actor="ann")
    with pytest.raises(NotFound, match="no version 9"):
        store.expire([1, 9], actor="ann")
    assert store.state.expired == ()


def test_an_expired_version_is_dead_for_ever(store: SubspaceStore) -> None:
    store.expire([2, 1], actor="ann")
    store.expire([1], actor="ann")
    assert last_op(store) == ("expire", "versions 1, 2")
    successor = again(store)
    assert successor.state.expired == (1, 2)
    for attempt in (
        lambda: successor.rollback(1, op_key="b", actor="ann"),
        lambda: successor.preview_rollback(1),
        lambda: successor.pin(1, "me", actor="ann"),
    ):
        with pytest.raises(InvalidInput, match="version 1 has expired"):
            attempt()
    for read in (lambda: successor.adapter("t1", 1), lambda: successor.basis(1), lambda: successor.diff(1, 3)):
        with pytest.raises(NotFound, match="version 1 has expired"):
            read()
    assert set(successor.state.tasks_at(3)) == {"t1", "t2", "t3"}


def test_what_may_expire_is_older_than_what_is_kept_or_rejected_and_has_no_name() -> None:
    store = published(6)
    store.tag("gold", 1, actor="ann")
    store.pin(2, "serving", 100.0, actor="ann")
    merged(store, {"bad": random_adapter(9)})
    store.reject(7, "it forgot", op_key="r", actor="gate")
    merged(store, {"t8": random_adapter(8)})
    assert expirable(store.state, keep_last=2, now=0.0) == [3, 4, 7]
    assert expirable(store.state, keep_last=2, now=100.0) == [2, 3, 4, 7]
    assert expirable(store.state, keep_last=6, now=100.0) == [7]
    assert expirable(store.state, keep_last=100, now=100.0) == [7]
    with pytest.raises(InvalidInput, match="at least one"):
        expirable(store.state, keep_last=0, now=0.0)
    store.expire(expirable(store.state, 2, 100.0), actor="ann")
    assert expirable(store.state, keep_last=2, now=100.0) == []


def test_versions_above_a_rollback_can_come_back_and_so_do_not_expire_by_themselves() -> None:
    store = published(4)
    store.rollback(2, op_key="back", actor="ann")
    assert expirable(store.state, keep_last=1, now=0.0) == [1]
    empty = opened()
    merged(empty, {"a": random_adapter(1)})
    assert expirable(empty.state, keep_last=1, now=0.0) == []


def test_history_tells_every_operation_in_words(store: SubspaceStore) -> None:
    start = len(store.history())
    store.hold("audit", actor="ann")
    store.release(actor="ann")
    store.quarantine("t9", "poisoned", actor="ann")
    store.unquarantine("t9", actor="ann")
    store.pin(1, "serving", 86400.0, actor="ann")
    store.pin(1, "audit", actor="ann")
    store.unpin(1, "audit", actor="ann")
    assert [(entry.op, entry.summary) for entry in store.history()[start:]] == [
        ("hold", "audit"),
        ("release", ""),
        ("quarantine", "t9: poisoned"),
        ("unquarantine", "t9"),
        ("pin", "version 1: serving, until 1970-01-02 00:00 UTC"),
        ("pin", "version 1: audit"),
        ("unpin", "version 1: audit"),
    ]
