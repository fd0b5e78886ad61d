"""A store is copied while it is written to and collected, and what is restored is the same store, bit for bit."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.errors import Conflict, Corrupt, NotFound, Unavailable
from subspace_store import Storage, archive
from subspace_store.archive import Archive
from subspace_store.backup import StoreCopy, check_empty, copy_store, restore_store
from subspace_store.log.retention import alive, expirable
from subspace_store.log.version_log import checkpoint_key
from subspace_store.storage.local import LocalStorage
from subspace_store.verify import verify
from tests.subspace_store.builders import (
    FaultyStorage,
    fresh_storage,
    merged,
    opened,
    random_adapter,
    reading,
)
from tests.subspace_store.log.test_garbage import contents, grown, successor


def restored(archive: Archive, copy: StoreCopy) -> Storage:
    """A new place with the store of a backup; everything is as its log says."""
    place = fresh_storage()
    assert restore_store(archive, copy, place) == len(copy.objects)
    assert verify(reading(place), deep=True) == []
    return place


class Watched(FaultyStorage):
    """Counts what is read, and tells before a blob is looked at."""

    def __init__(self, inner: Storage, before: Callable[[str], None] = lambda key: None) -> None:
        super().__init__(inner, lambda key: None)
        self.reads: Counter[str] = Counter()
        self.before = before

    def read(self, key: str) -> bytes:
        self.reads[key] += 1
        self.before(key)
        return super().read(key)

    def view(self, key: str, start: int = 0, size: int | None = None) -> memoryview:
        self.reads[key] += 1
        self.before(key)
        return super().view(key, start, size)


def test_what_was_backed_up_is_the_same_store_and_goes_on() -> None:
    store = grown()
    store.storage.write("data/t1/rows", b"rows")
    store.storage.write("doctor/1-a/create", b"somebody's trial")
    kept = Archive(fresh_storage())
    copy = copy_store(store.storage, kept)
    place = restored(kept, copy)
    assert contents(place) == contents(store.storage)
    assert place.read("data/t1/rows") == b"rows"
    assert place.keys("doctor/") == []
    again = opened(place, writer="restored", energy_ratio_min=0.8)
    version = merged(again, {"t9": random_adapter(9)})
    assert version.number == store.state.refs["candidate"] + 1


def test_a_long_log_is_opened_from_its_checkpoint() -> None:
    store = opened()
    for number in range(70):
        store.pin(0, f"owner {number}", None, op_key=f"pin {number}", actor="test")
    kept = Archive(fresh_storage())
    place = restored(kept, copy_store(store.storage, kept))
    assert place.keys("checkpoints/") == [checkpoint_key(64)]
    assert reading(place).state == store.state


def test_a_store_that_was_never_opened_is_backed_up_as_nothing() -> None:
    kept = Archive(fresh_storage())
    copy = copy_store(fresh_storage(), kept)
    assert (copy.seq, copy.objects) == (0, {})


def test_a_backup_during_merges_is_a_state_that_was() -> None:
    store = grown(count=2)
    stop, kept = threading.Event(), Archive(fresh_storage())

    def merge() -> None:
        number = 2
        while not stop.is_set() and number < 60:
            number += 1
            merged(store, {f"t{number}": random_adapter(number)})
            store.publish(number, op_key=f"publish {number}", actor="test")

    merging = threading.Thread(target=merge)
    merging.start()
    try:
        copies = [copy_store(store.storage, kept) for _ in range(4)]
    finally:
        stop.set()
        merging.join()
    assert [copy.seq for copy in copies] == sorted(copy.seq for copy in copies)
    everything = contents(store.storage)
    for copy in (copies[0], copies[-1]):
        assert contents(restored(kept, copy)).items() <= everything.items()


def test_what_is_collected_meanwhile_is_left_out_and_nothing_else() -> None:
    store = grown()
    writer = successor(store)
    done = threading.Event()

    def collect(key: str) -> None:
        """As soon as a blob is read, most versions expire and their blobs are deleted."""
        if key.startswith("blobs/") and not done.is_set():
            done.set()
            dying = expirable(writer.state, keep_last=1, now=0.0)
            assert len(dying) == 7
            writer.expire(dying, op_key="expire", actor="test")
            assert writer.collect().blobs

    kept = Archive(fresh_storage())
    copy = copy_store(Watched(store.storage, collect), kept)
    place = restored(kept, copy)
    assert contents(place) == contents(store.storage)
    assert [version.number for version in alive(reading(place).state)] == [8]


def test_an_object_that_is_gone_though_the_log_needs_it_is_damage() -> None:
    store = grown(count=2)
    store.storage.delete(store.storage.keys("blobs/")[0])
    with pytest.raises(Corrupt, match="cannot be backed up"):
        copy_store(store.storage, Archive(fresh_storage()))


def test_a_damaged_object_is_not_backed_up_as_if_it_were_whole() -> None:
    store = grown(count=2)
    key = store.state.versions[1].basis.key
    content = store.storage.read(key)
    store.storage.write(key, content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(Corrupt):
        copy_store(store.storage, Archive(fresh_storage()))


def test_a_second_backup_reads_and_copies_what_is_new_alone() -> None:
    store = grown(count=3)
    place = fresh_storage()
    first = copy_store(store.storage, Archive(place))
    merged(store, {"t4": random_adapter(4)})
    again, watched = Archive(place), Watched(store.storage)
    second = copy_store(watched, again, first)
    new = {key for key in second.objects if key not in first.objects}
    read = {key for key in watched.reads if key.startswith("blobs/") and key in first.objects}
    assert read == set()
    assert again.copied.objects == len({second.objects[key].sha256 for key in new})
    assert contents(restored(again, second)) == contents(store.storage)
    assert contents(restored(again, first)).items() < contents(store.storage).items(), "the first one stays what it was"


def test_a_store_that_went_on_from_an_older_backup_has_its_own_records() -> None:
    store, place = grown(count=2), fresh_storage()
    older = copy_store(store.storage, Archive(place))
    merged(store, {"lost": random_adapter(33)})
    newer = copy_store(store.storage, Archive(place), older)
    other = opened(restored(Archive(place), older), writer="restored")
    merged(other, {"kept": random_adapter(44)})
    assert other.state.seq > newer.seq - 1, "there are other records under the same numbers"
    copy = copy_store(other.storage, Archive(place), newer)
    assert contents(restored(Archive(place), copy)) == contents(other.storage)


@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_large_objects_go_through_piece_by_piece(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "PIECE_BYTES", 1000)
    store = grown(count=2)
    kept = Archive(fresh_storage() if kind == "memory" else LocalStorage(str(tmp_path)))
    copy = copy_store(store.storage, kept)
    assert max(one.size_bytes for one in copy.objects.values()) > 2000
    assert contents(restored(kept, copy)) == contents(store.storage)


@pytest.mark.parametrize("piece", [1000, 2**24])
def test_a_damaged_backup_is_told_and_writes_no_such_object(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "PIECE_BYTES", piece)
    store, kept = grown(count=2), Archive(fresh_storage())
    copy = copy_store(store.storage, kept)
    key = store.state.versions[1].basis.key
    stored = archive._key(copy.objects[key])
    content = kept.storage.read(stored)
    place = fresh_storage()
    kept.storage.write(stored, content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(Corrupt, match="gone or changed"):
        restore_store(kept, copy, place)
    assert key not in place.keys("")
    assert "FORMAT" not in place.keys(""), "it is no store yet"
    kept.storage.write(stored, content)
    assert restore_store(kept, copy, place)
    assert contents(place) == contents(store.storage)


def test_a_place_where_something_is_is_refused() -> None:
    place = fresh_storage()
    check_empty(place)
    place.write("anything", b"")
    with pytest.raises(Conflict, match="1 object"):
        check_empty(place)


def test_a_list_is_written_last_and_one_that_was_changed_is_refused() -> None:
    kept = Archive(fresh_storage())
    kept.begin("a")
    assert (kept.noted(), kept.cut_off()) == ([], ["a"])
    kept.note("a", {"format": 1})
    assert (kept.noted(), kept.cut_off()) == (["a"], [])
    assert kept.read("a") == {"format": 1}
    kept.storage.write("backups/a.json", kept.storage.read("backups/a.json").replace(b"1}", b"2}"))
    with pytest.raises(Corrupt):
        kept.read("a")
    with pytest.raises(NotFound):
        kept.read("b")


def test_an_object_that_changes_all_the_time_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "PIECE_BYTES", 10)
    place = fresh_storage()

    def change(key: str) -> None:
        place.write("staging/t/checkpoint", str(len(watched.reads) + watched.reads[key]).encode() * 30)

    watched, kept = Watched(place), Archive(fresh_storage())
    change("staging/t/checkpoint")
    watched.before = change
    with pytest.raises(Unavailable):
        kept.put_from(watched, "staging/t/checkpoint")
    assert kept.storage.keys("objects/") == []
