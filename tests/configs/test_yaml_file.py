"""YAML as people and other programs write it: read as it was meant, or refused in bounded time with what to write."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.document import read_document
from configs.errors import InvalidInput, TooLarge
from configs.limits import BYTES_MAX, VALUES_MAX
from configs.settings import Settings
from configs.task_spec import TaskSpec, read_task_spec
from configs.yaml_file import read_yaml
from tests.builders import settings, task_document

SECONDS = 10.0
"""Longest time for the worst file; most take milliseconds."""


def written(folder: Path, text: str | bytes) -> Path:
    path = folder / "task.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def values(folder: Path, text: str | bytes) -> Any:
    return read_yaml(written(folder, text)).values


def refusal(folder: Path, text: str | bytes) -> str:
    """The complaint about a file, which comes soon and fits on a screen."""
    path, started = written(folder, text), time.process_time()
    with pytest.raises(InvalidInput) as caught:
        read_document(path, TaskSpec)
    assert time.process_time() - started < SECONDS
    assert len(str(caught.value)) < 8000
    return str(caught.value)


def document(**changes: Any) -> str:
    """A task file whose values are all clear."""
    return yaml.safe_dump(task_document(**changes))


# --- anchors and merge keys --------------------------------------------------------------------------------------


def test_anchors_and_merge_keys_are_read(tmp_path: Path) -> None:
    text = """
