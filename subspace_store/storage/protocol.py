"""The one interface to object storage. Three implementations, one contract test.

Keys are `/`-separated, relative to the store's root. Only `create` is conditional, and only the log uses it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from configs.errors import InvalidInput

KEY_BYTES_MAX = 900
"""Longest key: S3 takes 1024 bytes, of which some are the prefix's."""
PART_BYTES_MAX = 255
"""Longest part between two slashes: a file's name."""


class ObjectStream(Protocol):
    """An object that is being written from front to back, except for its head, which comes last."""

    def append(self, content: bytes | memoryview) -> None:
        """Add the bytes that come next. The buffer may be reused afterwards."""
        ...

    def finish(self, head: bytes) -> None:
        """Write the head. When this returns, the whole object exists. No call may follow.

        Raises:
            InvalidInput: The head does not have the size that was announced.
        """
        ...


@runtime_checkable
class Storage(Protocol):
    """Bytes by key. Every method may raise `Unavailable`; then the outcome of a write is unknown, unless the error is
    `NotWritten`: then the object is unchanged, and stays so."""

    @property
    def url(self) -> str:
        """The address it was opened with, for people and for opening it elsewhere."""
        ...

    def read(self, key: str) -> bytes:
        """The whole object. Raises NotFound."""
        ...

    def view(self, key: str, start: int = 0, size: int | None = None) -> memoryview:
        """Part of an object, without reading the rest: mapped into memory from a folder, ranged requests to S3.

        Args:
            start: First byte, from 0.
            size: Number of bytes; None is all from `start` on.

        Returns:
            Exactly these bytes; fewer only where the object ends before.

        Raises:
            NotFound: There is no such object.
        """
        ...

    def write(self, key: str, content: bytes) -> None:
        """Create or replace, atomically: a reader sees the old bytes or the new, never a part."""
        ...

    def stream(self, key: str, head_size: int) -> AbstractContextManager[ObjectStream]:
        """Create or replace an object that is too large to hold in memory, and whose head is known only at its end.

        ```python
        with storage.stream(key, head_size=64) as out:
            for buffer in buffers:
                out.append(buffer)
            out.finish(head)
        ```

        The object appears whole at `finish`. If the block is left without it, the object is what it was before, and
        nothing is left behind.

        Args:
            head_size: Size of the head that `finish` will bring; it comes before all that is appended.

        Cost:
            Memory for some 80 MB at most, however large the object.
        """
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
        """Delete; an absent object is no error."""
        ...

    def abandon(self, prefix: str, idle_seconds: float = 0.0) -> int:
        """Give up writes below a prefix that were begun and never finished (a killed process leaves them); a process
        that is still writing one is told that it failed.

        Args:
            idle_seconds: Give up only writes to which nothing was added for so long.

        Returns:
            The number of writes that were given up. Objects that are whole stay.
        """
        ...


@runtime_checkable
class Clocked(Protocol):
    """A storage that has a clock of its own: an S3 server, a file system that another machine serves."""

    def clock(self) -> float:
        """Unix seconds by that clock. Raises Unavailable."""
        ...


def check_key(key: str) -> str:
    """The key itself.

    Raises:
        InvalidInput: The key is empty, absolute, or has an empty, `.` or `..` part: it would leave the store's root. Or
            some storage could not use it as a name: it is unprintable, or too long.
    """
    parts = key.split("/")
    is_name = key.isprintable() and "\\" not in key and len(key.encode()) <= KEY_BYTES_MAX
    if not is_name or any(part in ("", ".", "..") or len(part.encode()) > PART_BYTES_MAX for part in parts):
        raise InvalidInput(
            f"is not a storage key: {key!r:.80}",
            todo=f"use relative parts of up to {PART_BYTES_MAX} bytes, separated by single slashes",
        )
    return key


def check_head(head: bytes, head_size: int) -> bytes:
    """The head itself.

    Raises:
        InvalidInput: The stream left room for another size: the object would begin with a gap or lose bytes.
    """
    if len(head) != head_size:
        raise InvalidInput(f"the head has {len(head)} bytes; room was left for {head_size}")
    return head
