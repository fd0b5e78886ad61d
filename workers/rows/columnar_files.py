"""Rows of parquet files and of folders that `datasets` saved, a few at a time.

These formats state the size of what comes next, and a stranger's file may state anything: so nothing here assumes that
a row group, a record batch or a value is small. Files are read and not mapped: one that is cut short while it is read
is then an error, where a mapped one would end the process.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, BinaryIO

from configs.errors import InvalidInput
from configs.places import OpenFile
from workers.rows.columns import (
    ROW_BYTES_MAX,
    Columns,
    Unread,
    Values,
    check_count,
    check_header,
    check_unpacked,
    shown,
    too_large,
)
from workers.rows.text_lines import HEAD_BYTES, PARQUET_MAGIC, check_format

ROWS_AT_ONCE = 256
"""Rows that become Python values at once, if they are small."""
ARROW_BYTES = 4 * ROW_BYTES_MAX
"""Bytes of the rows of parquet that are decoded at once."""
PYTHON_BYTES = 2**20
"""Bytes of the rows that become Python values at once."""
READ_BYTES = 2**20
FOOTER_BYTES_MAX = 32 * 2**20
"""Most bytes of what a parquet file says of its row groups and columns. In memory it takes some twenty times as much:
100,000 row groups of four rows with two columns are 20 MB, and 400 MB of memory."""
FOOTER_END = 8
"""Bytes at the end of a parquet file: the size of that, and its mark."""
MESSAGE_BYTES_MAX = 2**30
"""Most bytes of one record batch in a folder; `datasets` writes 1,000 rows."""
UNREADABLE = (ValueError, OverflowError, TypeError, LookupError, ImportError, ArithmeticError, NotImplementedError)
"""What pyarrow raises on single values: no UTF-8, a date before the first, an unknown time zone, a type of its own."""


def read_parquet(path: Path, columns: Columns, open_file: OpenFile, unread: Unread) -> Iterator[tuple[str, Values]]:
    """See `row_files.read_file`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # With a buffer it reads page by page, without one a whole column of a row group.
        # It opens the file itself, without Python between, by the descriptor of the one that was opened.
        with contextlib.ExitStack() as opening:
            opened = opening.enter_context(open_file(path))
            check_format(opened.read(HEAD_BYTES), str(path), PARQUET_MAGIC)
            _check_footer(opened, str(path))
            descriptor = f"/proc/self/fd/{opened.fileno()}"
            file = opening.enter_context(pq.ParquetFile(descriptor, pre_buffer=False, buffer_size=READ_BYTES))
            check_header(columns, file.schema_arrow.names, str(path), unread)
            size = os.fstat(opened.fileno()).st_size
            check_count(file.metadata.num_rows, size, str(path))
            names = list(columns.values())
            _check_types(file.schema_arrow, names, str(path))
            chunks = _chunks(file.metadata, names)
            check_unpacked(sum(chunk.total_uncompressed_size for chunk in chunks), size, str(path))
            batches = file.iter_batches(_rows_at_once(opened, chunks), columns=names)
            yield from _rows(batches, file.schema_arrow, str(path))
    except (pa.ArrowException, ValueError, IndexError, OSError) as error:
        _raise_of_the_system(error)
        raise InvalidInput(f"is not a readable parquet file: {error}", str(path), "write it again") from error


def _raise_of_the_system(error: Exception) -> None:
    """Raise what the operating system said. pyarrow's own OSError, of a page that cannot be unpacked, has no number."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error


def _check_footer(file: BinaryIO, path: str) -> None:
    """Refuse a file whose description of itself, which is read first and whole, would fill the memory."""
    end = file.seek(0, io.SEEK_END)
    file.seek(max(0, end - FOOTER_END))
    size = int.from_bytes(file.read(4), "little")
    if FOOTER_BYTES_MAX < size <= end:  # what says more than there is is damaged, and pyarrow says how
        raise InvalidInput(
            f"has {size:,} bytes that describe its row groups and columns, more than the {FOOTER_BYTES_MAX:,} that are "
            "read",
            path,
            "save it with larger row groups, or with fewer columns",
        )


def _chunks(metadata: Any, names: Sequence[str]) -> list[Any]:
    """The chunks of some columns, of all row groups, as the file's metadata describe them."""
    return [
        chunk
        for group in map(metadata.row_group, range(metadata.num_row_groups))
        for chunk in map(group.column, range(group.num_columns))
        if any(f"{chunk.path_in_schema}.".startswith(f"{name}.") for name in names)
    ]


