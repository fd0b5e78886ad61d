"""Which tasks of a version are scored together, in mixed batches on one worker. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from configs.settings import BaseModelSettings
from configs.task_spec import Metric
from orchestrator.tasks.task_record import TaskRecord

COUNTED: tuple[Metric, ...] = ("accuracy", "f1_macro", "matthews_correlation")
"""Metrics that are counted from answers: the same to the bit, whichever way a task is answered. The others are computed
from outputs, which rounding changes, and a gate without tolerance could see it."""
TASK_ROWS_MAX = 64
"""Most rows of a task that is scored with others: one that has more fills batches of its own. Of MiniLM on one CPU, 40
tasks of 20 rows are scored in 0.51 of the time together, of 64 rows in 0.58 (benchmarks/serving.py, `scoring`)."""
GROUP_ROWS_MAX = 4096
"""Rows of a group: a text with its tokens takes a few kilobytes, and what is lost with a worker is a minute's work."""
GROUP_TASKS_MIN = 4
"""Tasks for which a worker makes room for mixed batches: it reads all bases and wraps all layers for them once."""


def may_be_mixed(record: TaskRecord, base: BaseModelSettings) -> bool:
    """Whether a task's score in mixed batches is the one that its own model gives, and there is room for its rows.

    Not so of regressions, of what language models write and of probabilities (rounding), of base weights in narrow or
    quantised numbers (the order of operations is then worth more than rounding), of pictures (memory), and of tasks
    whose base model is parted among the ranks.
    """
    spec, deepspeed = record.spec, record.spec.training.deepspeed or {}
    return (
        spec.kind == "sequence_classification"
        and spec.metric in COUNTED
        and len(spec.data.label_names) > 1
        and record.scored_count <= TASK_ROWS_MAX
        and base.dtype == "float32"
        and base.quantization == "none"
        and not deepspeed.get("zero_optimization")
    )


def groups(
    records: Sequence[TaskRecord], base: BaseModelSettings, workers: int, apart: Collection[str]
) -> list[tuple[TaskRecord, ...]]:
    """The tasks to be scored, those together that had better be: each group is for one worker.

    Args:
        workers: Number of workers that could begin at once: no group is so large that another one has nothing to do.
        apart: Ids of the tasks that are scored alone, because scoring them together came to nothing.
    """
    mixed = [record for record in records if record.task_id not in apart and may_be_mixed(record, base)]
    if len(mixed) < GROUP_TASKS_MIN:
        mixed = []
    share = sum(record.scored_count for record in mixed) / max(1, workers)
    found: list[list[TaskRecord]] = []
    rows = 0
    for record in mixed:
        if not found or rows >= share or rows + record.scored_count > GROUP_ROWS_MAX:
            found.append([])
            rows = 0
        found[-1].append(record)
        rows += record.scored_count
    together = {record.task_id for record in mixed}
    alone = [(record,) for record in records if record.task_id not in together]
    return [*map(tuple, found), *alone]
