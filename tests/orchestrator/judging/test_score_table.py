"""A[version][task], written down by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from orchestrator.judging.score_table import Cell, evaluations_due, score_table
from subspace_store.log.version import RowsScore, TaskScore
from tests.orchestrator.tables import Drifts, state, version

NAN = math.nan


def test_rows_are_versions_and_columns_tasks_by_birth() -> None:
    log = state(
        [version(1, 0, ["a"]), version(2, 1, ["b", "c"], {"a": 0.5})],
        {1: {"a": 0.8}, 2: {"a": 0.7, "b": 0.6, "c": 0.5}},
    )
    table = score_table(log, 2, drift_max=0.1)
    assert (table.versions, table.tasks) == ((1, 2), ("a", "b", "c"))
    assert table.birth == {"a": 1, "b": 2, "c": 2}
    assert table.cells == {
        1: {"a": Cell(0.8, 100, 1)},
        2: {"a": Cell(0.7, 100, 2), "b": Cell(0.6, 100, 2), "c": Cell(0.5, 100, 2)},
    }
    assert table.column("a") == [(1, 0.8), (2, 0.7)]
    assert math.isnan(table.score(1, "b"))


def test_a_score_is_carried_until_the_drifts_since_it_was_measured_add_up_to_the_limit() -> None:
    # Drifts of a: 0.04 at v2, 0.04 at v3 (sum 0.08 < 0.1), 0.04 at v4 (sum 0.12, not below 0.1 any more).
    log = state(
        [version(1, 0, ["a"]), *(version(n, n - 1, [f"x{n}"], {"a": 0.04}) for n in (2, 3, 4))], {1: {"a": 0.8}}
    )
    table = score_table(log, 4, drift_max=0.1)
    assert [table.cells[n].get("a") for n in (1, 2, 3, 4)] == [*[Cell(0.8, 100, 1)] * 3, None]
    assert math.isnan(table.score(4, "a"))


def test_measuring_again_starts_the_sum_anew() -> None:
    # 0.08 at v2, measured there, 0.08 at v3: 0.08 since, below 0.1, though 0.16 since birth.
    log = state(
        [version(1, 0, ["a"]), version(2, 1, ["b"], {"a": 0.08}), version(3, 2, ["c"], {"a": 0.08})],
        {1: {"a": 0.8}, 2: {"a": 0.7}},
    )
    assert score_table(log, 3, drift_max=0.1).cells[3]["a"] == Cell(0.7, 100, 2)


def test_a_compaction_moves_no_task_and_a_removal_from_it_is_measured_anew() -> None:
    compact = replace(version(3, 0, ["a", "b"])[0], remakes=2), {}
    without = replace(version(4, 0, ["b"])[0], remakes=3, removed=("a",)), {}
    scores = {1: {"a": 0.8}, 2: {"b": 0.6}}
    versions: list[Drifts] = [version(1, 0, ["a"]), version(2, 1, ["b"], {"a": 0.01}), compact, without]
    log = state(versions, scores)
    table = score_table(log, 3, drift_max=0.1)
    assert (table.versions, table.tasks, table.birth) == ((1, 2, 3), ("a", "b"), {"a": 1, "b": 2})
    assert table.cells[3] == {"a": Cell(0.8, 100, 1), "b": Cell(0.6, 100, 2)}
    assert evaluations_due(log, 3, 0.1) == ()
    table = score_table(log, 4, drift_max=0.1)
    assert (table.versions, table.tasks, table.birth) == ((1, 2, 4), ("b",), {"b": 2})  # in the place of 3
    assert evaluations_due(log, 4, 0.1) == ("b",)


def test_a_revision_takes_the_place_of_the_one_before_and_the_others_keep_their_drifts() -> None:
    second, moves = version(3, 2, ["a@2"], {"b": 0.04})
    second = replace(second, added=(replace(second.added[0], name="red/a", replaces="a"),))
    back, _ = version(4, 3, ["a"])
    back = replace(back, added=(replace(back.added[0], replaces="a@2"),))
    scores = {1: {"a": 0.8}, 2: {"b": 0.6}, 3: {"a@2": 0.9}}
    log = state([version(1, 0, ["a"]), version(2, 1, ["b"], {"a": 0.05}), (second, moves), (back, {"b": 0.04})], scores)
    assert score_table(log, 3, drift_max=0.1).cells[3] == {"b": Cell(0.6, 100, 2), "a@2": Cell(0.9, 100, 3)}
    assert evaluations_due(log, 3, 0.1) == ()
    # Put back, the first revision is measured anew: in another basis it is another birth.
    assert score_table(log, 4, drift_max=0.1).cells[4] == {"b": Cell(0.6, 100, 2)}
    assert evaluations_due(log, 4, 0.1) == ("a",)
    assert evaluations_due(log, 4, 0.07) == ("b", "a")  # 0.04 and 0.04


def test_a_task_that_did_not_move_at_all_keeps_its_score_even_with_limit_zero() -> None:
    log = state([version(1, 0, ["a"]), version(2, 1, ["b"], {"a": 0.0})], {1: {"a": 0.8}})
    assert score_table(log, 2, drift_max=0.0).score(2, "a") == 0.8
    moved = state([version(1, 0, ["a"]), version(2, 1, ["b"], {"a": 1e-12})], {1: {"a": 0.8}})
    assert math.isnan(score_table(moved, 2, drift_max=0.0).score(2, "a"))


def test_a_score_measured_as_nan_is_known_and_stays_nan() -> None:
    log = state([version(1, 0, ["a"])], {1: {"a": NAN}})
    assert math.isnan(score_table(log, 1, 0.1).cells[1]["a"].score)
    assert evaluations_due(log, 1, 0.1) == ()


def test_due_are_the_new_tasks_and_those_that_moved_too_far() -> None:
    log = state([version(1, 0, ["a", "b"]), version(2, 1, ["c"], {"a": 0.2, "b": 0.01})], {1: {"a": 0.8, "b": 0.8}})
    assert evaluations_due(log, 1, 0.1) == ()
    assert evaluations_due(log, 2, 0.1) == ("a", "c")


def test_after_a_rollback_a_table_follows_its_own_branch_only() -> None:
    # 1 ── 2 (b)          main was rolled back to 1, then c was merged there
    #  └── 3 (c)
    log = state(
        [version(1, 0, ["a"]), version(2, 1, ["b"], {"a": 9.0}), version(3, 1, ["c"], {"a": 0.01})],
        {1: {"a": 0.8}, 2: {"a": 0.1, "b": 0.5}, 3: {"c": 0.6}},
    )
    table = score_table(log, 3, 0.1)
    assert (table.versions, table.tasks) == ((1, 3), ("a", "c"))
    assert table.score(3, "a") == 0.8  # carried from 1; what happened on branch 2 does not count
    assert math.isnan(table.score(2, "a"))


@pytest.mark.parametrize("number", [0])
def test_the_empty_subspace_has_an_empty_table(number: int) -> None:
    table = score_table(state([], {}), number, 0.1)
    assert (table.versions, table.tasks, dict(table.cells)) == ((), (), {})


def test_the_rows_of_a_revision_are_followed_through_whatever_revision_answers() -> None:
    """a, its revision b, and its revision c; x is another task."""
    versions = [version(1, 0, ["a", "x"]), version(2, 1, ["b"]), version(3, 2, ["c"])]
    replacing = [versions[0]]
    for (made, drift), before in zip(versions[1:], "ab", strict=True):
        replacing.append((replace(made, added=(replace(made.added[0], replaces=before),)), drift))
    log = state(replacing, {1: {"a": 0.9, "x": 0.5}})

    def score(task_id: str, **parts: float) -> TaskScore:
        of_rows = tuple(RowsScore(task_id=one, score=value, count=10) for one, value in parts.items())
        return TaskScore(task_id=task_id, score=0.5, count=10 * len(parts), of_rows=of_rows)

    scores = {2: {"b": score("b", a=0.88, b=0.7)}, 3: {"c": score("c", a=0.87, b=0.71, c=0.6)}}
    table = score_table(replace(log, scores={**log.scores, **scores}), 3, 0.1)
    assert [table.on_rows(number, "a") for number in (1, 2, 3)] == [0.9, 0.88, 0.87]
    assert [table.on_rows(number, "b") for number in (2, 3)] == [0.7, 0.71]
    assert math.isnan(table.on_rows(1, "b"))
    assert (table.on_rows(3, "c"), table.on_rows(3, "x")) == (0.6, 0.5)
    assert [table.first_on_rows(number, "a") for number in (2, 3, 4)] == [0.9] * 3
    assert (table.first_on_rows(3, "b"), table.first_on_rows(4, "c")) == (0.7, 0.6)
    assert math.isnan(table.first_on_rows(3, "c"))
    assert table.tasks == ("x", "c")
