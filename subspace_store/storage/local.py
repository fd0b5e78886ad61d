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
from collections.abc import Callable, Iterator
from pathlib import Path

from configs.errors import NotFound, NotWritten, StoreFull, StoreReadOnly, Unavailable
from subspace_store.storage.protocol import check_head, check_key

TEMPORARY = ".writing-"
"""Temporary files start with this; no listing shows them."""

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
                if start >= end:  # nothing cannot be mapped
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
            # Also for the loser: what it reads now must not be gone after a crash. What fails here is no `NotWritten`,
            # because the name is there.
            with _refusals_named(path, _unavailable):
                _flush_folder(path.parent)
        return is_new

    def keys(self, prefix: str, after: str = "") -> list[str]:
        return sorted(key for key in self._files(prefix) if key > after and not _is_temporary(key))

    def delete(self, key: str) -> None:
        path = self._path(key)
        try:
            path.unlink(missing_ok=True)
        except NotADirectoryError:
            return
        except OSError as error:
            raise _unavailable(error, path) from error

    def abandon(self, prefix: str) -> int:
        begun = [key for key in self._files(prefix) if _is_temporary(key)]
        for key in begun:
            self.delete(key)
        return len(begun)

    def _files(self, prefix: str) -> Iterator[str]:
        # Only the folder that the prefix names in full is walked.
        parent = prefix.rpartition("/")[0]
        start = self._path(parent) if parent else self.folder
        for folder, _, names in os.walk(start):
            base = Path(folder).relative_to(self.folder).as_posix()
            keys = (name if base == "." else f"{base}/{name}" for name in names)
            yield from (key for key in keys if key.startswith(prefix))

    def _path(self, key: str) -> Path:
        return self.folder / check_key(key)


class _FileStream:
    """A temporary file beside `path` that takes its name at `finish`, and is gone after `close` in any case."""

    def __init__(self, path: Path, head_size: int) -> None:
        self.path, self.head_size = path, head_size
        self.temporary = path.parent / f"{TEMPORARY}{secrets.token_hex(8)}"
        with _refusals_named(path):
            _make_folder(path.parent)
            self.file = open(self.temporary, "xb")  # noqa: SIM115 (`close` closes it)
            self.file.seek(head_size)

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
        # On a full disk closing fails as writing did, which was reported; the file goes all the same.
        with contextlib.suppress(OSError):
            self.file.close()
        with contextlib.suppress(OSError):
            self.temporary.unlink()


def _is_temporary(key: str) -> bool:
    return key.rpartition("/")[2].startswith(TEMPORARY)


@contextlib.contextmanager
def _refusals_named(path: Path, told: Callable[[OSError, Path], Unavailable] | None = None) -> Iterator[None]:
    """told: Our error for one of the file system's; default: `_not_written`, for all that comes before a name."""
    try:
        yield
    except OSError as error:
        raise (told or _not_written)(error, path) from error


def _make_folder(folder: Path) -> None:
    """Like mkdir -p, and every new name in a parent is flushed."""
    if not folder.exists():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _flush_folder(folder.parent)


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _not_written(error: OSError, path: Path) -> Unavailable:
    """Of a write that has not given the object its name: what is known to have failed is told as failed."""
    what = f"the file system refused: {error.strerror or error}"
    if error.errno in FULL:
        return StoreFull(what, str(path), "make space on that disk (or in the quota), then ask again")
    if error.errno in READ_ONLY:
        return StoreReadOnly(what, str(path), "let this user write there, or mount it for writing; then ask again")
    return NotWritten(what, str(path), "check the disk, then ask again")


def _unavailable(error: OSError, path: Path) -> Unavailable:
    return Unavailable(f"the file system refused: {error.strerror or error}", str(path), "check space and permissions")
