"""Storage in this process's memory, for tests: two objects with one name see the same bytes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from configs.errors import NotFound
from subspace_store.storage.protocol import check_head, check_key

_PLACES: dict[str, dict[str, bytes]] = {}
_LOCK = threading.Lock()


class MemoryStorage:
    """A named place in memory. Lives as long as the process; safe for threads.

    Args:
        name: Name of the place; `""` is a name like any other.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def url(self) -> str:
        return f"memory:{self.name}"

    def read(self, key: str) -> bytes:
        with _LOCK:
            try:
                return self._objects()[check_key(key)]
            except KeyError:
                raise NotFound("no such object", f"{self.url}/{key}") from None

    def view(self, key: str, start: int = 0, size: int | None = None) -> memoryview:
        return memoryview(self.read(key))[start : None if size is None else start + size]

    def write(self, key: str, content: bytes) -> None:
        with _LOCK:
            self._objects()[check_key(key)] = bytes(content)

    @contextlib.contextmanager
    def stream(self, key: str, head_size: int) -> Iterator[_MemoryStream]:
        yield _MemoryStream(self, check_key(key), head_size)

    def create(self, key: str, content: bytes) -> bool:
        mine = bytes(content)
        with _LOCK:
            if check_key(key) in self._objects():
                return False
            self._objects()[key] = mine
            return True

    def keys(self, prefix: str, after: str = "") -> list[str]:
        with _LOCK:
            return sorted(key for key in self._objects() if key.startswith(prefix) and key > after)

    def delete(self, key: str) -> None:
        with _LOCK:
            self._objects().pop(check_key(key), None)

    def abandon(self, prefix: str, idle_seconds: float = 0.0) -> int:
        return 0  # an unfinished write ends with its process

    def _objects(self) -> dict[str, bytes]:
        return _PLACES.setdefault(self.name, {})


class _MemoryStream:
    def __init__(self, storage: MemoryStorage, key: str, head_size: int) -> None:
        self.storage, self.key, self.head_size = storage, key, head_size
        self.content = bytearray(head_size)

    def append(self, content: bytes | memoryview) -> None:
        self.content += content

    def finish(self, head: bytes) -> None:
        self.content[: self.head_size] = check_head(head, self.head_size)
        self.storage.write(self.key, bytes(self.content))
