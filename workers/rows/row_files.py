"""Files of examples in the formats that people have them: every row as plain values, one after another.

What the values mean is not decided here (labels.py, task_data.py). Nothing here holds a file in memory, runs code that
a file brings (no pickles, no dataset scripts) or asks the network.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any

from configs.errors import InvalidInput
from configs.places import OpenFile, open_anywhere
from workers.rows.array_files import read_npz
from workers.rows.columnar_files import read_folder, read_parquet
from workers.rows.columns import NOTHING, Columns, Unread, Values, check_columns, check_count
from workers.rows.table_files import read_csv, read_tsv
from workers.rows.text_lines import numbered_lines

ARROW_FILES = (".arrow", ".feather", ".ipc")
ROWS_BETWEEN_LOOKS = 2**16
"""Rows between two checks for changes of the file: one that grows faster than it is read would be read for ever."""


def read_file(
    path: Path, columns: Columns, open_file: OpenFile = open_anywhere, unread: Unread | None = None
) -> Iterator[tuple[str, Values]]:
    """Read a file, or a folder of `datasets`, row by row.

    Args:
        path: .jsonl, .csv or .tsv, each also .gz; .parquet; .npz; or a folder written by `Dataset.save_to_disk`.
        columns: What the rows must have. Other columns may be there, and may be left out of the values.
        open_file: Opens every file that is read.
        unread: Takes the names of other columns; of JSON lines, of those that hold something.

    Returns:
        (file and row, counted from 1; the row's values), in the order of the file.

    Raises:
        InvalidInput: The file cannot be read, is of another format or damaged, has no such column, too large a row, or
            more rows than one of its size can have; or it was written while it was read.
    """
    try:
        seen, size = _state(path), size_bytes(path)
        rows = _reader(path)(path, columns, open_file, unread or Unread())
        for count in itertools.count(0, ROWS_BETWEEN_LOOKS):
            some = itertools.islice(rows, ROWS_BETWEEN_LOOKS)
            if (first := next(some, None)) is None:
                return
            check_count(count + 1, size, str(path))
            yield first
            yield from some
            _check_unchanged(path, seen)
    except FileNotFoundError as error:
        raise InvalidInput(
            "cannot read the file: there is none of this name",
            str(path),
            "check the path in data: only files and folders are read, never a URL or a data set's name on a hub",
        ) from error
    except OSError as error:
        raise InvalidInput(f"cannot read the file: {error}", str(path), "check the path in data") from error


def size_bytes(path: Path) -> int:
    """Bytes of a file, or of all files in a folder. Raises OSError."""
    return sum(size for size, _ in _state(path))


def _state(path: Path) -> list[tuple[int, int]]:
    """A state that changes when the file, or one in the folder, is written."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [(facts.st_size, facts.st_mtime_ns) for facts in (file.stat() for file in files)]


def _check_unchanged(path: Path, seen: list[tuple[int, int]]) -> None:
    if _state(path) != seen:
        raise InvalidInput("was written while it was read", str(path), "submit it again when it is complete")


def read_json_lines(
    lines: Iterable[tuple[int, str]], path: str, columns: Columns, unread: Unread
) -> Iterator[tuple[str, Values]]:
    """Rows of numbered lines; blank ones are skipped. Raises InvalidInput."""
    for number, line in lines:
        if not line.strip():
            continue
        where = f"{path}, row {number}"
        try:
            values = _JSON.decode(line)
        except (ValueError, RecursionError) as error:
            raise _no_json(line, error, where) from error
        if not isinstance(values, dict):
            raise InvalidInput(
                f"must be a JSON object, not {type(values).__name__}", where, "write one JSON object per line"
            )
        check_columns(columns, values, where)
        unread.meet(columns, (name for name, value in values.items() if value not in NOTHING), where)
        yield where, values


def _no_json(line: str, error: Exception, where: str) -> InvalidInput:
    if line.lstrip().startswith("["):
        todo = "write one object per line, without brackets around them and commas between"
        return InvalidInput("is not JSON lines: a JSON array begins here", where, todo)
    if line.strip() == "{":
        return InvalidInput("is not JSON lines: its object goes over several lines", where, "write each on one line")
    if line.rstrip().endswith("},"):
        return InvalidInput("is not JSON lines: a comma follows the object", where, "take it away in every line")
    todo = "write one JSON object per line; a table is to be named .csv or .tsv"
    return InvalidInput(f"is not JSON: {error}", where, todo)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):  # Python silently takes the last of them
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"has the key {next(name for name in counts if counts[name] > 1)!r:.100} twice")
    return values


_JSON = json.JSONDecoder(object_pairs_hook=_object)


def _reader(path: Path) -> Callable[[Path, Columns, OpenFile, Unread], Iterator[tuple[str, Values]]]:
    if path.is_dir():
        return read_folder
    readers = {
        ".jsonl": _read_jsonl,
        ".csv": read_csv,
        ".tsv": read_tsv,
        ".parquet": read_parquet,
        ".npz": read_npz,
    }
    name = path.name.lower()
    suffix = PurePath(name.removesuffix(".gz")).suffix
    if suffix not in readers:
        path.stat()  # no file, or a link that leads nowhere: its name is not what is wrong
        if suffix in ARROW_FILES:
            raise InvalidInput(
                f"'{suffix}' is not a format of rows",
                str(path),
                "convert it: pandas.read_feather(FILE).to_parquet('rows.parquet'), or, if datasets wrote it, "
                "datasets.Dataset.from_file(FILE).to_parquet('rows.parquet')",
            )
        raise InvalidInput(
            f"'{suffix}' is not a format of rows",
            str(path),
            f"give {', '.join(readers)} or a folder of datasets' save_to_disk; JSON lines are to be named .jsonl",
        )
    if name.endswith(".gz") and suffix in (".parquet", ".npz"):
        raise InvalidInput(f"{suffix} files are packed inside and not read from .gz", str(path), "unpack it")
    return readers[suffix]


def _read_jsonl(path: Path, columns: Columns, open_file: OpenFile, unread: Unread) -> Iterator[tuple[str, Values]]:
    with open_file(path) as file:
        yield from read_json_lines(numbered_lines(file, str(path)), str(path), columns, unread)
