"""Labelled rows as JSON lines: checked at admission, read once for training, kept for evaluation.

Light on purpose (no torch, no transformers): the control plane checks every submission with it. Tokenising happens
batch by batch while training, so that the first step does not wait for the whole file.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import InvalidInput
from configs.task_spec import DataSpec

if TYPE_CHECKING:
    from numpy import uint8
    from numpy.typing import NDArray

GZIP_MAGIC = b"\x1f\x8b"
# A gzip bomb of a few kilobytes unpacks to gigabytes; a file of short texts of this size has millions of rows.
UNPACKED_BYTES_MAX = 2 * 2**30


@dataclass(frozen=True)
class TextRow:
    """One text, or two, with its label."""

    text: str
    text_pair: str | None
    label: int | float
    """Index into the task's label_names; for sequence_regression a finite number."""


Turn = tuple[str, str]
"""(role, content) of one message; the role is `system`, `user` or `assistant`."""


@dataclass(frozen=True)
class CompletionRow:
    """What a language model is given, and what it should answer."""

    turns: tuple[Turn, ...]
    """The last turn is the assistant's: the completion, on which alone the loss is. At least one comes before."""
    is_chat: bool
    """True: the row had messages, and the tokenizer's chat template applies. False: it had a prompt and a completion,
    the contents of its two turns, to be joined as they are."""

    @property
    def completion(self) -> str:
        return self.turns[-1][1]


@dataclass(frozen=True, eq=False)
class ImageRow:
    """One picture with its label."""

    image: NDArray[uint8]
    """H×W×C, 0 to 255; C is 1 or 3."""
    label: int
    """Index into the task's label_names."""


Row = TextRow | CompletionRow | ImageRow


@dataclass(frozen=True)
class RowCounts:
    """What a checked file holds."""

    rows: int
    per_label: Mapping[str, int]
    """Label name to rows, in the order of label_names; a label without rows has 0."""
    shared_rows: int = 0
    """Rows whose text is also in the file it was compared with: a warning, not an error."""


def check_rows(path: Path, spec: DataSpec, compare_with: Path | None = None) -> RowCounts:
    """Check a whole file before its task is accepted.

    Args:
        path: A .jsonl or .jsonl.gz file.
        spec: Columns and labels.
        compare_with: The other file of the task; rows with the same text are counted in `shared_rows`.

    Raises:
        InvalidInput: No such file, not UTF-8 or JSON, a column missing or of the wrong type, an empty text, an
            unknown label, no rows; names the file and the row, counted from 1.
    """
    rows = _read_file(path, spec)
    labels = Counter(row.label for row in rows)
    shared = 0
    if compare_with is not None:
        others = {_text_digest(row) for row in _read_file(compare_with, spec)}
        shared = sum(_text_digest(row) in others for row in rows)
    return RowCounts(len(rows), {name: labels[index] for index, name in enumerate(spec.label_names)}, shared)


def read_rows(content: bytes, spec: DataSpec, where: str = "rows") -> tuple[TextRow, ...]:
    """Read a file's bytes, packed or not.

    Raises:
        InvalidInput: See `check_rows`.
    """
    rows = tuple(_rows(_unpack(content, where), spec, where))
    if not rows:
        raise InvalidInput("has no rows", where, "give at least one labelled row")
    return rows


def _read_file(path: Path, spec: DataSpec) -> tuple[TextRow, ...]:
    try:
        size = path.stat().st_size
        if size > UNPACKED_BYTES_MAX:
            raise InvalidInput(f"has {size} bytes, more than {UNPACKED_BYTES_MAX}", str(path), "submit fewer rows")
        content = path.read_bytes()
    except OSError as error:
        raise InvalidInput(f"cannot read the file: {error}", str(path), "check the path in data") from error
    return read_rows(content, spec, str(path))


def _unpack(content: bytes, where: str) -> bytes:
    if not content.startswith(GZIP_MAGIC):
        return content
    try:
        with gzip.open(BytesIO(content)) as file:
            unpacked = file.read(UNPACKED_BYTES_MAX + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise InvalidInput(f"is not a complete gzip file: {error}", where, "pack it again") from error
    if len(unpacked) > UNPACKED_BYTES_MAX:
        raise InvalidInput(f"unpacks to more than {UNPACKED_BYTES_MAX} bytes", where, "submit fewer rows")
    return unpacked


def _rows(content: bytes, spec: DataSpec, where: str) -> Iterator[TextRow]:
    index_of = {name: index for index, name in enumerate(spec.label_names)}
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            yield _row(line, spec, index_of, f"{where}, row {number}")


def _row(line: bytes, spec: DataSpec, index_of: Mapping[str, int], where: str) -> TextRow:
    try:
        values = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InvalidInput(f"is not UTF-8: {error}", where, "save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"is not JSON: {error}", where, "write one JSON object per line") from error
    if not isinstance(values, dict):
        raise InvalidInput(f"must be a JSON object, not {type(values).__name__}", where)
    text = _text(values, spec.text_column, where)
    pair = _text(values, spec.text_pair_column, where) if spec.text_pair_column else None
    return TextRow(text, pair, _label(values, spec, index_of, where))


def _text(values: Mapping[str, Any], column: str, where: str) -> str:
    text = _value(values, column, where)
    if not isinstance(text, str):
        raise InvalidInput(f"column '{column}' must be a string, not {type(text).__name__}", where)
    if not text.strip():
        raise InvalidInput(f"column '{column}' is empty", where, "drop the row or fill in the text")
    return text


def _label(values: Mapping[str, Any], spec: DataSpec, index_of: Mapping[str, int], where: str) -> int:
    """A string is a name, an integer is an index; `true` is neither."""
    label = _value(values, spec.label_column, where)
    if isinstance(label, str):
        if label in index_of:
            return index_of[label]
    elif not isinstance(label, int) or isinstance(label, bool):
        raise InvalidInput(
            f"column '{spec.label_column}' must be a label's name or its index, not {type(label).__name__}", where
        )
    elif 0 <= label < len(index_of):
        return label
    known = ", ".join(spec.label_names[:20]) + (", …" if len(spec.label_names) > 20 else "")
    raise InvalidInput(
        f"label {label!r} is not one of the {len(index_of)} labels", where, f"data.label_names are: {known}"
    )


def _value(values: Mapping[str, Any], column: str, where: str) -> Any:
    if column not in values:
        raise InvalidInput(
            f"has no column '{column}'; it has {', '.join(sorted(map(str, values)))}",
            where,
            "name the column in data.text_column, data.text_pair_column or data.label_column",
        )
    return values[column]


def _text_digest(row: TextRow) -> bytes:
    return hashlib.sha256(json.dumps([row.text, row.text_pair]).encode()).digest()
