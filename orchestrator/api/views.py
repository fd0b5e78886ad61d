"""What the service answers, as plain JSON: made of records, the log's state and score tables. Decides nothing."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.api.estimates import Line
from orchestrator.api.lengths import least_seconds
from orchestrator.judging.forgetting import ForgettingReport, Mean
from orchestrator.judging.score_table import Cell, ScoreTable
from orchestrator.scheduling.estimate import Estimate, ends
from orchestrator.tasks.task_lifecycle import Step, next_step
from orchestrator.tasks.task_record import Pause, TaskRecord, TaskState
from orchestrator.tasks.task_rows import LOG, PROGRESS, TaskEvent, points_of
from subspace_store.log.branch_moves import Move
from subspace_store.log.version import CANDIDATE, MAIN, MergedTask, SubspaceState, Version
from subspace_store.subspace_reader import RollbackPreview

if TYPE_CHECKING:
    from orchestrator.worker_pool import PoolStatus

Json = dict[str, Any]


def task_summary(record: TaskRecord, line: Line, progress: Mapping[str, Any], now: float) -> Json:
    """A row of `onebasis tasks`.

    Args:
        line: Where tasks stand, and when they start.
        progress: Last progress that its worker reported; empty where no worker has it.
    """
    start = line.starts.get(record.task_id)
    length = line.length_of(record)
    end = ends(start, length) if start and length else None
    least = least_seconds(record, length, line.leads.get(record.task_id, 0.0))
    return {
        "task_id": record.task_id,
        "title": record.title,
        "team": record.team,
        "name": record.name,
        "revision": record.number,
        "exact_title": record.exact_title,
        "base_model": record.base_model,
        "pool": record.pool,
        "state": str(record.state),
        "reason": record.reason,
        "trouble": list(record.trouble),
        "place": line.places.get(record.task_id),
        "starts_in_seconds": start.seconds if start else None,
        "start": interval(start),
        "end": interval(end),
        "deadline": deadline(record, end, now, progress.get("seconds_left"), least),
        "submitted_at": record.submitted_at,
        "attempt": record.attempt,
        "worker": record.worker if is_at_work(record) else "",
        "version": record.version or None,
        "metric": record.spec.metric,
        "eval_rows": record.scored_count,
        "base_score": record.base_score,
        "local_score": record.local_score,
        "doubt": record.doubt(record.local_score),
        "progress": dict(progress),
    }


def pool(found: PoolStatus) -> Json:
    """A pool in `onebasis workers`, with what each of its workers does."""
    settings = found.settings
    return {
        "base_model": settings.base_model,
        "ranks": settings.ranks,
        "min": settings.min,
        "max": settings.max,
        "ready": found.ready,
        **{state: found.count(state) for state in ("busy", "warm", "starting", "drained")},
        "workers": {
            worker.name: {"state": worker.state, "does": str(worker), "machines": list(worker.machines or ())}
            for worker in found.workers
        },
    }


def interval(estimate: Estimate | None) -> Json | None:
    """An estimate: seconds from now, the median and the ends between which four of five fall."""
    if estimate is None:
        return None
    return {"seconds": estimate.seconds, "earliest": estimate.earliest, "latest": estimate.latest}


def deadline(
    record: TaskRecord,
    end: Estimate | None,
    now: float,
    seconds_left: float | None = None,
    least: float | None = None,
) -> Json | None:
    """Whether a task's deadline can be met; None where it has none, or is trained.

    Args:
        end: When it is trained, where it waits.
        seconds_left: The same, where it trains.
        least: Seconds until it is trained at the least, where no more is known.
    """
    if record.spec.deadline is None or record.state not in (TaskState.QUEUED, TaskState.TRAINING):
        return None
    at = record.spec.deadline.timestamp()
    earliest, latest = (end.earliest, end.latest) if end else (seconds_left, seconds_left)
    risk = (
        "missed" if at <= now else
        "cannot be met" if earliest is None and least is not None and now + least > at else
        "unknown" if earliest is None or latest is None else
        "cannot be met" if now + earliest > at else "may be missed" if now + latest > at else "met"
    )  # fmt: skip
    return {"at": at, "outlook": risk}


def is_at_work(record: TaskRecord) -> bool:
    """Whether a worker has an order for it."""
    return next_step(record) is Step.AWAIT_ADAPTER


def task_details(record: TaskRecord, history: Sequence[TaskEvent], plot: Path) -> Json:
    """What `onebasis task` shows beside the summary and why."""
    points = points_of(history)
    return {
        "spec": record.spec.model_dump(mode="json"),
        "train_rows": record.train_count,
        "eval_sha256": record.eval_sha256,
        "adapter": {
            "staging_key": record.staging_key,
            "sha256": record.adapter_sha256,
            "parameters": record.adapter_parameters,
        },
        "training": {
            "steps": record.steps,
            "loss": record.train_loss,
            "seconds": record.train_seconds,
            "submit_to_first_step_seconds": _between(record.submitted_at, record.first_step_at),
            "claim_to_first_step_seconds": _between(record.claimed_at, record.first_step_at),
            "lost_machines": record.lost_machines,
            "worker_deaths": record.worker_deaths,
            "own_bugs": record.own_bugs,
            "preemptions": record.preemptions,
            "refined_seconds": record.refined_seconds,
            "unrefined": record.unrefined,
            "share_full": record.spec.method.share_full,
            "asked_method": record.spec.method.name,
            "method": record.method,
            "compared": plain(record.compared),
            "trainable_parameters": record.trainable_parameters,
            "basis_version": record.basis_version,
            "revises": record.revises,
            "start": record.spec.start if record.revises else "",
            "resumed_from": record.resumed_from,
            "last_point": plain(asdict(points[-1])) if points else None,
            "plot": str(plot) if plot.exists() else None,
        },
        "metrics": dict(record.metrics),
        "events": [asdict(event) for event in history if event.kind not in (LOG, PROGRESS)],
    }


def warnings(record: TaskRecord, result: Mapping[str, Any] | None) -> list[str]:
    """Warnings about a task, and about its score under `main` where that is another score.

    Args:
        result: The scores, as the service's answer has them; None where no version holds the task.
    """
    score = result["score_under_main"] if result else None
    doubt = record.doubt(score) if score != record.local_score else ""
    return [*record.warnings, *([f"in main: {doubt}"] if doubt else [])]


def version_summary(state: SubspaceState, version: Version) -> Json:
    """A row of `onebasis versions`."""
    names = [name for name, number in state.refs.items() if number == version.number]
    on_main = any(v.number == version.number for v in state.lineage(state.refs[MAIN]))
    status = (
        "empty" if not version.number else
        "expired" if version.number in state.expired else
        "rejected" if version.number in state.rejected else "published" if on_main else
        "candidate" if CANDIDATE in names else "compacted" if version.number in state.compacted else
        "removed" if version.number in state.replaced else "rolled back"
    )  # fmt: skip
    return {
        "version": version.number,
        "parent": version.parent,
        "status": status,
        "refs": names,
        "tags": sorted(name for name, number in state.tags.items() if number == version.number),
        "reason": state.rejected.get(version.number, ""),
        "created_at": version.created_at,
        "added": [task.name for task in version.added],
        "refined": [task.name for task in version.refined],
        "remakes": version.remakes,
        "removed": _names(state, version.removed),
        "task_count": len(state.tasks_at(version.number)),
        "rank_max": version.rank_max,
        "bytes_written": version.bytes_written,
        "merge_seconds": version.merge_seconds,
    }


def task_in_version(state: SubspaceState, table: ScoreTable, number: int, task_id: str) -> Json:
    """A task as a version holds it."""
    task = state.tasks_at(number)[task_id]
    return {
        "task_id": task_id,
        "title": task.name,
        "birth": table.birth[task_id],
        "made_in": task.version,  # its coefficients: later than its birth when it was refined since (`share_full`)
        "error_at_birth": task.error_at_birth,
        "error": state.errors(number)[task_id],
        **cell(table, number, task_id),
    }


def task_size(task: MergedTask, error: float, coefficients: int) -> Json:
    """What one task stores for itself, and how exactly a version holds it.

    Args:
        coefficients: Numbers of its coefficients in the basis.
    """
    return {
        "task_id": task.task_id,
        "title": task.name,
        "separate_numbers": task.parameter_count,
        "coefficient_numbers": coefficients,
        "private_numbers": task.private_count - task.foundation_count,
        "foundation_numbers": task.foundation_count,
        "error_at_birth": task.error_at_birth,
        "error": error,
    }


def revision(record: TaskRecord, main_score: float | None) -> Json:
    """A revision in the list of those of its task."""
    return {
        "revision": record.number,
        "task_id": record.task_id,
        "state": str(record.state),
        "revises": record.revises,
        "version": record.version or None,
        "submitted_at": record.submitted_at,
        "train_rows": record.train_count,
        "new_eval_rows": record.eval_count,
        "local_score": record.local_score,
        "main_score": main_score,
    }


def _rows_of_revisions(table: ScoreTable, version: int, task_id: str) -> list[Json]:
    """Of a revision that is scored on the rows of several: for those of each, oldest first, the score under every
    version of the table. Before its birth it is that of the revision before it."""
    cell = table.cells.get(version, {}).get(task_id)
    return [
        {
            "task_id": brought_by,
            "rows": part.count,
            "scores": [number_or_none(table.on_rows(row, brought_by)) for row in table.versions],
        }
        for brought_by, part in (cell.of_rows if cell else {}).items()
    ]


def score_column(table: ScoreTable, version: int, title: str, task_id: str, record: TaskRecord | None) -> Json:
    """A task's column of `onebasis scores` of a version. record: None where the database does not know the task."""
    numbers = record.numbers_of_rows if record else {}
    before, own = (record.main_scores_of_rows, record.scores_of_rows) if record else ({}, {})
    return {
        "task_id": task_id,
        "title": title,
        "birth": table.birth[task_id],
        "metric": record.spec.metric if record else None,
        "rows": record.scored_count if record else None,
        "base": record.base_score if record else None,
        "local": record.local_score if record else None,
        "share_full": record is not None and record.spec.method.share_full,
        "revision": record.number if record else None,
        "of_rows": [
            {
                **part,
                "revision": numbers.get(part["task_id"]),
                "main_before": before.get(part["task_id"]),
                "local": own.get(part["task_id"]),
            }
            for part in _rows_of_revisions(table, version, task_id)
        ],
    }


