"""Tests the one rule of a storage that versions depend on: if several create one name, one wins and the others are
refused.

A server that ignores `If-None-Match: *` lets two writers overwrite each other's records. So a writer tests the rule
before its first record. The doctor tests it as well, also with several creates of one name at once: some servers check
first and write afterwards, which shows only by chance.
"""

from __future__ import annotations

import contextlib
import secrets
import time

from configs.errors import OnebasisError, UnsafeStorage
from subspace_store.storage.protocol import Storage

SCRATCH = "doctor/"
"""Folder of the objects that are made to try something out."""
SCRATCH_SECONDS = 3600.0
"""Age above which objects in that folder were left by a killed process: no trial takes so long."""
UNSAFE = "keep no subspace here: two writers would lose each other's versions; use a server that honours If-None-Match"


def scratch_folder() -> str:
    """A folder that nobody else uses, with a slash at its end. Its name tells its age."""
    return f"{SCRATCH}{int(time.time())}-{secrets.token_hex(8)}/"


def is_old_scratch(key: str, now: float) -> bool:
    """Whether a key lies in a `scratch_folder` that nobody uses any more."""
    made = key.removeprefix(SCRATCH).partition("-")[0]
    return key.startswith(SCRATCH) and made.isdecimal() and now - int(made) > SCRATCH_SECONDS


def try_second_create(storage: Storage, key: str, content: bytes, second: bytes) -> None:
    """Create an object that exists already. A storage that keeps the rule refuses it, and nothing changes.

    Args:
        content: Bytes that the object holds.
        second: Bytes of the second create: others, to see that they change nothing, or the same, where the object must
            not be lost.

    Raises:
        UnsafeStorage: The object was created again, or changed.

    Cost:
        One request; with other bytes one more.
    """
    if storage.create(key, second):
        raise UnsafeStorage("a second create of one name was not refused", storage.url, UNSAFE)
    if second != content and storage.read(key) != content:
        raise UnsafeStorage("a refused create changed the object", storage.url, UNSAFE)


def try_on_new_object(storage: Storage) -> None:
    """Create a scratch object twice, and delete it.

    Raises:
        UnsafeStorage: The second create was not refused, or changed what the first wrote.

    Cost:
        Four requests.
    """
    key = f"{scratch_folder()}create"
    try:
        storage.create(key, b"first")
        try_second_create(storage, key, b"first", b"second")
    finally:
        with contextlib.suppress(OnebasisError):
            storage.delete(key)
