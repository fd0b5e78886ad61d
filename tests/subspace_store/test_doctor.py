"""The doctor passes places that keep their promises, and names the promise that another one breaks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from configs.errors import Unavailable
from subspace_store.doctor import CHECKS, DAMAGED, UNSAFE, Check, examine
from subspace_store.storage.local import LocalStorage
from subspace_store.storage.memory import MemoryStorage
from subspace_store.storage.protocol import ObjectStream, Storage
from subspace_store.storage.s3 import S3Storage
from tests.moto_server import CREDENTIALS, free_port, moto_server
from tests.subspace_store.builders import FaultyStorage, fresh_storage


@pytest.fixture(autouse=True)
def dummy_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(params=["memory", "folder", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    if request.param == "memory":
        yield fresh_storage()
    elif request.param == "folder":
        yield LocalStorage(str(tmp_path))
    else:
        with moto_server("versions") as url:
            yield S3Storage("s3://versions/x", endpoint_url=url)


def test_every_kind_of_storage_passes_and_is_left_as_it_was(storage: Storage) -> None:
    storage.write("log/1", b"of a store")
    checks = examine(storage)
    assert [(check.name, check.ok, check.todo) for check in checks] == [(name, True, "") for name, _, _ in CHECKS]
    said = {check.name: check.what for check in checks}
    assert "a create takes" in said["second create"]
    assert "a read takes" in said["read"]
    assert "17 MiB come back" in said["stream"]
    assert storage.keys("") == ["log/1"]


def failed(storage: Storage) -> dict[str, Check]:
    """What the doctor finds wrong; whatever that is, it leaves nothing behind."""
    found = {check.name: check for check in examine(storage) if not check.ok}
    assert MemoryStorage(storage.url.removeprefix("memory:")).keys("") == []
    return found


def test_a_storage_that_overwrites_on_create_is_refused() -> None:
    class Overwriting(MemoryStorage):
        def create(self, key: str, content: bytes) -> bool:
            self.write(key, content)
            return True

    found = failed(Overwriting(fresh_storage().name))
    assert list(found) == ["second create", "eight creates at once"]
    assert found["second create"].what == "a second create of one name was not refused"
    assert found["eight creates at once"].what == "8 of 8 creates of one name at once were told that they won"
    assert {check.todo for check in found.values()} == {UNSAFE}


def test_a_storage_that_refuses_a_create_but_writes_it_is_refused() -> None:
    class Lying(MemoryStorage):
        def create(self, key: str, content: bytes) -> bool:
            created = super().create(key, content)
            self.write(key, content)
            return created

    found = failed(Lying(fresh_storage().name))
    assert found["second create"].what == "a refused create changed the object"
    assert set(found) <= {"second create", "eight creates at once"}  # the last of the eight may be the winner


def test_a_storage_whose_list_lags_behind_by_one_write_is_refused() -> None:
    class Lagging(MemoryStorage):
        newest = ""

        def write(self, key: str, content: bytes) -> None:
            super().write(key, content)
            self.newest = key

        def keys(self, prefix: str, after: str = "") -> list[str]:
            return [key for key in super().keys(prefix, after) if key != self.newest]

    found = failed(Lagging(fresh_storage().name))
    assert list(found) == ["list"]
    assert found["list"].what == "a list does not show 2, written before it"


@pytest.mark.parametrize(
    ("order", "said"), [(reversed, "2, 10 instead of 10, 2"), (lambda keys: [*keys, "x"], "2, x instead of 2")]
)
def test_a_list_in_another_order_or_with_more_is_refused(order: object, said: str) -> None:
    class Disordered(MemoryStorage):
        def keys(self, prefix: str, after: str = "") -> list[str]:
            return list(order(super().keys(prefix, after)))  # type: ignore[operator]

    assert said in failed(Disordered(fresh_storage().name))["list"].what


def test_a_list_that_forgets_where_to_start_is_refused() -> None:
    class Restarting(MemoryStorage):
        def keys(self, prefix: str, after: str = "") -> list[str]:
            return super().keys(prefix)

    assert list(failed(Restarting(fresh_storage().name))) == ["list"]


def test_a_storage_that_changes_one_bit_of_long_objects_is_refused() -> None:
    class Corrupting(MemoryStorage):
        def write(self, key: str, content: bytes) -> None:
            if len(content) > 100_000:
                content = content[:50_000] + bytes([content[50_000] ^ 1]) + content[50_001:]
            super().write(key, content)

    found = failed(Corrupting(fresh_storage().name))
    assert list(found) == ["read", "stream"]  # a stream into memory is a write at the end
    assert found["read"].what == "an object is read with other bytes than were written"
    assert {check.todo for check in found.values()} == {DAMAGED}


def test_a_storage_that_gives_another_part_than_was_asked_is_refused() -> None:
    class Shifted(MemoryStorage):
        def view(self, key: str, start: int = 0, size: int | None = None) -> memoryview:
            return super().view(key, max(0, start - 1), size)

    found = failed(Shifted(fresh_storage().name))
    assert list(found) == ["read"]
    assert found["read"].what == "bytes 1 to 4097 are not those written"


def test_a_storage_that_serves_old_bytes_from_a_cache_is_refused() -> None:
    class Cached(MemoryStorage):
        def read(self, key: str) -> bytes:
            seen = self.__dict__.setdefault("seen", {})
            return bytes(seen.setdefault(key, super().read(key)))

    assert list(failed(Cached(fresh_storage().name))) == ["overwrite"]


def test_a_storage_that_keeps_what_is_deleted_is_refused_and_named() -> None:
    class Keeping(MemoryStorage):
        def delete(self, key: str) -> None:
            pass

    found = [check for check in examine(Keeping(fresh_storage().name)) if not check.ok]
    assert [(check.name, check.what) for check in found] == [("delete", "a deleted object can still be read")]


def test_a_server_that_knows_no_multipart_upload_fails_that_check_with_its_answer() -> None:
    class Partless(FaultyStorage):
        def stream(self, key: str, head_size: int) -> AbstractContextManager[ObjectStream]:
            raise Unavailable("the server refuses: NotImplemented", key)

    found = failed(Partless(fresh_storage(), lambda key: None))
    assert list(found) == ["stream"]
    assert found["stream"].what.endswith("stream: the server refuses: NotImplemented")


def test_a_storage_that_is_away_is_no_finding() -> None:
    address = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(Unavailable, match=address):
        examine(S3Storage("s3://versions/x", endpoint_url=address))
