"""A folder obeys the storage contract, and survives crashes and full disks."""

import errno
import os
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from configs.errors import NotWritten, StoreFull, StoreReadOnly, Unavailable
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


def test_a_write_that_grows_no_more_is_given_up_and_an_empty_folder_with_it_but_not_one_that_is_young(
    tmp_path: Path,
) -> None:
    storage = LocalStorage(str(tmp_path))
    storage.write("log/1", b"x")
    for name, age in (("log", 7200), ("data/t1", 7200), ("data/t2", 60), ("staging/t3/1-a", 7200)):
        half = tmp_path / name / f"{TEMPORARY}{age}"
        half.parent.mkdir(parents=True, exist_ok=True)
        half.write_bytes(b"half")
        os.utime(half, (time.time() - age,) * 2)
    for name, age in (("results/old", 7200), ("results/young", 60)):
        (tmp_path / name).mkdir(parents=True)
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    assert storage.abandon("", 3600.0) == 3
    left = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*"))
    assert left == ["data", "data/t2", f"data/t2/{TEMPORARY}60", "log", "log/1", "results", "results/young"]


def test_the_last_object_of_a_folder_takes_the_folder_with_it_and_the_next_one_makes_it_again(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path / "store"))
    for key in ("data/t1/train", "data/t1/eval"):
        storage.write(key, b"x")
    storage.delete("data/t1/train")
    assert storage.keys("") == ["data/t1/eval"]
    storage.delete("data/t1/eval")
    assert list((tmp_path / "store").iterdir()) == []
    storage.write("data/t1/train", b"y")
    assert storage.read("data/t1/train") == b"y"


def test_who_writes_into_a_folder_that_others_empty_all_the_time_never_fails(tmp_path: Path) -> None:
    storage = LocalStorage(str(tmp_path))

    def write_and_delete(me: int) -> None:
        for turn in range(50):
            storage.write(f"data/t/{me}", b"%d" % turn)
            assert storage.read(f"data/t/{me}") == b"%d" % turn
            storage.delete(f"data/t/{me}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write_and_delete, range(4)))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_another_process_makes_and_removes_at_once_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir, made = os.mkdir, list[str]()

    def lost(path: str, mode: int = 0o777) -> None:
        made.append(str(path))
        if len(made) == 1:  # another one has made it; it is gone before anybody can look what it is
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        mkdir(path, mode)

    monkeypatch.setattr(os, "mkdir", lost)
    storage = LocalStorage(str(tmp_path))
    storage.write("data/t/x", b"y")
    assert storage.read("data/t/x") == b"y"
    assert made.count(str(tmp_path / "data")) == 2


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.ENOSPC, StoreFull),
        (errno.EDQUOT, StoreFull),
        (errno.EROFS, StoreReadOnly),
        (errno.EACCES, StoreReadOnly),
        (errno.EIO, NotWritten),
    ],
)
@pytest.mark.parametrize("step", ["open", "write", "fsync", "link"])
def test_what_fails_before_an_object_has_its_name_has_failed_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, number: int, error: type[Exception]
) -> None:
    storage = LocalStorage(str(tmp_path))
    storage.write("log/0", b"")

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    class Refusing:
        """A file that takes nothing."""

        write, seek, close = refuse, lambda *_: None, lambda _: None

    with monkeypatch.context() as patched:
        if step in ("fsync", "link"):
            patched.setattr(os, step, refuse)
        else:
            made = refuse if step == "open" else lambda _: Refusing()
            patched.setattr("subspace_store.storage.local._FileStream._opened", made)
        with pytest.raises(NotWritten, match=os.strerror(number)) as told:
            storage.create("log/1", b"record")
    assert type(told.value) is error
    assert storage.keys("") == ["log/0"]
    assert storage.create("log/1", b"record")


def test_what_fails_after_an_object_has_its_name_may_have_been_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = LocalStorage(str(tmp_path))
    storage.write("log/0", b"")

    def refuse(folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("subspace_store.storage.local._flush_folder", refuse)
    for act in (storage.create, storage.write):
        with pytest.raises(Unavailable) as told:
            act("log/1", b"record")
        assert not isinstance(told.value, NotWritten)


def test_a_folder_that_cannot_be_read_is_no_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = LocalStorage(str(tmp_path))
    storage.write("log/0", b"")

    def refuse(path: str) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(Unavailable, match="Permission denied"):
        storage.keys("log/")


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
