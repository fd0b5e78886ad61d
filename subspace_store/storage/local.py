"""Storage in a local folder, safe against a crash at any moment and against other processes on the same machine.

An object appears whole or not at all: bytes go to a temporary file, are flushed, and then get their name. A name is
durable once its folder is flushed too.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from configs.errors import NotFound, NotWritten, StoreFull, StoreReadOnly, Unavailable
from subspace_store.storage.protocol import check_head, check_key

TEMPORARY = ".writing-"
"""Start of the names of temporary files; no listing shows them."""

FOLDER_TRIES = 100
"""Number of attempts to write into a new folder: others may remove it while it is empty."""

FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
READ_ONLY = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})


class LocalStorage:
    """Objects as files below one folder.

    Args:
        folder: Made at the first write.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder).absolute()

    @property
    def url(self) -> str:
        return f"file:{self.folder}"

    def read(self, key: str) -> bytes:
        path = self._path(key)
        try:
            return path.read_bytes()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise NotFound("no such object", str(path)) from None
        except OSError as error:
            raise _unavailable(error, path) from error

    def view(self, key: str, start: int = 0, size: int | None = None) -> memoryview:
        path = self._path(key)
        try:
            with open(path, "rb") as file:
                end = os.fstat(file.fileno()).st_size
                end = end if size is None else min(end, start + size)
                if start >= end:  # an empty range cannot be mapped
                    return memoryview(b"")
                first = start - start % mmap.ALLOCATIONGRANULARITY
                # A file is never changed after it has got its name, so the mapping shows these bytes for ever,
                # also when the name is given to another file or deleted.
                mapped = mmap.mmap(file.fileno(), end - first, offset=first, access=mmap.ACCESS_READ)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise NotFound("no such object", str(path)) from None
        except OSError as error:
            raise _unavailable(error, path) from error
        return memoryview(mapped)[start - first :]

    def write(self, key: str, content: bytes) -> None:
        with self.stream(key, 0) as out:
            out.append(content)
            out.finish(b"")

    @contextlib.contextmanager
    def stream(self, key: str, head_size: int) -> Iterator[_FileStream]:
        out = _FileStream(self._path(key), head_size)
        try:
            yield out
        finally:
            out.close()

    def create(self, key: str, content: bytes) -> bool:
        path = self._path(key)
        with self.stream(key, 0) as out:
            out.append(content)
            out.flush(b"")
            try:
                # A hard link is refused if the name is taken; rename would replace it.
                os.link(out.temporary, path)
                is_new = True
            except FileExistsError:
                is_new = False
            except OSError as error:
                raise _not_written(error, path) from error
            # Also where the name was taken: what the caller reads now must not be gone after a crash. An error here is
            # no `NotWritten`, because the name is there.
            with _refusals_named(path, _unavailable):
                _flush_folder(path.parent)
        return is_new

    def keys(self, prefix: str, after: str = "") -> list[str]:
        return sorted(key for key in self._files(prefix) if key > after and not _is_temporary(key))

    def clock(self) -> float:
        file = self._path(f"{TEMPORARY}{secrets.token_hex(8)}")
        with _refusals_named(file, _unavailable):
            _make_folder(self.folder)
            try:
                with open(file, "xb"):  # a network file system stamps it by its server's clock
                    return file.stat().st_mtime
            finally:
                file.unlink(missing_ok=True)

    def delete(self, key: str) -> None:
        path = self._path(key)
        try:
            path.unlink(missing_ok=True)
        except NotADirectoryError:
            return
        except OSError as error:
            raise _unavailable(error, path) from error
        self._remove_empty(path.parent)

    def abandon(self, prefix: str, idle_seconds: float = 0.0) -> int:
        now = time.time()
        begun = [key for key in self._files(prefix) if _is_temporary(key) and self._age(key, now) >= idle_seconds]
        for key in begun:
            self.delete(key)
        # Folders of a process that was killed between making a folder and writing into it.
        for folder in self._empty_folders(prefix):
            if self._age(folder, now) >= idle_seconds:
                self._remove_empty(self.folder / folder)
        return len(begun)

    def _age(self, key: str, now: float) -> float:
        """Seconds since a file or folder was written to; negative for one that is gone."""
        try:
            return now - (self.folder / key).stat().st_mtime
        except OSError:
            return -1.0

    def _remove_empty(self, folder: Path) -> None:
        """Remove a folder and those around it that hold nothing, but never the store's own. A write that is about to
        begin there makes them again (`_FileStream`)."""
        with contextlib.suppress(OSError):
            while folder != self.folder and folder.is_relative_to(self.folder):
                folder.rmdir()
                folder = folder.parent

    def _files(self, prefix: str) -> Iterator[str]:
        for folder, _, names in self._walk(prefix):
            yield from (key for name in names if (key := f"{folder}{name}").startswith(prefix))

    def _empty_folders(self, prefix: str) -> list[str]:
        found = [folder for folder, inner, names in self._walk(prefix) if folder and not inner and not names]
        return [folder for folder in found if folder.startswith(prefix)]

    def _walk(self, prefix: str) -> Iterator[tuple[str, list[str], list[str]]]:
        """Each folder and what is in it. Names of folders end with a slash; the store's own is empty. Only the folder
        that the prefix names in full is walked."""
        parent = prefix.rpartition("/")[0]
        start = self._path(parent) if parent else self.folder
        for folder, inner, names in os.walk(start, onerror=_refuse_unreadable):
            base = Path(folder).relative_to(self.folder).as_posix()
            yield "" if base == "." else f"{base}/", inner, names

    def _path(self, key: str) -> Path:
        return self.folder / check_key(key)


