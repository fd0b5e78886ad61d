"""Tables as other programs write them are read, or refused with the cause that a person can mend."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from configs.errors import InvalidInput
from tests.workers.data_builders import spec_of
from workers.rows.task_data import TextRow, rows_in

SPEC = spec_of(label_names=("bad", "good"))
PLAIN = "text,label\nso dull,bad\na joy; truly,good\n"
ROWS = [TextRow("so dull", None, 0), TextRow("a joy; truly", None, 1)]

READ: dict[str, bytes] = {
    "line feeds": PLAIN.encode(),
    "no end of the last line": PLAIN.rstrip().encode(),
    "Windows": PLAIN.replace("\n", "\r\n").encode(),
    "an old Macintosh": PLAIN.replace("\n", "\r").encode(),
    "all line ends": b"text,label\rso dull,bad\r\na joy; truly,good\n",
    "a byte order mark": b"\xef\xbb\xbf" + PLAIN.encode(),
    "UTF-16, little end first": b"\xff\xfe" + PLAIN.replace("\n", "\r\n").encode("utf-16-le"),
    "UTF-16, big end first": b"\xfe\xff" + PLAIN.encode("utf-16-be"),
    "Excel's Unicode text": b"\xff\xfe" + PLAIN.replace(",", "\t").encode("utf-16-le"),
    "semicolons": b'\xef\xbb\xbftext;label\r\nso dull;bad\r\n"a joy; truly";good\r\n',
    "tabs": PLAIN.replace(",", "\t").encode(),
    "bars": PLAIN.replace(",", "|").encode(),
    "Excel's note on the separator": b'sep=;\r\ntext;label\r\nso dull;bad\r\n"a joy; truly";good\r\n',
    "spaces behind the commas": b"text, label\nso dull, bad\na joy; truly, good\n",
    "spaces, and quotes behind them": b'"label", "text"\n"bad", "so dull"\n"good", "a joy; truly"\n',
    "spaces around names and labels": b"text ,label \nso dull,bad \na joy; truly,good \n",
    "everything quoted": b'"text","label"\n"so dull","bad"\n"a joy; truly","good"\n',
    "other columns": b"id,label,,text,id\n1,bad,x,so dull,1\n2,good,y,a joy; truly,2\n",
    "an index of pandas": b",text,label\n0,so dull,bad\n1,a joy; truly,good\n",
    "a separator at every end": b"text,label,\nso dull,bad,\na joy; truly,good,\n",
    "blank lines": b"\n\ntext,label\n\nso dull,bad\n   \na joy; truly,good\n\n\n",
    "numbers with a point": b"text,label\nso dull,0.0\na joy; truly,1.0\n",
    "packed": gzip.compress(PLAIN.replace("\n", "\r").encode()),
}


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_a_table_is_read_whatever_program_wrote_it(name: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(READ[name])
    assert list(rows_in(path, SPEC)) == ROWS


def test_line_ends_inside_quotes_are_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'text,label\r"one\rtwo",bad\r"three\r\n\nfour",good\r')
    assert [row.text for row in rows_in(tmp_path / "a.csv", SPEC) if isinstance(row, TextRow)] == [
        "one\rtwo",
        "three\r\n\nfour",
    ]


def test_json_lines_of_an_old_macintosh_or_in_utf_16_are_read(tmp_path: Path) -> None:
    lines = '{"text": "so dull", "label": "bad"}\n{"text": "a joy; truly", "label": "good"}\n'
    for content in (lines.replace("\n", "\r").encode(), b"\xff\xfe" + lines.encode("utf-16-le")):
        (tmp_path / "a.jsonl").write_bytes(content)
        assert list(rows_in(tmp_path / "a.jsonl", SPEC)) == ROWS


REFUSED: dict[str, tuple[str, bytes, str]] = {
    "a gap": ("a.csv", b"text,label\nso dull,\na,good\n", ", row 1 (line 2): column 'label' has no label in it"),
    "no names": ("a.csv", b"so dull,bad\na,good\n", ", line 1 (the names of the columns): has no column 'text'"),
    "names parted otherwise": ("a.csv", b"txt;lbl\na;bad\n", "it has 'lbl', 'txt'"),
    "a name twice": ("a.csv", b"text;label;text\na;bad;b\n", "has the column 'text' twice"),
    "Latin-1": ("a.csv", b"text,label\ncaf\xe9,good\n", ", line 2: is not UTF-8: byte 0xe9 at character 4"),
    "UTF-16 without its mark": ("a.csv", PLAIN.encode("utf-16-le"), ", line 1: holds zero bytes: it is UTF-16 without"),
    "half of UTF-16": ("a.csv", b"\xff\xfe" + PLAIN.encode("utf-16-le") + b"\x00", ", at line 4 or soon after"),
    "UTF-32": ("a.csv", PLAIN.encode("utf-32"), ": is not what its name says: it is UTF-32"),
    "MySQL's gap": ("a.tsv", b"text\tlabel\na\t\\N\n", ", row 1 (line 2): column 'label' has no label in it (it says"),
    "a short row": ("a.csv", b"text,label\nso\ndull,bad\n", ", row 1 (line 2): has 1 fields, the first line 2"),
    "separators behind rows": ("a.csv", b"text,label\na,bad,\n", "it ends with a separator, which the first"),
    "JSON lines": ("a.csv", b'{"text": "a", "label": "bad"}\n', ": is not what its name says: it holds JSON"),
    "an array of JSON": ("a.jsonl", b'[\n{"text": "a", "label": 0},\n', ", row 1: is not JSON lines: a JSON array"),
    "commas between JSON lines": ("a.jsonl", b'{"text": "a", "label": 0},\n', ": is not JSON lines: a comma follows"),
    "JSON over several lines": ("a.jsonl", b'{\n"text": "a"}\n', ", row 1: is not JSON lines: its object goes over"),
    "CSV under another name": ("a.jsonl", PLAIN.encode(), "a table is to be named .csv or .tsv"),
    "a spreadsheet": ("a.csv", b"PK\3\4\x14\0\6\0", "it is a zip archive, as .xlsx spreadsheets are"),
    "an old spreadsheet": ("a.csv", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "it is an old spreadsheet (.xls)"),
    "parquet": ("a.jsonl", b"PAR1\x15\0", "it is a parquet file"),
    "packed parquet": ("a.csv.gz", gzip.compress(b"PAR1\x15\0"), "it is a parquet file"),
    "a web page": ("a.csv", b"<!DOCTYPE html>\n<html>", "it is a web page"),
    "a pointer": ("a.csv", b"version https://git-lfs.github.com/spec/v1\n", "it is a Git LFS pointer"),
    "another packer": ("a.csv", b"BZh91AY&SY", "it is packed by bzip2"),
    "text as parquet": ("a.parquet", PLAIN.encode(), ": is not what its name says: it is text"),
    "packed as parquet": ("a.parquet", gzip.compress(b"x"), ": is not what its name says: it is packed by gzip"),
    "parquet as arrays": ("a.npz", b"PAR1\x15\0", ": is not what its name says: it is a parquet file"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_table_that_cannot_be_read_is_refused_with_the_right_cause(name: str, tmp_path: Path) -> None:
    file, content, said = REFUSED[name]
    path = tmp_path / file
    path.write_bytes(content)
    kind = "image_classification" if file.endswith(".npz") else "sequence_classification"
    with pytest.raises(InvalidInput) as caught:
        list(rows_in(path, spec_of(kind, label_names=("bad", "good"))))
    assert said in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert caught.value.todo
