"""Every format gives the same rows; what is wrong with a file is named by file, row and line."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from configs.errors import InvalidInput
from tests.workers.data_builders import spec_of, written
from workers.rows import array_files, columnar_files, columns, row_files, table_files, text_lines
from workers.rows.row_files import read_file
from workers.rows.task_data import ImageRow, TextRow, rows_in

TEXT = {"text_column": "text", "label_column": "label"}
ARRAYS = {"image_column": "image", "label_column": "label"}
ROWS = [{"text": 'He said "no",\nthen left\t…', "label": "no"}, {"text": "yes & да", "label": "yes"}]


def values(path: Path, columns: dict[str, str] = TEXT) -> list[dict[str, Any]]:
    return [dict(row) for _, row in read_file(path, columns)]


def complaint(path: Path, columns: dict[str, str] = TEXT) -> str:
    with pytest.raises(InvalidInput) as caught:
        values(path, columns)
    assert (caught.value.where or "").startswith(str(path))
    return str(caught.value).removeprefix(str(path))


def small_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a row were too large above 1,000 bytes, or characters."""
    for module in (columns, array_files, columnar_files):
        monkeypatch.setattr(module, "ROW_BYTES_MAX", 1000)
    for reader in (text_lines, table_files):
        monkeypatch.setattr(reader, "LINE_CHARACTERS_MAX", 1000)


def as_folder(path: Path, *batches: pa.RecordBatch) -> Path:
    """What `datasets` would have saved."""
    path.mkdir()
    written(path / "state.json", {"_data_files": [{"filename": "x.arrow"}]})
    with pa.OSFile(str(path / "x.arrow"), "wb") as file, pa.ipc.new_stream(file, batches[0].schema) as out:
        for batch in batches:
            out.write_batch(batch)
    return path


def separated(rows: list[dict[str, Any]], separator: str) -> bytes:
    lines = [rows[0].keys(), *(row.values() for row in rows)]
    return "\n".join(separator.join('"' + value.replace('"', '""') + '"' for value in line) for line in lines).encode()


def as_jsonl(path: Path) -> None:
    written(path, *ROWS)


def as_csv(path: Path) -> None:
    path.write_bytes(separated(ROWS, "\t" if ".tsv" in path.name else ","))


def as_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=1)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("rows.jsonl", as_jsonl), ("rows.csv", as_csv), ("rows.tsv", as_csv), ("ROWS.CSV", as_csv),
        ("rows.parquet", as_parquet),
    ],
)  # fmt: skip
def test_every_format_of_text_gives_the_same_rows(name: str, write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path / name)
    assert values(tmp_path / name) == ROWS
    if not name.endswith(".parquet"):
        packed = tmp_path / f"{name}.gz"
        packed.write_bytes(gzip.compress((tmp_path / name).read_bytes()))
        assert values(packed) == ROWS


