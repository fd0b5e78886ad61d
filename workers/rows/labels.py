"""What a label in a file means: the one place where a value becomes an index into a task's label_names.

A table means the same in every format, though formats know different types: the 1 of a spreadsheet is the text "1" in
.csv, a whole number in JSON and 1.0 in a parquet column that once had gaps. So a value counts by what it says and not
by its type:

* White space around it does not count. A number is the same number however it is written (1, "1", 1.0, "01"), and a
  truth value the same in any capitals (true, "True"). Any other text is itself, capitals included.
* A value that says a label's name is that label.
* A whole number that is no name is an index into label_names, counted from 0; but only where no name is a number. In
  label_names ["1", "2", "3"] the value 1 could be the first label by name or the second by index: numbers are names
  there, and one that is no name is refused. The same holds where a name is a truth value, unless both readings agree
  (["false", "true"] with 0 and 1).
* One file says all its labels in one way, by name or by index. Where it mixes them, a number may as well be a name that
  label_names lacks: that is refused. (Of a truth value and its index, which agree, the file may say either.)
* A missing label (null, NaN, an empty cell) is refused, and so is what is neither text nor number.
"""

from __future__ import annotations

import difflib
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from configs.errors import InvalidInput
from configs.plain_text import disguised, looks
from workers.rows.columns import SHOWN_CHARACTERS, shown

MISSING_WORDS = ("", "nan", "none", "null", "na", "n/a", "<na>", "\\n")
"""Words that programs write for a missing value, in upper or lower case."""
TRUTH = ("false", "true")
NUMBER = re.compile(r"([+-]?)(?=\.?[0-9])([0-9]*)(?:\.([0-9]*))?", re.ASCII)
_KEY = "data.label_names"
NUMBER_CHARACTERS_MAX = 40
"""A longer text does not count as a number: no label needs it, and no name equals one."""


def check_names(names: Sequence[str]) -> None:
    """Refuse names that a person cannot tell apart, in this list or from another text: whoever writes the one and means
    the other has another label, or none. Names of one letter may differ in capitals (A and a, of handwriting).

    Raises:
        InvalidInput: An empty name; one with a character that is not seen or taken for another; two that look the same,
            or differ in capitals alone.
    """
    met: dict[str, str] = {}
    for name in names:
        if not name.strip():
            raise InvalidInput("one of the names is empty", _KEY, "write each label's name")
        if odd := disguised(name):
            raise InvalidInput(
                f"{shown([name])} is not what it looks like: {odd}",
                _KEY,
                "write it in letters of one script, without characters that show nothing, here and in the files",
            )
        seen = looks(name)
        if (other := met.setdefault(seen if len(seen) == 1 else seen.lower(), name)) != name:
            how = "look the same" if looks(other) == seen else "differ in capital letters alone"
            raise InvalidInput(
                f"{shown([other, name])} {how}: a person takes the one for the other",
                _KEY,
                "keep one of them, and write it so in the files; if they are two labels, give one another name",
            )


class Labels:
    """The labels of one file of a task.

    Args:
        names: The task's label_names; the index of a label is its place among them.

    Raises:
        InvalidInput: A name is empty, or two names say the same (`1` and `1.0`).
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self._index_of: dict[str, int] = {}
        for index, name in enumerate(self._names):
            said = _said(name)
            if not said:
                raise InvalidInput(
                    "holds an empty name, which no file can tell from a missing label", "data.label_names", "name it"
                )
            if (other := self._index_of.setdefault(said, index)) != index:
                raise InvalidInput(
                    f"{shown([self._names[other], name])} are the same label written in two ways",
                    "data.label_names",
                    "keep one of them",
                )
        has_indices = not any(_is_number(said) for said in self._index_of) and all(
            TRUTH.index(said) == index for said, index in self._index_of.items() if said in TRUTH
        )
        self._indices = {str(index): index for index in range(len(self._names))} if has_indices else {}
        """Text of a value to the index that it means; empty where numbers are names."""
        self._first: dict[bool, tuple[str, str]] = {}
        """Whether a value was read as an index, to the first such value and its place."""

    def index(self, value: Any, column: str, where: str) -> int:
        """The index of the label that a value says.

        Args:
            value: As the file's format gives it.
            column: Name of its column.
            where: File and row.

        Raises:
            InvalidInput: No label of this task, missing, or of a type that no label has; or the rows before said theirs
                by name and this one by index, or the other way round.
        """
        if isinstance(value, str) and value in self._index_of:
            return self._read(value, self._index_of[value], column, where, as_index=False)
        if value is not None and not isinstance(value, str | int | float | Decimal):
            raise InvalidInput(
                f"column '{column}' must hold a label's name or its index, not {type(value).__name__}",
                where,
                "write a name of data.label_names, or a whole number",
            )
        said = "" if value is None else _said(value)
        if said in self._index_of:
            return self._read(said, self._index_of[said], column, where, as_index=False)
        if said in self._indices:
            return self._read(said, self._indices[said], column, where, as_index=True)
        if is_missing(value):
            raise missing(column, where, value)
        odd = f" ({odd})" if isinstance(value, str) and (odd := disguised(value[:SHOWN_CHARACTERS])) else ""
        raise InvalidInput(
            f"label {value!r:.100}{odd} is not one of the {len(self._names)} labels", where, self._todo(said)
        )

    @property
    def are_numbered(self) -> bool:
        """Whether the file says its labels by index."""
        return True in self._first

    def _read(self, said: str, index: int, column: str, where: str, as_index: bool) -> int:
        """The index, unless the file's other labels are read in the other way."""
        if not self._indices or _said(self._names[index]) in TRUTH:
            return index
        self._first.setdefault(as_index, (said, where))
        if len(self._first) == 2:
            (name, named), (number, numbered) = self._first[False], self._first[True]
            raise InvalidInput(
                f"column '{column}' says some labels by name ({name!r:.40}: {named}) and others by number ({number}: "
                f"{numbered}). The number can be an index, and mean {self._names[self._indices[number]]!r:.40}, or a "
                "name that is missing in data.label_names",
                where,
                "write the name of its label into every row; if the number is a name, add it to data.label_names",
            )
        return index

    def _todo(self, said: str) -> str:
        known = f"data.label_names are: {shown(self._names)}"
        if _is_number(said) and self._indices:
            return f"{known}; a number is an index into them, from 0 to {len(self._names) - 1}"
        if _is_number(said):
            return (
                f"{known}; as some of these names are numbers or truth values, a number in the file is read as a name "
                "and never as an index: if indices are meant, write the names themselves into the file"
            )
        if said in TRUTH:
            return f"{known}; a truth value is a label only where they list true and false"
        near = difflib.get_close_matches(said.casefold(), [name.casefold() for name in self._names], 1)
        close = [name for name in self._names if name.casefold() in near]
        return known + (f"; did you mean {shown(close)}?" if close and len(said) <= SHOWN_CHARACTERS else "")


