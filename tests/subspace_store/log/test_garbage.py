"""Collecting deletes what nobody can need again, and nothing else."""

import random
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pytest

from configs.errors import Conflict, Fenced, NotFound, Unavailable
from subspace_store import Storage, SubspaceStore, Version, adapter_to_bytes
from subspace_store.log.garbage import Collected
from subspace_store.log.retention import alive, expirable, needed
from subspace_store.log.version_log import HINT, TRIES, checkpoint_key
from subspace_store.storage.local import TEMPORARY, LocalStorage
from subspace_store.storage.protocol import ObjectStream
from subspace_store.verify import verify
from tests.subspace_store.builders import SHAPES, FaultyStorage, fresh_storage, merged, opened, random_adapter, reading

Contents = dict[tuple[int, str], bytes]


@pytest.fixture(autouse=True)
def _snapshots_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subspace_store.merge_writer.SNAPSHOT_EVERY", 3)


def grown(storage: Storage | None = None, count: int = 8) -> SubspaceStore:
    """So many published versions; every second task adapts one module only. Merging drops directions."""
    store = opened(storage, energy_ratio_min=0.8)
    for number in range(1, count + 1):
        shapes = SHAPES if number % 2 else dict([*SHAPES.items()][:1])
        merged(store, {f"t{number}": random_adapter(number, shapes=shapes)})
        store.publish(number, op_key=f"publish {number}", actor="test")
    return store


def contents(storage: Storage) -> Contents:
    """(version, task) to the served adapter, bit for bit, of all that is alive; read by a reader of its own."""
    reader = reading(storage)
    state = reader.state
    return {
        (version.number, task): adapter_to_bytes(reader.adapter(task, version.number))
        for version in alive(state)
        for task in state.tasks_at(version.number)
    }


def successor(store: SubspaceStore) -> SubspaceStore:
    """The next epoch's writer, which may delete what earlier ones wrote."""
    return opened(store.storage, writer="successor", energy_ratio_min=0.8)


def blobs_of(store: SubspaceStore) -> set[str]:
    return set(store.storage.keys("blobs/"))


def expire_old(store: SubspaceStore, keep_last: int) -> list[int]:
    old = expirable(store.state, keep_last, now=0.0)
    store.expire(old, actor="test")
    return old


# What stays and what goes


@pytest.mark.parametrize("keep_last", [1, 2, 3, 5])
def test_after_expiring_and_collecting_every_live_version_is_bit_for_bit_what_it_was(keep_last: int) -> None:
    store = successor(grown())
    before, had = contents(store.storage), blobs_of(store)
    dead = expire_old(store, keep_last)
    assert len(dead) == 8 - keep_last
    found = store.collect()
    assert set(found.blobs) == had - blobs_of(store) != set()
    assert blobs_of(store) == set(needed(store.state))
    left = {key: content for key, content in before.items() if key[0] not in dead}
    assert contents(store.storage) == left
    assert verify(store) == []
    merged(store, {"t9": random_adapter(9)})
    assert verify(store) == []


def test_without_expired_versions_there_is_no_garbage() -> None:
    store = successor(grown())
    assert store.collect() == Collected(blobs=(), uploads=(), checkpoints=(), trials=(), size_bytes=0, deleted=True)


def test_looking_deletes_nothing_and_finds_what_deleting_deletes() -> None:
    store = successor(grown())
    expire_old(store, keep_last=1)
    everything = store.storage.keys("")
    looked = store.collectable()
    assert store.storage.keys("") == everything
    deleted = store.collect()
    assert (looked.deleted, deleted.deleted) == (False, True)
    assert looked.keys == deleted.keys != ()
    assert looked.size_bytes == deleted.size_bytes
    assert store.collect().keys == ()


def test_the_size_is_that_of_the_objects() -> None:
    store = successor(grown())
    expire_old(store, keep_last=1)
    looked = store.collectable()
    assert looked.size_bytes == sum(len(store.storage.read(key)) for key in looked.blobs)


def test_what_lies_before_a_snapshot_is_not_needed_to_read_what_comes_after_it() -> None:
    store = successor(grown(count=20))
    snapshot = max(v.number for v in store.state.versions.values() if v.snapshot is not None)
    assert 1 < snapshot < 20
    expire_old(store, keep_last=1)
    store.collect()
    there = blobs_of(store)
    assert [v.number for v in alive_or_not(store) if v.transport.key in there] == [*range(snapshot + 1, 21)]
    assert [v.number for v in alive_or_not(store) if v.added[0].coefficients.key in there] == [*range(snapshot + 1, 21)]


def alive_or_not(store: SubspaceStore) -> list[Version]:
    return [version for _, version in sorted(store.state.versions.items())]


