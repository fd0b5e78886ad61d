"""The commit protocol: what is in the log when connections, machines and other writers get in the way."""

import json
import math
import random
from collections.abc import Callable

import pytest

from configs.document import LINE_MAX
from configs.errors import (
    Conflict,
    Corrupt,
    Fenced,
    InvalidInput,
    NotFound,
    NotWritten,
    OutcomeUnknown,
    OwnedByAnother,
    StoreFull,
    Unavailable,
)
from subspace_store import SubspaceState, TaskScore, digest
from subspace_store.log.fold import (
    DROP_ADAPTERS,
    EXPIRE,
    HOLD,
    MERGE,
    PIN,
    PUBLISH,
    QUARANTINE,
    RELEASE,
    ROLLBACK,
    SCORES,
    TAG,
    UNPIN,
    UNQUARANTINE,
    log_key,
    to_plain,
)
from subspace_store.log.version import BlobRef, Identity, Version
from subspace_store.log.version_log import HINT, TRIES, VersionLog, checkpoint_key
from subspace_store.storage.memory import MemoryStorage
from subspace_store.storage.protocol import Storage
from tests.subspace_store.builders import FaultyStorage, fresh_storage

REF = BlobRef(key="blobs/0/x", size_bytes=1, sha256="00")


def no_wait(seconds: float) -> None:
    """Faults here do not get better with time."""


def writing(storage: Storage, writer: str = "writer") -> VersionLog:
    log = VersionLog(storage, writer, wait=no_wait)
    log.open()
    log.acquire(writer)
    return log


def reading(storage: Storage) -> SubspaceState:
    return VersionLog(storage).open()


def add_version(log: VersionLog, op_key: str = "") -> SubspaceState:
    """A merge without tensors."""
    number = max(log.state.versions, default=0) + 1
    version = Version(
        number=number,
        parent=log.state.refs["candidate"],
        created_at=1.5,
        added=(),
        basis=REF,
        transport=REF,
        rank_max=3,
    )
    return log.commit(MERGE, op_key=op_key, actor="a", refs={"candidate": number}, body={"version": version})


def in_turn(*faults: str | None) -> Callable[[str], str | None]:
    """These faults at the creates that follow, then none."""
    remaining = list(faults)
    return lambda key: remaining.pop(0) if remaining else None


def test_a_reader_folds_what_a_writer_committed() -> None:
    storage = fresh_storage()
    log = writing(storage)
    add_version(log, "k1")
    add_version(log, "k2")
    state = reading(storage)
    assert state == log.state
    assert state.refs == {"candidate": 2, "main": 0}
    assert state.op_keys == {"k1": 1, "k2": 2}
    assert state.versions[2].rank_max == 3
    assert (state.seq, state.epoch) == (3, 1)


def test_a_score_that_was_not_measured_stays_nan() -> None:
    storage = fresh_storage()
    log = writing(storage)
    add_version(log)
    scores = (TaskScore(task_id="t", score=math.nan, count=0), TaskScore(task_id="u", score=0.5, count=10))
    log.commit(SCORES, op_key="s", actor="a", body={"version": 1, "scores": scores})
    assert b"null" in storage.read(log_key(3))
    assert b"NaN" not in storage.read(log_key(3))
    for state in (log.state, reading(storage)):
        assert math.isnan(state.scores[1]["t"].score)
        assert state.scores[1]["u"] == scores[1]


def test_a_record_that_could_not_be_read_again_gets_no_slot() -> None:
    log = writing(fresh_storage())
    version = Version(number=1, parent=0, created_at=1.0, added=(), basis=REF, transport=REF, drift=(math.nan,))
    with pytest.raises(InvalidInput, match="cannot be written"):
        log.commit(MERGE, op_key="k", actor="a", body={"version": version})
    assert log.storage.keys("log/") == [log_key(1)]
    assert add_version(log).seq == 2


def test_an_older_writer_is_fenced_and_stays_fenced() -> None:
    storage = fresh_storage()
    old = writing(storage, "old")
    add_version(old)
    new = writing(storage, "new")
    for _ in range(2):
        with pytest.raises(Conflict, match="'new' opened this subspace with epoch 2"):
            add_version(old)
    add_version(new)
    assert list(reading(storage).versions) == [1, 2]


