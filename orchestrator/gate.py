"""May a version become `main`? A pure decision with its reasons.

Scores are compared on the same frozen rows, so a difference is one of predictions, not of samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from configs.settings import GateSettings
from orchestrator.score_table import ScoreTable
from orchestrator.task_record import TaskRecord

ROUNDING = 1e-9
"""Scores are quotients of integers: 0.83 − 0.80 must count as 0.03, not as 0.030000000000000027."""


@dataclass(frozen=True)
class Decision:
    """The gate's answer."""

    passed: bool
    reasons: tuple[str, ...]
    """One sentence with numbers per rule that was broken; empty when passed."""

    @property
    def summary(self) -> str:
        return "; ".join(self.reasons) if self.reasons else "every task kept its score"


def judge(table: ScoreTable, version: int, records: Mapping[str, TaskRecord], settings: GateSettings) -> Decision:
    """Judge one version by the scores of all its tasks.

    Args:
        table: The lineage up to `version`, with every due evaluation in it.
        records: Task id to record, for local scores, names and the task's own rule.
    """
    reasons: list[str] = []
    for task_id in table.tasks:
        record = records.get(task_id)
        score = table.score(version, task_id)
        if record is None or math.isnan(score):
            continue  # a task without evaluation rows, or of another life of the database: nothing to compare
        if table.birth[task_id] == version:
            reasons += _of_a_new_task(record, score, settings)
        else:
            # Nobody measured it at birth if it was merged again without some task: then its first score since counts.
            known = [s for v, s in table.column(task_id) if v < version and not math.isnan(s)]
            birth = known[0] if known else math.nan
            if birth - score > settings.drop_max + ROUNDING:
                reasons.append(
                    f"{record.title} would fall from {birth:.4f} at birth to {score:.4f}, "
                    f"more than gate.drop_max {settings.drop_max}"
                )
    return Decision(not reasons, tuple(reasons))


def _of_a_new_task(record: TaskRecord, score: float, settings: GateSettings) -> list[str]:
    reasons = []
    if record.local_score is not None and record.local_score - score > settings.merge_gap_max + ROUNDING:
        reasons.append(
            f"{record.title} scores {score:.4f} after merging and {record.local_score:.4f} with its own adapter, "
            f"a gap above gate.merge_gap_max {settings.merge_gap_max}"
        )
    least = record.spec.gate.min_score
    if least is not None and score < least - ROUNDING:
        reasons.append(f"{record.title} scores {score:.4f}, below its own gate.min_score {least}")
    return reasons
