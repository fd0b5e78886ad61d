"""Which versions are made again when a task is removed. Pure: called before the removal, to show it, and during it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from subspace_store.log.version import SubspaceState, Version


@dataclass(frozen=True)
class Remake:
    """A version that is made again without a task."""

    version: Version
    task_ids: tuple[str, ...]
    """Ids of the tasks that it added, without the one that is removed; at least one."""


def start_of_remakes(state: SubspaceState, task_id: str, candidate: int) -> int:
    """The version just before the first that must be made again, if a task that the candidate holds is removed."""
    line = state.lineage(candidate)
    births = {task.task_id: version.number for version in line for task in version.added}
    first = births[task_id]
    while True:
        # An expired version cannot be the start: its blobs may be gone, or about to be deleted (garbage.py).
        alive = (v.number for v in line if v.number < first and v.number not in state.expired)
        start = max(alive, default=0)
        # Tasks that were refined in a basis that will not exist again: they are merged anew, as they are now.
        older = [births[t.task_id] for v in line if v.number > start for t in v.refined]
        if not older or min(older) > start:
            return start
        first = min(older)


def remakes(state: SubspaceState, task_id: str, candidate: int) -> Sequence[Remake]:
    """The versions that are made again, oldest first; a version that added no other task is left out."""
    start = start_of_remakes(state, task_id, candidate)
    found = []
    for version in state.lineage(candidate):
        others = tuple(old.task_id for old in version.added if old.task_id != task_id)
        if version.number > start and others:
            found.append(Remake(version, others))
    return found
