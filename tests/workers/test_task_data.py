"""Rows: what is accepted, and that every refusal names the file and the row."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from configs.errors import InvalidInput
from configs.task_spec import DataSpec
from workers import task_data
from workers.task_data import RowCounts, TextRow, check_rows, read_rows

SPEC = DataSpec(label_names=("neg", "pos"))
PAIRS = DataSpec(label_names=("no", "yes"), text_column="question", text_pair_column="answer", label_column="fits")


def written(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_rows_are_counted_by_label(tmp_path: Path) -> None:
    path = written(
        tmp_path / "a.jsonl", {"text": "x", "label": "pos"}, {"text": "y", "label": 1}, "", {"text": "z", "label": 0}
    )
    assert check_rows(path, SPEC) == RowCounts(3, {"neg": 1, "pos": 2})


def test_a_label_may_be_its_name_or_its_index_and_an_integer_is_always_an_index() -> None:
    numbers = DataSpec(label_names=("2", "1", "0"))
    rows = read_rows(b'{"text": "x", "label": "2"}\n{"text": "x", "label": 2}', numbers)
    assert [row.label for row in rows] == [0, 2]


def test_packed_rows_are_read_like_plain_ones(tmp_path: Path) -> None:
    content = json.dumps({"question": "why?", "answer": "so.", "fits": "yes", "more": 3}).encode()
    assert read_rows(gzip.compress(content), PAIRS) == read_rows(content, PAIRS) == (TextRow("why?", "so.", 1),)


def test_unicode_line_separators_inside_a_text_do_not_end_the_row() -> None:
    assert read_rows('{"text": "a\u2028b\u0085c", "label": 0}'.encode(), SPEC)[0].text == "a\u2028b\u0085c"


def test_rows_that_are_also_in_the_other_file_are_counted_as_a_warning(tmp_path: Path) -> None:
    train = written(
        tmp_path / "t.jsonl", {"text": "x", "label": 0}, {"text": "y", "label": 1}, {"text": "z", "label": 1}
    )
    other = written(tmp_path / "e.jsonl", {"text": "y", "label": 0}, {"text": "w", "label": 1})
    assert check_rows(train, SPEC, compare_with=other).shared_rows == 1


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", "is not JSON"),
        ("[1]", "must be a JSON object, not list"),
        ({"label": 0}, "no column 'text'; it has label"),
        ({"text": "x"}, "no column 'label'"),
        ({"text": 3, "label": 0}, "must be a string, not int"),
        ({"text": None, "label": 0}, "must be a string, not NoneType"),
        ({"text": " \t", "label": 0}, "is empty"),
        ({"text": "x", "label": "maybe"}, "'maybe' is not one of the 2 labels"),
        ({"text": "x", "label": 2}, "2 is not one of the 2 labels"),
        ({"text": "x", "label": -1}, "-1 is not one of the 2 labels"),
        ({"text": "x", "label": True}, "not bool"),
        ({"text": "x", "label": 1.0}, "not float"),
        ({"text": "x", "label": None}, "not NoneType"),
    ],
)
def test_a_wrong_row_is_named_with_its_file_and_number(row: Any, said: str, tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", {"text": "fine", "label": 0}, row)
    with pytest.raises(InvalidInput, match=said) as caught:
        check_rows(path, SPEC)
    assert caught.value.where == f"{path}, row 2"


def test_an_unknown_label_is_answered_with_the_known_ones() -> None:
    with pytest.raises(InvalidInput, match=r"data\.label_names are: neg, pos"):
        read_rows(b'{"text": "x", "label": "positive"}', SPEC)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot read the file"),
        (b"", "has no rows"),
        (b"\n \n", "has no rows"),
        (b'{"text": "\xff", "label": 0}', "is not UTF-8"),
        (gzip.compress(b'{"text": "x", "label": 0}', mtime=0)[:-9], "not a complete gzip file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(content: bytes | None, said: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidInput, match=said) as caught:
        check_rows(path, SPEC)
    assert caught.value.where.startswith(str(path))


def test_a_file_that_is_too_large_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_data, "UNPACKED_BYTES_MAX", 10)
    monkeypatch.setattr(Path, "read_bytes", None)
    with pytest.raises(InvalidInput, match="more than 10"):
        check_rows(written(tmp_path / "rows.jsonl", {"text": "a", "label": "no"}), SPEC)


def test_checking_rows_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, workers.task_data; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
