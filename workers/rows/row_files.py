"""Files of examples in the formats that people have them: every row as plain values, one after another.

What the values mean is task_data.py's matter. Nothing here holds a file in memory, runs code that a file brings (no
pickles, no dataset scripts) or asks the network.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import itertools
import json
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePath
from typing import IO, Any, cast

from configs.errors import InvalidInput
from configs.places import OpenFile, open_anywhere
from workers.rows.columnar_files import read_folder, read_parquet
from workers.rows.columns import ROW_BYTES_MAX, Columns, Values, check_columns, check_header, too_large

GZIP_MAGIC = b"\x1f\x8b"
FIELD_CHARACTERS_MAX = 2**24
"""Longest field of a .csv: a quote that is never closed takes in all that follows. Python's own limit is 2**17."""
ARRAY_BYTES = 2**20
"""Of an array that are read at once."""
ROWS_BETWEEN_LOOKS = 2**16
"""A file that is written faster than it is read would else be read for ever."""
UNZIPPABLE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError, ValueError)
"""What zipfile raises on damaged or locked archives."""


def read_file(path: Path, columns: Columns, open_file: OpenFile = open_anywhere) -> Iterator[tuple[str, Values]]:
    """Read a file, or a folder of `datasets`, row by row.

    Args:
        path: .jsonl, .csv or .tsv, each also .gz; .parquet; .npz; or a folder written by `Dataset.save_to_disk`.
        columns: What the rows must have. Other columns may be there, and may be left out of the values.
        open_file: Opens every file that is read.

    Returns:
        (file and row, counted from 1; the row's values), in the order of the file.

    Raises:
        InvalidInput: The file cannot be read, is of another format or damaged, has no such column or too large a row;
            or it was written while it was read.
    """
    try:
        seen = _state(path)
        rows = _reader(path)(path, columns, open_file)
        for row in rows:
            yield row
            yield from itertools.islice(rows, ROWS_BETWEEN_LOOKS - 1)
            _check_unchanged(path, seen)
    except OSError as error:
        raise InvalidInput(f"cannot read the file: {error}", str(path), "check the path in data") from error


