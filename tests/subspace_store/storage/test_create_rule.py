"""A writer finds out that a storage lets two writers overwrite each other before it writes anything there."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from configs.errors import UnsafeStorage
from subspace_store import Storage, SubspaceStore
from subspace_store.log.store_format import check_place
from subspace_store.storage.create_rule import SCRATCH_SECONDS, is_old_scratch, scratch_folder
from subspace_store.storage.local import LocalStorage
from subspace_store.storage.memory import MemoryStorage
from subspace_store.storage.s3 import S3Storage
from tests.moto_server import CREDENTIALS, moto_server
from tests.subspace_store.builders import BASE, FaultyStorage, fresh_storage, merged, opened, random_adapter, reading


class Overwriting(MemoryStorage):
    """As a server that ignores `If-None-Match: *`."""

    def create(self, key: str, content: bytes) -> bool:
        self.write(key, content)
        return True


class Lying(MemoryStorage):
    """As a server that refuses and writes all the same."""

    def create(self, key: str, content: bytes) -> bool:
        created = super().create(key, content)
        self.write(key, content)
        return created


@pytest.fixture(params=["memory", "folder", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    if request.param == "memory":
        yield fresh_storage()
    elif request.param == "folder":
        yield LocalStorage(str(tmp_path / "store"))
    else:
        for name, value in CREDENTIALS.items():
            monkeypatch.setenv(name, value)
        with moto_server("versions") as url:
            yield S3Storage("s3://versions/x", endpoint_url=url)


def test_a_storage_that_keeps_the_rule_is_opened_again_and_again_and_nothing_of_the_trial_stays(
    storage: Storage, tmp_path: Path
) -> None:
    merged(opened(storage), {"t1": random_adapter(1)})
    opened(storage, "again")
    keys = {key for key in storage.keys("") if not key.startswith(("log/", "blobs/", "staging/"))}
    assert keys == {"FORMAT"}
    assert not (tmp_path / "store" / "doctor").exists()


@pytest.mark.parametrize("kind", [Overwriting, Lying])
def test_a_new_store_is_refused_where_two_writers_would_overwrite_each_other(kind: type[MemoryStorage]) -> None:
    storage = kind(fresh_storage().name)
    for writer in ("first", "second"):
        with pytest.raises(UnsafeStorage, match="use a server that honours If-None-Match"):
            opened(storage, writer)
    assert storage.keys("") == []


def test_a_store_that_was_moved_to_such_a_server_is_refused_and_left_as_it_was() -> None:
    safe = fresh_storage()
    merged(opened(safe), {"t1": random_adapter(1)})
    before = {key: safe.read(key) for key in safe.keys("")}
    with pytest.raises(UnsafeStorage, match="a second create of one name was not refused"):
        opened(Overwriting(safe.name), "second")
    assert {key: safe.read(key) for key in safe.keys("")} == before
    assert reading(Overwriting(safe.name)).state.seq == 2  # to read it is harmless


def test_a_place_can_be_looked_at_without_making_a_store_there() -> None:
    storage = fresh_storage()
    assert check_place(storage, BASE, "") is False
    assert storage.keys("") == []
    opened(storage)
    assert check_place(storage, BASE, "") is True


def test_of_writers_that_open_a_new_store_at_once_none_is_refused_for_the_others_trials(storage: Storage) -> None:
    def open_one(number: int) -> SubspaceStore:
        return opened(storage, f"writer {number}")

    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(open_one, number) for number in range(4)]
    assert not [future for future in found if isinstance(future.exception(), UnsafeStorage)]
    assert [key for key in storage.keys("") if not key.startswith("log/")] == ["FORMAT"]


class Counting(FaultyStorage):
    """Counts requests."""

    def __init__(self, inner: Storage) -> None:
        super().__init__(inner, self._count)
        self.requests = 0

    def _count(self, key: str) -> None:
        self.requests += 1

    def read(self, key: str) -> bytes:
        self.requests += 1
        return super().read(key)

    def delete(self, key: str) -> None:
        self.requests += 1
        super().delete(key)


def test_a_trial_costs_one_request_where_a_store_is_and_four_where_none_is() -> None:
    counting = Counting(fresh_storage())
    check_place(counting, BASE, "")
    assert counting.requests == 1 + 4  # FORMAT is looked for; create, create, read, delete
    opened(counting.inner)
    counting.requests = 0
    check_place(counting, BASE, "")
    assert counting.requests == 1 + 1


def test_what_a_killed_process_left_of_a_trial_is_collected_later() -> None:
    store = opened()
    young = scratch_folder()
    old = f"doctor/{int(time.time() - SCRATCH_SECONDS - 1)}-0123456789abcdef/"
    for key in (f"{young}create", f"{old}create", f"{old}list/1", "doctor/notes"):
        store.storage.write(key, b"")
    assert is_old_scratch(f"{old}create", time.time())
    assert store.collect().trials == (f"{old}create", f"{old}list/1")
    assert store.storage.keys("doctor/") == sorted([f"{young}create", "doctor/notes"])
