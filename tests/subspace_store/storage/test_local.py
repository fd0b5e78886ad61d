"""A folder obeys the storage contract, and survives crashes and full disks."""

import os
import stat
from pathlib import Path

import pytest

from configs.errors import Unavailable
from subspace_store.storage.local import TEMPORARY, LocalStorage
from tests.contracts.storage_contract import StorageContract


class TestLocalStorage(StorageContract):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> LocalStorage:
        return LocalStorage(str(tmp_path / "store"))


def test_a_crash_while_writing_leaves_the_old_bytes_and_nothing_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = LocalStorage(str(tmp_path))
    storage.write("log/_hint", b"old")
    (tmp_path / "log" / f"{TEMPORARY}dead").write_bytes(b"half")  # what a killed process leaves

    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(Unavailable, match="No space left"):
        storage.write("log/_hint", b"new")
    assert storage.read("log/_hint") == b"old"
    assert storage.keys("") == ["log/_hint"]


def test_the_file_is_flushed_before_it_gets_its_name_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = LocalStorage(str(tmp_path))
    storage.write("log/0", b"")
    steps: list[str] = []
    fsync, link = os.fsync, os.link
    monkeypatch.setattr(os, "fsync", lambda handle: (steps.append("flush"), fsync(handle))[1])
    monkeypatch.setattr(os, "link", lambda *names: (steps.append("name"), link(*names))[1])
    storage.create("log/1", b"x")
    assert steps == ["flush", "name", "flush"]
    steps.clear()
    storage.create("log/1", b"y")  # refused; the winner's name is made durable before the loser hears of it
    assert steps == ["flush", "name", "flush"]


def test_reading_a_folder_is_reading_nothing(tmp_path: Path) -> None:
    assert LocalStorage(str(tmp_path / "never-made")).keys("log/") == []
    assert not (tmp_path / "never-made").exists()


def test_a_stream_that_is_left_early_leaves_no_file(tmp_path: Path) -> None:
    with LocalStorage(str(tmp_path)).stream("blobs/1", 8) as out:
        out.append(bytes(100))
    assert os.listdir(tmp_path / "blobs") == []


def test_a_stream_is_flushed_before_it_gets_its_name_and_its_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = LocalStorage(str(tmp_path))
    storage.write("blobs/0", b"")
    steps: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (steps.append("flush"), fsync(handle))[1])
    monkeypatch.setattr(os, "replace", lambda *names: (steps.append("name"), replace(*names))[1])
    with storage.stream("blobs/1", 1) as out:
        out.append(b"x")
        out.finish(b"h")
    assert steps == ["flush", "name", "flush"]


def test_a_file_system_that_refuses_is_unavailable_but_an_error_of_the_block_is_its_own(tmp_path: Path) -> None:
    (tmp_path / "blobs").write_bytes(b"a file where a folder should be")
    with pytest.raises(Unavailable, match="Not a directory"):
        LocalStorage(str(tmp_path)).write("blobs/1", b"")
    with pytest.raises(PermissionError), LocalStorage(str(tmp_path)).stream("other/1", 0):
        raise PermissionError("of the caller")


def test_a_create_whose_name_may_not_be_durable_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def broken(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(5, "Input/output error")
        fsync(handle)

    storage = LocalStorage(str(tmp_path))
    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(Unavailable, match="Input/output error"):
        storage.create("name", b"x")
