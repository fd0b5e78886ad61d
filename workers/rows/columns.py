"""What the rows of every format have in common: the columns that they must have, and how large one may be."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from configs.errors import InvalidInput

ROW_BYTES_MAX = 64 * 2**20
"""Of one row. A file without line ends, packed zeros or one monstrous value would else be read into memory whole."""
SHOWN_NAMES = 20
SHOWN_CHARACTERS = 100

Values = Mapping[str, Any]
Columns = Mapping[str, str]
"""Key of the task file's section `data` to the column that it names."""


def too_large(where: str) -> InvalidInput:
    """The refusal of a row above `ROW_BYTES_MAX`."""
    return InvalidInput(
        f"is a row of more than {ROW_BYTES_MAX} bytes", where, "shorten it; in a text file, write one row per line"
    )


def check_columns(columns: Columns, names: Collection[str], where: str) -> None:
    """Refuse a file, or a row, that lacks a column. Raises InvalidInput."""
    for key, column in columns.items():
        if column not in names:
            near = difflib.get_close_matches(column, (name for name in names if len(name) <= SHOWN_CHARACTERS), 1)
            raise InvalidInput(
                f"has no column {shown([column])}; it has {shown(sorted(names))}",
                where,
                f"data.{key} names the column" + (f"; did you mean {shown(near)}?" if near else ""),
            )


def check_header(columns: Columns, names: Sequence[str], where: str) -> None:
    """As `check_columns`; and refuse a file that has such a column twice. Raises InvalidInput."""
    check_columns(columns, names, where)
    for column in columns.values():
        if names.count(column) > 1:
            raise InvalidInput(f"has the column {shown([column])} twice", where, "name each column once")


def shown(names: Sequence[str]) -> str:
    """Some names for a message. Quoted, spaces show; escaped, control characters and half characters do no harm."""
    quoted = (f"{name!r:.{SHOWN_CHARACTERS}}" for name in names[:SHOWN_NAMES])
    return ", ".join(quoted) + (", …" if len(names) > SHOWN_NAMES else "")