def test_a_fenced_writer_that_read_the_newer_records_is_fenced_all_the_same() -> None:
    storage = fresh_storage()
    old, new = writing(storage, "old"), writing(storage, "new")
    add_version(new)
    old.refresh()  # it now knows the head, and its next slot is free
    with pytest.raises(Conflict, match="epoch 2, after our 1"):
        add_version(old)
    assert reading(storage).seq == new.state.seq


def test_a_reader_cannot_commit() -> None:
    log = VersionLog(fresh_storage())
    log.open()
    with pytest.raises(InvalidInput, match="open for reading"):
        add_version(log)
    assert log.storage.keys("") == []


def test_a_reply_lost_after_the_write_is_one_commit() -> None:
    storage = fresh_storage()
    log = writing(FaultyStorage(storage, in_turn(None, "after")))
    add_version(log, "k")
    assert log.state == reading(storage)
    assert log.state.seq == 2


def test_a_retry_inside_the_client_that_meets_its_own_object_is_one_commit() -> None:
    class Retrying(MemoryStorage):
        def create(self, key: str, content: bytes) -> bool:
            return super().create(key, content) and super().create(key, content)  # as boto3: 412 for our own object

    storage = Retrying(fresh_storage().name)
    log = writing(storage)
    add_version(log, "k")
    assert reading(storage) == log.state
    assert log.state.seq == 2


def test_a_request_lost_before_the_write_is_sent_again_with_the_same_bytes() -> None:
    storage = fresh_storage()
    log = writing(FaultyStorage(storage, in_turn(None, "before", "before")))
    add_version(log, "k")
    assert reading(storage) == log.state


def test_when_nothing_answers_the_outcome_is_said_to_be_unknown() -> None:
    waits: list[float] = []
    storage = fresh_storage()
    faulty = FaultyStorage(storage, in_turn(None, *["before"] * TRIES))
    log = VersionLog(faulty, "writer", wait=waits.append)
    log.open()
    log.acquire("writer")
    with pytest.raises(Unavailable, match="outcome of merge is unknown"):
        add_version(log, "k")
    assert waits == sorted(waits)
    assert len(waits) == TRIES - 1


def in_doubt(storage: Storage, *faults: str | None) -> VersionLog:
    """A writer that does not know what became of its request `k`."""
    log = writing(FaultyStorage(storage, in_turn(None, *["before"] * TRIES, *faults)))
    with pytest.raises(OutcomeUnknown, match="--op-key k") as told:
        add_version(log, "k")
    assert (told.value.op_key, told.value.seq) == ("k", 2)
    return log


def test_an_unknown_outcome_is_finished_when_the_same_request_is_asked_again() -> None:
    storage = fresh_storage()
    log = in_doubt(storage)
    log.settle("k")  # what every request does first
    assert log.state.op_keys == {"k": 1}
    add_version(log, "k2")
    assert reading(storage).op_keys == {"k": 1, "k2": 2}


def test_an_unknown_outcome_is_not_done_later_by_itself_when_another_request_comes() -> None:
    storage = fresh_storage()
    log = in_doubt(storage)
    _, late = log._pending or (None, b"")
    add_version(log, "k2")
    assert not storage.create(log_key(2), late)  # its slot is taken, should it still be on its way
    assert reading(storage).op_keys == {"k2": 1}
    assert [record.op for record in opened_log(storage).records()] == ["acquire", "acquire", "merge"]
    add_version(log, "k")  # asked again, it is done as if for the first time
    assert reading(storage) == log.state
    assert log.state.op_keys == {"k2": 1, "k": 2}


def test_what_was_on_its_way_and_landed_is_found_when_another_request_comes() -> None:
    storage = fresh_storage()
    log = in_doubt(storage)
    assert storage.create(log_key(2), (log._pending or (None, b""))[1])
    request(log, "k2")
    assert reading(storage).op_keys == {"k": 1, "k2": 2}
    assert log.epoch == 1


def test_while_nothing_can_be_settled_another_request_has_failed_and_the_same_one_is_still_in_doubt() -> None:
    log = in_doubt(fresh_storage(), *["before"] * 2 * TRIES)
    with pytest.raises(NotWritten, match="nothing was begun: what became of merge 'k'"):
        log.settle("k2")
    with pytest.raises(OutcomeUnknown, match="--op-key k"):
        log.settle("k")
    log.settle("k2")
    add_version(log, "k2")
    assert log.state.op_keys == {"k2": 1}