# --- lines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'\xef\xbb\xbf{"text": "x", "label": "1"}\r\n\r\n'),
        ("a.csv", b"\xef\xbb\xbftext,label\r\n\r\nx,1\r\n"),
    ],
)
def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_a_value(
    name: str, content: bytes, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    assert values(tmp_path / name) == [{"text": "x", "label": "1"}]


def test_unicode_line_separators_inside_a_text_do_not_end_the_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\u2028b\u0085c", "label": 0}', encoding="utf-8")
    assert values(path)[0]["text"] == "a\u2028b\u0085c"


def test_rows_of_csv_are_named_by_number_and_by_the_line_on_which_they_begin(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('text,label\n"two\nlines",0\n\n"three\n\nlines",1\nx,0\n')
    places = [where.removeprefix(str(path)) for where, _ in read_file(path, TEXT)]
    assert places == [", row 1 (line 2)", ", row 2 (line 5)", ", row 3 (line 8)"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", None),
        ("\n", None),
        ("text,label\n", None),
        ("i love it,1\nso bad,0\n", "(the names of the columns): has no column 'text'; it has '1', 'i love it'"),
        ("i love it,1\nso bad,0\n", "; if this line is a row already, put a line with the names above it"),
        ("txt,label\nx,1", "data.text_column names the column; did you mean 'txt'?"),
        ("text,label,text\nx,1,y", "(the names of the columns): has the column 'text' twice"),
        ("text,label\nx,1\nhello, you,1\n", ", row 2 (line 3): has 3 fields, the first line 2"),
        ("text,label\nx\n", ", row 1 (line 2): has 1 fields, the first line 2"),
        ('text,label\n"x" y,1\n', ", line 2: is not readable from here on"),
        ('text,label\nx,1\n"y,1\nz,0\n', ", line 3: is not readable from here on"),
    ],
)
def test_a_csv_that_is_not_one_is_refused_with_its_line(content: str, said: str | None, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(content)
    if said is None:
        assert values(path) == []
    else:
        assert said in complaint(path)


def test_a_quote_that_is_never_closed_does_not_take_in_the_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_rows(monkeypatch)
    path = tmp_path / "a.tsv"
    path.write_text('text\tlabel\n"x\t1\n' + "y\t0\n" * 1000)
    said = complaint(path)
    assert said.startswith(", line 2: a row of more than 1000 characters begins here")
    assert "is a double quote opened there and never closed?" in said


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": "x", "label": 0}\n{"text": "\xff", "label": 0}', ", line 2: is not UTF-8"),
        ("a.csv", b"text,label\nx,1\n\xff,1\n", ", line 3: is not UTF-8"),
        ("a.jsonl", gzip.compress(b'{"text": "x", "label": 0}', mtime=0)[:-9], ": is not a complete gzip file"),
        ("a.csv.gz", b"\x1f\x8b\x09\x00garbage", ": is not a complete gzip file"),
        ("a.parquet", b"PAR1 garbage PAR1", ": is not a readable parquet file"),
        ("a.parquet.gz", b"", ": .parquet files are packed inside"),
        ("a.npz", b"PK\3\4 garbage", ": is not a readable .npz file"),
        ("a.json", b"[]", ": '.json' is not a format of rows"),
        ("a", b"", ": '' is not a format of rows"),
    ],
)
def test_a_damaged_file_or_another_format_is_named(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert complaint(tmp_path / name).startswith(said)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.npz"])
def test_a_file_that_is_not_there_is_named(name: str, tmp_path: Path) -> None:
    assert complaint(tmp_path / name).startswith(": cannot read the file")


@pytest.mark.parametrize("packed", [False, True])
def test_a_line_without_an_end_is_not_read_into_memory(
    packed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_rows(monkeypatch)
    path = tmp_path / "a.jsonl"
    content = b'{"text": "x", "label": 0}\n' + b"\0" * 5000
    path.write_bytes(gzip.compress(content) if packed else content)
    assert complaint(path).startswith(", line 2: is a row of more than 1000 characters")


def test_a_key_that_a_json_object_has_twice_is_refused_and_not_chosen_from(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x", "label": 0}\n{"text": "y", "label": 1, "text": "z"}')
    assert ", row 2: is not JSON: has the key 'text' twice" in complaint(path)


def test_names_in_a_refusal_are_quoted_so_that_no_character_is_unseen_or_does_harm(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(r'{"text ": 0, "\ud800": 1, "\u001b[31m": 2}')
    said = complaint(path)
    assert r"it has '\x1b[31m', 'text ', '\ud800'" in said
    assert "did you mean 'text '?" in said
    said.encode()


@pytest.mark.parametrize("rows", [1, 5])
def test_a_file_that_is_written_while_it_is_read_is_refused(
    rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_files, "ROWS_BETWEEN_LOOKS", 3)
    path = written(tmp_path / "a.jsonl", *[{"text": "x", "label": 0}] * rows)
    reading = read_file(path, TEXT)
    next(reading)
    with open(path, "a") as file:
        file.write('\n{"text": "x", "label": 0}' * (1 if rows == 1 else 10**4))
    taken: list[Any] = []
    with pytest.raises(InvalidInput, match="was written while it was read"):
        taken.extend(reading)
    assert len(taken) < 4  # one that grows faster than it is read is not followed for ever


# --- what costs too much ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n", b" \n"])
def test_empty_lines_are_passed_over_and_not_without_end(end: bytes, tmp_path: Path) -> None:
    row = b'{"text": "x", "label": 0}'
    (tmp_path / "a.jsonl").write_bytes(end * 9000 + (row + end + end) * 3)
    assert len(values(tmp_path / "a.jsonl")) == 3
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(end * 10_000_000))  # 10 kB
    began = time.process_time()
    assert ": 10001 of its first 10001 lines are empty" in complaint(tmp_path / "b.jsonl.gz")
    assert time.process_time() - began < 1


def test_a_packed_file_that_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "UNPACKED_BYTES_FREE", 10**5)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress((json.dumps({"text": "x" * 10_000, "label": 0}) + "\n").encode() * 1000))
    limit = 10**5 + 200 * path.stat().st_size
    assert f": unpacks to more than {limit} bytes, which is 100000 and 200 times its size" in complaint(path)
    plain = tmp_path / "a.jsonl"
    plain.write_bytes(gzip.decompress(path.read_bytes()))
    assert len(values(plain)) == 1000


def test_more_rows_than_a_file_of_its_size_can_have_are_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columns, "ROWS_FREE", 1000)
    monkeypatch.setattr(row_files, "ROWS_BETWEEN_LOOKS", 100)
    same = pa.DictionaryArray.from_arrays(pa.array(np.zeros(10**6, np.int32)), ["x"])
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": same, "label": same}), path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 20_000
    assert f": has more than {1000 + path.stat().st_size} rows in {path.stat().st_size} bytes" in complaint(path)
    packed = tmp_path / "b.csv.gz"
    packed.write_bytes(gzip.compress(b"text,label\n" + b"x,0\n" * 10**5))
    assert ": has more than " in complaint(packed)
    packed.write_bytes(gzip.compress(b"text,label\n" + b"x,0\n" * 1000))
    assert len(values(packed)) == 1000


