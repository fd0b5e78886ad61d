"""A store copied to an archive, and back into an empty place, while its writer goes on.

First the log is read, which says which objects a state needs; then they are copied. Objects never change. One that is
gone by then was collected because a later record gave its version up, so the log is read again and what it says now is
copied: no version has to be pinned, and nothing is written to the store. An object that is gone although no record
says so is damage. The log is copied up to the record that was read, and a log that ends earlier is a state that was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from configs.errors import Conflict, Corrupt, NotFound, Unavailable
from subspace_store.archive import Archive, Copy
from subspace_store.files import blobs
from subspace_store.log import retention
from subspace_store.log.fold import log_key
from subspace_store.log.store_format import KEY as FORMAT
from subspace_store.log.version import SubspaceState
from subspace_store.log.version_log import HINT, VersionLog, checkpoint_key
from subspace_store.parallel import AT_ONCE, in_order
from subspace_store.storage.create_rule import SCRATCH
from subspace_store.storage.protocol import Storage

TRIES = 5
"""Attempts, each with the log as it is then: nobody expires versions and collects five times during one backup."""
FIXED = ("blobs/", "log/", "data/")
"""Keys whose objects are never written again: named by an epoch and a random part, by a number, or by their digest."""


@dataclass(frozen=True)
class StoreCopy:
    """A store as a backup holds it."""

    seq: int
    """Number of the last record of the log."""
    head_sha256: str
    """Digest of that record, which stands for all before it."""
    objects: Mapping[str, Copy] = field(default_factory=dict)
    """Key to content, of every object; empty: there was no store yet."""


def copy_store(storage: Storage, archive: Archive, before: StoreCopy | None = None) -> StoreCopy:
    """Copy all that the store's present state needs; and the tasks' rows, uploads and results, which lie beside it.

    Args:
        before: What an earlier backup into this archive had of this store: what it has is not read again.

    Raises:
        Corrupt: An object that the state needs is gone or damaged.
        Unavailable: The storage was away.

    Cost:
        One listing. Objects that are new are read two or three times, to be checked and copied; others not at all.
    """
    for _ in range(TRIES):
        state = VersionLog(storage).open()
        try:
            return _copied(storage, archive, state, before)
        except _GivenUpError:
            continue
    raise Unavailable("versions expire faster than they are copied", storage.url, "make the backup again")


class _GivenUpError(Exception):
    """An object was collected since the log was read: no version needs it any more."""


def _copied(storage: Storage, archive: Archive, state: SubspaceState, before: StoreCopy | None) -> StoreCopy:
    if not state.seq:
        return StoreCopy(0, state.head_sha256)
    known = _known(storage, archive, before)
    needed = retention.needed(state)
    records = [log_key(seq) for seq in range(1, state.seq + 1)]
    listed = storage.keys("")
    beside = [
        key for key in listed if not key.startswith(("blobs/", "log/", "checkpoints/", SCRATCH)) and key != FORMAT
    ]
    checkpoints = [key for key in listed if key.startswith("checkpoints/") and key <= checkpoint_key(state.seq)][-1:]

    def copy(key: str) -> Copy | None:
        if key in known:
            return known[key]
        try:
            if key in needed:
                blobs.check_blob(storage, needed[key])
            return archive.put_from(storage, key)
        except (NotFound, Corrupt) as error:
            if key in beside and isinstance(error, NotFound):  # a task ended meanwhile, and its rows were deleted
                return None
            if key in needed and key not in retention.needed(VersionLog(storage).open()):
                raise _GivenUpError from error
            todo = "`onebasis store verify` shows what is damaged; restore it from an earlier backup"
            raise Corrupt(f"cannot be backed up: {error.what}", error.where, todo) from error

    # The newest checkpoint only saves reading the log. It may have been collected, and another be there now.
    keys = [FORMAT, *records, *needed, *beside]
    copies = {key: found for key, found in zip(keys, in_order(copy, keys, AT_ONCE), strict=True) if found is not None}
    for key in checkpoints:
        with contextlib.suppress(NotFound):
            copies[key] = archive.put_from(storage, key)
    head = copies[records[-1]].sha256
    if head != state.head_sha256:
        raise Corrupt("the record is not the one that the log ends with", f"{storage.url}/{records[-1]}")
    return StoreCopy(state.seq, state.head_sha256, copies)


def _known(storage: Storage, archive: Archive, before: StoreCopy | None) -> dict[str, Copy]:
    """What need not be read again. The last record of then stands for the log up to there: records are a chain. A store
    that was restored from an older backup, and went on, has other records under the same numbers."""
    if before is None or not before.seq:
        return {}
    try:
        content = storage.read(log_key(before.seq))
    except NotFound:
        return {}
    is_same = archive.holds(before.objects[log_key(before.seq)]) and archive.put(content).sha256 == before.head_sha256
    if not is_same:
        return {}
    return {key: copy for key, copy in before.objects.items() if key.startswith(FIXED) and archive.holds(copy)}


def check_empty(storage: Storage) -> None:
    """Refuse a place where something is. Raises Conflict."""
    if there := storage.keys(""):
        raise Conflict(
            f"something is there already ({len(there):,} objects)",
            storage.url,
            "name an empty folder or prefix in storage.url, or move away what is there",
        )


def restore_store(archive: Archive, copy: StoreCopy, storage: Storage) -> int:
    """Write a store back. What an earlier attempt wrote is written again; FORMAT, which makes it a store, comes last.

    Returns:
        The number of objects.

    Raises:
        Corrupt: A content of the archive is gone or damaged.
    """
    order = sorted(copy.objects, key=lambda key: (key == FORMAT, key))
    items = [(key, copy.objects[key]) for key in order if key not in (FORMAT, HINT)]
    for _ in in_order(lambda item: archive.get_to(item[1], storage, item[0]), items, AT_ONCE):
        pass
    if FORMAT in copy.objects:
        archive.get_to(copy.objects[FORMAT], storage, FORMAT)
    return len(copy.objects)
