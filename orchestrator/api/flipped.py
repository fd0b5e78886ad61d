"""Which evaluation rows of a task a version answers otherwise than an earlier one: read from what each row got.

No model is asked: every measurement keeps each row's share in its score (workers/results.py).
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

from configs.errors import Corrupt, NotFound
from configs.task_spec import TaskSpec
from orchestrator.api import views
from orchestrator.judging.gate import compared_with, paired_difference
from orchestrator.judging.score_table import ScoreTable
from orchestrator.tasks.task_record import TaskRecord, results_key
from subspace_store.storage.protocol import Storage
from workers.results import Results, read_results
from workers.rows.frozen_rows import EvaluationRows, open_evaluation_rows
from workers.rows.task_data import CompletionRow, ImageRow, Row, question_of

SAME = 1e-6
"""Largest difference of two shares that are the same: they are kept in float32."""


def flipped(record: TaskRecord, table: ScoreTable, version: int, storage: Storage, limit: int) -> dict[str, Any]:
    """How a task's rows fare under a version, against what the gate compares with.

    Args:
        table: The lineage up to the version.

    Returns:
        How many rows are worse and better, the mean difference with its 95 % interval, and the rows that changed most,
        the worst first, with what they say.

    Raises:
        NotFound: The version does not hold the task, has no score of it, or no results of single rows are kept.

    Cost:
        4 bytes a row are read twice; and, if any row changed, the task's evaluation rows once.
    """
    cell = table.cells.get(version, {}).get(record.task_id)
    if cell is None or math.isnan(cell.score):
        raise NotFound(f"version {version} has no score of {record.title}", "", "`onebasis scores` shows which have")
    at = cell.measured_at
    against, before_key = compared_with(record, table, at)
    try:
        early, late = _kept(storage, before_key), _kept(storage, results_key(record.task_id, at))
    except NotFound:
        what = f"the results of single rows are not kept of {record.title} under version {against} or {at}"
        raise NotFound(what, "", "they go with a version that expires; earlier releases kept none") from None
    if not early.comparable(late):
        what = f"the rows of {record.title} under version {against} are others than under version {at}"
        raise NotFound(what, "", "compare versions since the task's last revision")
    moves = [after - before for before, after in zip(early.per_row, late.per_row, strict=True)]
    changed = [row for row, move in enumerate(moves) if abs(move) > SAME]
    chosen = sorted(changed, key=lambda row: (-abs(moves[row]), moves[row]))[:limit]
    said = _rows(record, late, storage) if chosen else None
    spread = paired_difference(early.per_row, late.per_row)
    return {
        "task_id": record.task_id,
        "title": record.title,
        "metric": record.spec.metric,
        "version": version,
        "measured_at": at,
        "against": against,
        "rows": len(moves),
        "worse": sum(moves[row] < 0 for row in changed),
        "better": sum(moves[row] > 0 for row in changed),
        "mean": spread.mean,
        "low": views.number_or_none(spread.low),
        "high": views.number_or_none(spread.high),
        "flipped": [
            {"row": row, "before": early.per_row[row], "after": late.per_row[row], **_told(row, said, record.spec)}
            for row in sorted(chosen, key=moves.__getitem__)
        ],
    }


def _kept(storage: Storage, key: str) -> Results:
    if not key:
        raise NotFound("no results of single rows are kept")
    return read_results(storage, key)


def _rows(record: TaskRecord, results: Results, storage: Storage) -> EvaluationRows | None:
    """The rows that the results are of; None where these are gone, or others are there."""
    earlier = {rows.task_id: rows.eval_key for rows in record.earlier_rows}
    with contextlib.suppress(NotFound, Corrupt):
        found = open_evaluation_rows(storage, record.task_id, record.eval_key, earlier, record.spec)
        if len(found) == len(results.per_row) and found.sha256 == results.eval_sha256:
            return found
    return None


def _told(at: int, rows: EvaluationRows | None, spec: TaskSpec) -> dict[str, Any]:
    if rows is None:
        return {"inputs": None, "expected": None}
    row = rows[at]
    return {"inputs": None if isinstance(row, ImageRow) else question_of(row), "expected": _expected(row, spec)}


def _expected(row: Row, spec: TaskSpec) -> str:
    if isinstance(row, CompletionRow):
        return row.completion
    if isinstance(row.label, tuple):
        return ", ".join(f"{name} {number:g}" for name, number in zip(spec.data.label_names, row.label, strict=True))
    return f"{row.label:g}" if isinstance(row.label, float) else spec.data.label_names[row.label]