def test_a_page_of_parquet_is_not_unpacked_to_gigabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "UNPACKED_BYTES_FREE", 10**6)
    path = tmp_path / "a.parquet"
    table = pa.table({"text": ["x" * 10**6] * 50, "label": [0] * 50})
    pq.write_table(table, path, compression="zstd", use_dictionary=False, data_page_size=2**30)
    before = pa.total_allocated_bytes()
    assert ": unpacks to more than" in complaint(path)
    assert pa.total_allocated_bytes() - before < 10**6


def test_a_damaged_page_of_parquet_is_told_as_damage_and_not_as_a_wrong_path(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [f"some text {n}" for n in range(500)], "label": [0] * 500})
    pq.write_table(table, path, compression="snappy", use_dictionary=False)
    whole, column = bytearray(path.read_bytes()), pq.ParquetFile(path).metadata.row_group(0).column(0)
    end = column.data_page_offset + column.total_compressed_size
    for place in range(end - 400, end):  # behind the page's head: it is pyarrow's own OSError that tells
        whole[place] ^= 0x5A
    path.write_bytes(whole)
    with pytest.raises(OSError, match="Corrupt snappy"):
        pq.read_table(path)
    said = complaint(path)
    assert "is not a readable parquet file" in said
    assert "check the path" not in said


@pytest.mark.parametrize("codec", ["zstd", "lz4"])
@pytest.mark.parametrize("form", ["string", "dictionary"])
def test_packed_batches_in_a_folder_are_refused_before_they_are_unpacked(codec: str, form: str, tmp_path: Path) -> None:
    texts = pa.array(["x" * 10**6] * 50).cast(FORMS[form])
    batch = pa.record_batch({"text": texts, "label": [0] * 50})
    path = as_folder(tmp_path / "saved", batch)
    assert len(values(path)) == 50
    with pa.OSFile(str(path / "x.arrow"), "wb") as file:
        options = pa.ipc.IpcWriteOptions(compression=codec)
        with pa.ipc.new_stream(file, batch.schema, options=options) as out:
            out.write_batch(batch)
    before = pa.total_allocated_bytes()
    assert "/x.arrow: holds packed batches" in complaint(path)
    assert pa.total_allocated_bytes() - before < 10**6


def test_a_hundred_thousand_columns_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(",".join(f"c{number}" for number in range(100_000)))
    assert "has 100000 columns, more than 10000" in complaint(path)
    lines = tmp_path / "a.jsonl"
    lines.write_text(json.dumps({f"text{number}": 1 for number in range(100_000)}))
    assert "has no column 'text'; it has 'text0', 'text1'" in complaint(lines)
    keys = ",".join(f'"k{number}": 1' for number in range(100_000))
    lines.write_text(f'{{{keys}, "k99999": 1, "text": "a", "label": 0}}')
    assert "has the key 'k99999' twice" in complaint(lines)


