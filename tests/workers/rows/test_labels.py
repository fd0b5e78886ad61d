"""A table means the same in every format: what a label says counts, and not the type in which a format keeps it."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.errors import InvalidInput
from tests.workers.data_builders import spec_of
from workers.rows.labels import Labels, check_names, counted_from_1, earlier_index, two_readings
from workers.rows.task_data import ImageRow, TextRow, rows_in

STARS = ("1", "2", "3", "4", "5")
WORDS = ("bad", "good")


def index(names: Sequence[str], value: Any) -> int:
    return Labels(names).index(value, "label", "rows.csv, row 1")


def refusal(names: Sequence[str], value: Any) -> str:
    with pytest.raises(InvalidInput) as caught:
        index(names, value)
    assert caught.value.where == "rows.csv, row 1"
    return str(caught.value)


# --- one value ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "values", "expected"),
    [
        # A name that is a number is meant by that number, in whatever type, and never by its place.
        (("1", "0"), [1, "1", 1.0, "1.0", " 1 ", "01", "+1", Decimal("1.00"), np.float64(1)], 0),
        (("1", "0"), [0, "0", 0.0, -0.0, "-0", "0.", Decimal(0)], 1),
        (STARS, [5, "5", 5.0], 4),
        (("-1", "0", "1"), [-1, "-1", -1.0], 0),
        (("0.5", "1.5"), [1.5, "1.50", Decimal("1.5")], 1),
        (("01", "02"), [2, "2", "02"], 1),
        # A name that is none of these: whole numbers are places.
        (WORDS, ["good", " good", "good\u00a0", 1, "1", 1.0, "1.0"], 1),
        (WORDS, ["bad", 0, "0", -0.0], 0),
        # Truth values, as Python, pandas, R and JSON write them.
        (("false", "true"), [True, "true", "True", "TRUE"], 1),
        (("True", "False"), [True, "true", "True", "TRUE"], 0),
        (("false", "true"), [1, "1", 1.0], 1),  # both readings say the same
        # One letter in two ways of writing it down.
        (("été", "no"), ["été", "e\u0301te\u0301"], 0),
        (("None", "some"), ["None", " None "], 0),
    ],
)
def test_a_value_means_one_label_whatever_its_type(names: Sequence[str], values: list[Any], expected: int) -> None:
    assert [index(names, value) for value in values] == [expected] * len(values)


@pytest.mark.parametrize(
    ("names", "value", "said"),
    [
        (STARS, 0, "label 0 is not one of the 5 labels"),
        (STARS, "0", "read as a name and never as an index: if indices are meant, write the names"),
        (("True", "False"), 1, "read as a name and never as an index"),
        (WORDS, 2, "a number is an index into them, from 0 to 1"),
        (WORDS, -1, "label -1 is not one of the 2 labels"),
        (WORDS, 0.5, "label 0.5 is not one of the 2 labels"),
        (WORDS, True, "a truth value is a label only where they list true and false"),
        (WORDS, "True", "a truth value is a label only where they list true and false"),
        (WORDS, "Good", "did you mean 'good'?"),
        (WORDS, "٣", "'٣' is not one of the 2 labels"),
        (WORDS, 10**400, "is not one of the 2 labels"),
        (WORDS, float("inf"), "label inf is not one of the 2 labels"),
        (WORDS, [1], "must hold a label's name or its index, not list"),
        (WORDS, b"good", "must hold a label's name or its index, not bytes"),
        *((WORDS, value, "'label' has no label in it") for value in (None, "", "  ", float("nan"), Decimal("NaN"))),
        *((WORDS, value, f"has no label in it (it says '{value}')") for value in ("NaN", "null", "NA", "<NA>", "None")),
    ],
)  # fmt: skip
def test_a_value_that_is_no_label_is_refused_with_its_cause(names: Sequence[str], value: Any, said: str) -> None:
    text = refusal(names, value)
    assert said in text
    assert len(text) < 600


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("1", "1.0"), "'1', '1.0' are the same label written in two ways"),
        (("true", "True"), "'true', 'True' are the same label"),
        (("a", " a"), "'a', ' a' are the same label"),
        (("a", " "), "holds an empty name"),
    ],
)
def test_names_that_no_file_can_tell_apart_are_refused(names: Sequence[str], said: str) -> None:
    with pytest.raises(InvalidInput, match="label_names") as caught:
        Labels(names)
    assert said in str(caught.value)


@pytest.mark.parametrize("values", [["good", 0], ["bad", "bad", "1"], [1, 0, "good"], [0.0, " bad "]])
def test_a_file_that_says_some_labels_by_name_and_some_by_index_is_refused_with_both_readings(
    values: list[Any],
) -> None:
    labels, *places = Labels(WORDS), *(f"rows.csv, row {number}" for number in range(1, len(values) + 1))
    for value, place in zip(values[:-1], places, strict=False):
        labels.index(value, "label", place)
    with pytest.raises(InvalidInput) as caught:
        labels.index(values[-1], "label", places[-1])
    number = next(int(value) for value in values if value not in ("good", "bad", " bad "))
    assert caught.value.where == places[-1]
    assert "column 'label' says some labels by name" in str(caught.value)
    assert "row 1)" in str(caught.value)
    assert f"{places[-1]})" in str(caught.value)
    assert f"can be an index, and mean {WORDS[number]!r}, or a name that is missing" in str(caught.value)


def test_truth_values_and_the_indices_that_agree_with_them_may_stand_in_one_file() -> None:
    labels = Labels(("false", "true"))
    assert [labels.index(value, "label", "a") for value in (True, 0, "1", "FALSE")] == [1, 0, 1, 0]


def test_two_files_may_say_their_labels_in_two_ways(tmp_path: Path) -> None:
    assert [read(written_as("csv", labels, tmp_path), WORDS) for labels in ([0, 1], ["good", "bad"])] == [
        [0, 1],
        [1, 0],
    ]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("neg", "рos"), "'рos' is not what it looks like: character 1 is U+0440 CYRILLIC SMALL LETTER ER"),
        (("neg", "pοs"), "character 2 is U+03BF GREEK SMALL LETTER OMICRON"),
        (("neg", "very рos"), "character 6 is U+0440"),
        (("хорoшо", "плохо"), "character 4 is U+006F LATIN SMALL LETTER O"),
        (("neg", "pos\u200b"), "'pos\\u200b' is not what it looks like: character 4 is U+200B ZERO WIDTH SPACE"),
        (("\ufeffneg", "pos"), "character 1 is U+FEFF ZERO WIDTH NO-BREAK SPACE"),
        (("cop", "сор"), "'cop', 'сор' look the same"),  # one of them all Cyrillic
        (("neg", "pos", "pos "), "'pos', 'pos ' look the same"),
        (("new york", "new\u00a0 york"), "look the same"),
        (("café", "cafe\u0301"), "look the same"),
        (("می\u200cشود", "میشود"), "look the same"),
        (("Neg", "neg", "pos"), "'Neg', 'neg' differ in capital letters alone"),
        (("ÉTÉ", "été"), "differ in capital letters alone"),
        (("a", " "), "one of the names is empty"),
    ],
)
def test_names_that_a_person_cannot_tell_apart_are_refused(names: Sequence[str], said: str) -> None:
    with pytest.raises(InvalidInput, match="label_names") as caught:
        check_names(names)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "names",
    [
        ("neg", "pos"), ("хорошо", "плохо"), ("A", "a", "B"), ("TNFα", "μm", "ΔT"), ("naïve", "naive"), ("m²", "m2"),
        ("Maße", "Masse"), ("می\u200cشود", "نه"), ("👩\u200d⚕️", "👩"), ("東京タワー", "大阪"), ("Яndex", "google"),
        ("1", "2", "10"), ("new york", "newyork"), (),
    ],
)  # fmt: skip
def test_names_that_a_person_can_tell_apart_are_taken(names: Sequence[str]) -> None:
    check_names(names)


def test_a_label_that_only_looks_like_a_name_is_refused_with_the_odd_character() -> None:
    with pytest.raises(InvalidInput) as caught:
        index(("neg", "pos"), "рos")
    assert "label 'рos' (character 1 is U+0440 CYRILLIC SMALL LETTER ER) is not one of the 2 labels" in str(
        caught.value
    )


def test_indices_that_may_be_counted_from_1_are_told_with_both_readings() -> None:
    said = counted_from_1({"neg": 0, "neutral": 3, "pos": 2})
    assert "numbers from 1 to 2, and are read as indices counted from 0: 1 is 'neutral', and 'neg' has no row" in said
    assert "1 would be 'neg'" in said
    assert counted_from_1({"neg": 1, "neutral": 3, "pos": 0}) == counted_from_1({"neg": 0, "pos": 0}) == ""


def test_names_that_differ_in_capitals_alone_are_two_labels_to_a_file() -> None:
    assert [index(("us", "US"), value) for value in ("us", "US")] == [0, 1]


def test_labels_that_could_as_well_have_been_indices_are_warned_of_with_both_readings() -> None:
    said = two_readings({"1": 3, "0": 2})
    assert "1 is the label '1'" in said
    assert "1 would be '0'" in said
    assert "1 would be '2'" in two_readings(dict.fromkeys(STARS, 6) | {"5": 0})


@pytest.mark.parametrize(
    "per_label",
    [
        {"0": 1, "1": 2},  # both readings say the same
        {"-1": 1, "0": 1, "1": 1},  # no index is −1
        dict.fromkeys(STARS, 1),  # nor 5
        {"1": 0, "0": 0},
        {"bad": 2, "good": 2},
    ],
)
def test_labels_of_one_reading_are_not_warned_of(per_label: dict[str, int]) -> None:
    assert two_readings(per_label) == ""


def test_rows_that_an_earlier_release_froze_as_they_came_keep_the_meaning_that_their_scores_have() -> None:
    assert [earlier_index(value, ("1", "0")) for value in ("1", 1, "0", 0)] == [0, 1, 1, 0]
    assert [earlier_index(value, WORDS) for value in ("good", 1, "1")] == [1, 1, 1]


# --- one table in every format -----------------------------------------------------------------------------------

TABLES: dict[str, tuple[Sequence[str], list[Any]]] = {
    "numbers that are names": (("1", "0"), [0, 1, 1, 0]),
    "stars": (STARS, [1, 2, 3, 4, 5]),
    "polarity": (("-1", "0", "1"), [1, 0, -1]),
    "indices": (WORDS, [0, 1, 1]),
    "numbers of a column that had gaps": (WORDS, [0.0, 1.0]),
    "texts": (WORDS, ["good", "bad"]),
    "texts with spaces": (WORDS, [" good", "bad "]),
    "truth values": (("false", "true"), [True, False]),
    "truth values the other way round": (("True", "False"), [True, False]),
    "a gap": (WORDS, [1.0, None]),
    "a number out of range": (STARS, [1, 6]),
    "truth values as words": (WORDS, [True, False]),
    "another word": (WORDS, ["good", "fine"]),
    "names and numbers": (("bad", "good", "2"), ["good", "2", "bad"]),
    "names and indices": (WORDS, ["good", "0"]),
}


def written_as(suffix: str, labels: list[Any], folder: Path) -> Path:
    """The labels, each with a text, as a program writes them: pandas' way of writing CSV and JSON lines."""
    path = folder / f"rows.{suffix}"
    texts = [f"text {place}" for place in range(len(labels))]
    if suffix == "csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *zip(texts, labels, strict=True)])
    elif suffix == "jsonl":
        pairs = zip(texts, labels, strict=True)
        path.write_text("\n".join(json.dumps({"text": text, "label": label}) for text, label in pairs))
    else:
        pq.write_table(pa.table({"text": texts, "label": pa.array(labels)}), path)
    return path


