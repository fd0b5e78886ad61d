"""Which tasks are scored together: those of which the score is the same, and no more than a worker had better do."""

from __future__ import annotations

from typing import Any

import pytest

from configs.settings import BaseModelSettings
from orchestrator.judging.scoring_groups import TASK_ROWS_MAX, groups, may_be_mixed
from orchestrator.tasks.task_record import TaskRecord
from tests.builders import settings, task_record

BASE = settings().bases[0]


def record(number: int, rows: int = 50, **changes: Any) -> TaskRecord:
    return task_record(f"red/task-{number}", spec=changes, eval_count=rows)


def sizes(found: list[tuple[TaskRecord, ...]]) -> list[int]:
    return [len(group) for group in found]


@pytest.mark.parametrize(
    ("changes", "base", "rows", "is_mixed"),
    [
        ({}, {}, 50, True),
        ({"metric": "f1_macro"}, {}, TASK_ROWS_MAX, True),
        ({"metric": "probability"}, {}, 50, False),
        ({}, {}, TASK_ROWS_MAX + 1, False),
        ({}, {"dtype": "bfloat16"}, 50, False),
        ({}, {"quantization": "nf4"}, 50, False),
        ({"training": {"deepspeed": {"zero_optimization": {"stage": 3}}}}, {}, 50, False),
        ({"kind": "sequence_regression", "data": {"label_names": ()}, "metric": "pearson"}, {}, 50, False),
    ],
)
def test_together_is_scored_only_what_has_the_same_score(
    changes: dict[str, Any], base: dict[str, Any], rows: int, is_mixed: bool
) -> None:
    other = BaseModelSettings.model_validate(BASE.model_dump() | base)
    assert may_be_mixed(record(1, rows, **changes), other) is is_mixed


def test_few_tasks_have_a_worker_each_and_many_are_shared_out_among_the_workers() -> None:
    few, many = [record(n) for n in range(3)], [record(n) for n in range(30)]
    assert sizes(groups(few, BASE, 2, ())) == [1, 1, 1]
    assert sizes(groups(many, BASE, 1, ())) == [30]
    assert sizes(groups(many, BASE, 2, ())) == [15, 15]
    assert sizes(groups([record(n, 64) for n in range(130)], BASE, 1, ())) == [64, 64, 2]  # of at most 4,096 rows
    assert [r for group in groups(many, BASE, 3, ()) for r in group] == many


def test_what_came_to_nothing_together_is_scored_alone() -> None:
    tasks = [record(n) for n in range(6)]
    found = groups(tasks, BASE, 1, {tasks[2].task_id})
    assert sizes(found) == [5, 1]
    assert found[1] == (tasks[2],)