def test_versions_that_share_a_past_with_an_expired_one_keep_it() -> None:
    store = successor(grown(count=5))
    store.rollback(2, op_key="back", actor="test")
    merged(store, {"other": random_adapter(20)})
    store.publish(6, op_key="publish 6", actor="test")
    before = contents(store.storage)
    store.expire([1, 2, 4], actor="test")
    store.collect()
    assert contents(store.storage) == {key: value for key, value in before.items() if key[0] in (3, 5, 6)}
    assert verify(store) == []


def test_the_log_is_never_touched() -> None:
    store = successor(grown())
    log = {key: store.storage.read(key) for key in store.storage.keys("log/")}
    expire_old(store, keep_last=1)
    log |= {key: store.storage.read(key) for key in store.storage.keys("log/")}
    store.collect()
    assert {key: store.storage.read(key) for key in store.storage.keys("log/")} == log


def test_a_reader_that_holds_a_pinned_version_keeps_reading() -> None:
    store = successor(grown())
    reader = reading(store.storage)
    store.pin(2, "reader", time.time() + 3600, actor="test")
    store.expire([n for n in range(1, 8) if n != 2], actor="test")
    before = contents(store.storage)[2, "t1"]
    store.collect()
    assert adapter_to_bytes(reader.adapter("t1", 2)) == before
    store.pin(2, "reader", time.time() - 1, actor="test")
    store.expire([2], actor="test")
    store.collect()
    with pytest.raises(NotFound, match="version 2 has expired"):
        reading(store.storage).adapter("t1", 2)


READS: dict[str, Callable[[SubspaceStore], object]] = {
    "adapter": lambda reader: reader.adapter("t1", 1),
    "ranks": lambda reader: reader.ranks(1),
    "basis": lambda reader: reader.basis(1),
    "subspace": lambda reader: reader.subspace(1),
    "footprint": lambda reader: reader.footprint(1),
    "diff": lambda reader: reader.diff(1, 8),
    "forecast": lambda reader: reader.forecast({"x": random_adapter(90)}, 1),
}


@pytest.mark.parametrize("read", READS)
def test_a_reader_that_did_not_see_its_version_expire_is_told_so_and_of_no_damage(read: str) -> None:
    store = successor(grown())
    reader = reading(store.storage)
    expire_old(store, keep_last=1)
    store.collect()
    with pytest.raises(NotFound, match="version 1 has expired"):
        READS[read](reader)


# Epochs


def half_merged(storage: Storage) -> tuple[SubspaceStore, set[str]]:
    """A writer that wrote the blobs of a merge and could not commit; and these blobs."""
    failing = False
    faulty = FaultyStorage(storage, lambda key: "before" if failing and key.startswith("log/") else None)
    store = opened(faulty, writer="unlucky")
    store._log._wait = lambda seconds: None
    had = blobs_of(store)
    failing = True
    with pytest.raises(Unavailable, match=f"after {TRIES} tries"):
        merged(store, {"half": random_adapter(50)})
    failing = False
    return store, blobs_of(store) - had


def test_the_blobs_of_a_merge_that_never_was_go_with_the_next_epoch_and_not_with_its_own() -> None:
    storage = fresh_storage()
    grown(storage, count=2)
    unlucky, half = half_merged(storage)
    assert half
    unlucky._log._pending = None  # as if its process had forgotten: nobody will commit this merge any more
    assert unlucky.collect().blobs == ()
    assert half <= blobs_of(unlucky)
    store = opened(storage, writer="next")
    assert set(store.collect().blobs) == half
    assert verify(store) == []


def test_what_a_killed_writer_had_begun_to_write_goes_with_the_next_epoch_and_not_with_its_own(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path))
    store = grown(storage, count=2)
    killed = storage.stream("blobs/0000000001/half", 8)
    killed.__enter__().append(bytes(100))
    begun = [*tmp_path.rglob(f"{TEMPORARY}*")]
    assert len(begun) == 1
    assert store.collect().abandoned == 0
    successor = opened(storage, writer="next")
    assert successor.collectable().abandoned == 0
    assert begun[0].exists()
    assert successor.collect().abandoned == 1
    assert not begun[0].exists()
    assert verify(successor) == []


def test_many_deletes_travel_together_and_all_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    store = successor(grown())
    monkeypatch.setattr("subspace_store.log.garbage.MANY", 3)
    expire_old(store, keep_last=1)
    together = threading.Barrier(2, timeout=30)
    delete, rest = store.storage.delete, iter([*range(2)])

    def meeting(key: str) -> None:
        if next(rest, None) is not None:
            together.wait()  # the first waits for the second
        delete(key)

    monkeypatch.setattr(store.storage, "delete", meeting)
    assert len(store.collect().keys) > 3
    assert blobs_of(store) == set(needed(store.state))


