"""Tables as text, as spreadsheets and databases export them: .csv and .tsv.

Programs disagree about what stands between the fields, and the file's name does not tell. The first line does: the
separator is the one with which it names the columns that the task asks for. If there is none, the file is refused.
"""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from configs.errors import InvalidInput
from configs.places import OpenFile
from workers.rows.columns import LINE_CHARACTERS_MAX, Columns, Unread, Values, check_header
from workers.rows.text_lines import numbered_lines

SEPARATORS = (",", "\t", ";", "|")
"""Separators of fields, tried in this order after the one that the file's name suggests."""


def read_csv(path: Path, columns: Columns, open_file: OpenFile, unread: Unread) -> Iterator[tuple[str, Values]]:
    """See `row_files.read_file`."""
    return _read(path, columns, open_file, unread, ",")


def read_tsv(path: Path, columns: Columns, open_file: OpenFile, unread: Unread) -> Iterator[tuple[str, Values]]:
    """See `row_files.read_file`."""
    return _read(path, columns, open_file, unread, "\t")


def _read(
    path: Path, columns: Columns, open_file: OpenFile, unread: Unread, promised: str
) -> Iterator[tuple[str, Values]]:
    with open_file(path) as file:
        table = _Table(numbered_lines(file, str(path)), columns, unread, promised, str(path))
        places = {column: table.names.index(column) for column in columns.values()} if table.names else {}
        for number, (line, row) in enumerate(table, start=1):
            where = f"{path}, row {number} (line {line})"
            if len(row) != len(table.names):
                raise _uneven(row, table.names, where)
            if inside := sum(table.rows_inside(row, place) for place, field in enumerate(row) if "\n" in field):
                unread.meet_lines(inside, where)
            yield where, {column: row[place] for column, place in places.items()}


class _Table:
    """Rows that are not blank, each with the line on which it begins.

    Raises:
        InvalidInput: The first line does not name the columns; or a row cannot be read.
    """

    def __init__(
        self, lines: Iterator[tuple[int, str]], columns: Columns, unread: Unread, promised: str, path: str
    ) -> None:
        csv.field_size_limit(LINE_CHARACTERS_MAX)  # a row is not longer either, see `_texts`; Python's own is 2**17
        self._path, self._lines = path, lines
        self._line = 0
        """Number of the last line that was read."""
        self._row_line = self._row_characters = 0
        self.names: Sequence[str] = ()
        """Names of the columns; empty where the file is."""
        self.separator = promised
        number, first = self._said()
        if told := re.fullmatch(r'"?sep=([^\s"]|\t)"?\s*', first, re.IGNORECASE):  # a line for Excel
            promised = told[1]
            number, first = self._said()
        if not first:
            self._reader = csv.reader([])
            return
        self.separator = separator = _separator(first, columns, promised)
        fields = _fields(first, separator)
        if first.lstrip().startswith(("{", "[")) and not _has(columns, _stripped(fields, columns)):
            raise InvalidInput("is not what its name says: it holds JSON", path, "name a file of JSON lines .jsonl")
        # "text, label": the separator's space
        self._is_spaced = is_spaced = any(name.startswith(" ") for name in fields[1:])
        self._lines, self._line = itertools.chain([(number, first)], lines), number - 1
        # Strict: a quote that is not closed, or text after one, would else join rows silently.
        self._reader = csv.reader(self._texts(), delimiter=separator, strict=True, skipinitialspace=is_spaced)
        number, names = next(self)
        self.names = _stripped(names, columns)
        or_else = "; if this line is a row already, put a line with the names above it"
        check_header(columns, self.names, f"{path}, line {number} (the names of the columns)", unread, or_else)

    def __iter__(self) -> _Table:
        return self

    def __next__(self) -> tuple[int, list[str]]:
        while True:
            first = self._row_line = self._line + 1
            self._row_characters = 0
            try:
                row = next(self._reader)
            except csv.Error as error:
                raise InvalidInput(
                    f"is not readable from here on: {error}",
                    f"{self._path}, line {first}",
                    "put fields with quotes in them into double quotes and double theirs, or write JSON lines",
                ) from error
            if len(row) > 1 or (row and row[0].strip()):
                return first, row

    def rows_inside(self, row: Sequence[str], place: int) -> int:
        """How many lines inside the field at this place of a row look like rows of their own.

        They are the whole lines inside it; 0 unless all of them look like rows. Where there is none, it is the last
        line: if that and the first, with the fields after and before, are as many fields as a row has. A text's own
        separators do not count there, which a space follows.
        """
        first, *inside, last = row[place].split("\n")
        if inside:
            return len(inside) if all(len(_fields(line, self.separator)) == len(row) for line in inside) else 0
        begins, ends = _fields(first, self.separator), _fields(last, self.separator)
        is_spaced = any(text.startswith(" ") for text in (*begins[1:], *ends[1:]))
        are_rows = place + len(begins) == len(row) == len(ends) + len(row) - place - 1
        return int(are_rows and is_spaced <= self._is_spaced)

    def _said(self) -> tuple[int, str]:
        """The next line that is not blank; (0, "") at the end."""
        return next(((number, line) for number, line in self._lines if not line.isspace()), (0, ""))

    def _texts(self) -> Iterator[str]:
        for number, line in self._lines:
            self._row_characters += len(line)
            if self._row_characters > LINE_CHARACTERS_MAX:
                raise InvalidInput(
                    f"a row of more than {LINE_CHARACTERS_MAX} characters begins here",
                    f"{self._path}, line {self._row_line}",
                    "is a double quote opened there and never closed? Double quotes inside a field are to be doubled",
                )
            self._line = number
            yield line


def _separator(first: str, columns: Columns, promised: str) -> str:
    """The separator with which the first line names the columns. If none does, the one that splits it into most fields:
    the refusal then shows the names as a person reads them."""
    candidates = (promised, *SEPARATORS)
    named = (each for each in candidates if _has(columns, _stripped(_fields(first, each), columns)))
    return next(named, max(candidates, key=lambda each: len(_fields(first, each))))


def _fields(line: str, separator: str) -> list[str]:
    return next(csv.reader([line], delimiter=separator), [])


def _stripped(names: Sequence[str], columns: Columns) -> Sequence[str]:
    """The names of a table's columns; stripped of white space if the task's columns are among them only then."""
    return names if _has(columns, names) else [name.strip() for name in names]


def _has(columns: Columns, names: Sequence[str]) -> bool:
    return set(columns.values()) <= {*names}


def _uneven(row: Sequence[str], names: Sequence[str], where: str) -> InvalidInput:
    """The refusal of a row that has more or fewer fields than there are columns."""
    what = f"has {len(row)} fields, the first line {len(names)}"
    if len(row) < len(names):
        return InvalidInput(what, where, "fill in what is missing; put fields with line breaks into double quotes")
    if not any(row[len(names) :]):
        todo = "end the first line with a separator too, or take it away at the ends of the rows"
        return InvalidInput(f"{what}: it ends with a separator, which the first line does not", where, todo)
    return InvalidInput(what, where, "put fields with a separator in them into double quotes")
