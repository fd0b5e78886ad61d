"""What every storage must do, as one class of tests. An implementation subclasses it and gives a `storage`."""

from __future__ import annotations

import contextlib
import pickle
import random
import struct
import time
from array import array
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import pytest

from configs.errors import InvalidInput, NotFound, Unavailable
from subspace_store.storage.protocol import Clocked, Storage

MIB = 2**20


class StorageContract:
    """Subclass as `TestXStorage` with a fixture `storage` that is empty at every test."""

    many_keys: ClassVar[int] = 1100
    """More than the 1000 that one page of an S3 listing holds."""
    unfinished_stay: ClassVar[bool] = True
    """Whether a killed process leaves what it had begun to write."""

    def wait_until_sent(self, storage: Storage) -> None:
        """Wait until what was appended to unfinished streams is at the storage, where that takes a while."""

    @pytest.fixture
    def storage(self) -> Storage:
        raise NotImplementedError

    def test_it_is_a_storage(self, storage: Storage) -> None:
        assert isinstance(storage, Storage)

    def test_its_clock_if_it_has_one_tells_the_time(self, storage: Storage) -> None:
        if isinstance(storage, Clocked):
            assert abs(storage.clock() - time.time()) < 60

    def test_what_was_written_is_read(self, storage: Storage) -> None:
        storage.write("blobs/1/a.bin", b"\x00\xff" * 5000)
        storage.write("empty", b"")
        assert storage.read("blobs/1/a.bin") == b"\x00\xff" * 5000
        assert storage.read("empty") == b""

    def test_a_write_replaces(self, storage: Storage) -> None:
        storage.write("log/_hint", b"1")
        storage.write("log/_hint", b"2")
        assert storage.read("log/_hint") == b"2"

    def test_an_absent_object_is_not_found_by_name(self, storage: Storage) -> None:
        with pytest.raises(NotFound, match="log/00000000000000000001"):
            storage.read("log/00000000000000000001.json")

    def test_a_second_create_is_refused_and_changes_nothing(self, storage: Storage) -> None:
        assert storage.create("log/1.json", b"first") is True
        assert storage.create("log/1.json", b"second") is False
        assert storage.read("log/1.json") == b"first"

    def test_an_existing_object_cannot_be_created(self, storage: Storage) -> None:
        storage.write("FORMAT", b"written")
        assert storage.create("FORMAT", b"created") is False

    def test_of_eight_that_create_at_once_one_wins_and_its_bytes_are_there(self, storage: Storage) -> None:
        for slot in range(5):
            with ThreadPoolExecutor(8) as pool:
                won = list(pool.map(lambda me, s=slot: storage.create(f"log/{s}", f"{me}".encode()), range(8)))
            assert won.count(True) == 1
            assert storage.read(f"log/{slot}") == f"{won.index(True)}".encode()

    def test_keys_are_sorted_and_start_with_the_prefix(self, storage: Storage) -> None:
        for key in ("log/2", "log/10", "log/1", "logs/1", "a/log/1", "log/x/y"):
            storage.write(key, b"")
        assert storage.keys("log/") == ["log/1", "log/10", "log/2", "log/x/y"]
        assert storage.keys("log/1") == ["log/1", "log/10"]
        assert storage.keys("") == ["a/log/1", "log/1", "log/10", "log/2", "log/x/y", "logs/1"]
        assert storage.keys("nothing/") == []

    def test_keys_after_one_leave_it_out(self, storage: Storage) -> None:
        for key in ("log/1", "log/2", "log/3"):
            storage.write(key, b"")
        assert storage.keys("log/", after="log/1") == ["log/2", "log/3"]
        assert storage.keys("log/", after="log/15") == ["log/2", "log/3"]
        assert storage.keys("log/", after="log/3") == []

    def test_a_long_listing_is_complete(self, storage: Storage) -> None:
        names = [f"log/{number:020d}.json" for number in range(self.many_keys)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda name: storage.write(name, b"."), names))
        assert storage.keys("log/") == names
        assert storage.keys("log/", after=names[9]) == names[10:]

    def test_deleting_is_final_and_twice_is_fine(self, storage: Storage) -> None:
        storage.write("staging/t/1", b"x")
        storage.delete("staging/t/1")
        storage.delete("staging/t/1")
        assert storage.keys("staging/") == []
        assert storage.create("staging/t/1", b"again") is True

    @pytest.mark.parametrize(
        "key",
        [
            *("", "/etc/passwd", "../other", "log/../../other", "log//1", "log/.", "a\\b", "a\0b"),
            *("a\nb", "\ud800", "x" * 256, "é" * 128, "a/" * 460 + "a"),
        ],
    )
    def test_a_key_cannot_leave_the_root_or_be_what_no_file_is_called(self, storage: Storage, key: str) -> None:
        for act in (
            storage.read,
            storage.view,
            storage.delete,
            lambda k: storage.write(k, b""),
            lambda k: storage.create(k, b""),
            lambda k: storage.stream(k, 0).__enter__(),
        ):
            with pytest.raises(InvalidInput, match="not a storage key"):
                act(key)

    def test_a_view_is_the_asked_bytes_and_ends_with_the_object(self, storage: Storage) -> None:
        content = random.Random(0).randbytes(20_000)
        storage.write("blobs/1", content)
        storage.write("empty", b"")
        for start, size in [(0, None), (0, 5), (9_999, 5_001), (4_096, 4_096), (7, 0), (19_990, 100), (19_999, None)]:
            assert bytes(storage.view("blobs/1", start, size)) == content[start:][:size], (start, size)
        assert [bytes(storage.view("blobs/1", 20_000, size)) for size in (None, 5)] == [b"", b""]
        assert bytes(storage.view("empty")) == b""
        for size in (None, 0, 5):
            with pytest.raises(NotFound, match="blobs/2"):
                storage.view("blobs/2", size=size)

    def test_a_view_outlives_the_object(self, storage: Storage) -> None:
        storage.write("blobs/1", b"old" * 3_000)
        view = storage.view("blobs/1", 3)
        storage.write("blobs/1", b"new")
        storage.delete("blobs/1")
        assert bytes(view) == b"old" * 2_999

    @pytest.mark.parametrize(
        ("head_size", "sizes"),
        [
            (0, []),
            (8, [3, 0, 5]),
            (8, [MIB] * 8),  # just more than a part of a multipart upload
            (0, [5 * MIB, 1, 12 * MIB, 7]),
            (9 * MIB, []),  # a head that is itself longer than a part
            (9 * MIB, [10 * MIB, 7]),
        ],
        ids=str,
    )
    def test_a_stream_is_one_object_with_its_head_in_front(
        self, storage: Storage, head_size: int, sizes: list[int]
    ) -> None:
        make = random.Random(1).randbytes
        head, rest = make(head_size), [make(size) for size in sizes]
        storage.write("blobs/1", b"old")
        with storage.stream("blobs/1", head_size) as out:
            for number, content in enumerate(rest):
                buffer = bytearray(content)
                out.append(memoryview(buffer) if number % 2 else content)
                buffer[:] = bytes(len(buffer))  # the caller fills its buffer anew
            assert storage.read("blobs/1") == b"old"
            out.finish(head)
        assert storage.read("blobs/1") == head + b"".join(rest)
        assert storage.keys("") == ["blobs/1"]

    def test_a_stream_takes_buffers_of_numbers_as_their_bytes(self, storage: Storage) -> None:
        with storage.stream("blobs/1", 1) as out:
            for numbers in (array("d", [1.0, -2.5]), array("d")):
                out.append(memoryview(numbers))
            out.finish(b"h")
        assert storage.read("blobs/1") == b"h" + struct.pack("2d", 1.0, -2.5)

    @pytest.mark.parametrize("size", [3, 16 * MIB])
    def test_a_stream_that_is_left_early_changes_nothing(self, storage: Storage, size: int) -> None:
        storage.write("blobs/old", b"old")
        with contextlib.suppress(ZeroDivisionError), storage.stream("blobs/old", 8) as out:
            out.append(bytes(size))
            raise ZeroDivisionError
        with storage.stream("blobs/new", 8) as out:
            out.append(bytes(size))
        with storage.stream("blobs/new", 8) as out:
            out.append(bytes(size))
            with pytest.raises(InvalidInput, match="7 bytes; room was left for 8"):
                out.finish(bytes(7))
        assert storage.keys("") == ["blobs/old"]
        assert storage.read("blobs/old") == b"old"

    def test_writes_below_a_prefix_are_given_up_and_what_is_whole_or_elsewhere_is_not_touched(
        self, storage: Storage
    ) -> None:
        storage.write("blobs/1/whole", b"whole")
        with storage.stream("blobs/1/begun", 8) as begun, storage.stream("blobs/10/begun", 8) as other:
            begun.append(bytes(16 * MIB))
            other.append(bytes(16 * MIB))
            self.wait_until_sent(storage)
            assert storage.abandon("", idle_seconds=3600.0) == 0  # both have just been written to
            assert storage.abandon("blobs/1/") == self.unfinished_stay
            assert storage.abandon("blobs/1/") == storage.abandon("nothing/") == 0
            if self.unfinished_stay:
                with pytest.raises(Unavailable):
                    begun.finish(bytes(8))
            other.finish(b"finished")
        assert storage.keys("") == ["blobs/1/whole", "blobs/10/begun"]
        assert bytes(storage.view("blobs/10/begun", 0, 8)) == b"finished"

    def test_a_copy_sent_to_another_process_sees_the_same_objects(self, storage: Storage) -> None:
        storage.write("a", b"1")
        copy = pickle.loads(pickle.dumps(storage))
        assert copy.url == storage.url
        assert copy.read("a") == b"1"