def cell(table: ScoreTable, version: int, task_id: str) -> Json:
    """A[version][task] and where it was measured."""
    found = table.cells.get(version, {}).get(task_id)
    if found is None:
        return {"score": None, "measured_at": None, "rows": None, "general_loss": None}
    return {
        "score": number_or_none(found.score),
        "measured_at": found.measured_at,
        "rows": found.count,
        "general_loss": found.general_loss,
    }


def move(
    state: SubspaceState,
    moved: Move,
    held: Mapping[int, Mapping[str, MergedTask]],
    rows: Mapping[int, Mapping[str, Cell]],
) -> Json:
    """One move of a branch: what it did to tasks, by their names, and to scores that differ.

    Args:
        held: Version to name to task, of the versions before and after it.
        rows: Version to task id to score there.
    """
    old, new = held[moved.before], held[moved.after]
    both = [name for name in new if name in old]
    scores = {
        name: (_score_of(name, old, rows[moved.before]), _score_of(name, new, rows[moved.after]))
        for name in {**old, **new}
    }
    known = [(early, late) for early, late in map(scores.__getitem__, both) if early is not None and late is not None]
    return {
        "seq": moved.seq,
        "time": moved.time,
        "actor": moved.actor,
        "how": moved.how,
        "reason": moved.reason,
        "holds": moved.holds,
        "from": moved.before,
        "to": moved.after,
        "expired": moved.after in state.expired,
        "came": [name for name in new if name not in old],
        "left": [name for name in old if name not in new],
        "replaced": [name for name in both if old[name].task_id != new[name].task_id],
        "changed": [name for name in both if _is_changed(old[name], new[name])],
        "scores": {name: list(pair) for name, pair in scores.items() if pair[0] != pair[1]},
        "stayed": {
            "tasks": len(both),
            "measured": len(known),
            "before": _mean([score for score, _ in known]),
            "after": _mean([score for _, score in known]),
        },
    }


