"""Inputs that recur are counted, however many rows there are."""

from __future__ import annotations

import random

import pytest

from workers.rows import recurrence
from workers.rows.recurrence import Labelled, Met


def test_each_evaluation_row_that_a_training_row_meets_counts() -> None:
    met = Met()
    for number in (7, 3, 3, 9, 2**64 - 1):
        met.add(number)
    met.close()
    for number in (3, 8, 2**64 - 1, 3):
        met.meet(number)
    assert met.count == 3  # 3 twice, and the largest


def test_nothing_is_met_where_nothing_was_noted() -> None:
    met = Met()
    met.close()
    met.meet(1)
    assert met.count == 0
    assert Labelled().counts() == (0, 0)


def test_inputs_and_those_with_several_labels_are_counted_in_any_order() -> None:
    rows = [(1, 0), (1, 0), (2, 0), (2, 1), (2, 1), (3, 4), (4, 0), (4, 1), (4, 2)]
    random.Random(1).shuffle(rows)
    found = Labelled()
    for number, label in rows:
        found.add(number, label)
    assert found.counts() == (4, 2)  # of 1 to 4, the inputs 2 and 4


def test_only_the_first_rows_of_a_large_file_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurrence, "COMPARED_ROWS_MAX", 2)
    found = Labelled()
    for number, label in ((1, 0), (2, 0), (2, 1)):
        found.add(number, label)
    assert found.counts() == (2, 0)
