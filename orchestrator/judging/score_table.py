"""A[version][task]: the matrix that forgetting, the gate and every report are read from.

Scores are measured on each task's frozen evaluation rows and kept in the version log. A task that a merge hardly
moved keeps its score unmeasured; such a cell says at which version it was measured. NaN where there is none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from subspace_store.log.version import SubspaceState


@dataclass(frozen=True)
class Cell:
    """One score and where it comes from."""

    score: float
    count: int
    measured_at: int
    """The version it was measured under: the cell's own, or an earlier one that it was carried over from."""


@dataclass(frozen=True)
class ScoreTable:
    """Rows are the versions of one lineage, oldest first; columns its tasks, by birth."""

    versions: tuple[int, ...]
    tasks: tuple[str, ...]
    birth: Mapping[str, int]
    cells: Mapping[int, Mapping[str, Cell]]

    def score(self, version: int, task_id: str) -> float:
        """A[version][task], NaN where not known."""
        cell = self.cells.get(version, {}).get(task_id)
        return cell.score if cell else math.nan

    def column(self, task_id: str) -> list[tuple[int, float]]:
        """The task's scores along the versions since its birth."""
        return [(v, self.score(v, task_id)) for v in self.versions if v >= self.birth[task_id]]


def score_table(state: SubspaceState, version: int, drift_max: float) -> ScoreTable:
    """The table of a version and its ancestors.

    Args:
        drift_max: A score is carried over while the task's accumulated relative drift since it was measured is
            below this.
    """
    lineage = state.lineage(version)
    tasks: list[str] = []
    cells: dict[int, dict[str, Cell]] = {}
    last: dict[str, Cell] = {}
    drifted: dict[str, float] = {}
    for row in lineage:
        # The drifts of a row are those of the tasks that were there before, in the order in which they came.
        for task_id, drift in zip(tasks, row.drift, strict=bool(row.drift)):
            drifted[task_id] = drifted.get(task_id, 0.0) + drift
        tasks += [task.task_id for task in row.added]
        for task in row.refined:  # another adapter than the one that was measured
            last.pop(task.task_id, None)
        for task_id, measured in state.scores.get(row.number, {}).items():
            last[task_id] = Cell(measured.score, measured.count, row.number)
            drifted[task_id] = 0.0
        cells[row.number] = {t: cell for t, cell in last.items() if drifted.get(t, 0.0) < drift_max or not drifted[t]}
    return ScoreTable(tuple(v.number for v in lineage), tuple(tasks), state.births(version), cells)


def evaluations_due(state: SubspaceState, version: int, drift_max: float) -> tuple[str, ...]:
    """The tasks whose score under `version` is not known: the new ones and those that could have changed."""
    table = score_table(state, version, drift_max)
    known = table.cells.get(version, {})
    return tuple(task for task in table.tasks if task not in known)
