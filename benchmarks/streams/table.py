"""The figures of one row of the table: what a way serves is scored, and measured by the definitions of
`orchestrator/judging/`. Scores are in the task's own metric, points are hundredths of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from benchmarks.streams.orders import Stream
from benchmarks.streams.ways import Learned
from benchmarks.streams.workshop import Workshop
from orchestrator.judging.forgetting import forgetting_report
from orchestrator.judging.score_table import Cell, ScoreTable

BYTES_PER_NUMBER = 4

Figures = dict[str, Any]


def figures(
    shop: Workshop, stream: Stream, learned: Learned, reference: Mapping[str, float], *, whole: bool
) -> Figures:
    """All columns.

    Args:
        reference: Task to the score of its separate LoRA; empty for that row itself.
        whole: Whether every version is scored, not only each task's first and the last.
    """
    table = score_table(shop, stream, learned, whole=whole)
    last = table.versions[-1]
    cases = {case.spec.name: case for case in stream.cases}
    local = {task: shop.score(adapter, cases[task]) for task, adapter in learned.delivered.items()}
    report = forgetting_report(table, last, local)
    scores = {task: table.score(last, task) for task in cases}
    own = reference or scores
    losses = {task: 100 * (scores[task] - own[task]) for task in cases}
    adapters = learned.served[last]
    in_heads = sum(tensor.numel() for adapter in adapters.values() for tensor in adapter.head.values())
    return {
        "scores": scores,
        "at_birth": {task: table.score(table.birth[task], task) for task in cases},
        "average": report.average_accuracy.value,
        "worst_task": min(scores, key=scores.__getitem__),
        "loss_points": losses,
        "mean_loss_points": statistics.fmean(losses.values()),
        "worst_loss_points": min(losses.values()),
        "normalised": known(normalised(scores, own)),
        "backward_transfer_points": known(100 * report.backward_transfer.value),
        "forgetting_points": known(100 * report.forgetting.value),
        "merge_gap_points": known(100 * report.merge_gap.value),
        "trained_numbers": learned.trained_numbers,
        "bytes_shared": BYTES_PER_NUMBER * learned.shared_numbers,
        "bytes_own": BYTES_PER_NUMBER * learned.own_numbers,
        "bytes_heads": BYTES_PER_NUMBER * in_heads,
        "seconds": learned.seconds,
        "notes": learned.notes,
    }


def known(value: float) -> float | None:
    """None where nothing was measured: JSON has no NaN."""
    return None if math.isnan(value) else value


def normalised(scores: Mapping[str, float], own: Mapping[str, float]) -> float:
    """K-Merge's normalised score: mean over tasks of the score over that of the task's own adapter. Tasks whose own
    adapter scores 0 or less are left out: a correlation may, and then there is nothing to keep.

    Source: K-Merge (arXiv:2510.13537).
    """
    kept = [scores[task] / own[task] for task in scores if own[task] > 0]
    return statistics.fmean(kept) if kept else math.nan


def score_table(shop: Workshop, stream: Stream, learned: Learned, *, whole: bool) -> ScoreTable:
    """A[version][task], of each task's first version and the last one, or of all."""
    versions = tuple(sorted(learned.served))
    tasks = tuple(case.spec.name for case in stream.cases)
    cases = {case.spec.name: case for case in stream.cases}
    birth = {task: next(v for v in versions if task in learned.served[v]) for task in tasks}
    cells: dict[int, dict[str, Cell]] = {version: {} for version in versions}
    for version in versions:
        for task, adapter in learned.served[version].items():
            if whole or version in (birth[task], versions[-1]):
                case = cases[task]
                cells[version][task] = Cell(shop.score(adapter, case), len(case.test), version)
    return ScoreTable(versions, tasks, birth, cells)