def _rows_at_once(file: BinaryIO, chunks: Iterable[Any]) -> int:
    """How many rows to decode at once: all may refer to the largest value of a column's dictionary, stored once.

    So two kilobytes can become gigabytes.
    """
    largest = 1
    for chunk in chunks:
        if chunk.has_dictionary_page:
            file.seek(chunk.dictionary_page_offset)
            largest = max(largest, _page_bytes(file.read(32)))
    return max(1, min(ROWS_AT_ONCE, ARROW_BYTES // largest))


def _page_bytes(head: bytes) -> int:
    """A page's size when unpacked, which parquet's metadata do not tell and pyarrow does not show.

    It is the second field of the page's head, in Thrift's compact form: 0x15 for "the next field, int32", then a
    zigzag number of seven bits a byte.
    """
    at = value = 0
    for _ in range(2):
        if head[at] != 0x15:
            raise ValueError("a page's head is no such")
        value = shift = 0
        while True:
            at += 1
            value |= (head[at] & 0x7F) << shift
            shift += 7
            if head[at] < 0x80:
                break
        at += 1
    return value >> 1


def read_folder(path: Path, columns: Columns, open_file: OpenFile, unread: Unread) -> Iterator[tuple[str, Values]]:
    """See `row_files.read_file`. Without `datasets`: importing it takes a second, and it follows paths."""
    import pyarrow as pa

    first = 0
    for name in _files_of(path, open_file):
        where = str(path / name)
        try:
            with open_file(path / name) as file:
                _check_packing(file, where)
            with open_file(path / name) as file, pa.ipc.open_stream(pa.PythonFile(_Guarded(file))) as stream:
                check_header(columns, stream.schema.names, str(path), unread)
                _check_types(stream.schema, list(columns.values()), str(path))
                for batch in stream:
                    where = f"{path / name}, rows {first + 1} to {first + batch.num_rows} of the folder"
                    batch.validate(full=True)  # wrong lengths would lead out of the batch
                    yield from _rows([batch.select(list(columns.values()))], stream.schema, str(path), first)
                    first += batch.num_rows
        except (pa.ArrowException, ValueError, struct.error, OSError) as error:
            _raise_of_the_system(error)
            raise InvalidInput(f"is not a readable Arrow file: {error}", where, "save it again") from error


def _check_packing(file: BinaryIO, where: str) -> None:
    """Refuse compressed batches, which `datasets` does not write: a few kilobytes can ask for gigabytes of memory.

    pyarrow does not say whether a batch is compressed. The head of its message does; it is a flatbuffer: tables of
    numbered fields.
    """
    import pyarrow as pa

    for message in pa.ipc.MessageReader.open_stream(pa.PythonFile(_Guarded(file))):
        if message.type not in ("dictionary", "record batch"):
            continue
        head = bytes(message.metadata)
        batch = _inner(head, _inner(head, 0, None), 2)  # field 2 of a message: what it is about
        if message.type == "dictionary":
            batch = _inner(head, batch, 1)  # field 1 of a dictionary: the batch of its values
        if _place(head, batch, 3):  # field 3 of a batch: how it is packed
            raise InvalidInput("holds packed batches", where, "save it by datasets' save_to_disk, or as parquet")
        if message.type == "record batch":
            return


def _inner(head: bytes, table: int, field: int | None) -> int:
    """Position of the table that a field of a flatbuffer's table points to; field None: by its first word."""
    at = table if field is None else table + _place(head, table, field)
    return at + int(struct.unpack_from("<I", head, at)[0])


def _place(head: bytes, table: int, field: int) -> int:
    """Offset of a field from the beginning of its flatbuffer table; 0: the table has no field of this number."""
    names = table - int(struct.unpack_from("<i", head, table)[0])
    size = int(struct.unpack_from("<H", head, names)[0])
    return int(struct.unpack_from("<H", head, names + 4 + 2 * field)[0]) if 4 + 2 * field < size else 0


class _Guarded(io.RawIOBase):
    """A file that refuses to read more than `MESSAGE_BYTES_MAX` at once: the size comes from the file itself."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= MESSAGE_BYTES_MAX:
            raise ValueError(f"a record batch of {size} bytes, more than {MESSAGE_BYTES_MAX}")
        return self._file.read(size)

    def tell(self) -> int:
        return self._file.tell()


def _files_of(folder: Path, open_file: OpenFile) -> list[str]:
    if (splits := folder / "dataset_dict.json").is_file():
        try:
            with open_file(splits) as file:
                known = shown([str(name) for name in json.load(file)["splits"]])
        except (ValueError, KeyError, TypeError):
            known = "?"
        raise InvalidInput(f"has several splits: {known}", str(folder), "name one of them: FOLDER/SPLIT")
    try:
        with open_file(folder / "state.json") as file:
            state = json.load(file)
        names = [str(file["filename"]) for file in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInput(
            f"is a folder, but not one of datasets' save_to_disk ({error})", str(folder), "name a file"
        ) from error
    for name in names:
        if name in ("", ".", "..") or PurePath(name).name != name:
            raise InvalidInput(f"names a file outside itself: {name!r}", str(folder / "state.json"), "save it again")
    return names


def _rows(batches: Iterable[Any], schema: Any, path: str, first: int = 0) -> Iterator[tuple[str, Values]]:
    classes = _class_names(schema)
    for batch in batches:
        size = batch.nbytes
        # `size` may count a buffer that all rows share, so the rows are then measured one by one.
        if size > ROW_BYTES_MAX:
            _check_sizes(batch, path, first)
        step = max(1, min(ROWS_AT_ONCE, batch.num_rows * PYTHON_BYTES // max(1, size)))
        for start in range(0, batch.num_rows, step):
            for values in _as_python(batch.slice(start, step), path, first):
                first += 1
                for column, names in classes.items():
                    if isinstance(value := values.get(column), int):
                        values[column] = _class_name(value, names, column, f"{path}, row {first}")
                yield f"{path}, row {first}", values


def _class_name(number: int, names: Sequence[str], column: str, where: str) -> str | None:
    if number == -1:  # by the convention of `datasets`: not labelled, as in the test parts of competitions
        return None
    if not 0 <= number < len(names):
        raise InvalidInput(
            f"column '{column}' has class {number}, and the file names {len(names)} classes: {shown(names)}",
            where,
            "mend the file's ClassLabel, or drop the row",
        )
    return names[number]


def _check_types(schema: Any, names: Sequence[str], path: str) -> None:
    """Refuse columns of a type that neither text, label, chat nor picture has: dates, durations, maps."""
    import pyarrow.types as types

    for name in names:
        kind = schema.field(name).type
        inner = kind.value_type if types.is_dictionary(kind) else kind
        if types.is_temporal(inner) or types.is_map(inner) or types.is_union(inner):
            raise InvalidInput(
                f"column {shown([name])} is of type {inner}",
                path,
                "write it as text, or as a number, and save it again",
            )


def _check_sizes(batch: Any, path: str, first: int) -> None:
    """Refuse a row that is too large."""
    for index in range(batch.num_rows):
        if sum(_value_bytes(column.slice(index, 1)) for column in batch.columns) > ROW_BYTES_MAX:
            raise too_large(f"{path}, row {first + index + 1}")


def _value_bytes(value: Any) -> int:
    """Size of an array of one value, without the buffers that it shares with other values."""
    import pyarrow as pa

    if pa.types.is_dictionary(value.type):
        value = value.dictionary_decode()
    if pa.types.is_string_view(value.type) or pa.types.is_binary_view(value.type):
        value = value.cast(pa.large_binary())
    return int(value.nbytes)


def _as_python(batch: Any, path: str, first: int) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = batch.to_pylist()
    except UNREADABLE as error:  # few of these errors name the row
        for index in range(batch.num_rows if batch.num_rows > 1 else 0):
            _as_python(batch.slice(index, 1), path, first + index)
        where = f"{path}, row {first + 1}"
        raise InvalidInput(f"has a value that cannot be read: {error}", where, "mend it, or drop the row") from error
    return rows


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
