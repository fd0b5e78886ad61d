"""Storage in this process's memory, for tests: two objects with one name see the same bytes."""

from __future__ import annotations

import threading

from configs.errors import NotFound
from subspace_store.storage import check_key

_PLACES: dict[str, dict[str, bytes]] = {}
_LOCK = threading.Lock()


class MemoryStorage:
    """A named place in memory. Lives as long as the process; safe for threads.

    Args:
        name: Which place; `""` is a place like any other.
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

    def write(self, key: str, content: bytes) -> None:
        with _LOCK:
            self._objects()[check_key(key)] = bytes(content)

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

    def _objects(self) -> dict[str, bytes]:
        return _PLACES.setdefault(self.name, {})