@pytest.mark.parametrize("next_key", ["k", "k2"])
def test_an_acquisition_that_lands_late_is_known_as_ones_own(next_key: str) -> None:
    storage = fresh_storage()
    sent: list[bytes] = []

    class Slow(FaultyStorage):
        def create(self, key: str, content: bytes) -> bool:
            if key == log_key(2):
                sent.append(content)
                raise Unavailable("no answer", key)
            return super().create(key, content)

    log = writing(Slow(storage, in_turn()))
    for key, error in (("k", OutcomeUnknown), ("k2", NotWritten)):  # the second sends an acquisition
        with pytest.raises(error):
            request(log, key)
    assert json.loads(sent[-1])["op"] == "acquire"
    assert storage.create(log_key(2), sent[-1])
    request(log, next_key)
    assert (log.epoch, reading(storage).op_keys) == (2, {next_key: 1})


class Refusing(FaultyStorage):
    """Has no space for records while `full`."""

    full = False

    def create(self, key: str, content: bytes) -> bool:
        if self.full:
            raise StoreFull("no space left", key)
        return super().create(key, content)


def test_what_the_storage_refused_has_failed_and_is_not_done_when_there_is_space_again() -> None:
    storage = fresh_storage()
    refusing = Refusing(storage, in_turn())
    log = writing(refusing)
    refusing.full = True
    with pytest.raises(StoreFull):
        add_version(log, "k")
    refusing.full = False
    add_version(log, "k2")
    assert [record.op_key for record in opened_log(storage).records()] == ["", "k2"]


def test_a_refusal_after_an_attempt_without_an_answer_proves_nothing() -> None:
    refusing = Refusing(fresh_storage(), lambda key: full_from_now_on())

    def full_from_now_on() -> str | None:
        refusing.full = bool(log.epoch)
        return "before" if log.epoch else None

    log = VersionLog(refusing, "writer", wait=no_wait)
    log.open()
    log.acquire("writer")
    with pytest.raises(OutcomeUnknown, match="no space left"):
        add_version(log, "k")


def test_an_unknown_outcome_that_was_written_is_found_by_reading() -> None:
    class Deaf(FaultyStorage):
        def read(self, key: str) -> bytes:
            if deaf and key == log_key(2):
                raise Unavailable("no answer", key)
            return super().read(key)

    deaf = False
    storage = fresh_storage()
    log = writing(Deaf(storage, in_turn(None, "after", *["before"] * TRIES)))
    deaf = True
    with pytest.raises(Unavailable, match="unknown"):
        add_version(log, "k")
    deaf = False
    assert log.refresh().op_keys == {"k": 1}
    add_version(log, "k2")
    assert reading(storage).seq == 3


def test_two_writers_in_one_epoch_are_an_alarm() -> None:
    storage = fresh_storage()
    log = writing(storage)
    twin = VersionLog(storage, "twin", wait=no_wait)
    twin.open()
    twin.epoch = log.epoch  # what a storage that ignores create-if-absent makes possible
    add_version(twin)
    for _ in range(2):
        with pytest.raises(Corrupt, match="used by two writers"):
            add_version(log)


def test_a_changed_record_breaks_the_chain() -> None:
    storage = fresh_storage()
    log = writing(storage)
    add_version(log)
    add_version(log)
    changed = json.loads(storage.read(log_key(2)))
    changed["actor"] = "somebody else"
    storage.write(log_key(2), json.dumps(changed, sort_keys=True, separators=(",", ":")).encode())
    with pytest.raises(Corrupt, match="the chain is broken"):
        reading(storage)


def test_a_missing_record_before_later_ones_is_noticed() -> None:
    storage = fresh_storage()
    log = writing(storage)
    add_version(log)
    add_version(log)
    storage.delete(log_key(2))
    with pytest.raises(Corrupt, match=r"record 2 is missing, but log/0+3\.json exists"):
        reading(storage)


def test_a_record_that_is_no_json_is_corrupt() -> None:
    storage = fresh_storage()
    writing(storage)
    storage.write(log_key(2), b"{half")
    with pytest.raises(Corrupt, match="is not JSON"):
        reading(storage)


def long_log(storage: Storage) -> VersionLog:
    """130 records: checkpoints at 64 and 128."""
    log = writing(storage)
    while log.state.seq < 130:
        add_version(log, f"k{log.state.seq}")
    return log


