"""Whether the objects that versions need are there, each of its size: one byte is read of each, and no tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

from configs.errors import Corrupt, NotFound
from subspace_store.log import retention
from subspace_store.log.version import BlobRef, SubspaceState
from subspace_store.parallel import AT_ONCE, in_order
from subspace_store.storage.protocol import Storage

NAMED_MAX = 3
"""Objects that one message names."""


def missing(storage: Storage, refs: Iterable[BlobRef]) -> Iterator[Corrupt]:
    """An error for each object that is gone or has another size.

    Raises:
        Unavailable: The storage was away.
    """
    found = in_order(partial(_error, storage), list(refs), AT_ONCE)
    return (error for error in found if error is not None)


def check_files(storage: Storage, state: SubspaceState, version: int, known: int = 0) -> None:
    """Look whether all that a version needs is there.

    Args:
        known: A version whose objects are not looked at; 0: none.

    Raises:
        Corrupt: It is not; names the first objects that are gone.
        Unavailable: The storage was away.

    Cost:
        One byte of each object, several at a time.
    """
    elsewhere = retention.needed_by(state, known)
    refs = [ref for key, ref in retention.needed_by(state, version).items() if key not in elsewhere]
    gone = list(missing(storage, refs))
    if gone:
        named = "; ".join(error.sentence for error in gone[:NAMED_MAX])
        more = f"; and {len(gone) - NAMED_MAX} more" if len(gone) > NAMED_MAX else ""
        raise Corrupt(
            f"version {version} needs {len(gone)} objects that are not as they were written: {named}{more}",
            "",
            "`onebasis store verify` lists all; restore them from a backup",
        )


def _error(storage: Storage, ref: BlobRef) -> Corrupt | None:
    where = f"{storage.url}/{ref.key}"
    try:
        last = storage.view(ref.key, ref.size_bytes - 1, 2)
    except NotFound:
        return Corrupt("the object that the log names is gone", where)
    return None if len(last) == 1 else Corrupt(f"it does not have the {ref.size_bytes} bytes that the log says", where)
