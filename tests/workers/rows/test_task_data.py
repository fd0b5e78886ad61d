"""Rows of every kind: what is accepted, and that every refusal names the file and the row."""

from __future__ import annotations

import gzip
import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from configs.errors import InvalidInput
from configs.task_spec import TaskSpec
from tests.workers.data_builders import spec_of, written
from workers.rows import task_data
from workers.rows.task_data import (
    CompletionRow,
    ImageRow,
    Row,
    TextRow,
    decode_picture,
    input_digest,
    read_rows,
    rows_in,
)

SPEC = spec_of(label_names=("neg", "pos"))
PAIRS = spec_of(label_names=("no", "yes"), text_column="question", text_pair_column="answer", label_column="fits")
SCORES = spec_of("sequence_regression", text_pair_column="text_b")
PROMPTS = spec_of("causal_lm")
CHATS = spec_of("causal_lm", messages_column="messages")
IMAGES = spec_of("image_classification", label_names=("cat", "dog"))
POINTS = spec_of("image_regression", label_names=("nose_x", "nose_y", "tail_x", "tail_y"))


def one(spec: TaskSpec, **values: Any) -> Row:
    """The row that a line of JSON makes."""
    (row,) = read_rows(json.dumps(values).encode(), spec)
    return row


def refused(spec: TaskSpec, row: Any, folder: Path) -> InvalidInput:
    """The complaint about a file whose second row is this one, the first being a good one."""
    fine: dict[str, Any] = {
        "text": "fine", "text_b": "fine", "label": 0, "prompt": "fine", "completion": "fine", "image": [[0]],
        "messages": [{"role": "user", "content": "fine"}, {"role": "assistant", "content": "fine"}],
    }  # fmt: skip
    path = written(folder / "rows.jsonl", fine, row if isinstance(row, str) else fine | row)
    with pytest.raises(InvalidInput) as caught:
        list(rows_in(path, spec))
    assert (caught.value.where or "").startswith(f"{path}, row 2")
    return caught.value


def png(mode: str, size: tuple[int, int] = (3, 2), **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, "PNG", **options)
    return file.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG that says it has this many pixels on each side; what follows its head is never asked for."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n\0\0\0\r" + head + struct.pack(">I", zlib.crc32(head)) + b"\0\0\0\7IDAT"


# --- texts with labels -------------------------------------------------------------------------------------------


def test_a_label_may_be_its_name_or_its_index() -> None:
    assert [one(SPEC, text="x", label=label) for label in ("pos", 1, "1")] == [TextRow("x", None, 1)] * 3


def test_rows_of_an_earlier_release_have_their_labels_as_it_read_them() -> None:
    numbers = spec_of(label_names=("2", "1", "0"))
    content = b'{"text": "x", "label": "2"}\n{"text": "x", "label": 2}'
    assert read_rows(content, numbers, are_earlier=True) == (TextRow("x", None, 0), TextRow("x", None, 2))
    assert read_rows(content, numbers) == (TextRow("x", None, 0), TextRow("x", None, 0))


def test_packed_rows_are_read_like_plain_ones() -> None:
    content = json.dumps({"question": "why?", "answer": "so.", "fits": "yes", "more": 3}).encode()
    assert read_rows(gzip.compress(content), PAIRS) == read_rows(content, PAIRS) == (TextRow("why?", "so.", 1),)


