"""The figures of one row of the table: what a way serves is scored, and measured by the definitions of
`orchestrator/judging/`. Scores are in the task's own metric, points are hundredths of it."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from benchmarks.real_streams import Case
from benchmarks.streams.orders import Stream
from benchmarks.streams.ways import Learned
from benchmarks.streams.workshop import Workshop
from configs.settings import GateSettings
from configs.task_spec import HEADLESS_KINDS
from orchestrator.judging.forgetting import forgetting_report
from orchestrator.judging.score_table import Cell, ScoreTable
from orchestrator.judging.transfer import transfer_report
from subspace_store.merging.variants import relative_error
from workers.metrics import constant_score

BYTES_PER_NUMBER = 4
LEARNT = 0.05
"""A separate LoRA that scores no more than this above the most frequent label has nothing that a merge could lose."""
DRIFT_MIN = GateSettings().drift_min

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
    taught = [task for task, case in cases.items() if own[task] > without_learning(case) + LEARNT]
    adapters = learned.served[last]
    spared = unmoved(learned, table)
    untrained = {}
    if whole and answers_untaught(stream):
        untrained = {task: shop.untrained_score(adapters[task], case) for task, case in cases.items()}
    ahead = transfer_report(table, last, untrained)
    lost = {}
    if shop.general_text and speaks(stream):
        lost = {task: shop.general_loss(adapters[task], case) for task, case in cases.items()}
    in_heads = sum(tensor.numel() for adapter in adapters.values() for tensor in adapter.head.values())
    return {
        "scores": scores,
        "at_birth": {task: table.score(table.birth[task], task) for task in cases},
        "average": report.average_accuracy.value,
        "worst_task": min(scores, key=scores.__getitem__),
        "loss_points": losses,
        "mean_loss_points": statistics.fmean(losses.values()),
        "learnt": taught,
        "learnt_loss_points": statistics.fmean(losses[task] for task in taught) if taught else None,
        "worst_loss_points": min(losses.values()),
        "normalised": known(normalised(scores, own)),
        "backward_transfer_points": known(100 * report.backward_transfer.value),
        "forgetting_points": known(100 * report.forgetting.value),
        "merge_gap_points": known(100 * report.merge_gap.value),
        "forward_transfer_points": known(100 * ahead.forward_transfer.value),
        "mtil": {
            "transfer": known(ahead.transfer.value),
            "average": known(ahead.average.value),
            "last": ahead.last.value,
        },
        "untrained": untrained,
        "by_version": {str(v): {t: cell.score for t, cell in row.items()} for v, row in table.cells.items()}
        if untrained
        else {},
        "general_loss": lost,
        "mean_general_loss": statistics.fmean(lost.values()) if lost else None,
        "evaluations_spared": len(spared),
        "evaluations_due": sum(born < last for born in table.birth.values()),
        "spared_change_points": max(
            (100 * abs(scores[task] - table.score(table.birth[task], task)) for task in spared), default=0.0
        ),
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


def without_learning(case: Case) -> float:
    """The score on a task's test rows of always giving their most frequent label; 0 where that is not defined."""
    labels = [row.label for row in case.test if isinstance(getattr(row, "label", None), int)]
    return constant_score(case.spec.metric, tuple(Counter(labels).values())) or 0.0


def unmoved(learned: Learned, table: ScoreTable) -> tuple[str, ...]:
    """The tasks that a service would not score again at the end: what serves them moved by less than the gate's bound
    since their birth. Here they are scored all the same."""
    last = table.versions[-1]
    earlier = [task for task, born in table.birth.items() if born < last]
    moved = {
        task: relative_error(learned.served[table.birth[task]][task].modules, learned.served[last][task].modules)
        for task in earlier
    }
    return tuple(task for task, drift in moved.items() if drift < DRIFT_MIN)


def speaks(stream: Stream) -> bool:
    """Whether it is a language model's, which may lose of its general text."""
    return all(case.spec.kind == "causal_lm" for case in stream.cases)


def answers_untaught(stream: Stream) -> bool:
    """Whether the model can answer a task that it has not learnt: it writes, or is asked by a text for each label."""
    return all(case.spec.kind in HEADLESS_KINDS for case in stream.cases)


def score_table(shop: Workshop, stream: Stream, learned: Learned, *, whole: bool) -> ScoreTable:
    """A[version][task], of each task's first version and the last one, or of all; where the model can answer untaught
    then also of the tasks that are still to come, by the one update if there is one, else by the base model alone."""
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
        for task in tasks if whole and answers_untaught(stream) else ():
            if version < birth[task]:
                to_come = learned.served[birth[task]][task]
                one = next(iter(learned.served[version].values())).modules
                case = cases[task]
                score = (
                    shop.score(replace(to_come, modules=one), case)
                    if learned.common
                    else shop.untrained_score(to_come, case)
                )
                cells[version][task] = Cell(score, len(case.test), version)
    return ScoreTable(versions, tasks, birth, cells)