def two_readings(per_label: Mapping[str, int]) -> str:
    """A warning where the labels of a file could as well have been indices, and would then be others; else empty.

    Args:
        per_label: Label name to rows of the file, in the order of label_names.
    """
    names = list(per_label)
    indices = set(map(str, range(len(names))))
    said = [(index, name, _said(name)) for index, name in enumerate(names) if per_label[name]]
    if any(text not in indices for _, _, text in said):
        return ""
    other = next(((name, names[int(text)]) for index, name, text in said if int(text) != index), None)
    if other is None:
        return ""
    return (
        f"the labels in the file are numbers and are read as names of data.label_names: {other[0]:.40} is the label "
        f"{other[0]!r:.40}. Read as indices they would be other labels ({other[0]:.40} would be {other[1]!r:.40}): if "
        "indices are meant, write the names into the file"
    )


def counted_from_1(per_label: Mapping[str, int]) -> str:
    """A warning where a file says its labels by index and never the first: counted from 1, they would be others; else
    empty.

    Args:
        per_label: As in `two_readings`.
    """
    names = list(per_label)
    used = [index for index, name in enumerate(names) if per_label[name]]
    if not used or used[0] == 0:
        return ""
    first = used[0]
    return (
        f"the labels in the file are numbers from {first} to {used[-1]}, and are read as indices counted from 0: "
        f"{first} is {names[first]!r:.40}, and {names[0]!r:.40} has no row. Counted from 1 they would be other labels "
        f"({first} would be {names[first - 1]!r:.40}): if that is meant, write the names into the file"
    )


def is_missing(value: Any) -> bool:
    """Whether a value means that there is none."""
    if isinstance(value, str):
        return value.strip().casefold() in MISSING_WORDS
    return value is None or (isinstance(value, float | Decimal) and math.isnan(value))


def missing(column: str, where: str, value: Any) -> InvalidInput:
    """The refusal of a row without a label."""
    written = f" (it says {value!r})" if isinstance(value, str) and value.strip() else ""
    return InvalidInput(f"column '{column}' has no label in it{written}", where, "fill it in, or drop the row")


def earlier_index(value: Any, names: Sequence[str]) -> int:
    """A label of rows that release 0.3 froze as they came, read as it read them: a score must not change its meaning.

    A text is a name, and an index if it is none; a whole number is always an index.
    """
    return names.index(value) if value in names else int(value)


def _said(value: str | int | float | Decimal) -> str:
    """What a value says, the same for all types that can say it."""
    if isinstance(value, bool):
        return TRUTH[value]
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float | Decimal):
        # Through its shortest text: 0.1 is not 0.1000000000000000055511151231257827.
        return _number(f"{Decimal(repr(float(value))) if isinstance(value, float) else value:f}")
    text = value.strip()
    if not text.isascii():
        return unicodedata.normalize("NFC", text)
    if text.casefold() in TRUTH:
        return text.casefold()
    return _number(text) if len(text) <= NUMBER_CHARACTERS_MAX else text


def _number(text: str) -> str:
    """The shortest text of a number; any other text as it is."""
    found = NUMBER.fullmatch(text)
    if found is None:
        return text
    sign, whole, fraction = found[1], found[2].lstrip("0") or "0", (found[3] or "").rstrip("0")
    number = f"{whole}.{fraction}" if fraction else whole
    return f"-{number}" if sign == "-" and number != "0" else number


def _is_number(said: str) -> bool:
    return NUMBER.fullmatch(said) is not None