def test_a_regression_label_is_a_number_however_it_is_written() -> None:
    labels = [one(SCORES, text="a", text_b="b", label=label) for label in (3, 3.0, "3.0", " 3")]
    assert labels == [TextRow("a", "b", 3.0)] * 4
    assert {type(row.label) for row in labels if isinstance(row, TextRow)} == {float}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("{", "is not JSON"),
        ("[1]", "must be a JSON object, not list"),
        ('{"label": 0}', "no column 'text'; it has 'label'"),
        ('{"text": "x"}', "no column 'label'"),
        ({"text": 3}, "must be a string, not int"),
        ({"text": None}, "must be a string, not NoneType"),
        ({"text": " \t"}, "is empty"),
        ({"text": "\u200b \ufeff"}, "is empty"),
        ({"text": "half \ud83d"}, "is no Unicode text"),
        ({"label": "maybe"}, "'maybe' is not one of the 2 labels"),
        ({"label": 2}, "2 is not one of the 2 labels"),
        ({"label": "2"}, "'2' is not one of the 2 labels"),
        ({"label": -1}, "-1 is not one of the 2 labels"),
        ({"label": "-1"}, "'-1' is not one of the 2 labels"),
        ({"label": "٣"}, "'٣' is not one of the 2 labels"),
        ({"label": "9" * 5000}, "is not one of the 2 labels"),
        ({"label": True}, "True is not one of the 2 labels"),
        ({"label": 1.5}, "1.5 is not one of the 2 labels"),
        ({"label": None}, "column 'label' has no label in it"),
        ({"label": {"a": 1}}, "must hold a label's name or its index, not dict"),
    ],
)
def test_a_wrong_row_is_named_with_its_file_and_number(row: Any, said: str, tmp_path: Path) -> None:
    assert said in str(refused(SPEC, row, tmp_path))


def test_a_text_is_too_long_in_every_format_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_data, "TEXT_CHARACTERS_MAX", 10)
    assert "column 'text' has 11 characters, more than 10" in str(refused(SPEC, {"text": "x" * 11}, tmp_path))
    assert one(SPEC, text="x" * 10, label=0) == TextRow("x" * 10, None, 0)


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (float("nan"), "column 'label' is nan"),
        (float("inf"), "column 'label' is inf"),
        ("-inf", "column 'label' is -inf"),
        (10**400, "must be a number"),
        (-1e39, "column 'label' is -1e+39"),  # float32, in which it is learnt and scored, would make it −inf
        ("three", "must be a number, not 'three'"),
        ("", "column 'label' has no label in it"),
        ("1_2", "must be a number, not '1_2'"),  # 12, says Python
        (True, "must be a number, not bool"),
        (None, "column 'label' has no label in it"),
        ([3], "must be a number, not list"),
    ],
)
def test_a_regression_label_that_is_no_finite_number_is_refused(label: Any, said: str, tmp_path: Path) -> None:
    assert said in str(refused(SCORES, {"label": label}, tmp_path))


def test_an_unknown_label_is_answered_with_the_known_ones() -> None:
    with pytest.raises(InvalidInput, match=r"data\.label_names are: 'neg', 'pos'"):
        one(SPEC, text="x", label="positive")


def test_a_misspelt_column_is_answered_with_its_key_and_the_nearest_name() -> None:
    with pytest.raises(InvalidInput, match=r"data\.text_column names the column; did you mean 'sentence'\?"):
        one(spec_of(text_column="sentense", label_names=("a", "b")), sentence="x", label=0)


# --- completions -------------------------------------------------------------------------------------------------


def test_a_prompt_and_its_completion_are_kept_as_they_are_written() -> None:
    row = one(PROMPTS, prompt="Q: 1+1?\n", completion=" 2\n")
    assert row == CompletionRow((("user", "Q: 1+1?\n"), ("assistant", " 2\n")), is_chat=False)
    assert isinstance(row, CompletionRow)
    assert row.completion == " 2\n"


def test_messages_are_turns_and_the_last_is_the_completion() -> None:
    turns = (("system", "be brief"), ("user", "hi"), ("assistant", "hello"), ("user", "bye"), ("assistant", "ciao"))
    row = one(CHATS, messages=[{"role": role, "content": content, "name": None} for role, content in turns])
    assert row == CompletionRow(turns, is_chat=True)


