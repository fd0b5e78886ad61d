"""Storage in a local folder, safe against a crash at any moment and against other processes on the same machine.

An object appears whole or not at all: bytes go to a temporary file, are flushed, and then get their name. A name is
durable once its folder is flushed too.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from configs.errors import NotFound, Unavailable
from subspace_store.storage import check_key

TEMPORARY = ".writing-"
"""Temporary files start with this; no listing shows them."""


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

    def write(self, key: str, content: bytes) -> None:
        path = self._path(key)
        try:
            with _flushed(path, content) as temporary:
                os.replace(temporary, path)
        except OSError as error:
            raise _unavailable(error, path) from error

    def create(self, key: str, content: bytes) -> bool:
        path = self._path(key)
        try:
            with _flushed(path, content) as temporary:
                # A hard link is refused if the name is taken; rename would replace it.
                os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError as error:
            raise _unavailable(error, path) from error
        return True

    def keys(self, prefix: str, after: str = "") -> list[str]:
        # Only the folder that the prefix names in full is walked.
        parent = prefix.rpartition("/")[0]
        start = self._path(parent) if parent else self.folder
        found = []
        for folder, _, names in os.walk(start):
            base = Path(folder).relative_to(self.folder).as_posix()
            for name in names:
                key = name if base == "." else f"{base}/{name}"
                if key.startswith(prefix) and key > after and not name.startswith(TEMPORARY):
                    found.append(key)
        return sorted(found)

    def delete(self, key: str) -> None:
        path = self._path(key)
        try:
            path.unlink(missing_ok=True)
        except NotADirectoryError:
            return
        except OSError as error:
            raise _unavailable(error, path) from error

    def _path(self, key: str) -> Path:
        return self.folder / check_key(key)


@contextlib.contextmanager
def _flushed(path: Path, content: bytes) -> Iterator[Path]:
    """A flushed temporary file beside `path`; when the caller has named it, the folder is flushed as well."""
    _make_folder(path.parent)
    temporary = path.parent / f"{TEMPORARY}{secrets.token_hex(8)}"
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)
        _flush_folder(path.parent)


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


def _unavailable(error: OSError, path: Path) -> Unavailable:
    return Unavailable(f"the file system refused: {error.strerror or error}", str(path), "check space and permissions")
