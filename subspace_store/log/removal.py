"""Which versions are made again when a task is removed. Pure: asked before it is done, and while it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from subspace_store.log.version import SubspaceState, Version


@dataclass(frozen=True)
class Remake:
    """A version that is made again without a task."""

    version: Version
    task_ids: tuple[str, ...]
    """The tasks that it added, without the one that is removed; at least one."""


def start_of_remakes(state: SubspaceState, task_id: str, candidate: int) -> int:
    """The version that is right before all that must be made again without a task that the candidate holds."""
    line = state.lineage(candidate)
    births = {task.task_id: version.number for version in line for task in version.added}
    first = births[task_id]
    while True:
        # Not onto an expired version: what it was may be gone, or about to be deleted (garbage.py).
        alive = (v.number for v in line if v.number < first and v.number not in state.expired)
        start = max(alive, default=0)
        # A refinement in a basis that will not be again: its task is merged anew, as it is now.
        older = [births[t.task_id] for v in line if v.number > start for t in v.refined]
        if not older or min(older) > start:
            return start
        first = min(older)


def remakes(state: SubspaceState, task_id: str, candidate: int) -> Sequence[Remake]:
    """The versions that are made again, oldest first; none for one that added no other task."""
    start = start_of_remakes(state, task_id, candidate)
    found = []
    for version in state.lineage(candidate):
        others = tuple(old.task_id for old in version.added if old.task_id != task_id)
        if version.number > start and others:
            found.append(Remake(version, others))
    return found
