"""Tests with scratch objects whether a bucket or folder keeps the promises that a store depends on.

Nothing of a store is read or changed here (verify.py checks stores). Run it before a bucket or folder is trusted, and
after its server was upgraded.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from configs.errors import Corrupt, NotFound, OnebasisError, UnsafeStorage
from subspace_store.storage.create_rule import UNSAFE, scratch_folder, try_second_create
from subspace_store.storage.protocol import Storage

T = TypeVar("T")

RIVALS = 8
"""Number of creates of one name at the same time; s3rver lets all eight win."""

RACES = 5
"""Number of races: a server that checks first and writes afterwards fails only one race in a few."""

STREAM_BYTES = 17 * 2**20
"""Size of the streamed object: more than S3 clients send or read in one piece."""

TIMED = 5
"""Number of requests whose median time is reported."""

STALE = "keep no subspace here: what was committed could be overlooked; check caches and replicas before the server"
DAMAGED = "keep no subspace here: bytes come back changed; check disks, proxies and the server's version"
KEEPS = "what is not needed any more stays and costs space; check the permission to delete, versioning and object locks"


@dataclass(frozen=True)
class Check:
    """One promise, and whether it was kept."""

    name: str
    ok: bool
    what: str
    """The observation: a measurement, or how the promise was broken."""
    todo: str
    """Advice what to do if the promise was broken; empty if it was kept."""


@dataclass(frozen=True)
class _Scratch:
    """A folder that nobody else uses, and the keys that may exist in it."""

    storage: Storage
    folder: str
    used: set[str] = field(default_factory=set)

    def key(self, name: str) -> str:
        key = f"{self.folder}{name}"
        self.used.add(key)
        return key


def examine(storage: Storage) -> list[Check]:
    """Try every promise on objects below `doctor/`, which are removed afterwards.

    Returns:
        All checks in a fixed order; a place may hold versions if every one is `ok`.

    Raises:
        Unavailable: The storage cannot be reached or refuses the first write. What it answers later is a check's
            finding.

    Cost:
        About 100 small requests, and 17 MiB written and read.
    """
    scratch = _Scratch(storage, scratch_folder())
    try:
        storage.write(scratch.key("reached"), b"")
        return [_tried(name, check, todo, scratch) for name, check, todo in CHECKS]
    finally:
        for key in sorted(scratch.used):
            with contextlib.suppress(OnebasisError):
                storage.delete(key)


def _tried(name: str, check: Callable[[_Scratch], str], todo: str, scratch: _Scratch) -> Check:
    try:
        return Check(name, True, check(scratch), "")
    except OnebasisError as error:
        # UnsafeStorage is about the whole place, whose address need not be repeated.
        return Check(name, False, error.what if isinstance(error, UnsafeStorage) else error.sentence, todo)


def _second_create(scratch: _Scratch) -> str:
    storage, keys = scratch.storage, [scratch.key(f"create/{number}") for number in range(TIMED)]

    def create(key: str) -> None:
        _expect(storage.create(key, b"first"), "a new name could not be created")

    took = _milliseconds(create, keys)
    for key in keys:
        try_second_create(storage, key, b"first", b"second")
    return f"it is refused and changes nothing; a create takes {took:.1f} ms"


def _race(scratch: _Scratch) -> str:
    for race in range(RACES):
        key, start = scratch.key(f"race/{race}"), threading.Barrier(RIVALS)

        def create(me: int, key: str = key, start: threading.Barrier = start) -> bool:
            start.wait()
            return scratch.storage.create(key, b"%d" % me)

        with ThreadPoolExecutor(RIVALS) as pool:
            won = list(pool.map(create, range(RIVALS)))
        winners = won.count(True)
        _expect(winners == 1, f"{winners} of {RIVALS} creates of one name at once were told that they won")
        _expect(scratch.storage.read(key) == b"%d" % won.index(True), "the object is not the winner's")
    return f"one winner and its bytes in each of {RACES} races"


def _listing(scratch: _Scratch) -> str:
    storage, folder = scratch.storage, f"{scratch.folder}list/"
    written: list[str] = []
    for name in ("2", "10", "1", "3/1"):
        written.append(scratch.key(f"list/{name}"))
        storage.write(written[-1], b"")
        expected = sorted(written)
        for after in ("", *expected):
            wanted = [key for key in expected if key > after]
            found = storage.keys(folder, after)
            missing = _names(sorted(set(wanted) - set(found)), folder)
            _expect(not missing, f"a list does not show {missing}, written before it")
            _expect(found == wanted, f"a list shows {_names(found, folder)} instead of {_names(wanted, folder)}")
    return "it shows every write at once, in order"


def _reading(scratch: _Scratch) -> str:
    storage, key, content = scratch.storage, scratch.key("read"), os.urandom(100_003)
    storage.write(key, content)
    _expect(storage.read(key) == content, "an object is read with other bytes than were written")
    for start, size in ((0, 8), (1, 4_096), (70_001, 20_000), (100_000, 100), (50_000, None)):
        end = None if size is None else start + size
        _expect(storage.view(key, start, size) == content[start:end], f"bytes {start} to {end} are not those written")
    with contextlib.suppress(NotFound):
        storage.read(scratch.key("absent"))
        raise Corrupt("an object that was never written can be read")
    took = _milliseconds(lambda _: storage.view(key, 0, 8), range(TIMED))
    return f"all and parts of it come back as they were written; a read takes {took:.1f} ms"


def _stream(scratch: _Scratch) -> str:
    storage, key, head, body = scratch.storage, scratch.key("stream"), os.urandom(64), os.urandom(STREAM_BYTES)
    begun = time.perf_counter()
    with storage.stream(key, len(head)) as out:
        for start in range(0, len(body), 2**20):
            out.append(memoryview(body)[start : start + 2**20])
        out.finish(head)
    written = time.perf_counter()
    stored = storage.read(key)
    speeds = [STREAM_BYTES / 2**20 / seconds for seconds in (written - begun, time.perf_counter() - written)]
    same = hashlib.sha256(stored).digest() == hashlib.sha256(head + body).digest()
    _expect(same, f"{len(head + body)} bytes were written in parts, and {len(stored)} different bytes came back")
    return f"{STREAM_BYTES // 2**20} MiB come back as written; {speeds[0]:.0f} MiB/s up, {speeds[1]:.0f} MiB/s down"


def _overwrite(scratch: _Scratch) -> str:
    storage, key = scratch.storage, scratch.key("overwrite")
    for content in (b"one", b"two two", b"3"):
        storage.write(key, content)
        _expect(storage.read(key) == content, "after a write the old bytes were read")
    return "it is seen at once"


def _deletion(scratch: _Scratch) -> str:
    storage, key = scratch.storage, scratch.key("deleted")
    storage.delete(key)
    storage.write(key, b"old")
    storage.delete(key)
    with contextlib.suppress(NotFound):
        storage.read(key)
        raise Corrupt("a deleted object can still be read")
    _expect(not storage.keys(key), "a deleted object is still listed")
    _expect(storage.create(key, b"new"), "the name of a deleted object cannot be used again")
    return "it is final, and deleting an absent object is no error"


CHECKS: tuple[tuple[str, Callable[[_Scratch], str], str], ...] = (
    ("second create", _second_create, UNSAFE),
    ("eight creates at once", _race, UNSAFE),
    ("list", _listing, STALE),
    ("read", _reading, DAMAGED),
    ("stream", _stream, DAMAGED),
    ("overwrite", _overwrite, STALE),
    ("delete", _deletion, KEEPS),
)


def _expect(kept: bool, broken: str) -> None:
    if not kept:
        raise Corrupt(broken)


def _names(keys: Iterable[str], folder: str) -> str:
    return ", ".join(key.removeprefix(folder) for key in keys)


def _milliseconds(act: Callable[[T], object], arguments: Iterable[T]) -> float:
    """Median time of one call."""
    times = []
    for argument in arguments:
        begun = time.perf_counter()
        act(argument)
        times.append(time.perf_counter() - begun)
    return 1e3 * statistics.median(times)
