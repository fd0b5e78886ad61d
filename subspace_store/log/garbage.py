"""Garbage collection: deletes what no live version needs. The only code that deletes anything of a subspace.

Why it never deletes what somebody will need. Let the collector write with epoch E, and let S be the state it folded
after it had acquired E.

1. S holds every record of an epoch below E that there will ever be. Acquiring E took a slot. Slots before it are all
   taken, and are folded in S. A slot after it is only ever taken by a writer that has folded the acquisition, and a
   writer whose epoch is below the one it has folded stops (version_log.py: `settle`, and `fold` refuses such a
   record). A record whose outcome was unknown to its writer is in its slot or has lost it; either way S says which.
2. A version whose record is not in S has an epoch e ≥ E. What it needs was written by that writer, below
   `blobs/e`, or was needed by its parent (bases taken over unchanged; coefficients, transports, snapshots and adapters
   of the lineage: that is how `retention.needed` is built), or, if it is made again without a task or puts a revision
   back, by a version that had not expired then (adapters as delivered: of tasks that the then candidate held, and of
   earlier revisions). Nor had its parent: a merge is made on the candidate, which a branch names, and
   `SubspaceStore.remove` begins after a version that is alive. Expiring is for ever, so these were alive in S too, or
   are not in S. By induction a version not in S needs only what live versions of S need, and blobs of epochs ≥ E.
3. A version in S needs later what it needs in S, or less: it may expire, and a head may take an adapter's place; the
   head is a new blob, of the epoch of the record that names it. An operation that is asked for again (same op_key) is
   answered and names no blob. No name can return to an expired version (`retention.check_alive`).

So a blob of an epoch below E that no live version of S needs is needed by no later state. The argument has no clock
in it: a collector that was stalled for a year, and was fenced meanwhile, still deletes only such blobs. It checks
whether it was fenced before it deletes because a fenced writer should stop, not because the argument needs it.

Blobs that a writer of epoch E or above has written and not yet committed are never touched: their folder is named by
the epoch. A merge of this same writer may run in another thread. Unfinished writes of epochs below E are given up for
the same reason: a fenced writer's stream may fail, because its record would be refused anyway.

What can break: a reader that still reads an expired version finds its blobs gone. It should pin what it reads for long.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from configs.errors import InvalidInput
from subspace_store.log import retention
from subspace_store.log.version import SubspaceState
from subspace_store.log.version_log import VersionLog
from subspace_store.parallel import AT_ONCE, A, B, in_order
from subspace_store.storage.create_rule import SCRATCH, is_old_scratch

IDLE_SECONDS = 3600.0
"""Seconds after which a write of any writer is given up if it has not grown. If its writer is still running, it gets
an error: the write failed."""
CHECKPOINTS_KEPT = 2
"""Number of checkpoints to keep: one more than is read, as the newest may be damaged. All can be made again from the
log."""
MANY = 256
"""Number of requests above which several are sent at once; a fault simulation has fewer, and stays one sequence."""


@dataclass(frozen=True, kw_only=True)
class Collected:
    """The garbage that was found.

    Args:
        blobs: Keys below `blobs/`, of epochs before the collector's own.
        uploads: Keys below `staging/`.
        checkpoints: Keys below `checkpoints/`.
        trials: Keys below `doctor/`: left by a process that was killed while it tried the storage out.
        size_bytes: Size of the objects that the log knows; it does not know unfinished writes, uploads and
            checkpoints.
        deleted: Whether they were deleted; False: they were only looked for.
        abandoned: Number of unfinished writes, of earlier epochs or idle for an hour, that were given up; 0 if nothing
            was to be deleted.
    """

    blobs: tuple[str, ...]
    uploads: tuple[str, ...]
    checkpoints: tuple[str, ...]
    trials: tuple[str, ...]
    size_bytes: int
    deleted: bool
    abandoned: int = 0

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys."""
        return self.blobs + self.uploads + self.checkpoints + self.trials


def collect(
    log: VersionLog, *, uploads_in_use: Callable[[], Collection[str]] | None = None, really: bool = False
) -> Collected:
    """Find what no live version needs, and delete it if asked to.

    Args:
        log: The log, whose epoch says which blobs may be touched. With a log that is open for reading nothing is
            deleted: the result is what the next writer could delete.
        uploads_in_use: Called after uploads were listed; gives the ids of tasks whose uploads must stay: all that are
            not finished. None: uploads stay.
        really: Whether to delete; otherwise only look.

    Raises:
        Conflict: The writer was fenced.
        InvalidInput: `uploads_in_use` gave no ids, or `really` with a log that is open for reading: nothing was
            deleted.
        Unavailable: The storage was away; asked again, it goes on where it stopped.

    Cost:
        Four listings; to delete, also one listing for each earlier epoch, one more, and one request for each object.
    """
    state = log.refresh()
    if really or log.writer is not None:
        log.settle()
        state = log.state
    # The epoch of this very state: another thread's request may make the writer take the next epoch at any moment.
    epoch = state.epoch if log.epoch else state.epoch + 1
    needed = retention.needed(state)
    blobs = tuple(key for key in log.storage.keys("blobs/") if key not in needed and _epoch(key) < epoch)
    uploads = _unused_uploads(log, uploads_in_use) if uploads_in_use else ()
    checkpoints = tuple(log.storage.keys("checkpoints/")[:-CHECKPOINTS_KEPT])
    now = time.time()
    trials = tuple(key for key in log.storage.keys(SCRATCH) if is_old_scratch(key, now))
    sizes = _sizes(state)
    found = Collected(
        blobs=blobs,
        uploads=uploads,
        checkpoints=checkpoints,
        trials=trials,
        size_bytes=sum(sizes.get(key, 0) for key in blobs),
        deleted=really,
    )
    if really:
        log.refresh()
        log.settle()
        _all(log.storage.delete, found.keys)
        begun = _all(log.storage.abandon, [f"blobs/{earlier:010d}/" for earlier in range(1, epoch)])
        idle = log.storage.abandon("", IDLE_SECONDS)
        return replace(found, abandoned=sum(begun) + idle)
    return found


def _all(function: Callable[[A], B], items: Sequence[A]) -> list[B]:
    return list(in_order(function, items, AT_ONCE if len(items) > MANY else 1))


def _epoch(key: str) -> float:
    """The epoch in `blobs/EPOCH/NAME`; infinity for any other name, which is not ours to delete."""
    part = key.split("/")[1]
    return int(part) if part.isdecimal() else float("inf")


def _unused_uploads(log: VersionLog, in_use: Callable[[], Collection[str]]) -> tuple[str, ...]:
    listed = [(key, key.split("/")) for key in log.storage.keys("staging/")]
    found = in_use()
    if isinstance(found, str) or not isinstance(found, Collection):
        raise InvalidInput(
            f"uploads_in_use gave {type(found).__name__}", todo="give the ids of all tasks whose uploads must stay"
        )
    used = {*found}
    return tuple(key for key, parts in listed if len(parts) > 2 and parts[1] not in used)


def _sizes(state: SubspaceState) -> dict[str, int]:
    refs = [ref for version in state.versions.values() for ref in version.blobs] + [*state.heads.values()]
    return {ref.key: ref.size_bytes for ref in refs}
