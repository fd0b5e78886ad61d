"""The doctor tells a server that keeps the rules from one that overwrites."""

import pytest

from configs.errors import UnsafeStorage
from subspace_store import open_storage
from subspace_store.doctor import examine
from tests.servers.merges import open_writer
from tests.servers.s3rver import OWN_CREDENTIALS
from tests.servers.server import Server

pytestmark = pytest.mark.s3


def test_a_server_that_keeps_the_rules_passes(server: Server) -> None:
    checks = examine(open_storage(server.place()))
    assert checks
    assert [check for check in checks if not check.ok] == []


def test_a_server_that_overwrites_is_refused(s3rver: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in OWN_CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    failed = [check for check in examine(open_storage(s3rver.place())) if not check.ok]
    assert failed
    assert all(check.todo for check in failed)


def test_no_writer_opens_a_store_on_a_server_that_overwrites(s3rver: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in OWN_CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    storage = open_storage(s3rver.place())
    with pytest.raises(UnsafeStorage):
        open_writer(storage, "writer")
    assert storage.keys("") == []