def read(path: Path, names: Sequence[str]) -> list[int] | str:
    """The indices; or "refused"."""
    try:
        rows = list(rows_in(path, spec_of(label_names=tuple(names))))
    except InvalidInput:
        return "refused"
    return [row.label for row in rows if isinstance(row, TextRow) and isinstance(row.label, int)]


@pytest.mark.parametrize("name", TABLES)
def test_one_table_means_the_same_as_csv_json_lines_and_parquet(name: str, tmp_path: Path) -> None:
    names, labels = TABLES[name]
    as_csv, as_jsonl, as_parquet = (
        read(written_as(suffix, labels, tmp_path), names) for suffix in ("csv", "jsonl", "parquet")
    )
    assert as_csv == as_jsonl == as_parquet
    assert (as_csv == "refused") == (
        name in ("a gap", "a number out of range", "truth values as words", "another word", "names and indices")
    )


def test_an_array_of_labels_means_what_a_table_of_them_means(tmp_path: Path) -> None:
    spec = spec_of("image_classification", label_names=("2", "1"))
    for labels in (
        np.array([1, 2]),
        np.array([1.0, 2.0], np.float32),
        np.array(["1", "2"]),
        np.array([1, 2], np.uint8),
    ):
        np.savez(tmp_path / "a.npz", image=np.zeros((2, 1, 1), np.uint8), label=labels)
        rows = list(rows_in(tmp_path / "a.npz", spec))
        assert [row.label for row in rows if isinstance(row, ImageRow)] == [1, 0]


def test_a_category_of_pandas_is_its_name(tmp_path: Path) -> None:
    categories = pa.DictionaryArray.from_arrays(pa.array([1, 0], pa.int8()), ["good", "bad"])
    pq.write_table(pa.table({"text": ["a", "b"], "label": categories}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", WORDS) == [0, 1]


@pytest.mark.parametrize(
    ("number", "said"), [(-1, "has no label in it"), (2, "has class 2, and the file names 2 classes")]
)
def test_a_class_label_without_a_name_is_refused(number: int, said: str, tmp_path: Path) -> None:
    features = {"label": {"names": ["bad", "good"], "_type": "ClassLabel"}}
    schema = pa.schema(
        [("text", pa.string()), ("label", pa.int64())],
        {b"huggingface": json.dumps({"info": {"features": features}}).encode()},
    )
    pq.write_table(pa.table({"text": ["a", "b"], "label": [1, number]}, schema), tmp_path / "a.parquet")
    with pytest.raises(InvalidInput, match=r"a\.parquet, row 2: column 'label' ") as caught:
        list(rows_in(tmp_path / "a.parquet", spec_of(label_names=("bad", "good", "best"))))
    assert said in str(caught.value)