def test_a_chat_is_not_the_same_row_as_the_same_words_to_be_joined() -> None:
    turns = (("user", "a"), ("assistant", "b"))
    assert input_digest(CompletionRow(turns, True)) != input_digest(CompletionRow(turns, False))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"completion": "  "}, "column 'completion' is empty"),
        ({"prompt": ""}, "column 'prompt' is empty"),
        ({"prompt": ["a"]}, "must be a string, not list"),
    ],
)
def test_a_wrong_completion_is_refused(row: Any, said: str, tmp_path: Path) -> None:
    assert said in str(refused(PROMPTS, row, tmp_path))


USER = {"role": "user", "content": "hi"}
ASSISTANT = {"role": "assistant", "content": "hello"}


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("hi", "must be a list of {role, content}"),
        (["hi"], "must be a list of {role, content}"),
        ([], "the last message of column 'messages' is one of 0"),
        ([ASSISTANT], "the last message of column 'messages' is one of 1"),
        ([USER, ASSISTANT, USER], "the last message of column 'messages' is the user's"),
        ([USER, {"role": "bot", "content": "hello"}], "message 2 of column 'messages' has the role 'bot'"),
        ([USER, {"from": "gpt", "value": "hello"}], "message 2 of column 'messages' has no content and no role"),
        ([USER, ASSISTANT | {"content": " "}], "message 2 of column 'messages' is empty"),
        ([USER, ASSISTANT] * 2049, "column 'messages' has 4098 messages, more than 4096"),
        ([{"role": [[]], "content": "a"}, ASSISTANT], "message 1 of column 'messages' has the role of type list"),
        ([USER | {"content": None}, ASSISTANT], "message 1 of column 'messages' must be a string, not NoneType"),
        ([USER | {"content": [{"type": "text", "text": "a"}]}, ASSISTANT], "must be a string, not list"),
        ([USER | {"content": "\ud800"}, ASSISTANT], "message 1 of column 'messages' is no Unicode text"),
        ([USER, ASSISTANT | {"content": "a" * (2**22 + 1)}], "message 2 of column 'messages' has 4194305 characters"),
        ([USER, {"role": "tool", "content": "4"}, ASSISTANT], "message 2 of column 'messages' has the role 'tool'"),
        ([USER, ASSISTANT | {"tool_calls": [{"name": "add"}]}], "message 2 of column 'messages' has tool_calls"),
        ([USER, ASSISTANT | {"reasoning_content": "hm"}], "message 2 of column 'messages' has reasoning_content"),
    ],
)
def test_wrong_messages_are_refused(messages: Any, said: str, tmp_path: Path) -> None:
    assert said in str(refused(CHATS, {"messages": messages}, tmp_path))


# --- pictures ----------------------------------------------------------------------------------------------------


def test_pixels_without_colours_get_an_axis_for_them() -> None:
    row = one(IMAGES, image=[[0, 128, 255], [1, 2, 3]], label="dog")
    assert isinstance(row, ImageRow)
    assert (row.image.shape, row.image.dtype, row.label, row.encoded) == ((2, 3, 1), np.uint8, 1, b"")
    assert row.image[..., 0].tolist() == [[0, 128, 255], [1, 2, 3]]


def test_a_picture_may_be_two_hundred_times_as_long_as_wide() -> None:
    assert decode_picture(png("L", (1, 200)), "here").shape == (200, 1, 1)


@pytest.mark.parametrize(
    ("mode", "shape"), [("L", (2, 3, 1)), ("1", (2, 3, 1)), ("RGB", (2, 3, 3)), ("RGBA", (2, 3, 3)), ("P", (2, 3, 3))]
)
def test_an_encoded_picture_becomes_gray_or_three_colours(mode: str, shape: tuple[int, ...]) -> None:
    pixels = decode_picture(png(mode), "here")
    assert (pixels.shape, pixels.dtype) == (shape, np.uint8)


def test_a_picture_is_turned_as_its_camera_says() -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # stands on its right side
    assert decode_picture(png("RGB", exif=turned), "here").shape == (3, 2, 3)


