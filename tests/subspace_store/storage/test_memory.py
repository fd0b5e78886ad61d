"""Memory obeys the storage contract."""

import pytest

from subspace_store.storage.memory import MemoryStorage
from tests.contracts.storage_contract import StorageContract
from tests.subspace_store.builders import fresh_storage


class TestMemoryStorage(StorageContract):
    unfinished_stay = False

    @pytest.fixture
    def storage(self) -> MemoryStorage:
        return fresh_storage()


def test_two_objects_with_one_name_are_one_place() -> None:
    here = fresh_storage()
    here.write("a", b"1")
    assert MemoryStorage(here.name).read("a") == b"1"