class _FileStream:
    """A temporary file beside `path` that takes its name at `finish`, and is gone after `close` in any case."""

    def __init__(self, path: Path, head_size: int) -> None:
        self.path, self.head_size = path, head_size
        self.temporary = path.parent / f"{TEMPORARY}{secrets.token_hex(8)}"
        with _refusals_named(path):
            self.file = self._opened()
            self.file.seek(head_size)

    def _opened(self) -> BinaryIO:
        for _ in range(FOLDER_TRIES):
            _make_folder(self.path.parent)
            with contextlib.suppress(FileNotFoundError):  # the folder was empty, and another process removed it
                return open(self.temporary, "xb")
        raise FileNotFoundError(errno.ENOENT, "the folder is removed again and again")

    def append(self, content: bytes | memoryview) -> None:
        with _refusals_named(self.path):
            self.file.write(content)

    def flush(self, head: bytes) -> None:
        check_head(head, self.head_size)
        with _refusals_named(self.path):
            self.file.seek(0)
            self.file.write(head)
            self.file.flush()
            os.fsync(self.file.fileno())

    def finish(self, head: bytes) -> None:
        self.flush(head)
        with _refusals_named(self.path):
            os.replace(self.temporary, self.path)
        with _refusals_named(self.path, _unavailable):
            _flush_folder(self.path.parent)

    def close(self) -> None:
        # On a full disk closing fails as writing did, which was reported; the file is removed all the same.
        with contextlib.suppress(OSError):
            self.file.close()
        with contextlib.suppress(OSError):
            self.temporary.unlink()


def _is_temporary(key: str) -> bool:
    return key.rpartition("/")[2].startswith(TEMPORARY)


@contextlib.contextmanager
def _refusals_named(path: Path, told: Callable[[OSError, Path], Unavailable] | None = None) -> Iterator[None]:
    """Turn the file system's errors into ours. told: Makes our error; default `_not_written`, which is right until the
    object has its name."""
    try:
        yield
    except OSError as error:
        raise (told or _not_written)(error, path) from error


def _make_folder(folder: Path) -> None:
    """Like mkdir -p, and every new name in a parent is flushed."""
    if not folder.exists():
        _make_folder(folder.parent)
        # The parent was removed meanwhile, or this folder, which another had just made: the caller tries again.
        with contextlib.suppress(FileNotFoundError, FileExistsError):
            folder.mkdir(exist_ok=True)
            _flush_folder(folder.parent)


def _refuse_unreadable(error: OSError) -> None:
    """A folder that is gone holds nothing; one that cannot be read may hold anything."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise _unavailable(error, Path(error.filename)) from error


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _not_written(error: OSError, path: Path) -> Unavailable:
    """The error for a write that ended before the object got its name: the write has certainly failed."""
    what = f"the file system refused: {error.strerror or error}"
    if error.errno in FULL:
        return StoreFull(what, str(path), "make space on that disk (or in the quota), then ask again")
    if error.errno in READ_ONLY:
        return StoreReadOnly(what, str(path), "let this user write there, or mount it for writing; then ask again")
    return NotWritten(what, str(path), "check the disk, then ask again")


def _unavailable(error: OSError, path: Path) -> Unavailable:
    return Unavailable(f"the file system refused: {error.strerror or error}", str(path), "check space and permissions")
