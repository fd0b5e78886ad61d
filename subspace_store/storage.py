"""The one seam to object storage. Three implementations, one contract test.

Keys are `/`-separated, relative to the store's root. Only `create` is conditional, and only the log uses it.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable


@runtime_checkable
class Storage(Protocol):
    """Bytes by key. Every method may raise `Unavailable`; then the outcome of a write is unknown."""

    @property
    def url(self) -> str:
        """The address it was opened with, for people and for opening it elsewhere."""
        ...

    def read(self, key: str) -> bytes:
        """The whole object. Raises NotFound."""
        ...

    def write(self, key: str, content: bytes) -> None:
        """Create or replace, atomically: a reader sees the old bytes or the new, never a part."""
        ...

    def create(self, key: str, content: bytes) -> bool:
        """Create if absent. True: these bytes are the object. False: an object was there; nothing changed.

        After `Unavailable` the object may or may not exist. A retry inside a client library may report False
        for an object that this very call wrote: read it back to know.
        """
        ...

    def keys(self, prefix: str, after: str = "") -> list[str]:
        """All keys that start with prefix and sort after `after`, in ascending order."""
        ...

    def delete(self, key: str) -> None:
        """Delete; absent is fine."""
        ...