def _state(path: Path) -> list[tuple[int, int]]:
    """What changes when a file, or one in the folder, is written."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [(facts.st_size, facts.st_mtime_ns) for facts in (file.stat() for file in files)]


def _check_unchanged(path: Path, seen: list[tuple[int, int]]) -> None:
    if _state(path) != seen:
        raise InvalidInput("was written while it was read", str(path), "submit it again when it is complete")


def read_json_lines(lines: Iterable[tuple[int, str]], path: str, columns: Columns) -> Iterator[tuple[str, Values]]:
    """Rows of numbered lines; blank ones are passed over. Raises InvalidInput."""
    for number, line in lines:
        if not line.strip():
            continue
        where = f"{path}, row {number}"
        try:
            values = _JSON.decode(line)
        except (ValueError, RecursionError) as error:
            raise InvalidInput(f"is not JSON: {error}", where, "write one JSON object per line") from error
        if not isinstance(values, dict):
            raise InvalidInput(
                f"must be a JSON object, not {type(values).__name__}", where, "write one JSON object per line"
            )
        check_columns(columns, values, where)
        yield where, values


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):  # of which Python takes the last without a word
        names = [name for name, _ in pairs]
        raise ValueError(f"has the key {next(name for name in names if names.count(name) > 1)!r:.100} twice")
    return values


_JSON = json.JSONDecoder(object_pairs_hook=_object)


def numbered_lines(file: IO[bytes], path: str) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file, gzipped or not, counted from 1. Raises InvalidInput."""
    packed = file.read(2) == GZIP_MAGIC
    file.seek(0)
    try:
        yield from _lines(cast(IO[bytes], gzip.GzipFile(fileobj=file)) if packed else file, path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InvalidInput(f"is not a complete gzip file: {error}", path, "pack it again") from error


def _lines(file: IO[bytes], path: str) -> Iterator[tuple[int, str]]:
    for number in itertools.count(1):
        line = file.readline(ROW_BYTES_MAX + 1)
        if not line:
            return
        where = f"{path}, line {number}"
        if len(line) > ROW_BYTES_MAX:
            raise too_large(where)
        try:
            # Spreadsheets put a byte order mark before the first line.
            yield number, (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).decode()
        except UnicodeDecodeError as error:
            raise InvalidInput(f"is not UTF-8: {error}", where, "save the file as UTF-8") from error


def _reader(path: Path) -> Callable[[Path, Columns, OpenFile], Iterator[tuple[str, Values]]]:
    if path.is_dir():
        return read_folder
    readers = {
        ".jsonl": _read_jsonl,
        ".csv": _read_csv,
        ".tsv": _read_tsv,
        ".parquet": read_parquet,
        ".npz": _read_npz,
    }
    name = path.name.lower()
    suffix = PurePath(name.removesuffix(".gz")).suffix
    if suffix not in readers:
        path.stat()  # of a link that leads nowhere the name is not what is wrong
        raise InvalidInput(
            f"'{suffix}' is not a format of rows",
            str(path),
            f"give {', '.join(readers)} or a folder of datasets' save_to_disk; JSON lines are to be named .jsonl",
        )
    if name.endswith(".gz") and suffix in (".parquet", ".npz"):
        raise InvalidInput(f"{suffix} files are packed inside and not read from .gz", str(path), "unpack it")
    return readers[suffix]


# Text


def _read_jsonl(path: Path, columns: Columns, open_file: OpenFile) -> Iterator[tuple[str, Values]]:
    with open_file(path) as file:
        yield from read_json_lines(numbered_lines(file, str(path)), str(path), columns)


def _read_csv(path: Path, columns: Columns, open_file: OpenFile) -> Iterator[tuple[str, Values]]:
    return _read_separated(path, columns, open_file, ",")


def _read_tsv(path: Path, columns: Columns, open_file: OpenFile) -> Iterator[tuple[str, Values]]:
    return _read_separated(path, columns, open_file, "\t")


def _read_separated(path: Path, columns: Columns, open_file: OpenFile, delimiter: str) -> Iterator[tuple[str, Values]]:
    csv.field_size_limit(FIELD_CHARACTERS_MAX)
    with open_file(path) as file:
        lines = (line for _, line in numbered_lines(file, str(path)))
        # Strict: a quote that is not closed, or text after one, would else join rows without a word.
        cells = _CountedLines(csv.reader(lines, delimiter=delimiter, strict=True), str(path))
        _, header = next(cells, (0, []))
        if not header:
            return
        check_header(columns, header, f"{path}, line 1 (the names of the columns)")
        for number, (line, row) in enumerate(cells, start=1):
            where = f"{path}, row {number} (line {line})"
            if len(row) != len(header):
                raise InvalidInput(
                    f"has {len(row)} fields, the first line {len(header)}",
                    where,
                    "put fields with a separator in them into double quotes",
                )
            yield where, dict(zip(header, row, strict=True))


class _CountedLines:
    """Rows of a csv reader that are not blank, each with the line on which it begins."""

    def __init__(self, reader: Any, path: str) -> None:
        self._reader, self._path = reader, path

    def __iter__(self) -> _CountedLines:
        return self

    def __next__(self) -> tuple[int, list[str]]:
        row: list[str] = []
        while not row:
            first = self._reader.line_num + 1
            try:
                row = next(self._reader)
            except csv.Error as error:
                raise InvalidInput(
                    f"is not readable from here on: {error}",
                    f"{self._path}, line {first}",
                    "put fields with quotes in them into double quotes and double theirs, or write JSON lines",
                ) from error
        return first, row


# Arrays


def _read_npz(path: Path, columns: Columns, open_file: OpenFile) -> Iterator[tuple[str, Values]]:
    try:
        with open_file(path) as file, zipfile.ZipFile(file) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
            check_header(columns, names, str(path))
            arrays = [_Array(archive, column, str(path)) for column in columns.values()]
            for array in arrays[1:]:
                if array.length != arrays[0].length:
                    raise InvalidInput(
                        f"'{array.name}' has {array.length} rows, '{arrays[0].name}' {arrays[0].length}",
                        str(path),
                        "give each row its picture and its label",
                    )
            for number, row in enumerate(zip(*arrays, strict=True), start=1):
                yield f"{path}, row {number}", dict(zip(columns.values(), row, strict=True))
    except UNZIPPABLE as error:
        raise InvalidInput(f"is not a readable .npz file: {error}", str(path), "write it with numpy.savez") from error


class _Array:
    """One array of an .npz file, read along its first axis. numpy.load would read it whole."""

    def __init__(self, archive: zipfile.ZipFile, name: str, path: str) -> None:
        from numpy.lib import format as npy

        self.name, self.where = name, f"{path}, array '{name}'"
        self.file = archive.open(f"{name}.npy")
        try:
            version = npy.read_magic(self.file)
            read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
            self.shape, is_fortran, self.dtype = read_header(self.file)
        except (ValueError, KeyError) as error:
            raise InvalidInput(f"is no plain array: {error}", self.where, "write it with numpy.savez") from error
        if self.dtype.hasobject:
            raise InvalidInput(
                "holds Python objects, which are pickled; pickles are never read",
                self.where,
                "save an array of numbers: pictures of one size as N×H×W×C uint8, or parquet for others",
            )
        if not self.shape or (is_fortran and len(self.shape) > 1):
            raise InvalidInput(
                f"has shape {self.shape}" + (" in Fortran's order" if is_fortran else ""),
                self.where,
                "the first axis counts the rows; numpy.ascontiguousarray puts it first in the file too",
            )
        self.length = int(self.shape[0])

    def __iter__(self) -> Iterator[Any]:
        import numpy as np

        row_bytes = self.dtype.itemsize
        for size in self.shape[1:]:
            row_bytes *= size
        if not 0 < row_bytes <= ROW_BYTES_MAX:
            raise InvalidInput(
                f"has rows of {row_bytes} bytes (shape {self.shape}); 1 to {ROW_BYTES_MAX} are read",
                self.where,
                "give smaller pictures, or encoded ones in parquet",
            )
        rows_at_once = max(1, ARRAY_BYTES // row_bytes)
        for start in range(0, self.length, rows_at_once):
            count = min(rows_at_once, self.length - start)
            content = self.file.read(count * row_bytes)
            if len(content) < count * row_bytes:
                raise InvalidInput(f"ends before row {self.length}", self.where, "write the file again")
            rows = np.frombuffer(content, self.dtype).reshape(count, *self.shape[1:])
            yield from rows.tolist() if rows.ndim == 1 else rows
