"""What tasks gain from those before and after them, by the field's names and definitions. Pure; reads a ScoreTable.

A task has a score before its birth where the model can answer it untrained: a language model, or classes that are
described in words. Where it cannot, these are NaN with a count of 0, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.judging.forgetting import Mean, mean
from orchestrator.judging.score_table import ScoreTable


@dataclass(frozen=True)
class TransferReport:
    """The figures of the stream that ends in one version."""

    version: int
    forward_transfer: Mean
    """FWT, Lopez-Paz & Ranzato 2017: mean over tasks after the first of A[v][t] − b(t), where v is the version right
    before the task's birth and b(t) the score of the untrained model."""
    transfer: Mean
    """MTIL's Transfer, Zheng et al. 2023 (ZSCL): mean over tasks after the first of the mean of A[v][t] over all
    versions before the task's birth. How well the model still answers what it has not learnt yet."""
    average: Mean
    """MTIL's Average, ibid.: mean over tasks of the mean of A[v][t] over all versions, those before its birth too."""
    last: Mean
    """MTIL's Last, ibid.: mean over tasks of A[version][t]."""


def transfer_report(table: ScoreTable, version: int, untrained: Mapping[str, float]) -> TransferReport:
    """The figures of one version of a table that also has scores of tasks before their birth.

    Args:
        table: The lineage that ends in or passes through `version`.
        untrained: Task id to the score of the model that no task was learnt with; missing or NaN where not measured.
    """
    versions = [v for v in table.versions if v <= version]
    present = [t for t in table.tasks if table.birth[t] <= version]
    before = {t: [v for v in versions if v < table.birth[t]] for t in present}
    later = [t for t in present if before[t]]
    return TransferReport(
        version,
        mean([table.score(before[t][-1], t) - untrained.get(t, math.nan) for t in later]),
        mean([_mean_over(table, before[t], t) for t in later]),
        # A task that was not scored before its birth has no such average: that of its later versions is another one.
        mean([_mean_over(table, versions, t) for t in present]),
        mean([table.score(version, t) for t in present]),
    )


def _mean_over(table: ScoreTable, versions: list[int], task_id: str) -> float:
    """Mean over some versions; NaN where one of them is not known."""
    return math.fsum(table.score(version, task_id) for version in versions) / len(versions)
