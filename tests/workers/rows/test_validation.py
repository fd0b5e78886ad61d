"""What `auto` sets aside of the training rows, and when that is too little to compare by."""

from __future__ import annotations

import pytest

from tests.workers.test_deepspeed_engine import zero
from tests.workers.worker_builders import sentiment_task
from workers.rows.task_data import TextRow
from workers.rows.validation import LEAST_IN, ROWS_MAX, ROWS_MIN, needs_all_rows, not_compared, set_aside


def test_equal_rows_are_on_one_side_and_the_split_is_the_same_whatever_else_is_there() -> None:
    rows = [TextRow(text=f"text {i % 200}", text_pair=None, label=i % 2) for i in range(600)]
    trained, validation = set_aside(rows)
    assert len(trained) + len(validation) == 600
    assert 600 / 6 < len(validation) < 600 / LEAST_IN
    aside = {row.text for row in validation}
    assert not aside & {row.text for row in trained}
    more = [TextRow(text=f"other {i}", text_pair=None, label=0) for i in range(200)]
    assert aside <= {row.text for row in set_aside(more + rows[::-1])[1]}


def test_of_many_rows_a_bounded_number_is_set_aside_and_the_others_are_trained_on() -> None:
    rows = [TextRow(text=f"text {i}", text_pair=None, label=i // 5000) for i in range(10_000)]
    trained, validation = set_aside(rows)
    assert len(validation) == ROWS_MAX
    assert len(trained) == 10_000 - ROWS_MAX
    assert 0.35 < sum(row.label for row in validation) / len(validation) < 0.65  # of sorted rows too


def test_no_label_loses_its_last_row_to_validation() -> None:
    rows = [TextRow(text=f"text {i}", text_pair=None, label=i // 2) for i in range(400)]  # two rows for each label
    trained, validation = set_aside(rows)
    assert validation
    assert {row.label for row in trained} == set(range(200))


@pytest.mark.parametrize("copies", [50, 900])
def test_a_text_that_recurs_is_whole_on_one_side_and_no_row_is_lost(copies: int) -> None:
    chosen = next(row for row in set_aside(texts(1000))[1] if isinstance(row, TextRow))  # set aside by itself
    rows = texts(1000) + [chosen] * copies
    trained, validation = set_aside(rows)
    assert len(trained) + len(validation) == len(rows)
    assert len(validation) <= min(ROWS_MAX, len(rows) // LEAST_IN)
    assert {row.text for row in validation}.isdisjoint(row.text for row in trained)
    assert (chosen in list(trained)) is (copies == 900)


def texts(count: int) -> list[TextRow]:
    return [TextRow(text=f"text {i}", text_pair=None, label=i % 2) for i in range(count)]


def test_rows_that_are_too_few_and_a_model_that_one_process_may_not_hold_are_not_compared_by() -> None:
    said = not_compared(sentiment_task(), texts(ROWS_MIN - 1))
    assert said.startswith("auto compares nothing and trains a lora of rank 2: ")
    assert "would be 23, and fewer than 24 are too few" in said
    assert not_compared(sentiment_task(), texts(ROWS_MIN)) == ""
    parted = sentiment_task(training={"deepspeed": zero(3)})
    assert "ZeRO stage 3" in not_compared(parted, texts(ROWS_MIN))
    assert not_compared(sentiment_task(training={"deepspeed": zero(2)}), texts(ROWS_MIN)) == ""


def test_what_was_chosen_is_trained_on_all_rows_unless_few_were_set_aside() -> None:
    assert not needs_all_rows(texts(95), texts(5))
    assert needs_all_rows(texts(94), texts(6))