@pytest.mark.parametrize("depth", [900, 5000])
def test_lists_in_lists_are_refused_wherever_they_stand(depth: int, tmp_path: Path) -> None:
    nested = "[" * depth + "1" + "]" * depth
    lines = {
        "sequence_classification": f'{{"text": "a", "label": {nested}}}',
        "image_classification": f'{{"image": {nested}, "label": 0}}',
        "sequence_regression": f'{{"text": {nested}, "label": 0}}',
    }
    for kind, line in lines.items():
        (tmp_path / "a.jsonl").write_text(line)
        with pytest.raises(InvalidInput, match=r"a\.jsonl, row 1"):
            list(rows_in(tmp_path / "a.jsonl", spec_of(kind)))  # type: ignore[arg-type]


def test_arrays_packed_as_numpy_does_not_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_LZMA) as archive:
        for name in ("image", "label"):
            file = io.BytesIO()
            np.save(file, np.zeros((3, 2, 2), np.uint8))
            archive.writestr(f"{name}.npy", file.getvalue())
    assert ", array 'image': is packed as numpy packs nothing" in complaint(tmp_path / "a.npz", ARRAYS)


# --- columns -----------------------------------------------------------------------------------------------------


def test_other_columns_of_parquet_are_left_alone_and_missing_ones_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x"], "label": [0], "embedding": [[0.5] * 9], "__index__": [7]}), path)
    assert values(path) == [{"text": "x", "label": 0}]
    assert "has no column 'label_1'; it has '__index__', 'embedding', 'label', 'text'" in complaint(
        path, TEXT | {"label_column": "label_1"}
    )


