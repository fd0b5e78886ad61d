"""What merging cost the tasks, by the field's names and definitions. Pure; reads a ScoreTable.

The field has several measures for each word, so each function names its own. NaN where nothing was measured,
never 0; every mean comes with the number of tasks and a 95 % interval (Student's t over tasks).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.judging.score_table import ScoreTable
from orchestrator.judging.student_t import quantile_975


@dataclass(frozen=True)
class Mean:
    """A mean over tasks."""

    value: float
    count: int
    half_width: float
    """Half of the 95 % interval; NaN below two tasks."""


@dataclass(frozen=True)
class ForgettingReport:
    """One version's figures."""

    version: int
    average_accuracy: Mean
    """Mean over tasks of A[v][t]. ("Accuracy" is the field's word; each task has its own metric.)"""
    backward_transfer: Mean
    """BWT, Lopez-Paz & Ranzato 2017: mean over earlier tasks of A[v][t] − A[birth(t)][t]. Negative: forgotten."""
    forgetting: Mean
    """Chaudhry et al. 2018: mean over earlier tasks of max A[l][t] over versions l before v, − A[v][t]."""
    merge_gap: Mean
    """Mean over tasks of local(t) − A[birth(t)][t]: what the merge itself cost at birth."""


def forgetting_report(table: ScoreTable, version: int, local: Mapping[str, float]) -> ForgettingReport:
    """The figures of one version of a table.

    Args:
        table: The lineage that ends in or passes through `version`.
        local: Task id to the score of its own adapter before merging; missing or NaN where not measured.
    """
    present = [t for t in table.tasks if table.birth[t] <= version]
    earlier = [t for t in present if table.birth[t] < version]
    return ForgettingReport(
        version,
        mean([table.score(version, t) for t in present]),
        mean([table.score(version, t) - table.score(table.birth[t], t) for t in earlier]),
        mean([_best_before(table, version, t) - table.score(version, t) for t in earlier]),
        mean([local.get(t, math.nan) - table.score(table.birth[t], t) for t in present]),
    )


def mean(values: Sequence[float]) -> Mean:
    """Mean of the values that are numbers, with their count and a 95 % Student t interval."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return Mean(math.nan, 0, math.nan)
    average = math.fsum(known) / len(known)
    if len(known) < 2:
        return Mean(average, len(known), math.nan)
    variance = math.fsum((value - average) ** 2 for value in known) / (len(known) - 1)
    return Mean(average, len(known), quantile_975(len(known) - 1) * math.sqrt(variance / len(known)))


def _best_before(table: ScoreTable, version: int, task_id: str) -> float:
    known = [score for v, score in table.column(task_id) if v < version and not math.isnan(score)]
    return max(known, default=math.nan)
