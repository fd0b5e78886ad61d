"""FWT and MTIL's three figures on a table small enough to compute by hand."""

from __future__ import annotations

import math

import pytest

from orchestrator.judging.score_table import Cell, ScoreTable
from orchestrator.judging.transfer import transfer_report

SCORES = {
    1: {"a": 0.80, "b": 0.30, "c": 0.20},
    2: {"a": 0.70, "b": 0.60, "c": 0.26},
    3: {"a": 0.75, "b": 0.54, "c": 0.90},
}
UNTRAINED = {"a": 0.10, "b": 0.25, "c": 0.30}


def table(scores: dict[int, dict[str, float]]) -> ScoreTable:
    """a is born in version 1, b in 2, c in 3; scores above that diagonal are of tasks that are still to come."""
    cells = {v: {t: Cell(score, 10, v) for t, score in row.items()} for v, row in scores.items()}
    return ScoreTable((1, 2, 3), ("a", "b", "c"), {"a": 1, "b": 2, "c": 3}, cells)


def test_forward_transfer_is_the_score_right_before_birth_over_the_untrained_one() -> None:
    # b: 0.30 − 0.25 = +0.05; c: 0.26 − 0.30 = −0.04. Mean +0.005 of two tasks: the first has nothing before it.
    found = transfer_report(table(SCORES), 3, UNTRAINED).forward_transfer
    assert (found.value, found.count) == (pytest.approx(0.005), 2)


def test_transfer_is_the_mean_over_all_versions_before_birth() -> None:
    # b: 0.30; c: (0.20 + 0.26) / 2 = 0.23. Mean 0.265.
    found = transfer_report(table(SCORES), 3, {}).transfer
    assert (found.value, found.count) == (pytest.approx(0.265), 2)


def test_average_is_over_all_versions_and_last_over_the_last_alone() -> None:
    # a: 2.25 / 3 = 0.75; b: 1.44 / 3 = 0.48; c: 1.36 / 3 = 0.4533. Mean 0.5611. Last: (0.75 + 0.54 + 0.90) / 3 = 0.73.
    found = transfer_report(table(SCORES), 3, {})
    assert found.average.value == pytest.approx(5.05 / 9)
    assert found.last.value == pytest.approx(0.73)


def test_an_earlier_version_is_measured_with_the_tasks_that_it_has() -> None:
    # At version 2: transfer b 0.30; average a (0.80 + 0.70) / 2 = 0.75, b (0.30 + 0.60) / 2 = 0.45; last 0.65.
    found = transfer_report(table(SCORES), 2, UNTRAINED)
    assert (found.forward_transfer.value, found.transfer.value) == (pytest.approx(0.05), pytest.approx(0.30))
    assert (found.average.value, found.last.value) == (pytest.approx(0.60), pytest.approx(0.65))


def test_tasks_that_cannot_be_answered_untrained_have_no_transfer() -> None:
    born = {v: {t: score for t, score in row.items() if "abc".index(t) < v} for v, row in SCORES.items()}
    found = transfer_report(table(born), 3, UNTRAINED)
    assert (found.forward_transfer.count, found.transfer.count) == (0, 0)
    assert math.isnan(found.transfer.value)
    # a alone has a score in every version
    assert (found.average.value, found.average.count) == (pytest.approx(0.75), 1)
    assert found.last.value == pytest.approx(0.73)
