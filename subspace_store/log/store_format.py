"""The object FORMAT in a store's folder: the number of the format, and the base model that the store belongs to."""

from __future__ import annotations

import json

from configs.errors import Corrupt, NotFound, OtherBaseModel, UnusableStore
from subspace_store.storage.create_rule import try_on_new_object, try_second_create
from subspace_store.storage.protocol import Storage

KEY = "FORMAT"
FORMAT_NUMBER = 2
"""Format of everything below the store's folder. tests/data/stores has a store of each format that is read."""


def check_format(storage: Storage, base_model: str = "", base_sha256: str = "") -> tuple[str, str]:
    """(base model, sha256) that the folder names, or the caller's where it names none; empty is unknown.

    Raises:
        OtherBaseModel: The folder belongs to another base model.
        UnusableStore: It has a format that is no longer read.
        Corrupt: A newer format, or no FORMAT at all.
    """
    content = read_format(storage)
    return (base_model, base_sha256) if content is None else _checked(storage, content, base_model, base_sha256)


def read_format(storage: Storage) -> bytes | None:
    """The content of the object FORMAT; None: no writer has opened a store here yet."""
    try:
        return storage.read(KEY)
    except NotFound:
        return None


def check_place(storage: Storage, base_model: str, base_sha256: str) -> bool:
    """Check, before a writer's first record, that the folder belongs to its base model, and that two writers cannot
    overwrite each other there. Nothing is left behind.

    Returns:
        Whether there is a store already.

    Raises:
        UnsafeStorage: The storage lets two writers create the same object.
        OtherBaseModel, UnusableStore, Corrupt: As `check_format`.

    Cost:
        Two small requests; where there is no store yet, five.
    """
    content = read_format(storage)
    if content is None:
        try_on_new_object(storage)
        return False
    _checked(storage, content, base_model, base_sha256)
    # The second create has the same bytes: a storage that breaks the rule only writes them again.
    try_second_create(storage, KEY, content, content)
    return True


def make_store(storage: Storage, base_model: str, base_sha256: str) -> tuple[str, str]:
    """As `check_format`, for a writer: makes the store where there is none.

    Args:
        base_model, base_sha256: Name and sha256 of the base model that it will belong to for ever. Empty is unknown.

    Raises: As `check_place`.
    """
    if not check_place(storage, base_model, base_sha256):
        mine = {"format": FORMAT_NUMBER, "base_model": base_model, "base_sha256": base_sha256}
        # Another writer may have created it first: whose FORMAT it is, is checked next.
        storage.create(KEY, json.dumps(mine, sort_keys=True).encode())
    return check_format(storage, base_model, base_sha256)


def _checked(storage: Storage, content: bytes, base_model: str, base_sha256: str) -> tuple[str, str]:
    where = f"{storage.url}/{KEY}"
    try:
        found = json.loads(content)
        number, theirs = int(found["format"]), (str(found["base_model"]), str(found["base_sha256"]))
    except (ValueError, KeyError, TypeError) as error:
        raise Corrupt(f"is no FORMAT of a subspace: {error}", where) from error
    if number > FORMAT_NUMBER:
        raise Corrupt(f"has format {number}, this code reads up to {FORMAT_NUMBER}", where, "use a newer onebasis")
    if number < FORMAT_NUMBER:
        raise UnusableStore(
            f"has format {number}, which onebasis 0.1 wrote and this code does not read",
            where,
            "export its tasks with the version that wrote it, and import them here; or choose another storage.url",
        )
    for what, stored, ours in zip(("name", "weights_sha256"), theirs, (base_model, base_sha256), strict=True):
        if stored and ours and stored != ours:
            raise OtherBaseModel(
                f"this subspace belongs to the base model with {what} {stored!r}, not {ours!r}",
                where,
                f"correct base_model.{what} in the settings if it is the one that is wrong; else choose another "
                "storage.url: a subspace is of one base model for ever",
            )
    return theirs[0] or base_model, theirs[1] or base_sha256
