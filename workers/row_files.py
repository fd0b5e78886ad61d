"""Files of examples in the formats that people have them: every row as plain values, one after another.

What the values mean is task_data.py's matter. Nothing here holds a file in memory, runs code that a file brings (no
pickles, no dataset scripts) or asks the network.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import gzip
import itertools
import json
import lzma
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import IO, Any, cast

from configs.errors import InvalidInput

GZIP_MAGIC = b"\x1f\x8b"
LINE_BYTES_MAX = 64 * 2**20
"""Longest line: a file without line ends, or packed zeros, would be read into memory whole."""
FIELD_CHARACTERS_MAX = 2**24
"""Longest field of a .csv: a quote that is never closed takes in all that follows. Python's own limit is 2**17."""
BATCH_ROWS = 256
"""Rows of a columnar file that become Python values at once."""
BATCH_BYTES = 2**20
UNZIPPABLE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError, ValueError)
"""What zipfile raises on damaged or locked archives."""

Values = Mapping[str, Any]
Columns = Mapping[str, str]
"""Key of the task file's section `data` to the column that it names."""


def read_file(path: Path, columns: Columns) -> Iterator[tuple[str, Values]]:
    """Read a file, or a folder of `datasets`, row by row.

    Args:
        path: .jsonl, .csv or .tsv, each also .gz; .parquet; .npz; or a folder written by `Dataset.save_to_disk`.
        columns: What the rows must have. Other columns may be there, and may be left out of the values.

    Returns:
        (file and row, counted from 1; the row's values), in the order of the file.

    Raises:
        InvalidInput: The file cannot be read, is of another format or damaged, or has no such column.
    """
    read = _reader(path)
    try:
        yield from read(path, columns)
    except OSError as error:
        raise InvalidInput(f"cannot read the file: {error}", str(path), "check the path in data") from error


def read_json_lines(lines: Iterable[tuple[int, str]], path: str, columns: Columns) -> Iterator[tuple[str, Values]]:
    """Rows of numbered lines; blank ones are passed over. Raises InvalidInput."""
    for number, line in lines:
        if not line.strip():
            continue
        where = f"{path}, row {number}"
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidInput(f"is not JSON: {error}", where, "write one JSON object per line") from error
        if not isinstance(values, dict):
            raise InvalidInput(f"must be a JSON object, not {type(values).__name__}", where)
        _check_columns(columns, values, where)
        yield where, values


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
        line = file.readline(LINE_BYTES_MAX + 1)
        if not line:
            return
        where = f"{path}, row {number}"
        if len(line) > LINE_BYTES_MAX:
            raise InvalidInput(f"is a line of more than {LINE_BYTES_MAX} bytes", where, "write one row per line")
        try:
            # Spreadsheets put a byte order mark before the first line.
            yield number, (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).decode()
        except UnicodeDecodeError as error:
            raise InvalidInput(f"is not UTF-8: {error}", where, "save the file as UTF-8") from error


def _reader(path: Path) -> Callable[[Path, Columns], Iterator[tuple[str, Values]]]:
    if path.is_dir():
        return _read_folder
    readers = {
        ".jsonl": _read_jsonl,
        ".csv": _read_csv,
        ".tsv": _read_tsv,
        ".parquet": _read_parquet,
        ".npz": _read_npz,
    }
    name = path.name.lower()
    suffix = PurePath(name.removesuffix(".gz")).suffix
    if suffix not in readers:
        raise InvalidInput(
            f"'{suffix}' is not a format of rows",
            str(path),
            f"give {', '.join(readers)} or a folder of datasets' save_to_disk; JSON lines are to be named .jsonl",
        )
    if name.endswith(".gz") and suffix in (".parquet", ".npz"):
        raise InvalidInput(f"{suffix} files are packed inside and not read from .gz", str(path), "unpack it")
    return readers[suffix]


def _check_columns(columns: Columns, names: Collection[str], where: str) -> None:
    for key, column in columns.items():
        if column not in names:
            there = sorted(map(str, names))
            shown = ", ".join(there[:20]) + (", …" if len(there) > 20 else "")
            near = difflib.get_close_matches(column, there, 1)
            raise InvalidInput(
                f"has no column '{column}'; it has {shown}",
                where,
                f"data.{key} names the column" + (f"; did you mean '{near[0]}'?" if near else ""),
            )


# Text


def _read_jsonl(path: Path, columns: Columns) -> Iterator[tuple[str, Values]]:
    with open(path, "rb") as file:
        yield from read_json_lines(numbered_lines(file, str(path)), str(path), columns)


def _read_csv(path: Path, columns: Columns) -> Iterator[tuple[str, Values]]:
    return _read_separated(path, columns, ",")


def _read_tsv(path: Path, columns: Columns) -> Iterator[tuple[str, Values]]:
    return _read_separated(path, columns, "\t")


