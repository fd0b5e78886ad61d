"""A[version][task]: the matrix that forgetting, the gate and every report are read from.

Scores are measured on each task's frozen evaluation rows and kept in the version log. A task that a merge hardly
moved keeps its score unmeasured; such a cell says at which version it was measured. NaN where there is none.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from subspace_store.log.version import RowsScore, SubspaceState, Version


@dataclass(frozen=True)
class Cell:
    """One score and where it comes from."""

    score: float
    count: int
    measured_at: int
    """The version it was measured under: the cell's own, or an earlier one that it was carried over from."""
    of_rows: Mapping[str, RowsScore] = field(default_factory=dict)
    """Of a revision with rows of several: id of the revision that brought them to the score on them alone."""
    general_loss: float | None = None
    """What the language model loses by the task, in nats for each token of general text; None where not measured."""


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

    def on_rows(self, version: int, task_id: str) -> float:
        """The score, under a version, on the evaluation rows that a task brought: of itself, or of the revision of it
        that the version holds instead. NaN where not known."""
        cells = self.cells.get(version, {})
        own = cells.get(task_id)
        if own is not None and not own.of_rows:
            return own.score
        return next((cell.of_rows[task_id].score for cell in cells.values() if task_id in cell.of_rows), math.nan)

    def first_on_rows(self, before: int, task_id: str) -> float:
        """The first known of these scores, in the versions before one; NaN where there is none."""
        known = (self.on_rows(version, task_id) for version in self.versions if version < before)
        return next((score for score in known if not math.isnan(score)), math.nan)

    def general_loss(self, version: int, task_id: str) -> float:
        """What the language model loses by a task under a version, NaN where not known."""
        cell = self.cells.get(version, {}).get(task_id)
        return math.nan if cell is None or cell.general_loss is None else cell.general_loss

    def column(self, task_id: str) -> list[tuple[int, float]]:
        """The task's scores along the versions since its birth."""
        return [(v, self.score(v, task_id)) for v in self.versions if v >= self.birth[task_id]]


def score_table(state: SubspaceState, version: int, drift_max: float) -> ScoreTable:
    """The table of a version and those before it.

    Args:
        drift_max: A score is carried over while the task's accumulated relative drift since it was measured is
            below this.
    """
    cells = {row.number: known.cells() for row, known in _along(state, version, drift_max)}
    births = state.births(version)
    return ScoreTable(tuple(cells), tuple(births), births, cells)


def newest_scores(state: SubspaceState, version: int, drift_max: float) -> Mapping[str, Cell]:
    """The row of a version alone: task id to its score there, of those that have one.

    Cost:
        One number for each task and version of the lineage; a table costs a record for each.
    """
    known = _Known(drift_max)
    for _, now in _along(state, version, drift_max):
        known = now
    return known.cells()


def rows_of(state: SubspaceState, versions: Collection[int], drift_max: float) -> dict[int, Mapping[str, Cell]]:
    """The rows of some versions, whatever lineages they are in: version to what `newest_scores` says of it.

    Cost:
        That of `newest_scores` once for each lineage, not for each version.
    """
    found: dict[int, Mapping[str, Cell]] = {0: {}}
    for version in sorted(versions, reverse=True):
        if version not in found:
            found |= {
                row.number: known.cells() for row, known in _along(state, version, drift_max) if row.number in versions
            }
    return found


@dataclass
class _Known:
    """What is known of the scores at some row of the lineage."""

    drift_max: float
    last: dict[str, Cell] = field(default_factory=dict)
    """The newest measurement of each task."""
    drifted: dict[str, float] = field(default_factory=dict)
    """Accumulated drift of each task since then."""

    def cells(self) -> Mapping[str, Cell]:
        """The scores that are valid, measured there or carried over."""
        drifted = self.drifted
        return {t: cell for t, cell in self.last.items() if drifted.get(t, 0.0) < self.drift_max or not drifted[t]}


def _along(state: SubspaceState, version: int, drift_max: float) -> Iterator[tuple[Version, _Known]]:
    """The versions of a history, oldest first, and what is known then: one object, which changes."""
    tasks: list[str] = []
    known = _Known(drift_max)
    for row in state.history(version):
        if not row.parent:
            tasks = []
            if not row.is_compaction:  # else all tasks are what they were
                known.last.clear()
        for task_id in row.left:  # a revision took its place; put back later, it is another birth
            known.last.pop(task_id, None)
            known.drifted.pop(task_id, None)
        tasks = [task_id for task_id in tasks if task_id not in row.left]
        # The drifts of a row are those of the tasks that were there before and stay, in the order in which they came.
        for task_id, drift in zip(tasks, row.drift, strict=bool(row.drift)):
            known.drifted[task_id] = known.drifted.get(task_id, 0.0) + drift
        tasks += [task.task_id for task in row.added]
        for task in row.refined:  # another adapter than the one that was measured
            known.last.pop(task.task_id, None)
        for task_id, measured in state.scores.get(row.number, {}).items():
            parts = {part.task_id: part for part in measured.of_rows}
            known.last[task_id] = Cell(measured.score, measured.count, row.number, parts, measured.general_loss)
            known.drifted[task_id] = 0.0
        yield row, known


def evaluations_due(state: SubspaceState, version: int, drift_max: float) -> tuple[str, ...]:
    """The tasks whose score under `version` is not known: the new ones and those that could have changed."""
    table = score_table(state, version, drift_max)
    known = table.cells.get(version, {})
    return tuple(task for task in table.tasks if task not in known)