base: &base {r: 4, lora_alpha: 8}
more: &more {r: 2, lora_dropout: 0.5}
one: {<<: *base, r: 16}
two: {<<: [*base, *more]}
three: {r: 1, <<: {<<: *more}}
same: *base
text: {'<<': kept}
"""
    read = values(tmp_path, text)
    assert read["one"] == {"r": 16, "lora_alpha": 8}
    assert read["two"] == {"r": 4, "lora_alpha": 8, "lora_dropout": 0.5}  # the earlier mapping wins
    assert read["three"] == {"r": 1, "lora_dropout": 0.5}
    assert read["same"] == {"r": 4, "lora_alpha": 8}
    assert read["text"] == {"<<": "kept"}
    # An own reader beside PyYAML's: they must agree.
    assert read == {**yaml.safe_load(text.replace("text: {'<<': kept}\n", "")), "text": {"<<": "kept"}}


def test_a_task_file_may_share_a_part_by_a_merge_key(tmp_path: Path) -> None:
    text = document() + "training: {<<: &fast {learning_rate: 0.01, seed: 7}, seed: 8}\n"
    spec = read_task_spec(written(tmp_path, text))
    assert (spec.training.learning_rate, spec.training.seed) == (0.01, 8)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("a: {<<: 3}", "line 1: << takes a mapping"),
        ("a: {<<: [3]}", "line 1: << takes a mapping"),
        ("a: {<<: {b: 1}, <<: {c: 1}}", "the key '<<' stands twice"),
        ("a: &a [*a]", "line 1: *'a' stands for nothing that ends before it"),
        ("a: *nobody", "line 1: *'nobody' stands for nothing"),
        ("a: 1\nb: {c: 1,\n  c: 2}", "line 3: the key 'c' stands twice"),
        ("? [1]\n: 2", "line 1: a list or a mapping is no key"),
        ("a: !!python/object/apply:os.getcwd []", "'!!python/object/apply:os.getcwd' is no plain value"),
        ("a: !mine 3", "'!mine' is no plain value"),
        ("a: !!int text", "'!!int' is no plain value"),
    ],
)
def test_what_is_no_plain_value_is_refused_with_its_line(tmp_path: Path, text: str, what: str) -> None:
    assert what in refusal(tmp_path, text)


# --- two readings ------------------------------------------------------------------------------------------------

TWO = [
    ("no", "the boolean false", "a text"), ("on", "the boolean true", "a text"), ("Yes", "the boolean true", "a text"),
    ("1e3", "a text", "the number 1000.0"), ("1:30", "the number 90", "a text"),
    ("010", "the number 8", "the number 10"), ("0o17", "a text", "the number 15"),
    ("2024-01-01", "a text", "a date"), ("2024-13-45", "a text", "a date"),
    ("2001-12-14t21:59:43.10-05:00", "a text", "a date"), ("0b101", "the number 5", "a text"),
    ("1_000", "the number 1000", "a text"), ("08", "a text", "the number 8"),
]  # fmt: skip


@pytest.mark.parametrize(("word", "ours", "other"), TWO, ids=[word for word, _, _ in TWO])
def test_a_word_that_programs_read_in_two_ways_is_no_text(tmp_path: Path, word: str, ours: str, other: str) -> None:
    text = document(data={"label_names": None}).replace("data:\n", f"data:\n  label_names: [first, {word}]\n", 1)
    told = refusal(tmp_path, text)
    assert f"data.label_names.1: `{word}` is {ours} to some programs and {other} to others" in told
    assert f"write '{word}' in quotes for a text" in told
    quoted = text.replace(word, f"'{word}'")
    assert read_task_spec(written(tmp_path, quoted)).data.label_names == ("first", word)


@pytest.mark.parametrize("word", ["1", "true", "~", "1.5", ".nan"])
def test_a_word_that_is_no_text_to_anybody_is_refused_with_the_quotes_to_write(tmp_path: Path, word: str) -> None:
    text = document(data={"label_names": None}).replace("data:\n", f"data:\n  label_names: [first, {word}]\n", 1)
    told = refusal(tmp_path, text)
    assert "data.label_names.1: " in told
    assert f"write '{word}' in quotes for a text" in told or "is no finite number" in told


@pytest.mark.parametrize(("word", "told"), [("010", "`010` is the number 8"), ("1:30", "`1:30` is the number 90")])
def test_a_number_that_is_another_one_to_others_is_refused(tmp_path: Path, word: str, told: str) -> None:
    assert f"training.max_steps: {told}" in refusal(tmp_path, document() + f"training: {{max_steps: {word}}}\n")


def test_numbers_and_booleans_that_mean_one_thing_are_taken_as_people_write_them(tmp_path: Path) -> None:
    text = "training: {learning_rate: 1e-3, max_steps: 1_000, bf16: no, auto_find_batch_size: on, seed: 0x10}\n"
    training = read_task_spec(written(tmp_path, document() + text)).training
    assert (training.learning_rate, training.max_steps, training.seed) == (0.001, 1000, 16)
    assert (training.bf16, training.auto_find_batch_size) == (False, True)


def test_a_word_with_two_readings_does_not_reach_deepspeed(tmp_path: Path) -> None:
    text = "training: {deepspeed: {zero_optimization: {stage: 2}, optimizer: {params: {lr: 1e-3}}}}\n"
    told = refusal(tmp_path, document() + text)
    assert "training.deepspeed.optimizer.params.lr: `1e-3` is a text to some programs" in told


@pytest.mark.parametrize("word", ["no", "on", "7", "1e3", "~"])
def test_a_key_that_is_no_text_to_every_program_is_refused(tmp_path: Path, word: str) -> None:
    values = settings(tmp_path).model_dump(mode="json") | {"teams": {"PLACE": {}}}
    path = written(tmp_path, yaml.safe_dump(values).replace("PLACE", word))
    with pytest.raises(InvalidInput, match=rf"line \d+: the key `{word}` is .*write '{word}' in quotes for a text"):
        read_document(path, Settings)
    path.write_text(path.read_text().replace(f"  {word}:", f"  'x{word.strip('~')}':"))
    assert len(read_document(path, Settings).teams) == 1


# --- encodings and files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_encoding_with_a_mark_and_every_line_end_is_read(tmp_path: Path, encoding: str, end: str) -> None:
    text = "team: red\nname: größe\n".replace("\n", end)
    assert values(tmp_path, text.encode(encoding)) == {"team": "red", "name": "größe"}


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "holds nothing"),
        (b"# nothing\n", "holds nothing"),
        (b"team: gr\xf6n\n", "it is not UTF-8 text: byte 8 is 0xf6"),
        (b"\xff\xfea", "it is not UTF-16 text"),
        ("team: red\n".encode("utf-16-le"), "is not valid YAML"),
        (b"a: 1\n---\nb: 2\n", "line 2: a second document begins there"),
        (b"training:\n\tseed: 3\n", "indent with spaces: YAML takes no tabs there"),
        (b'team: "\\ud800"\n', "team"),
        (b'team: "\\e[31mred"\n', "team: must be one line of plain text, and holds \\x1b"),
        ("team: \u202edeR\n".encode(), "team: must be one line of plain text, and holds \\u202e"),
        (b"a: \0\n", "is not valid YAML"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_what_cannot_be_read_is_told_with_what_to_do(tmp_path: Path, content: bytes, what: str) -> None:
    told = refusal(tmp_path, content)
    assert what in told or "Unicode character escape" in told
    assert "\x1b" not in told
    assert "\n  → " in told


def test_a_folder_a_pipe_and_a_device_are_no_file_and_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    started = time.monotonic()
    for path, what in (
        (tmp_path, "a folder"), (tmp_path / "pipe", "a pipe"), (Path("/dev/zero"), "a device"),
        (tmp_path / "a\0b", "null (byte|character)"), (tmp_path / ("x" * 5000), "too long"),
    ):  # fmt: skip
        with pytest.raises(InvalidInput, match=f"(?s)cannot read the file.*{what}"):
            read_yaml(path)
    assert time.monotonic() - started < SECONDS


def test_a_deepspeed_file_is_read_as_carefully(tmp_path: Path) -> None:
    config = tmp_path / "zero.json"
    path = written(tmp_path, document(training={"deepspeed": str(config)}))
    for content, what in (
        ('{"zero_optimization": {"stage": 1}, "zero_optimization": {"stage": 2}}', "stands twice"),
        ('{"zero_optimization": {"stage": 2}, "x": ' + "9" * 30 + "}", "more than 19 digits"),
        ("[" * 100_000, "is not JSON"),
        ('{"zero_optimization": NaN}', "NaN is no number"),
        (" " * (BYTES_MAX + 1), "has more than"),
    ):
        config.write_text(content)
        with pytest.raises(InvalidInput, match=what):
            read_task_spec(path)


# --- cost --------------------------------------------------------------------------------------------------------


def laughs(levels: int, kind: str) -> str:
    """Each line holds the one before ten times."""
    inner = {"list": "[{}]", "merge": "{{<<: [{}]}}"}[kind]
    lines = ["a0: &a0 {k: 1}"]
    lines += [f"a{n}: &a{n} {inner.format(', '.join([f'*a{n - 1}'] * 10))}" for n in range(1, levels)]
    return "\n".join(lines)


EVIL = {
    "billion laughs": laughs(12, "list"),
    "merged laughs": laughs(12, "merge"),
    "nested aliases": "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 2000)),
    "deep": "a: " + "[" * 200_000,
    "deep mappings": "a: " + "{a: " * 50_000,
    "deep by lines": "".join(" " * n + f"k{n}:\n" for n in range(1500)),
    "unknown keys": "".join(f"key{n}: 1\n" for n in range(100_000)),
    "unknown keys inside": "training:\n" + "".join(f"  key{n}: 1\n" for n in range(9_000)),
    "a long key": f"{'k' * 200_000}: 1\n",
    "long keys": "".join(f"{'k' * 4000}{n}: 1\n" for n in range(900)),
    "many values": "a: [" + "1," * (VALUES_MAX + 10) + "]",
    "a number": "lora: {lora_alpha: 1" + "0" * 400 + "}",
    "a long number": "lora: {r: " + "9" * 100_000 + "}",
    "a sexagesimal number": "lora: {r: " + "9:" * 100_000 + "9}",
    "a long text": f"team: {'x' * 1_000_000}",
    "a date": "team: 2024-99-99",
    "mistakes": "data: {label_names: [" + "1," * 100_000 + "]}",
    "merges of large mappings": "a: &a {" + ",".join(f"k{n}: 1" for n in range(5000)) + "}\nb: {<<: ["
    + ",".join(["*a"] * 100) + "]}",
}  # fmt: skip


@pytest.mark.parametrize("name", EVIL)
def test_an_evil_file_is_refused_soon_with_a_short_message(tmp_path: Path, name: str) -> None:
    refusal(tmp_path, EVIL[name])


def test_a_file_of_200_megabytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "task.yaml"
    with path.open("wb") as file:
        file.truncate(200 * 2**20)
    with pytest.raises(TooLarge, match="has more than 4,194,304 bytes"):
        read_yaml(path)


def test_the_mistakes_that_are_not_listed_are_counted(tmp_path: Path) -> None:
    told = refusal(tmp_path, document() + "training: {" + ", ".join(f"key{n}: 1" for n in range(1000)) + "}\n")
    assert told.count("unknown key 'training.key") == 20
    assert "and 980 more" in told