def test_the_same_pixels_are_the_same_row_whether_they_were_encoded_or_not() -> None:
    pixels = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    decoded = decode_picture(file.getvalue(), "here")
    assert input_digest(ImageRow(decoded, 0, file.getvalue())) == input_digest(ImageRow(pixels, 1))
    assert input_digest(ImageRow(pixels.reshape(3, 2, 3), 0)) != input_digest(ImageRow(pixels, 0))


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ([], "must be uint8"),
        ([1, 2], "has shape (2,)"),
        ([[[1, 2, 3, 4]]], "has shape (1, 1, 4)"),
        ([[[1] * 8] * 8] * 3, "has shape (3, 8, 8)"),
        ([[0] * 201], "column 'image': is too long a picture: of 201×1 pixels"),
        ([[0, 256]], "must be uint8, whole numbers from 0 to 255, not int64"),
        ([[0, -1]], "must be uint8"),
        ([[0.5, 1.0]], "must be uint8, whole numbers from 0 to 255, not float64"),
        ([[1, 2], [3]], "has rows of several lengths"),
        ("cat.png", "must be pixels or a picture's bytes, not str"),
        ({"bytes": None, "path": "cat.png"}, "names a file ('cat.png') and does not hold it"),
    ],
)
def test_what_is_no_picture_is_refused(image: Any, said: str, tmp_path: Path) -> None:
    assert said in str(refused(IMAGES, {"image": image}, tmp_path))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not a picture that can be decoded"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "is not a picture that can be decoded"),
        (png("RGB", (64, 64))[:60], "is not a picture that can be decoded"),
        (png("I;16"), "is a picture of mode I;16; pixels must have 8 bits"),
        (bomb(30_000, 30_000), "is too large a picture"),
        (bomb(10_000, 10_000), "is too large a picture"),  # between what Pillow warns of and what it refuses
        (bomb(1, 80_000_000), "is too long a picture: of 1×80000000 pixels"),
        (bomb(80_000_000, 1), "is too long a picture: of 80000000×1 pixels"),
        (png("L", (1, 201)), "is too long a picture"),
    ],
)
def test_bytes_that_are_no_picture_or_too_large_a_one_are_refused(content: bytes, said: str) -> None:
    with pytest.raises(InvalidInput, match=r"rows\.parquet, row 7") as caught:
        decode_picture(content, "rows.parquet, row 7")
    assert said in str(caught.value)


# --- light -------------------------------------------------------------------------------------------------------


def test_checking_rows_loads_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "numpy", "pyarrow", "datasets", "PIL"}
    code = f"import sys, workers.rows.task_data; print(sorted({heavy} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


@pytest.mark.parametrize("label", [[0.5, 1, 2, "3"], [[0.5, 1], [2, 3]]])
def test_a_label_of_several_numbers_is_a_list_of_them_or_of_points(label: Any) -> None:
    row = one(POINTS, image=[[0]], label=label)
    assert isinstance(row, ImageRow)
    assert row.label == (0.5, 1.0, 2.0, 3.0)


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ([0, 1, 2], "has 3 numbers, and data.label_names are 4"),
        (1, "has 1 numbers, and data.label_names are 4"),
        ([0, 1, 2, 1e39], "is 1e.39"),
        ([0, 1, 2, True], "must be a number, not bool"),
        ([0, 1, 2, None], "label"),
        ([0, 1, 2, [3]], "must be a number, not list"),
        ([[0, 1], [2, [3]]], "must be a number, not list"),
        ([[0, 1, 2, 3]], "numbers, and data.label_names are 4"),  # all x, then all y?
        ([[0, 1], 2, 3], "numbers, and data.label_names are 4"),
        (None, "label"),
    ],
)
def test_a_label_that_is_not_one_number_for_each_name_is_refused(label: Any, said: str, tmp_path: Path) -> None:
    path = written(tmp_path / "rows.jsonl", {"image": [[0]], "label": label})
    with pytest.raises(InvalidInput, match=said):
        list(rows_in(path, POINTS))
