"""Which versions are made again when a task is removed. Pure: called before the removal, to show it, and during it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from subspace_store.log.retention import tasks_alive
from subspace_store.log.version import MergedTask, SubspaceState, Version


@dataclass(frozen=True)
class Remake:
    """A version that is made again without a task."""

    version: Version
    tasks: tuple[MergedTask, ...]
    """Tasks that it added, at least one, without the one that is removed: each as it was refined last. Earlier
    revisions are among them, as long as a version that has not expired holds them."""


def revisions_along(state: SubspaceState, task_id: str, candidate: int) -> tuple[str, ...]:
    """Ids of a task that the candidate holds and of its earlier revisions along the lineage, oldest first. A version
    has one task of a name, so they are all that ever had it there."""
    name = state.tasks_at(candidate)[task_id].name
    found = (task.task_id for version in state.lineage(candidate) for task in version.added if task.name == name)
    return tuple(dict.fromkeys(found))


def start_of_remakes(state: SubspaceState, task_id: str, candidate: int) -> int:
    """The version just before the first that must be made again, if a task that the candidate holds is removed."""
    line, gone = state.lineage(candidate), {*revisions_along(state, task_id, candidate)}
    first = min(version.number for version in line for task in version.added if task.task_id in gone)
    births: dict[str, int] = {}
    refined: list[tuple[int, int]] = []  # a refinement, and the birth of its task before it
    for version in line:
        births |= {task.task_id: version.number for task in version.added}
        refined += [(version.number, births[task.task_id]) for task in version.refined]
    while True:
        # An expired version cannot be the start: its blobs may be gone, or about to be deleted (garbage.py).
        alive = (v.number for v in line if v.number < first and v.number not in state.expired)
        start = max(alive, default=0)
        # Tasks that were refined in a basis that will not exist again: they are merged anew, as they are now.
        older = [birth for number, birth in refined if number > start]
        if not older or min(older) > start:
            return start
        first = min(older)


def remakes(state: SubspaceState, task_id: str, candidate: int) -> Sequence[Remake]:
    """The versions that are made again, oldest first; a version that added no other task is left out."""
    line, gone = state.lineage(candidate), {*revisions_along(state, task_id, candidate)}
    start, held = start_of_remakes(state, task_id, candidate), tasks_alive(state)
    newest = _newest(line)
    found = []
    for version in line:
        others = (newest[version.number, task.task_id] for task in version.added if task.task_id not in gone)
        kept = tuple(task for task in others if task in held)
        if version.number > start and kept:
            found.append(Remake(version, kept))
    return found


def _newest(line: Sequence[Version]) -> dict[tuple[int, str], MergedTask]:
    """Version and id of each task that it added, to the newest entry of the task before it left."""
    found: dict[tuple[int, str], MergedTask] = {}
    births: dict[str, int] = {}
    for version in line:
        births |= {task.task_id: version.number for task in version.added}
        found |= {(births[task.task_id], task.task_id): task for task in version.brought}
    return found