def test_a_merge_of_unknown_outcome_is_settled_before_anything_is_judged() -> None:
    storage = fresh_storage()
    grown(storage, count=2)
    unlucky, half = half_merged(storage)
    unlucky.collect()
    assert 3 not in unlucky.state.versions  # and it never will be, unless it is asked for again
    assert not half & blobs_of(unlucky)
    assert opened(storage, writer="next").collect().blobs == ()
    assert blobs_of(unlucky) == set(needed(unlucky.state))


def test_a_fenced_writer_collects_nothing() -> None:
    store = successor(grown())
    expire_old(store, keep_last=1)
    everything = store.storage.keys("blobs/")
    opened(store.storage, writer="newer")
    with pytest.raises(Fenced, match="epoch 3"):
        store.collect()
    assert store.storage.keys("blobs/") == everything


class Interrupted(FaultyStorage):
    """Does something once, just before the first delete, or after the first blob was written."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner, lambda key: None)
        self.before_delete: Callable[[], object] | None = None
        self.after_blob: Callable[[], object] | None = None

    def delete(self, key: str) -> None:
        then, self.before_delete = self.before_delete, None
        if then is not None:
            then()
        super().delete(key)

    def write(self, key: str, content: bytes) -> None:
        super().write(key, content)
        self._written(key)

    def stream(self, key: str, head_size: int) -> AbstractContextManager[ObjectStream]:
        self._written(key)
        return super().stream(key, head_size)

    def _written(self, key: str) -> None:
        if key.startswith("blobs/"):
            then, self.after_blob = self.after_blob, None
            if then is not None:
                then()


def test_a_collector_that_was_stalled_and_fenced_before_its_deletes_still_deletes_only_garbage() -> None:
    storage = Interrupted(fresh_storage())
    store = successor(grown(storage))
    expire_old(store, keep_last=2)
    before: Contents = {}

    def meanwhile() -> None:
        newer = opened(storage.inner, writer="newer", energy_ratio_min=0.8)
        newer.rollback(7, op_key="back", actor="test")
        merged(newer, {"new": random_adapter(30)})
        newer.publish(9, op_key="publish 9", actor="test")
        newer.expire([8], actor="test")
        newer.collect()
        half_merged(storage.inner)
        before.update(contents(storage.inner))

    storage.before_delete = meanwhile
    store.collect()
    assert {number for number, _ in before} == {7, 9}
    assert contents(storage.inner) == before
    assert verify(reading(storage.inner)) == []


def test_collecting_in_another_thread_spares_the_blobs_of_a_merge_under_way_and_does_not_wait_for_it() -> None:
    storage = Interrupted(fresh_storage())
    store = successor(grown(storage))
    expire_old(store, keep_last=1)
    found: list[Collected] = []

    def meanwhile() -> None:
        collector = threading.Thread(target=lambda: found.append(store.collect()))
        collector.start()
        collector.join(30)

    storage.after_blob = meanwhile
    merged(store, {"t9": random_adapter(9)})
    assert len(found) == 1
    assert found[0].blobs != ()
    assert verify(store) == []
    assert blobs_of(store) == set(needed(store.state))


@pytest.mark.parametrize("seed", range(6))
def test_whatever_is_done_in_whatever_order_live_versions_never_change(seed: int) -> None:
    dice = random.Random(seed)
    storage = fresh_storage()
    store = opened(storage, energy_ratio_min=0.8)
    known: Contents = {}
    for step in range(25):
        state = store.state
        act = dice.choice(["merge", "merge", "publish", "publish", "reject", "rollback", "expire", "collect", "reopen"])
        waits = state.refs["candidate"] != state.refs["main"]
        usable = [n for n in state.published if n not in state.expired]
        if act == "merge":
            merged(store, {f"s{step}": random_adapter(100 * seed + step)})
        elif act == "publish" and waits:
            store.publish(state.refs["candidate"], op_key=f"p{step}", actor="test")
        elif act == "reject" and waits:
            store.reject(state.refs["candidate"], "why", op_key=f"r{step}", actor="test")
        elif act == "rollback" and dice.random() < 0.5:
            store.rollback(dice.choice(usable), op_key=f"b{step}", actor="test")
        elif act == "expire":
            free = [v.number for v in alive(state) if v.number not in state.refs.values()]
            store.expire(dice.sample(free, len(free) // 2), actor="test")
        elif act == "collect":
            store.collect()
        elif act == "reopen":
            store = opened(storage, writer=f"writer {step}", energy_ratio_min=0.8)
        now = contents(storage)
        assert {key: known[key] for key in now.keys() & known.keys()} == {key: now[key] for key in now.keys() & known}
        known |= now
    assert verify(store) == []


# Beside blobs


def test_uploads_go_unless_they_are_in_use_and_stay_if_nobody_was_asked() -> None:
    store = grown(count=3)
    uploads = {f"staging/t{n}/1/adapter.safetensors" for n in (1, 2, 3)}
    assert set(store.storage.keys("staging/")) == uploads
    assert store.collect().uploads == ()
    asked_after: list[int] = []

    def in_use() -> list[str]:
        store.storage.write("staging/late/1/adapter.safetensors", b"came between the listing and the question")
        asked_after.append(len(store.storage.keys("staging/")))
        return ["t2"]

    found = store.collect(uploads_in_use=in_use)
    assert asked_after == [4]
    assert set(found.uploads) == uploads - {"staging/t2/1/adapter.safetensors"}
    assert store.storage.keys("staging/") == [
        "staging/late/1/adapter.safetensors",
        "staging/t2/1/adapter.safetensors",
    ]


def test_of_the_checkpoints_the_newest_two_stay_and_a_reader_opens_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subspace_store.log.version_log.CHECKPOINT_EVERY", 4)
    store = grown()
    state = store.state
    assert store.storage.keys("checkpoints/") == [checkpoint_key(seq) for seq in (4, 8, 12, 16)]
    found = store.collect()
    assert found.checkpoints == (checkpoint_key(4), checkpoint_key(8))
    store.storage.write(HINT, b"4")
    assert reading(store.storage).state == state


# Adapters as delivered


def test_an_adapter_that_was_let_go_leaves_its_head_and_what_the_subspace_holds() -> None:
    store = successor(grown(count=4))
    before, facts = contents(store.storage), store.delivered("t2")
    wanted = store.state.versions[2].added[0].adapter.key
    store.drop_adapters(["t2"], actor="test")
    assert store.history()[-1].summary == "1 adapter"
    found = store.collect()
    assert found.blobs == (wanted,)
    assert found.size_bytes == store.state.versions[2].added[0].adapter.size_bytes
    assert contents(store.storage) == before
    reader = reading(store.storage)
    served = reader.adapter("t2")
    assert (served.info, list(served.head)) == (facts.info, list(facts.head))
    with pytest.raises(NotFound, match=r"task team/t2 \(t2\): its adapter as delivered was let go"):
        reader.delivered("t2")
    assert adapter_to_bytes(reader.delivered("t3")) == adapter_to_bytes(store.delivered("t3"))
    assert verify(store) == []
    assert verify(store, deep=False) == []


def test_an_adapter_is_let_go_once_and_after_another_task_was_removed_its_approximation_is_kept() -> None:
    store = successor(grown(count=4))
    store.drop_adapters(["t2", "t3"], actor="test")
    seq, blobs = store.state.seq, blobs_of(store)
    store.drop_adapters(["t3"], actor="test")
    assert (store.state.seq, blobs_of(store)) == (seq, blobs)
    made = store.remove("t1", op_key="r", actor="test")
    assert made is not None
    assert [version.approximate for version in store.state.lineage(made.number)] == [("t2",), ("t3",), ()]
    store.publish(made.number, op_key="p", actor="test")
    store.expire([1, 2, 3, 4], actor="test")
    store = successor(store)
    store.collect()
    assert verify(store) == []
    assert list(store.delivered("t2").head) == ["classifier.weight"]


def test_an_adapter_without_a_head_is_let_go_too() -> None:
    store = opened()
    merged(store, {"bare": replace(random_adapter(1), head={})})
    store.publish(1, op_key="p", actor="test")
    store.drop_adapters(["bare"], actor="test")
    assert reading(store.storage).adapter("bare").head == {}


def test_what_is_not_published_keeps_its_adapter_and_what_was_rejected_stands_in_nobodys_way() -> None:
    store = grown(count=2)
    merged(store, {"t3": random_adapter(3), "t4": random_adapter(4)}, op_key="together")
    for task, error in (("t3", Conflict), ("nobody", NotFound)):
        with pytest.raises(error):
            store.drop_adapters(["t1", task], actor="test")
    store.reject(3, "one of them forgot", op_key="r", actor="gate")
    with pytest.raises(NotFound):
        store.drop_adapters(["t3"], actor="test")
    merged(store, {"t3": random_adapter(3)}, op_key="alone")
    store.publish(4, op_key="p4", actor="test")
    assert store.state.heads == {}
    store.drop_adapters(["t3"], actor="test")
    assert list(store.state.heads) == [store.state.versions[4].added[0].adapter.key]


def test_what_no_live_version_holds_is_not_delivered_any_more() -> None:
    store = grown(count=2)
    store.rollback(1, op_key="back", actor="test")
    assert store.delivered("t2")
    store.expire([2], actor="test")
    with pytest.raises(NotFound, match="no version holds the task t2"):
        store.delivered("t2")
