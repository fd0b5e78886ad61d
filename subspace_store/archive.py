"""A folder or bucket of backups: contents under their digests, so that each is kept once however many backups hold it.

Contents are written before the list that names them (`note`), and nothing that was written is changed: a backup that
was cut off has no list, and the next one finds what it had copied.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from configs.errors import Corrupt, NotFound, Unavailable
from subspace_store.digests import digest
from subspace_store.storage.protocol import Storage

OBJECTS, LISTS, BEGUN = "objects/", "backups/", "begun/"
PIECE_BYTES = 16 * 2**20
"""Size of a piece that is held in memory; smaller objects are read once, larger ones twice."""
TRIES = 3
"""Attempts at an object that changes while it is copied."""


@dataclass(frozen=True)
class Copy:
    """One content of an archive."""

    sha256: str
    size_bytes: int


class Archive:
    """Contents and lists of them. `put…` may be called by several threads.

    Args:
        storage: Where it is. Its writes need not be conditional.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        self._there = {key.rpartition("/")[2] for key in storage.keys(OBJECTS)}
        self._lock = threading.Lock()
        self.copied = Copied()

    def holds(self, copy: Copy) -> bool:
        """Whether a content is there."""
        return copy.sha256 in self._there

    def put(self, content: bytes) -> Copy:
        """Keep a content, unless it is there."""
        copy = Copy(digest(content), len(content))
        if not self.holds(copy):
            self.storage.write(_key(copy), content)
        self._count(copy)
        return copy

    def put_from(self, source: Storage, key: str) -> Copy:
        """Keep an object of another storage.

        Raises:
            NotFound: There is no such object.
            Unavailable: It was changed again and again while it was copied.
        """
        first = bytes(source.view(key, 0, PIECE_BYTES))
        if len(first) < PIECE_BYTES:
            return self.put(first)
        for _ in range(TRIES):
            copy = _measured(source, key)
            if self.holds(copy) or _streamed(source, key, self.storage, _key(copy), copy):
                self._count(copy)
                return copy
        raise Unavailable("changes while it is copied", f"{source.url}/{key}", "make the backup again later")

    def get(self, copy: Copy) -> bytes:
        """A content.

        Raises:
            Corrupt: It is gone, or not what was written.
        """
        try:
            content = self.storage.read(_key(copy))
        except NotFound:
            content = b""
        if Copy(digest(content), len(content)) != copy:
            raise _damaged(self.storage, copy)
        return content

    def get_to(self, copy: Copy, target: Storage, key: str) -> None:
        """Write a content to another storage.

        Raises:
            Corrupt: It is gone, or not what was written: nothing is written.
        """
        if copy.size_bytes < PIECE_BYTES:
            target.write(key, self.get(copy))
        elif not _streamed(self.storage, _key(copy), target, key, copy):
            raise _damaged(self.storage, copy)

    def begin(self, name: str) -> None:
        """Say that a backup of this name is being made."""
        self.storage.write(f"{BEGUN}{name}", b"")

    def note(self, name: str, facts: dict[str, Any]) -> None:
        """Write a backup's list, which makes it one: everything that it names has to be there."""
        content = json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()
        self.storage.write(f"{LISTS}{name}.json", b'{"sha256":"%s","backup":%s}' % (digest(content).encode(), content))
        self.storage.delete(f"{BEGUN}{name}")

    def noted(self) -> list[str]:
        """Names of the whole backups, oldest first: a name begins with its time."""
        return [key.removeprefix(LISTS).removesuffix(".json") for key in self.storage.keys(LISTS)]

    def cut_off(self) -> list[str]:
        """Names of backups that were begun and not ended."""
        whole = {*self.noted()}
        return [name for key in self.storage.keys(BEGUN) if (name := key.removeprefix(BEGUN)) not in whole]

    def read(self, name: str) -> dict[str, Any]:
        """A backup's list.

        Raises:
            NotFound: There is none of this name.
            Corrupt: It is not what was written.
        """
        where = f"{self.storage.url}/{LISTS}{name}.json"
        content = self.storage.read(f"{LISTS}{name}.json")
        found = re.fullmatch(rb'\{"sha256":"([0-9a-f]{64})","backup":(.*)\}', content, re.DOTALL)
        if found is None or digest(found[2]) != found[1].decode():
            raise Corrupt("is not the list that was written", where, "use another backup")
        facts: dict[str, Any] = json.loads(found[2])
        return facts

    def _count(self, copy: Copy) -> None:
        with self._lock:
            is_new = copy.sha256 not in self._there
            self._there.add(copy.sha256)
            before = self.copied
            self.copied = Copied(before.objects + is_new, before.size_bytes + is_new * copy.size_bytes)


@dataclass(frozen=True)
class Copied:
    """What was not in the archive before."""

    objects: int = 0
    size_bytes: int = 0


def _key(copy: Copy) -> str:
    return f"{OBJECTS}{copy.sha256[:2]}/{copy.sha256}"


def _pieces(source: Storage, key: str) -> Iterator[memoryview]:
    start = 0
    while len(piece := source.view(key, start, PIECE_BYTES)):
        yield piece
        start += len(piece)


def _measured(source: Storage, key: str) -> Copy:
    sha256, size = hashlib.sha256(), 0
    for piece in _pieces(source, key):
        sha256.update(piece)
        size += len(piece)
    return Copy(sha256.hexdigest(), size)


def _streamed(source: Storage, key: str, target: Storage, to: str, copy: Copy) -> bool:
    """Copy a large object. False: its bytes are not those, and nothing was written."""
    sha256, size = hashlib.sha256(), 0
    with target.stream(to, 0) as out:
        for piece in _pieces(source, key):
            sha256.update(piece)
            size += len(piece)
            out.append(piece)
        if Copy(sha256.hexdigest(), size) != copy:
            return False
        out.finish(b"")
    return True


def _damaged(storage: Storage, copy: Copy) -> Corrupt:
    where = f"{storage.url}/{_key(copy)}"
    return Corrupt("a part of the backup is gone or changed", where, "use an earlier backup")