def _score_of(name: str, held: Mapping[str, MergedTask], row: Mapping[str, Cell]) -> float | None:
    cell = row.get(held[name].task_id) if name in held else None
    return number_or_none(cell.score) if cell is not None else None


def _is_changed(old: MergedTask, new: MergedTask) -> bool:
    """Whether the same task was refined, or merged anew."""
    return old.task_id == new.task_id and old.version != new.version


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def news(table: ScoreTable) -> list[list[list[float | None]]]:
    """For each version the cells that differ from those of the version before: column, score (None: not known any
    more), rows."""
    found: list[list[list[float | None]]] = []
    before: Mapping[str, Cell] = {}
    for version in table.versions:
        now = table.cells[version]
        found.append(
            [
                [column, number_or_none(cell.score) if cell else None, cell.count if cell else None]
                for column, task_id in enumerate(table.tasks)
                if (cell := now.get(task_id)) is not before.get(task_id)  # one that is carried over is the same record
            ]
        )
        before = now
    return found


def rollback(found: RollbackPreview, preview: bool, held: bool, op_key: str | None = None) -> Json:
    """What a rollback did, or would do."""
    return {
        "preview": preview,
        **({"op_key": op_key} if op_key else {}),
        "held": held,
        "from_version": found.from_version,
        "to_version": found.to_version,
        "vanishing": [task.name for task in found.vanishing],
        "returning": [task.name for task in found.returning],
    }


def describe_report(report: ForgettingReport) -> Json:
    """The means of a report with their n and interval, NaN as None."""
    return {
        name: {"value": number_or_none(m.value), "n": m.count, "half_width_95": number_or_none(m.half_width)}
        for name, m in vars(report).items()
        if isinstance(m, Mean)
    }


def number_or_none(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value


def plain(value: Any) -> Any:
    """Records of records as JSON: tuples as lists, NaN as None, keys as strings."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return number_or_none(value) if isinstance(value, float) else value


def _names(state: SubspaceState, task_ids: Collection[str]) -> list[str]:
    """Names, for people, of tasks that any version added."""
    if not task_ids:
        return []
    names = state.names()
    return [names[task_id] for task_id in task_ids]


def _between(start: float | None, end: float | None) -> float | None:
    # An earlier attempt may have begun before this one was claimed.
    return None if start is None or end is None else max(0.0, end - start)


def pause_json(pause: Pause | None) -> Json | None:
    """A pause; None where there is none."""
    return None if pause is None else pause.model_dump(mode="json")
