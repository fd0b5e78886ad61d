"""The field's measures on a table small enough to compute by hand."""

from __future__ import annotations

import math

import pytest

from orchestrator.judging.forgetting import forgetting_report, mean
from orchestrator.judging.score_table import ScoreTable, score_table
from tests.orchestrator.tables import state, version

NAN = math.nan


def table() -> ScoreTable:
    """
            a      b      c
    v1     0.80
    v2     0.85   0.60
    v3     0.75   0.66   0.90
    """
    moved = {"a": 1.0, "b": 1.0}
    return score_table(
        state(
            [version(1, 0, ["a"]), version(2, 1, ["b"], {"a": 1.0}), version(3, 2, ["c"], moved)],
            {1: {"a": 0.80}, 2: {"a": 0.85, "b": 0.60}, 3: {"a": 0.75, "b": 0.66, "c": 0.90}},
        ),
        3,
        0.1,
    )


def test_average_accuracy_is_the_mean_over_the_tasks_of_that_version() -> None:
    # (0.75 + 0.66 + 0.90) / 3 = 0.77;  v2: (0.85 + 0.60) / 2 = 0.725
    assert forgetting_report(table(), 3, {}).average_accuracy.value == pytest.approx(0.77)
    assert forgetting_report(table(), 2, {}).average_accuracy.value == pytest.approx(0.725)


def test_backward_transfer_is_now_minus_birth_over_earlier_tasks() -> None:
    # a: 0.75 − 0.80 = −0.05; b: 0.66 − 0.60 = +0.06; c is born here. Mean +0.005.
    found = forgetting_report(table(), 3, {}).backward_transfer
    assert (found.value, found.count) == (pytest.approx(0.005), 2)


def test_forgetting_is_the_best_before_minus_now_and_may_be_negative() -> None:
    # a: max(0.80, 0.85) − 0.75 = +0.10; b: 0.60 − 0.66 = −0.06. Mean +0.02.
    assert forgetting_report(table(), 3, {}).forgetting.value == pytest.approx(0.02)
    # v2: a: 0.80 − 0.85 = −0.05, not 0: the maximum is over versions before.
    assert forgetting_report(table(), 2, {}).forgetting.value == pytest.approx(-0.05)


def test_merge_gap_is_own_adapter_minus_birth_where_it_was_measured() -> None:
    # a: 0.82 − 0.80 = 0.02; b: 0.61 − 0.60 = 0.01; c has no local score. Mean 0.015 of 2.
    found = forgetting_report(table(), 3, {"a": 0.82, "b": 0.61, "c": NAN}).merge_gap
    assert (found.value, found.count) == (pytest.approx(0.015), 2)


def test_the_first_version_has_nothing_to_forget() -> None:
    report = forgetting_report(table(), 1, {})
    assert math.isnan(report.backward_transfer.value)
    assert math.isnan(report.forgetting.value)
    assert (report.forgetting.count, report.average_accuracy.value) == (0, 0.80)


def test_what_was_not_measured_is_left_out_and_never_zero() -> None:
    log = state(
        [version(1, 0, ["a", "b"]), version(2, 1, ["c"], {"a": 1.0, "b": 1.0})],
        {1: {"a": 0.8, "b": NAN}, 2: {"a": 0.7, "b": 0.5, "c": NAN}},
    )
    report = forgetting_report(score_table(log, 2, 0.1), 2, {})
    assert (report.average_accuracy.value, report.average_accuracy.count) == (pytest.approx(0.6), 2)
    assert (report.backward_transfer.value, report.backward_transfer.count) == (pytest.approx(-0.1), 1)
    assert (report.forgetting.value, report.forgetting.count) == (pytest.approx(0.1), 1)


def test_a_mean_comes_with_students_t_interval() -> None:
    # 0.1, 0.2, 0.3: mean 0.2, s = 0.1, n = 3, t(0.975; 2) = 4.3027: 4.3027 · 0.1 / √3 = 0.24841
    found = mean([0.1, 0.2, NAN, 0.3])
    assert (found.value, found.count) == (pytest.approx(0.2), 3)
    assert found.half_width == pytest.approx(0.24841, abs=1e-5)


def test_one_value_has_no_interval_and_none_has_no_mean() -> None:
    assert math.isnan(mean([0.5]).half_width)
    assert (mean([0.5]).value, mean([0.5]).count) == (0.5, 1)
    assert math.isnan(mean([NAN]).value)
    assert mean([]).count == 0
