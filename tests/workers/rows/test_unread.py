"""What files hold beside what the task reads is named once, when it is submitted; nothing is dropped without a word."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from configs.errors import InvalidInput
from tests.workers.data_builders import spec_of, written
from workers.rows import columns
from workers.rows.columns import Unread
from workers.rows.frozen_rows import freeze
from workers.rows.task_data import rows_in

ROWS: list[dict[str, Any]] = [{"text": f"t{i}", "label": "yes", "idx": i, "context": "c"} for i in range(2)]


def jsonl(folder: Path) -> Path:
    return written(folder / "a.jsonl", *ROWS)


def csv(folder: Path) -> Path:
    lines = [",".join(ROWS[0]), *(",".join(map(str, row.values())) for row in ROWS)]
    (folder / "a.csv").write_text("\n".join(lines))
    return folder / "a.csv"


def parquet(folder: Path) -> Path:
    Dataset.from_list(ROWS).to_parquet(folder / "a.parquet")
    return folder / "a.parquet"


def saved(folder: Path) -> Path:
    Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    return folder / "saved"


def told(path: Path, spec: Any) -> list[str]:
    unread = Unread()
    list(rows_in(path, spec, unread=unread))
    return list(unread.told())


@pytest.mark.parametrize("write", [jsonl, csv, parquet, saved])
def test_a_column_that_no_key_names_is_told_in_every_format(write: Callable[[Path], Path], tmp_path: Path) -> None:
    path = write(tmp_path)
    part, other = told(path, spec_of())
    assert part.startswith("not read, though in common formats a part of what the model is given: 'context' (first in ")
    assert other.startswith(f"columns that are not read: 'idx' (first in {path}")
    assert told(path, spec_of(text_pair_column="context")) == [other]


def test_an_array_that_no_key_names_is_told(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", image=np.zeros((2, 4, 4, 3), dtype=np.uint8), label=np.array([0, 1]), fold=np.zeros(2))
    path = tmp_path / "a.npz"
    assert told(path, spec_of("image_classification")) == [f"columns that are not read: 'fold' (first in {path})"]


def test_what_a_chat_would_be_written_with_is_named_with_the_row_that_has_it(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    weighted = [messages[0], messages[1] | {"weight": 0}]
    rows = [{"messages": messages, "tools": []}, {"messages": messages, "tools": [{"name": "f"}], "id": 3}]
    path = written(tmp_path / "a.jsonl", *rows, {"messages": weighted})
    part, other = told(path, spec_of("causal_lm", messages_column="messages"))
    assert f"'tools', 'messages[].weight' (first in {path}, row 2): " in part
    assert other == f"columns that are not read: 'id' (first in {path}, row 2)"
    assert told(written(tmp_path / "b.jsonl", rows[0]), spec_of("causal_lm", messages_column="messages")) == []


def test_an_input_beside_the_instruction_is_named(tmp_path: Path) -> None:
    alpaca = {"instruction": "add", "input": "1 and 2", "output": "3"}
    path = written(tmp_path / "a.jsonl", alpaca | {"input": ""}, alpaca)
    (part,) = told(path, spec_of("causal_lm", prompt_column="instruction", completion_column="output"))
    assert f"'input' (first in {path}, row 2)" in part


def test_both_files_of_a_task_are_looked_at_and_each_name_is_told_once(tmp_path: Path) -> None:
    row = {"text": "t", "label": "yes"}
    train = written(tmp_path / "train.jsonl", row | {"a": 1, "b": 2})
    evaluation = written(tmp_path / "eval.jsonl", row | {"text": "u", "b": 3})
    frozen = freeze(spec_of(), train, evaluation)
    assert frozen.unread == (f"columns that are not read: 'b', 'a' (first in {evaluation}, row 1)",)


def test_of_very_many_names_some_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "UNREAD_MAX", 2)
    rows = [{"text": "t", "label": "yes", f"k{i}": 1} for i in range(5)]
    (said,) = told(written(tmp_path / "a.jsonl", *rows), spec_of())
    assert said.startswith("columns that are not read: 'k0', 'k1' (first in ")


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_rows_that_an_unbalanced_quote_swallows_are_told_and_paragraphs_are_not(name: str, tmp_path: Path) -> None:
    path, mark = tmp_path / name, "," if name == "a.csv" else "\t"
    rows = [f"text{mark}label", f"one{mark}yes", f'"two{mark}no', f"three{mark}yes", f"four{mark}no", f'five"{mark}no']
    path.write_text("\n".join(rows))
    (said,) = told(path, spec_of("sequence_classification"))
    assert said.startswith("2 lines look like rows, inside a field in double quotes (first in ")
    assert f"{name}, row 2 (line 3)): read as a part of that field" in said
    path.write_text("\n".join([rows[0], rows[1], f'"Hello\n\nI was charged{mark} twice{mark} today.\nBye"{mark}no']))
    assert told(path, spec_of("sequence_classification")) == []


@pytest.mark.parametrize(
    ("swallowing", "header"),
    [
        ('"two{0}no\nthree"{0}yes', "text{0}label"),  # the text's quote is opened in one row and closed in the next
        ('no{0}"two\nyes{0}three"', "label{0}text"),
        ('7{0}"two{0}no\n8{0}three"{0}yes', "id{0}text{0}label"),
    ],
)
@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_the_very_next_row_that_an_unbalanced_quote_swallows_is_told(
    name: str, swallowing: str, header: str, tmp_path: Path
) -> None:
    mark = "," if name == "a.csv" else "\t"
    (tmp_path / name).write_text(f"{header}\n{swallowing}\n".format(mark))
    said = told(tmp_path / name, spec_of())[0]
    assert said.startswith("1 line looks like a row of its own, inside a field in double quotes (first in ")
    assert f"{name}, row 1 (line 2)): read as a part of that field" in said


@pytest.mark.parametrize(
    "content",
    [
        'text,label\n"Hello\nyou",yes\n',
        'text,label\n"Hello, you\nthere",yes\n',  # commas of a sentence
        'text,label\n"one,two,three\nfour",yes\n',  # more than a row has
        'label,text\nyes,"Hello\nyou"\n',
        'label,text\nyes,"Hello\nyou, there"\n',
    ],
)
def test_a_text_of_two_lines_is_no_swallowed_row(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(content)
    assert told(tmp_path / "a.csv", spec_of()) == []


def test_in_a_table_with_a_space_after_each_separator_a_swallowed_row_has_it_too(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text, label\n"two, no\nthree", yes\n')
    (said,) = told(tmp_path / "a.csv", spec_of())
    assert said.startswith("1 line looks like a row of its own")


@pytest.mark.parametrize("marks", ["''", "``", "‘’", "“”", '""'])
@pytest.mark.parametrize("name", ["a.tsv", "a.jsonl", "a.parquet"])
def test_quotes_around_every_text_of_a_column_are_told_with_its_name(name: str, marks: str, tmp_path: Path) -> None:
    texts = [f"{marks[0]}it is {n}{marks[1]}" for n in range(3)]
    path, rows = tmp_path / name, [{"text": text, "pair": "plain", "label": "yes"} for text in texts]
    if name == "a.tsv":
        doubled = (text.replace('"', '""') for text in texts)
        lines = (f'"{text}"\tplain\tyes' if marks == '""' else f"{text}\tplain\tyes" for text in doubled)
        path.write_text("\n".join(["text\tpair\tlabel", *lines]))
    elif name == "a.jsonl":
        written(path, *rows)
    else:
        Dataset.from_list(rows).to_parquet(path)
    (said,) = told(path, spec_of(text_pair_column="pair"))
    assert said.startswith(f"every text of the column 'text' in {path} stands in quotes, {marks[0]}…{marks[1]}: ")


@pytest.mark.parametrize(
    "texts", [["'one'", "two"], ["'one'", '"two"'], ["'one'"], ["'", "'"], ["one", "'two'", "'3'"]]
)
def test_quotes_around_some_texts_are_quotations(texts: list[str], tmp_path: Path) -> None:
    rows = [{"prompt": text, "completion": f"{text}!"} for text in texts]
    assert told(written(tmp_path / "a.jsonl", *rows), spec_of("causal_lm")) == []


def test_answers_before_a_chats_last_are_told(tmp_path: Path) -> None:
    spec = spec_of("causal_lm", messages_column="messages")
    turns = [{"role": role, "content": f"{role} {n}"} for n in range(2) for role in ("user", "assistant")]
    path = written(tmp_path / "a.jsonl", {"messages": turns[:2]}, {"messages": turns}, {"messages": turns})
    (said,) = told(path, spec)
    assert said.startswith("2 chats have more than one message of the assistant's (first in ")
    assert "row 2" in said
    assert told(written(tmp_path / "b.jsonl", {"messages": turns[:2]}), spec) == []


@pytest.mark.parametrize(
    ("kind", "columns", "key"),
    [
        ("sequence_classification", {"text_pair_column": "label"}, "data.label_column"),
        ("sequence_classification", {"text_column": "label"}, "data.label_column"),
        ("sequence_classification", {"text_pair_column": "text"}, "data.text_pair_column"),
        ("sequence_regression", {"text_column": "label"}, "data.label_column"),
        ("causal_lm", {"completion_column": "prompt"}, "data.completion_column"),
        ("image_classification", {"image_column": "label"}, "data.label_column"),
    ],
)
def test_what_the_model_is_given_and_what_it_should_answer_are_two_columns(
    kind: Any, columns: dict[str, str], key: str, tmp_path: Path
) -> None:
    # With the label as second text a task was published with 1.0000.
    with pytest.raises(InvalidInput, match="is that column too") as refused:
        list(rows_in(written(tmp_path / "a.jsonl", *ROWS), spec_of(kind, **columns)))
    assert refused.value.where == key


@pytest.mark.parametrize(
    ("kind", "rows", "columns"),
    [
        ("sequence_classification", [{"text": f"t{i}", "b": "Yes ", "label": "yes"} for i in range(4)], {}),
        ("sequence_classification", [{"text": f"t{i}", "b": str(i % 2), "label": i % 2} for i in range(4)], {}),
        ("sequence_regression", [{"text": f"t{i}", "b": f"{i}.5", "label": i + 0.5} for i in range(4)], {}),
        ("causal_lm", [{"prompt": f"a{i}", "completion": f"A{i} "} for i in range(4)], {"text_pair_column": None}),
    ],
)
def test_an_input_that_is_the_answer_itself_is_told(
    kind: Any, rows: list[dict[str, Any]], columns: dict[str, Any], tmp_path: Path
) -> None:
    path = written(tmp_path / "a.jsonl", *rows)
    assert [line[:34] for line in told(path, spec_of(kind, **{"text_pair_column": "b"} | columns))] == [
        f"in 4 of 4 rows of {path}"[:34]
    ]


def test_a_word_that_is_now_and_then_the_answer_is_not_told(tmp_path: Path) -> None:
    rows = [{"text": text, "label": "yes"} for text in ("yes", "of course", "surely")]
    assert told(written(tmp_path / "a.jsonl", *rows), spec_of()) == []


@pytest.mark.parametrize(
    "text",
    [
        "cafÃ©",
        "itâ€™s",
        "Ã¼ber",
        "Â£5",
        "Â\xa0x",
        "ÃŸ",
        "ðŸ˜€",
        "Ð¿Ñ€Ð¸Ð²ÐµÑ‚",
        "â\x80\x99",
        "ï»¿a",
        "Ã\xa0".replace("\xa0", "¨"),
    ],
)
def test_utf8_that_was_read_as_latin1_is_told_with_its_row_and_what_it_looks_like(text: str, tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", {"text": "plain", "label": "yes"}, *[{"text": text, "label": "no"}] * 2)
    (said,) = told(path, spec_of())
    assert said.startswith("2 rows have what looks like UTF-8 read as Latin-1 or Windows-1252 (first in ")
    assert f"{path}, row 2: " in said


@pytest.mark.parametrize(
    "text",
    [
        "café, naïve, Ångström, Straße", "“AMANHÔ – e AMANHÔ", "AMANHÃ… «MAÇûAMANHÃ»", "10 € à 5 £", "привет, ÐÑ",
        "chạy Ângelo", "😀 ’s", "Ã", "pâté â la carte",
    ],
)  # fmt: skip
def test_letters_that_are_meant_are_not_told_as_misread(text: str, tmp_path: Path) -> None:
    assert told(written(tmp_path / "a.jsonl", {"text": text, "label": "yes"}), spec_of()) == []


def test_what_another_program_could_not_read_is_told(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", {"text": "caf\ufffd", "label": "yes"}, {"text": "caf", "label": "no"})
    (said,) = told(path, spec_of())
    assert said.startswith("1 row has the character U+FFFD, which programs write for bytes that they could not read")
    assert f"(first in {path}, row 1) →" in said