def test_messages_come_out_of_parquet_as_a_list(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    pq.write_table(pa.table({"messages": [messages, messages], "id": [1, 2]}), path)
    assert values(path, {"messages_column": "messages"}) == [{"messages": messages}] * 2


def columnar(folder: Path, name: str, table: pa.Table) -> Path:
    """The table as a parquet file or as a folder of batches of 3 rows."""
    if name == "folder":
        return as_folder(folder / "saved", *table.to_batches(max_chunksize=3))
    pq.write_table(table, folder / "a.parquet")
    return folder / "a.parquet"


FORMS = {
    "string": pa.string(),
    "large_string": pa.large_string(),
    "string_view": pa.string_view(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
}


@pytest.mark.parametrize("name", ["folder", "parquet"])
@pytest.mark.parametrize("form", FORMS)
def test_a_value_that_is_too_large_is_named_by_its_row_and_the_others_are_not(
    form: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_rows(monkeypatch)
    texts = [f"{number}" * 300 for number in range(9)]  # together above the limit, in the dictionary as well
    good = columnar(tmp_path, name, pa.table({"text": pa.array(texts).cast(FORMS[form]), "label": [0] * 9}))
    assert [row["text"] for row in values(good)] == texts
    (tmp_path / "bad").mkdir()
    texts[4] = "x" * 1001
    bad = columnar(tmp_path / "bad", name, pa.table({"text": pa.array(texts).cast(FORMS[form]), "label": [0] * 9}))
    assert complaint(bad).startswith(", row 5: is a row of more than 1000 bytes")


@pytest.mark.parametrize("name", ["folder", "parquet"])
def test_messages_that_are_too_large_together_are_named_by_their_row(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_rows(monkeypatch)
    messages = [[{"role": "user", "content": "x" * size}] * count for size, count in [(9, 2), (300, 3), (300, 4)]]
    path = columnar(tmp_path, name, pa.table({"messages": messages}))
    assert complaint(path, {"messages_column": "messages"}).startswith(", row 3: is a row of more than 1000 bytes")


def test_a_few_hundred_bytes_of_parquet_do_not_become_gigabytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columnar_files, "ARROW_BYTES", 10 * 2**20)
    # All 60 rows name the one value of the column's dictionary, of a megabyte.
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 60, pa.int32()), ["x" * 2**20])
    path = tmp_path / "bomb.parquet"
    pq.write_table(pa.table({"text": text, "label": [0] * 60}), path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 2000
    before, most, lengths = pa.total_allocated_bytes(), 0, []
    for _, row in read_file(path, TEXT):
        lengths.append(len(row["text"]))
        most = max(most, pa.total_allocated_bytes() - before)
    assert lengths == [2**20] * 60
    assert most < 25 * 2**20


def test_a_large_row_group_is_not_read_whole(tmp_path: Path) -> None:
    texts = [f"{number} " * 1000 for number in range(10_000, 16_000)]
    path = tmp_path / "large.parquet"
    pq.write_table(pa.table({"text": texts, "label": [0] * 6000}), path, compression="none", use_dictionary=False)
    assert path.stat().st_size > 36e6
    before, most = pa.total_allocated_bytes(), 0
    for _ in read_file(path, TEXT):
        most = max(most, pa.total_allocated_bytes() - before)
    assert most < 10e6


@pytest.mark.parametrize("name", ["folder", "parquet"])
def test_a_value_that_is_no_text_is_refused(name: str, tmp_path: Path) -> None:
    buffers = [None, pa.py_buffer(np.array([0, 1, 2, 3], np.int32)), pa.py_buffer(b"ab\xff")]
    column = pa.Array.from_buffers(pa.string(), 3, buffers)
    said = complaint(columnar(tmp_path, name, pa.table({"text": column, "label": [0, 0, 0]})))
    assert ", row 3: has a value that cannot be read" in said or ", rows 1 to 3 of the folder: is not" in said


DATES = {
    "before the first": pa.array([0, 1, -(2**62)], pa.timestamp("ms")),
    "of no time zone": pa.array([0, 1, 2], pa.timestamp("us", "Not/AZone")),
    "in days": pa.array([0, 1, 2**31 - 1], pa.date32()),
    "a duration": pa.array([0, 1, 2**62], pa.duration("s")),
    "in nanoseconds": pa.array([0, 1, -(2**62)], pa.timestamp("ns")),
}


@pytest.mark.parametrize("name", ["folder", "parquet"])
@pytest.mark.parametrize("date", DATES)
def test_dates_are_no_text_and_no_label_and_inside_messages_do_no_harm(date: str, name: str, tmp_path: Path) -> None:
    for column in ("text", "label"):
        (tmp_path / column).mkdir()
        table = pa.table({"text": ["a", "b", "c"], "label": [0, 0, 0]} | {column: DATES[date]})
        assert f": column '{column}' is of type " in complaint(columnar(tmp_path / column, name, table))
    fields = [pa.array(["user"] * 3), pa.array(["x"] * 3), DATES[date]]
    messages = pa.ListArray.from_arrays([0, 1, 2, 3], pa.StructArray.from_arrays(fields, ["role", "content", "at"]))
    path = columnar(tmp_path, name, pa.table({"messages": messages}))
    chats = {"messages_column": "messages"}
    if date == "in nanoseconds":
        assert len(values(path, chats)) == 3
    else:
        assert "has a value that cannot be read" in complaint(path, chats)


@pytest.mark.parametrize("name", ["folder", "parquet"])
def test_decimals_as_databases_export_them_are_numbers(name: str, tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b"], "label": pa.array([Decimal("1.50"), Decimal("-2.25")])})
    rows = list(rows_in(columnar(tmp_path, name, table), spec_of("sequence_regression")))
    assert rows == [TextRow("a", None, 1.5), TextRow("b", None, -2.25)]


@pytest.mark.parametrize("name", ["folder", "parquet"])
def test_a_column_that_is_there_twice_is_refused(name: str, tmp_path: Path) -> None:
    table = pa.table([pa.array(["a"]), pa.array(["b"]), pa.array([1])], names=["text", "text", "label"])
    assert ": has the column 'text' twice" in complaint(columnar(tmp_path, name, table))


def test_a_folder_whose_file_is_cut_short_or_says_it_is_endless_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = pa.record_batch({"text": ["x" * 1000] * 3, "label": [0] * 3})
    path = as_folder(tmp_path / "saved", batch, batch)
    whole = (path / "x.arrow").read_bytes()
    reading = read_file(path, TEXT)
    next(reading)
    (path / "x.arrow").write_bytes(whole[: len(whole) // 2])  # mapped, reading on would end the process
    with pytest.raises(InvalidInput, match="saved"):
        list(reading)
    (path / "x.arrow").write_bytes(whole)
    monkeypatch.setattr(columnar_files, "MESSAGE_BYTES_MAX", 2000)
    assert "a record batch of" in complaint(path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders and files that `datasets` itself wrote."""
    import datasets

    folder = tmp_path_factory.mktemp("saved")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["yes", "no"])})
    text = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, 1]}, features=features)
    text.save_to_disk(folder / "text", num_shards=2)
    text.select([2, 0]).save_to_disk(folder / "chosen")
    text.to_parquet(folder / "text.parquet")
    datasets.DatasetDict({"train": text, "test": text}).save_to_disk(folder / "splits")
    picture = Image.fromarray(np.full((2, 3, 3), 7, np.uint8))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["no", "yes"])})
    images = datasets.Dataset.from_dict({"image": [picture], "label": [1]}, features=features)
    images.save_to_disk(folder / "images")
    return folder


def test_a_class_label_counts_by_its_name_whatever_the_order_of_the_labels(saved: Path) -> None:
    rows = [TextRow("a", None, 1), TextRow("b", None, 0), TextRow("c", None, 0)]
    for name in ("text", "text.parquet", "splits/train"):
        assert list(rows_in(saved / name, spec_of(label_names=("no", "yes")))) == rows
    assert list(rows_in(saved / "chosen", spec_of(label_names=("no", "yes")))) == [rows[2], rows[0]]


def test_a_class_label_that_the_task_does_not_list_is_refused(saved: Path) -> None:
    with pytest.raises(InvalidInput, match=r"row 1: label 'yes' is not one of the 2 labels"):
        list(rows_in(saved / "text", spec_of(label_names=("no", "maybe"))))


def test_rows_of_a_folder_are_counted_through_its_files(saved: Path) -> None:
    assert [where for where, _ in read_file(saved / "text", TEXT)] == [f"{saved / 'text'}, row {n}" for n in (1, 2, 3)]


def test_pictures_of_datasets_are_read(saved: Path) -> None:
    (row,) = rows_in(saved / "images", spec_of("image_classification"))
    assert isinstance(row, ImageRow)
    assert (row.image.tolist(), row.label) == (np.full((2, 3, 3), 7).tolist(), 1)


def test_a_folder_of_several_splits_is_answered_with_their_names(saved: Path) -> None:
    assert ": has several splits: 'train', 'test'\n  → name one of them" in complaint(saved / "splits")


def test_a_folder_that_datasets_did_not_write_is_refused(tmp_path: Path) -> None:
    assert complaint(tmp_path).startswith(": is a folder, but not one of datasets' save_to_disk")


@pytest.mark.parametrize("name", ["../secret.arrow", "/etc/passwd", "..", ""])
def test_a_folder_may_not_name_files_outside_itself(name: str, tmp_path: Path) -> None:
    written(tmp_path / "state.json", {"_data_files": [{"filename": name}]})
    assert complaint(tmp_path).startswith(f"/state.json: names a file outside itself: '{name}'")


def test_a_damaged_file_in_a_folder_is_refused_and_crashes_nothing(saved: Path, tmp_path: Path) -> None:
    (source,) = (saved / "chosen").glob("*.arrow")
    written(tmp_path / "state.json", {"_data_files": [{"filename": "x.arrow"}]})
    whole = source.read_bytes()
    outcomes = set()
    for at in range(0, len(whole), 5):
        (tmp_path / "x.arrow").write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            values(tmp_path)
            outcomes.add("read")  # a letter of a text, a number
        except InvalidInput:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


# --- arrays ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_read_along_their_first_axis(
    save: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(array_files, "ARRAY_BYTES", 20)  # three pictures at once
    images = np.arange(10 * 6, dtype=np.uint8).reshape(10, 2, 3)
    save(tmp_path / "a.npz", image=images, label=np.arange(10), other=np.array([{}], dtype=object))
    rows = values(tmp_path / "a.npz", ARRAYS)
    assert [row["label"] for row in rows] == list(range(10))
    assert {type(row["label"]) for row in rows} == {int}
    assert np.array_equal([row["image"] for row in rows], images)


def test_labels_of_arrays_may_be_names_and_pictures_may_be_encoded(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("L", (3, 2), 9).save(file, "PNG")
    np.savez(tmp_path / "a.npz", image=np.array([file.getvalue()]), label=np.array(["yes"]))
    (row,) = rows_in(tmp_path / "a.npz", spec_of("image_classification"))
    assert isinstance(row, ImageRow)
    assert (row.image[..., 0].tolist(), row.label) == ([[9] * 3] * 2, 1)


IMAGES = np.zeros((3, 2, 2), np.uint8)
LABELS = np.zeros(3, int)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x": IMAGES, "label": LABELS}, ": has no column 'image'; it has 'label', 'x'"),
        ({"image": IMAGES, "label": LABELS[:2]}, ": 'label' has 2 rows, 'image' 3"),
        ({"image": np.asfortranarray(IMAGES), "label": LABELS}, ", array 'image': has shape (3, 2, 2) in Fortran's"),
        ({"image": IMAGES, "label": np.zeros(())}, ", array 'label': has shape ()"),
        ({"image": np.zeros((3, 0), np.uint8), "label": LABELS}, ", array 'image': has rows of 0 bytes"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(arrays: dict[str, Any], said: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    assert complaint(tmp_path / "a.npz", ARRAYS).startswith(said)


class Exploding:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("a pickle was read",)


def test_pickled_arrays_are_refused_and_never_read(tmp_path: Path) -> None:
    pickled = np.array([Exploding(), Exploding(), Exploding()], dtype=object)
    np.savez(tmp_path / "a.npz", image=pickled, label=LABELS)
    assert "array 'image': holds Python objects, which are pickled" in complaint(tmp_path / "a.npz", ARRAYS)


@pytest.mark.parametrize("shape", [(2**40, 2, 2), (3, 2**31, 2**31), (3, 2**26 + 1)])
def test_an_array_that_claims_more_rows_than_it_has_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    labels = io.BytesIO()
    np.lib.format.write_array_header_1_0(labels, {"descr": "|u1", "fortran_order": False, "shape": shape[:1]})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("image.npy", file.getvalue() + b"\0" * 12)
        archive.writestr("label.npy", labels.getvalue() + b"\0" * 3)
    said = complaint(tmp_path / "a.npz", ARRAYS)
    assert "ends before row" in said or "has rows of" in said


def test_json_lines_deeper_than_python_goes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("[" * 100_000)
    assert ", row 1: is not JSON" in complaint(path)
    assert json.loads("[[]]") == [[]]


# --- parquet files that are huge in one way or another -------------------------------------------------------------


def test_a_parquet_file_of_too_many_row_groups_is_refused_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columnar_files, "FOOTER_BYTES_MAX", 20_000)
    table = pa.table({"text": ["a", "b"] * 200, "label": [0, 1] * 200})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=400)
    assert len(list(read_file(tmp_path / "x.parquet", TEXT))) == 400
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=1)
    assert "bytes that describe its row groups and columns, more than the 20,000" in complaint(tmp_path / "x.parquet")


def test_a_huge_parquet_file_with_columns_that_nobody_asked_for_is_read_in_little_memory(tmp_path: Path) -> None:
    program = """
import sys, pyarrow as pa
from pathlib import Path
from workers.rows.row_files import read_file
count = sum(1 for _ in read_file(Path(sys.argv[1]), {"text_column": "text", "label_column": "label"}))
print(count, pa.default_memory_pool().max_memory())
"""
    text = ["x" * 1_000] * 60_000  # 60 MB in one row group
    table = pa.table({"text": text, "label": [0, 1] * 30_000, "picture": [b"y" * 1_000] * 60_000})
    path = tmp_path / "x.parquet"
    pq.write_table(table, path, row_group_size=60_000, use_dictionary=False, compression="none")
    assert path.stat().st_size > 120_000_000
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    count, peak = map(int, done.stdout.split())
    assert count == 60_000
    assert peak < 16_000_000


@pytest.mark.parametrize("name", ["rows.arrow", "rows.feather"])
def test_files_of_arrow_are_refused_with_how_to_convert_them(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"ARROW1")
    assert "to_parquet('rows.parquet')" in complaint(tmp_path / name)


def test_the_name_of_a_data_set_on_a_hub_is_no_file(tmp_path: Path) -> None:
    said = complaint(tmp_path / "imdb")
    assert "there is none of this name" in said
    assert "never a URL or a data set's name on a hub" in said