class Counting(FaultyStorage):
    """Counts reads of records."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner, in_turn())
        self.records = 0

    def read(self, key: str) -> bytes:
        self.records += key.startswith("log/0")
        return super().read(key)


def test_a_checkpoint_spares_the_records_before_it() -> None:
    storage = fresh_storage()
    log = long_log(storage)
    counting = Counting(storage)
    assert reading(counting) == log.state
    # 128 to trust the checkpoint; 129 and 130; 131 is absent, asked once more after the listing.
    assert counting.records == 5
    assert storage.read(HINT) == b"128"


@pytest.mark.parametrize("damage", ["missing", "half", "other state", "other chain", "no hint", "wrong hint"])
def test_a_missing_or_damaged_checkpoint_falls_back_to_the_log(damage: str) -> None:
    storage = fresh_storage()
    log = long_log(storage)
    key, content = checkpoint_key(128), storage.read(checkpoint_key(128))
    if damage == "missing":
        storage.delete(key)
        storage.delete(checkpoint_key(64))
    elif damage == "half":
        storage.write(key, content[:1000])
    elif damage == "other state":
        storage.write(key, content.replace(b'"candidate":127', b'"candidate":126'))
    elif damage == "other chain":
        storage.write(key, storage.read(checkpoint_key(64)))
    elif damage == "no hint":
        storage.delete(HINT)
    else:
        storage.write(HINT, b"99999")
    assert to_plain(reading(storage)) == to_plain(log.state)


def test_records_come_in_both_directions() -> None:
    storage = fresh_storage()
    log = writing(storage)
    add_version(log)
    assert [record.op for record in log.records()] == ["acquire", "merge"]
    assert [record.seq for record in log.records(newest_first=True)] == [2, 1]


def test_of_two_that_open_at_once_both_get_an_epoch_and_the_later_one_writes() -> None:
    storage = fresh_storage()
    other: list[VersionLog] = []

    def somebody_first(key: str) -> None:
        if key == log_key(1) and not other:
            other.append(VersionLog(storage, "other", wait=no_wait))
            other[0].open()
            other[0].acquire("other")

    log = writing(FaultyStorage(storage, somebody_first))
    assert (other[0].epoch, log.epoch) == (1, 2)
    add_version(log)
    with pytest.raises(Conflict):
        add_version(other[0])


def request(log: VersionLog, op_key: str) -> None:
    """What SubspaceStore does with every request: settle, look it up, else do it."""
    log.settle(op_key)
    if op_key not in log.state.op_keys:
        add_version(log, op_key)


@pytest.mark.parametrize("block", range(4))
def test_whatever_fails_every_acknowledged_request_is_in_the_log_exactly_once(block: int) -> None:
    for seed in range(50 * block, 50 * block + 50):
        dice = random.Random(seed)
        storage = fresh_storage()
        faulty = FaultyStorage(storage, lambda key, d=dice: d.choices([None, "before", "after"], [5, 3, 3])[0])  # type: ignore[misc]
        logs: list[VersionLog] = []
        acknowledged = []
        for number in range(12):
            for _ in range(40):
                try:
                    if not logs or dice.random() < 0.15:
                        log = VersionLog(faulty, f"writer {len(logs)}", wait=no_wait)
                        log.open()
                        log.acquire("test")
                        logs.append(log)
                    # An old writer may still believe that it is the one.
                    request(dice.choice(logs[-2:]), f"k{number}")
                    acknowledged.append(f"k{number}")
                    break
                except (Unavailable, Conflict):
                    continue
        records = [r.op_key for r in opened_log(storage).records() if r.op == MERGE]
        assert sorted(records) == sorted(set(records)), seed
        assert set(acknowledged) <= set(records), seed
        assert len(acknowledged) == 12, seed


def opened_log(storage: Storage) -> VersionLog:
    log = VersionLog(storage)
    log.open()
    return log


def test_an_absent_log_is_an_empty_subspace() -> None:
    assert reading(fresh_storage()) == SubspaceState()
    with pytest.raises(NotFound):
        fresh_storage().read(log_key(1))


def every_operation(log: VersionLog) -> None:
    """Each operation at least once, and each that undoes one."""
    for number in range(1, 6):
        add_version(log, f"k{number}")
        log.commit(PUBLISH, op_key="", actor="gate", refs={"main": number}, body={"version": number})
    log.commit(TAG, op_key="t", actor="ann", body={"name": "gold", "version": 2})
    log.commit(HOLD, op_key="h", actor="ann", body={"reason": "audit"})
    log.commit(RELEASE, op_key="", actor="ann")
    for task in ("bad", "worse"):
        log.commit(QUARANTINE, op_key="", actor="ann", body={"task_id": task, "reason": f"{task} data"})
    log.commit(UNQUARANTINE, op_key="", actor="ann", body={"task_id": "worse"})
    for version, owner, until in ((3, "serving", 7.5), (3, "audit", None), (4, "audit", None), (1, "late", 1.0)):
        log.commit(PIN, op_key="", actor="ann", body={"version": version, "owner": owner, "until": until})
    log.commit(UNPIN, op_key="", actor="ann", body={"version": 4, "owner": "audit"})
    log.commit(EXPIRE, op_key="", actor="ann", body={"versions": [4, 1], "now": 2.0})
    log.commit(DROP_ADAPTERS, op_key="", actor="ann", body={"heads": {"blobs/1/adapter": REF}})
    body = {"version": 3, "from": 5, "reason": "worse", "hold": True}
    log.commit(ROLLBACK, op_key="r", actor="bob", refs={"main": 3, "candidate": 3}, body=body)


def test_names_holds_pins_and_the_dead_are_folded() -> None:
    storage = fresh_storage()
    log = writing(storage)
    every_operation(log)
    state = reading(storage)
    assert state == log.state
    assert state.tags == {"gold": 2}
    assert state.held is not None
    assert (state.held.actor, state.held.reason) == ("bob", "worse")
    assert state.quarantined == {"bad": "bad data"}
    assert state.pins == {3: {"serving": 7.5, "audit": None}}
    assert state.expired == (1, 4)
    assert state.heads == {"blobs/1/adapter": REF}
    assert {key: state.op_keys[key] for key in "thr"} == {"t": 2, "h": 0, "r": 3}


def test_a_checkpoint_holds_all_of_it_and_one_of_before_is_still_read(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = fresh_storage()
    log = writing(storage)
    every_operation(log)
    monkeypatch.setattr("subspace_store.log.version_log.CHECKPOINT_EVERY", log.state.seq + 1)
    log.commit(RELEASE, op_key="", actor="ann")
    counting = Counting(storage)
    assert reading(counting) == log.state
    assert counting.records == 3
    # As written by code that knew no tags, holds, pins or quarantine.
    old = json.loads(to_json(to_plain(VersionLog(storage).open())))
    plain = {"seq": 1, "epoch": 1, "head_sha256": digest(storage.read(log_key(1)))}
    plain |= {name: type(old[name])() for name in ("versions", "scores", "rejected", "op_keys")}
    plain |= {"refs": {"candidate": 0, "main": 0}, "published": [0]}
    for key in storage.keys("checkpoints/"):
        storage.delete(key)
    storage.write(checkpoint_key(1), to_json({"state": plain, "sha256": digest(to_json(plain))}))
    counting = Counting(storage)
    assert reading(counting) == log.state
    assert counting.records == log.state.seq + 2  # the checkpoint's own twice, not folded again


def to_json(plain: object) -> bytes:
    return json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()


@pytest.mark.parametrize("body", [{}, {"version": "three", "name": "x"}, {"version": 1}])
def test_an_operation_without_what_it_needs_is_wrong_input_and_gets_no_slot(body: dict[str, object]) -> None:
    log = writing(fresh_storage())
    with pytest.raises(InvalidInput, match="is no tag of this format"):
        log.commit(TAG, op_key="k", actor="a", body=body)
    assert log.state.seq == 1
    with pytest.raises(InvalidInput, match="operation 'dance' that this code does not know"):
        log.commit("dance", op_key="k", actor="a")


# Whose store it is

MINE, THEIRS = Identity("mine", "here:/mine"), Identity("theirs", "there:/theirs")


def owned(storage: Storage, service: Identity | None, **how: bool) -> VersionLog:
    log = VersionLog(storage, "writer", wait=no_wait)
    log.open()
    log.acquire("writer", service, **how)
    return log


def test_a_store_that_a_service_claimed_refuses_all_others_until_it_is_released() -> None:
    storage = fresh_storage()
    mine = owned(storage, MINE, claim=True)
    for other in (THEIRS, None):
        with pytest.raises(OwnedByAnother, match="belongs to the service here:/mine") as caught:
            owned(storage, other, claim=other is not None)
        assert (caught.value.service_id, caught.value.name) == ("mine", "here:/mine")
    add_version(mine)  # nobody was fenced by those who were refused
    mine.release("me", MINE)
    assert reading(storage).owner is None
    add_version(mine)  # and the writer that released it goes on
    theirs = owned(storage, THEIRS, claim=True)
    assert theirs.state.owner is not None
    assert theirs.state.owner.service_id == "theirs"
    with pytest.raises(Fenced):
        add_version(mine)


def test_the_same_service_opens_again_and_owns_the_store_since_it_first_did() -> None:
    storage = fresh_storage()
    first = owned(storage, MINE, claim=True).state.owner
    again = owned(storage, MINE, claim=True).state.owner
    assert first is not None
    assert again == first


def test_a_writer_that_claims_nothing_leaves_the_owner_as_it_is() -> None:
    storage = fresh_storage()
    assert owned(storage, MINE).state.owner is None
    owner = owned(storage, MINE, claim=True).state.owner
    assert owned(storage, MINE).state.owner == owner  # a command of the same service
    assert owned(storage, None, force=True).state.owner == owner  # a command elsewhere, with --force


def test_a_takeover_is_deliberate_and_the_old_service_cannot_come_back_by_itself() -> None:
    storage = fresh_storage()
    mine = owned(storage, MINE, claim=True)
    owned(storage, THEIRS, claim=True, force=True)
    with pytest.raises(Fenced):
        add_version(mine)
    with pytest.raises(OwnedByAnother, match="there:/theirs"):
        owned(storage, MINE, claim=True)
    mine.release("me", MINE)  # it ends: what is another's by now is not given up
    owner = reading(storage).owner
    assert owner is not None
    assert owner.service_id == "theirs"


def test_of_two_services_that_open_an_empty_store_at_once_one_has_it() -> None:
    storage = fresh_storage()
    one, two = (VersionLog(storage, name, wait=no_wait) for name in ("one", "two"))
    one.open(), two.open()  # both see that it is nobody's
    one.acquire("one", MINE, claim=True)
    with pytest.raises(OwnedByAnother):
        two.acquire("two", THEIRS, claim=True)
    add_version(one)
    assert [record.epoch for record in one.records()] == [1, 1]


def test_a_log_from_before_there_were_owners_is_nobodys_and_its_checkpoints_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage = fresh_storage()
    monkeypatch.setattr("subspace_store.log.version_log.CHECKPOINT_EVERY", 2)
    add_version(writing(storage))
    plain = json.loads(storage.read(checkpoint_key(2)))["state"]
    del plain["owner"], plain["rejected_for"]
    folded = json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()
    storage.write(checkpoint_key(2), b'{"sha256":"%s","state":%s}' % (digest(folded).encode(), folded))
    assert reading(storage).owner is None
    assert max(reading(storage).versions) == 1


EVIL = "\x1b[31mred\x07 half \ud800 \x9b end"


def test_a_log_with_reasons_of_before_they_were_checked_is_read_and_shows_them_as_plain_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage = fresh_storage()
    log = writing(storage)
    add_version(log)
    log.commit(HOLD, op_key="h", actor=EVIL, body={"reason": EVIL + "x" * 5_000_000})
    log.commit(QUARANTINE, op_key="q", actor="ann", body={"task_id": "bad", "reason": EVIL})
    monkeypatch.setattr("subspace_store.log.version_log.CHECKPOINT_EVERY", log.state.seq + 1)
    log.commit(TAG, op_key="t", actor="ann", body={"name": "gold", "version": 1})
    storage_without = MemoryStorage(fresh_storage().name)
    for key in storage.keys("log/0"):
        storage_without.write(key, storage.read(key))
    for place in (storage, storage_without):  # from the checkpoint, and from the records
        state = reading(place)
        assert state.held is not None
        assert state.held.actor == r"\x1b[31mred\x07 half \ud800 \x9b end"
        assert state.held.reason.startswith(r"\x1b[31mred\x07 half \ud800 \x9b endxxx")
        assert len(state.held.reason) == LINE_MAX
        assert state.quarantined == {"bad": r"\x1b[31mred\x07 half \ud800 \x9b end"}
        json.dumps(to_plain(state), ensure_ascii=False).encode()  # as HTTP sends it
    assert [record.seq for record in opened_log(storage).records()] == [1, 2, 3, 4, 5]
    again = writing(storage, "again")  # the chain is what it was
    add_version(again)
    assert reading(storage).tags == {"gold": 1}
