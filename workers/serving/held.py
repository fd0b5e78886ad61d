"""Which tasks a version holds, by their names: walked through once for each version, and remembered."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from threading import Lock

from subspace_store.subspace_reader import SubspaceReader

VERSIONS_KEPT = 8
"""Versions that are remembered, those asked for last."""


class Held:
    """Of one store. May be asked from any thread."""

    def __init__(self, store: SubspaceReader) -> None:
        self._store = store
        self._known: OrderedDict[int, Mapping[str, str]] = OrderedDict()
        self._lock = Lock()

    def at(self, version: int) -> Mapping[str, str]:
        """Name of each task, `team/task`, to its id; nothing for a version that the log does not have yet."""
        with self._lock:
            if version in self._known:
                self._known.move_to_end(version)
                return self._known[version]
        state = self._store.state
        if version and version not in state.versions:
            return {}  # not remembered: the log may have it a moment later
        found = {entry.name: task_id for task_id, entry in state.tasks_at(version).items()}
        with self._lock:
            self._known[version] = found
            while len(self._known) > VERSIONS_KEPT:
                self._known.popitem(last=False)
        return found

    def find(self, task: str, version: int) -> tuple[str, str] | None:
        """(name, id) of a task that is named by either; None where the version does not hold it."""
        held = self.at(version)
        if task in held:
            return task, held[task]
        return next(((name, task_id) for name, task_id in held.items() if task_id == task), None)