def _read_separated(path: Path, columns: Columns, delimiter: str) -> Iterator[tuple[str, Values]]:
    csv.field_size_limit(FIELD_CHARACTERS_MAX)
    with open(path, "rb") as file:
        lines = (line for _, line in numbered_lines(file, str(path)))
        # Strict: a quote that is not closed, or text after one, would else join rows without a word.
        cells = _CountedLines(csv.reader(lines, delimiter=delimiter, strict=True), str(path))
        _, header = next(cells, (0, []))
        if not header:
            return
        if len(set(header)) != len(header):
            twice = next(name for name in header if header.count(name) > 1)
            raise InvalidInput(f"has the column '{twice}' twice", f"{path}, line 1", "name each column once")
        _check_columns(columns, header, f"{path}, line 1 (the names of the columns)")
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


# Columns


def _read_parquet(path: Path, columns: Columns) -> Iterator[tuple[str, Values]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, pre_buffer=False) as file:
            _check_columns(columns, file.schema_arrow.names, str(path))
            batches = file.iter_batches(BATCH_ROWS, columns=list(columns.values()))
            yield from _rows(batches, file.schema_arrow, str(path))
    except (pa.ArrowException, ValueError) as error:  # names and texts that are no UTF-8
        raise InvalidInput(f"is not a readable parquet file: {error}", str(path), "write it again") from error


def _read_folder(path: Path, columns: Columns) -> Iterator[tuple[str, Values]]:
    """What `Dataset.save_to_disk` wrote, without `datasets`: importing it takes a second, and it follows paths."""
    import pyarrow as pa

    names = _files_of(path)
    schemas = []
    first = 0
    for name in names:
        try:
            with pa.memory_map(str(path / name)) as file, pa.ipc.open_stream(file) as stream:
                schemas.append(stream.schema)
                _check_columns(columns, stream.schema.names, str(path))
                for batch in stream:
                    batch.validate(full=True)  # in memory that is mapped, wrong lengths would lead out of the file
                    yield from _rows([batch.select(list(columns.values()))], stream.schema, str(path), first)
                    first += batch.num_rows
        except (pa.ArrowException, ValueError) as error:
            raise InvalidInput(f"is not a readable Arrow file: {error}", str(path / name), "save it again") from error


def _files_of(folder: Path) -> list[str]:
    if (splits := folder / "dataset_dict.json").is_file():
        try:
            known = ", ".join(map(str, json.loads(splits.read_text())["splits"]))
        except (ValueError, KeyError, TypeError):
            known = "?"
        raise InvalidInput(f"has several splits: {known}", str(folder), "name one of them: FOLDER/SPLIT")
    try:
        state = json.loads((folder / "state.json").read_text())
        names = [str(file["filename"]) for file in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInput(
            f"is a folder, but not one of datasets' save_to_disk ({error})", str(folder), "name a file"
        ) from error
    for name in names:
        if name in ("", ".", "..") or PurePath(name).name != name:
            raise InvalidInput(f"names a file outside itself: {name!r}", str(folder / "state.json"))
    return names


def _rows(batches: Iterable[Any], schema: Any, path: str, first: int = 0) -> Iterator[tuple[str, Values]]:
    classes = _class_names(schema)
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH_ROWS):
            for values in batch.slice(start, BATCH_ROWS).to_pylist():
                first += 1
                for column, names in classes.items():
                    value = values.get(column)
                    if isinstance(value, int) and 0 <= value < len(names):
                        values[column] = names[value]
                yield f"{path}, row {first}", values


def _class_names(schema: Any) -> dict[str, list[str]]:
    """Columns that `datasets` knows as ClassLabel, with their names: a name means the same in any order of labels."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {
            column: [str(name) for name in feature["names"]]
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (KeyError, ValueError, TypeError):
        return {}


# Arrays


def _read_npz(path: Path, columns: Columns) -> Iterator[tuple[str, Values]]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
            _check_columns(columns, names, str(path))
            arrays = [_Array(archive, column, str(path)) for column in columns.values()]
            for array in arrays[1:]:
                if array.length != arrays[0].length:
                    raise InvalidInput(
                        f"'{array.name}' has {array.length} rows, '{arrays[0].name}' {arrays[0].length}", str(path)
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
        if not 0 < row_bytes <= LINE_BYTES_MAX * 8:
            raise InvalidInput(f"has rows of {row_bytes} bytes (shape {self.shape})", self.where)
        rows_at_once = max(1, BATCH_BYTES // row_bytes)
        for start in range(0, self.length, rows_at_once):
            count = min(rows_at_once, self.length - start)
            content = self.file.read(count * row_bytes)
            if len(content) < count * row_bytes:
                raise InvalidInput(f"ends before row {self.length}", self.where, "write the file again")
            rows = np.frombuffer(content, self.dtype).reshape(count, *self.shape[1:])
            yield from rows.tolist() if rows.ndim == 1 else rows
