"""Real S3 servers obey the storage contract, and a subspace lives on them."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from configs.errors import Conflict, Unavailable
from subspace_store import Storage, SubspaceReader, SubspaceStore, open_storage
from subspace_store.verify import verify
from tests.contracts.storage_contract import StorageContract
from tests.servers.merges import adapters, merge, open_writer
from tests.servers.server import Server
from tests.subspace_store.builders import deltas, relative_distance

pytestmark = pytest.mark.s3


class TestStorageOnAServer(StorageContract):
    @pytest.fixture
    def storage(self, server: Server) -> Storage:
        return open_storage(server.place("contract"))


def test_a_subspace_is_merged_judged_rolled_back_and_read_on_a_server(server: Server) -> None:
    place = server.place()
    store = open_writer(open_storage(place), "writer")
    for number in range(3):
        store.publish(merge(store, number).number, op_key=f"p{number}", actor="test")
    store.reject(merge(store, 3).number, "worse", op_key="r3", actor="test")
    store.rollback(1, op_key="back", actor="test")
    assert merge(store, 4).parent == 1

    reader = SubspaceReader.open(open_storage(place))
    assert reader.state == store.state
    assert reader.state.refs == {"candidate": 5, "main": 1}
    assert verify(reader) == []
    for task_id in adapters(0):
        found, expected = deltas(reader.adapter(task_id)), deltas(store.adapter(task_id))
        assert relative_distance(found, expected, expected) < 1e-6


def test_of_eight_writers_that_open_at_once_only_the_last_can_write(server: Server) -> None:
    place = server.place()

    def open_one(writer: int) -> SubspaceStore | None:
        try:
            return open_writer(open_storage(place), f"writer {writer}")
        except Conflict:
            return None  # it had its epoch, and another took the next at once

    with ThreadPoolExecutor(8) as pool:
        stores = [store for store in pool.map(open_one, range(8)) if store is not None]
    last = max(stores, key=lambda store: store.state.epoch)
    assert last.refresh().epoch == 8
    for store in stores:
        if store is not last:
            with pytest.raises(Conflict):
                merge(store, 0)
    assert merge(last, 0).number == 1
    assert verify(last) == []


@pytest.mark.parametrize("variable", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"])
def test_wrong_credentials_are_named(ceph: Server, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "wrong")
    storage = open_storage(ceph.place())
    for act in (
        lambda: storage.read("a"),
        lambda: storage.write("a", b""),
        lambda: storage.create("a", b""),
        lambda: storage.keys(""),
        lambda: storage.delete("a"),
    ):
        with pytest.raises(Unavailable, match=r"refuses these credentials[\s\S]*AWS_SECRET_ACCESS_KEY"):
            act()
