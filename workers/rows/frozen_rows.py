"""A task's rows as they are kept: one form for all formats, read by index from a mapped file.

The form is Arrow's file format, not compressed, because Trainer asks for rows in random order: a row is found in the
mapped file without decoding others, where parquet decodes a row group and JSON lines all that comes before. It is
written front to back, so neither side holds a file in memory. Pictures stay encoded if they came encoded.

Evaluation rows are identified by a digest of what the rows say (`sha256`), not of the file: the same rows from .csv and
.parquet are the same task data. The file's own digest is part of its key, and is compared at every opening.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import mmap
import struct
import tempfile
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, overload

from configs.errors import Corrupt, InvalidInput, Unavailable
from configs.places import OpenFile, open_anywhere
from configs.task_spec import IMAGE_KINDS, Kind, TaskSpec
from subspace_store.storage.protocol import Storage
from workers.metrics import CORRELATIONS, constant_score
from workers.rows.columns import UNPACKED_BYTES_FREE, Unread, check_unpacked
from workers.rows.recurrence import COMPARED_ROWS_MAX, Labelled, Met
from workers.rows.row_files import size_bytes
from workers.rows.task_data import (
    Complaint,
    CompletionRow,
    ImageRow,
    Row,
    TextRow,
    decode_picture,
    input_digest,
    label_of,
    likenesses,
    read_rows,
    rows_in,
)

SPOOLED_BYTES = 8 * 2**20
"""Up to this size frozen rows are kept in memory, above it in a temporary file."""
BATCH_BYTES = 4 * 2**20
BATCH_ROWS = 4096
PIECE = 64 * 2**20
"""Bytes that are asked of the storage at once; rows that fit into one piece are not put into a file."""
FROZEN_BYTES_MAX = 256 * 2**30
"""Most bytes of frozen rows, whatever they came from: all tasks share the disk."""
SHARED_RATIO_MAX = 0.5
"""Share of the evaluation rows that may not be training rows too, unless data.eval_is_train asks for it. Short texts
recur by chance (in intent data a few percent): fewer are a warning."""


@dataclass(frozen=True)
class FrozenRows:
    """Checked rows on their way to the storage."""

    file: IO[bytes] = field(repr=False)
    file_sha256: str
    sha256: str
    """Digest of what the rows say, in their order."""
    count: int
    per_label: Mapping[str, int]
    """Label name to rows, in the order of label_names; a label without rows has 0."""
    constant_score: float | None
    """Score, by the task's metric, of always giving these rows' most frequent label; see `metrics.constant_score`."""
    inputs: int = 0
    """Number of different inputs, as a reader sees them, among the first `COMPARED_ROWS_MAX` rows."""
    contradicted: int = 0
    """Number of those that have several labels, in classification."""

    def key(self, folder: str, name: str) -> str:
        """Storage key to keep them under."""
        return f"{folder}/{name}-{self.file_sha256}.arrow"

    def rows(self, kind: Kind) -> StoredRows:
        """The rows, read from the file, which must stay open."""
        import pyarrow as pa

        self.file.seek(0)
        found = pa.ipc.open_file(self.file)
        return StoredRows([found.get_batch(number) for number in range(found.num_record_batches)], kind, self.sha256)

    def write(self, storage: Storage, key: str) -> None:
        """Upload them piece by piece."""
        upload(self.file, storage, key)


def upload(file: IO[bytes], storage: Storage, key: str) -> None:
    """Write all of a file to the storage, piece by piece."""
    file.seek(0)
    with storage.stream(key, head_size=0) as out:
        while piece := file.read(PIECE // 16):
            out.append(piece)
        out.finish(b"")


@dataclass(frozen=True)
class FrozenTask:
    """All rows of a task. The caller must close it."""

    train: FrozenRows | None = None
    evaluation: FrozenRows | None = None
    shared_rows: int = 0
    """Number of evaluation rows that are also training rows to a reader (`as_read`), whatever their labels."""
    alike_rows: int = 0
    """Number of those and of others that are training rows but for capital letters. Where data.eval_fraction parted the
    rows: of all, as equal ones are on one side."""

    unread: tuple[str, ...] = ()
    """Sentences on columns that are not read, see `columns.Unread`."""
    numbered_labels: bool = False
    """Whether a file says its labels by index."""

    def close(self) -> None:
        """Delete the temporary files."""
        for rows in (self.train, self.evaluation):
            if rows:
                rows.file.close()


def freeze(
    spec: TaskSpec,
    train: Path | None,
    evaluation: Path | None,
    open_file: OpenFile = open_anywhere,
    complaint: Complaint = lambda row: "",
) -> FrozenTask:
    """Check a task's files, and write what they say into temporary files of the one form.

    Args:
        spec: Without `evaluation`, data.eval_fraction of the training rows is kept for evaluation. A digest of each row
            without its label decides which: the same ones in any order and whatever is added, and equal rows on one
            side. So the fraction is met only roughly when rows are few.
        train: File or folder of training rows, if there is one.
        evaluation: The same for evaluation rows.
        open_file: Opens every file that is read.
        complaint: Says why the base model cannot read a row.

    Raises:
        InvalidInput: See `rows_in`; or a file or a side of the split has no rows; or a file unpacks to too much; or all
            evaluation rows have one label and the task's metric is a correlation; or half of the evaluation rows or
            more are training rows too, and data.eval_is_train does not ask for it.
        Unavailable: No space for the temporary files.

    Cost:
        About 15 µs for a row of text. Memory for one batch of rows, 18 bytes for each evaluation row, and 16 for each
        of the first `COMPARED_ROWS_MAX` rows of either side. Of what a file
        holds, no more is read than `columns.ROWS_FREE` and `columns.UNPACKED_RATIO_MAX` allow for its size.
    """
    fraction = 0.0 if evaluation else spec.data.eval_fraction or 0.0
    evaluated, trained = _Writer(spec, evaluation or train), _Writer(spec, train)
    shared, alike, parted, unread = Met(), Met(), array("Q"), Unread()
    with contextlib.ExitStack() as undo, _space_needed("the rows"):
        undo.callback(trained.file.close)
        undo.callback(evaluated.file.close)
        if evaluation:
            for row in rows_in(evaluation, spec, open_file, complaint, unread):
                digest = input_digest(row)
                read, folded = map(_number, likenesses(row, digest))
                shared.add(read)
                alike.add(folded)
                evaluated.add(row, digest, read)
            _some(evaluated, str(evaluation), "give at least one row")
            shared.close()
            alike.close()
        if train:
            for row in rows_in(train, spec, open_file, complaint, unread):
                digest = input_digest(row)
                read, folded = map(_number, likenesses(row, digest))
                is_evaluated = _number(digest) < fraction * 2**64
                (evaluated if is_evaluated else trained).add(row, digest, read)
                if not fraction:
                    shared.meet(read)
                    alike.meet(folded)
                elif is_evaluated:
                    alike.add(folded)
                elif len(parted) < COMPARED_ROWS_MAX:
                    parted.append(folded)
            _some(trained, str(train), "give at least one row" if not fraction else "lower data.eval_fraction")
            if fraction:
                _some(evaluated, str(train), "raise data.eval_fraction or give more rows", " for evaluation")
                alike.close()
                for number in parted:
                    alike.meet(number)
        if evaluated.count and not evaluated.varies and spec.metric in CORRELATIONS:
            raise InvalidInput(
                f"all {evaluated.count} evaluation rows have the same label: {spec.metric} is not defined",
                str(evaluation or train),
                "give evaluation rows with several labels, or choose another metric",
            )
        count = shared.count
        if count and count >= SHARED_RATIO_MAX * evaluated.count and not spec.data.eval_is_train:
            raise InvalidInput(
                f"{count} of {evaluated.count} evaluation rows are also training rows: the score would say how well "
                "they were memorised, and nothing about new ones",
                str(evaluation),
                "give other rows, or data.eval_fraction instead of data.eval_file; if this is what is to be measured, "
                "set data.eval_is_train to true",
            )
        frozen = FrozenTask(
            trained.finish() if train else None,
            evaluated.finish() if evaluation or fraction else None,
            count,
            alike.count,
            tuple(unread.told()),
            unread.numbered_labels,
        )
        undo.pop_all()
    return frozen


def open_rows(storage: Storage, key: str, spec: TaskSpec) -> StoredRows:
    """Frozen rows, to be asked for by index.

    Args:
        key: As `FrozenRows.key` made it; or of gzipped JSON lines, as earlier releases kept rows.

    Returns:
        The rows in their order. Each is made when it is asked for. More than `PIECE` from another machine lies in a
        mapped temporary file, which is deleted with the rows.

    Raises:
        NotFound: Nothing is there.
        Corrupt: The bytes are not what was written.
        Unavailable: The storage was away, or there is no space for the temporary file.
    """
    where = f"{storage.url}/{key}"
    if not key.endswith(".arrow"):
        packed = storage.read(key)
        batch = _batch([_values(row)[0] for row in read_rows(packed, spec, where, are_earlier=True)], spec.kind)
        return StoredRows([batch], spec.kind, hashlib.sha256(packed).hexdigest())
    import pyarrow as pa

    content, sha256 = _fetched(storage, key, where)
    if sha256 != key.rpartition("-")[2].removesuffix(".arrow"):
        raise Corrupt(f"has sha256 {sha256[:12]}…, not what its name says", where, "submit the task again")
    reader = pa.ipc.open_file(content)
    return StoredRows([reader.get_batch(number) for number in range(reader.num_record_batches)], spec.kind, sha256)


def _fetched(storage: Storage, key: str, where: str) -> tuple[Any, str]:
    """The object as an Arrow buffer, in memory when it is small, else mapped; and its digest."""
    import pyarrow as pa

    piece = storage.view(key, 0, PIECE)
    if isinstance(piece.obj, mmap.mmap):  # a storage that maps its files: the whole takes no memory either
        piece = storage.view(key)
    elif len(piece) == PIECE:
        return _downloaded(storage, key, piece, where)
    return pa.py_buffer(piece), hashlib.sha256(piece).hexdigest()


def _downloaded(storage: Storage, key: str, piece: memoryview, where: str) -> tuple[Any, str]:
    """As `_fetched`, through a temporary file that has no name any more; `piece` is the first."""
    import pyarrow as pa

    digest = hashlib.sha256(piece)
    with _space_needed(where), tempfile.NamedTemporaryFile(prefix="onebasis-rows-") as file:
        file.write(piece)
        while len(piece) == PIECE:
            piece = storage.view(key, file.tell(), PIECE)
            digest.update(piece)
            file.write(piece)
        file.flush()
        return pa.memory_map(file.name).read_buffer(), digest.hexdigest()


class Rows(Sequence[Row]):
    """Rows that are made when they are asked for; a subclass says how many there are, and makes one."""

    def row(self, at: int) -> Row:
        """The row at a place from 0."""
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        return self.row(range(len(self))[index])  # from the end where negative; IndexError


class SomeRows(Rows):
    """Some of other rows, by their places, in this order."""

    def __init__(self, rows: Sequence[Row], places: Sequence[int]) -> None:
        self._rows, self._places = rows, places

    def __len__(self) -> int:
        return len(self._places)

    def row(self, at: int) -> Row:
        return self._rows[self._places[at]]


class StoredRows(Rows):
    """Frozen rows, made one by one from Arrow batches."""

    def __init__(self, batches: Sequence[Any], kind: Kind, sha256: str) -> None:
        self.sha256 = sha256
        """Digest of the stored file."""
        self._columns = [batch.columns for batch in batches]
        self._ends = list(itertools.accumulate(batch.num_rows for batch in batches))
        makers: dict[Kind, Callable[..., Row]] = {"causal_lm": _completion, **dict.fromkeys(IMAGE_KINDS, _image)}
        self._make = makers.get(kind, TextRow)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def row(self, at: int) -> Row:
        batch = bisect_right(self._ends, at)
        inside = at - (self._ends[batch - 1] if batch else 0)
        return self._make(*(column[inside].as_py() for column in self._columns[batch]))

    def __iter__(self) -> Iterator[Row]:
        for columns in self._columns:
            for values in zip(*(column.to_pylist() for column in columns), strict=True):
                yield self._make(*values)


class EvaluationRows(Rows):
    """All evaluation rows of a task: those that the revisions before it brought, oldest first, and its own.

    Args:
        task_id: Of the task.
        brought: Id of each of these revisions, and of the task itself, to its rows.
    """

    def __init__(self, task_id: str, brought: Mapping[str, StoredRows]) -> None:
        self._rows = tuple(brought.values())
        self._ends = list(itertools.accumulate(map(len, self._rows)))
        starts = [0, *self._ends]
        places = {one: slice(*ends) for one, *ends in zip(brought, starts, self._ends, strict=False)}
        self.of_revisions: Mapping[str, slice] = {} if [*brought] == [task_id] else places
        """Id of the revision that brought them to the places of its rows; empty where all are the task's own."""
        digests = [rows.sha256 for rows in self._rows]
        self.sha256 = digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()
        """Digest of the stored files."""

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def row(self, at: int) -> Row:
        part = bisect_right(self._ends, at)
        return self._rows[part].row(at - (self._ends[part - 1] if part else 0))

    def __iter__(self) -> Iterator[Row]:
        return itertools.chain(*self._rows)


def open_evaluation_rows(
    storage: Storage, task_id: str, key: str, earlier: Mapping[str, str], spec: TaskSpec
) -> EvaluationRows:
    """All evaluation rows of a task.

    Args:
        key: Of its own rows; empty without any.
        earlier: Id of each revision before it to the key of its rows, oldest first.

    Raises:
        NotFound, Corrupt, Unavailable: See `open_rows`.
    """
    keys = {**earlier, **({task_id: key} if key else {})}
    return EvaluationRows(task_id, {brought_by: open_rows(storage, at, spec) for brought_by, at in keys.items()})


class _Writer:
    """Rows on their way into a temporary file.

    Args:
        source: File or folder that they come from.
    """

    def __init__(self, spec: TaskSpec, source: Path | None) -> None:
        self.file: Any = tempfile.SpooledTemporaryFile(SPOOLED_BYTES)  # noqa: SIM115 (FrozenTask.close)
        self.count = 0
        self._spec, self._source = spec, source
        self._labels: Counter[Any] = Counter()
        self._inputs = Labelled()
        self.varies = False
        """Whether there are two labels that differ."""
        self._first = b""
        self._digest = hashlib.sha256()
        self._rows: list[tuple[Any, ...]] = []
        self._bytes = 0
        self._out: Any = None

    def add(self, row: Row, digest: bytes, read: int) -> None:
        """Take a row, its `input_digest`, and the number of its input as it is read."""
        values, size = _values(row)
        label = label_of(row)
        self._digest.update(digest + repr(label).encode())
        self._inputs.add(read, label if isinstance(label, int) else 0)
        if isinstance(label, int):
            self._labels[label] += 1
        if not self.varies and label is not None:
            numbers = label if isinstance(label, tuple) else (label,)
            seen = struct.pack(f"{len(numbers)}f", *(number + 0.0 for number in numbers))  # as scored; −0.0 is 0.0
            self._first = self._first or seen
            self.varies = seen != self._first
        self._rows.append(values)
        self._bytes += size
        self.count += 1
        if self._bytes >= BATCH_BYTES or len(self._rows) >= BATCH_ROWS:
            self._flush()

    def finish(self) -> FrozenRows:
        self._flush()
        self._out.close()
        self.file.seek(0)
        names = self._spec.data.label_names
        return FrozenRows(
            self.file,
            hashlib.file_digest(self.file, "sha256").hexdigest(),
            self._digest.hexdigest(),
            self.count,
            {name: self._labels[index] for index, name in enumerate(names)},
            constant_score(self._spec.metric, [self._labels[index] for index in range(len(names))]),
            *self._inputs.counts(),
        )

    def _flush(self) -> None:
        import pyarrow as pa

        batch = _batch(self._rows, self._spec.kind)
        self._out = self._out or pa.ipc.new_file(self.file, batch.schema)
        self._out.write_batch(batch)
        self._rows, self._bytes = [], 0
        if self._source and self.file.tell() > UNPACKED_BYTES_FREE:
            check_unpacked(self.file.tell(), size_bytes(self._source), str(self._source))
        if self.file.tell() > FROZEN_BYTES_MAX:
            raise InvalidInput(f"the rows are more than {FROZEN_BYTES_MAX} bytes", "data", "submit fewer rows")


def _schema(kind: Kind) -> Any:
    import pyarrow as pa

    turn = pa.struct([("role", pa.string()), ("content", pa.string())])
    picture = [("picture", pa.binary()), ("shape", pa.list_(pa.int32()))]  # an encoded picture has no shape
    columns: dict[Kind, list[tuple[str, Any]]] = {
        "sequence_classification": [("text", pa.string()), ("text_pair", pa.string()), ("label", pa.int64())],
        "sequence_regression": [("text", pa.string()), ("text_pair", pa.string()), ("label", pa.float64())],
        "causal_lm": [("turns", pa.list_(turn)), ("is_chat", pa.bool_())],
        "image_classification": [*picture, ("label", pa.int64())],
        "image_regression": [*picture, ("label", pa.list_(pa.float64()))],
        "image_text": [*picture, ("label", pa.int64())],
    }
    return pa.schema(columns[kind])


def _batch(rows: Sequence[tuple[Any, ...]], kind: Kind) -> Any:
    import pyarrow as pa

    schema = _schema(kind)
    columns = zip(*rows, strict=True) if rows else ((),) * len(schema)
    arrays = [pa.array(column, type_) for column, type_ in zip(columns, schema.types, strict=True)]
    return pa.record_batch(arrays, schema=schema)


def _values(row: Row) -> tuple[tuple[Any, ...], int]:
    """A row as values of the schema's columns, and about how many bytes they take."""
    match row:
        case TextRow():
            return (row.text, row.text_pair, row.label), len(row.text) + len(row.text_pair or "") + 16
        case CompletionRow():
            turns = [{"role": role, "content": content} for role, content in row.turns]
            return (turns, row.is_chat), sum(len(content) + 16 for _, content in row.turns)
        case ImageRow():
            content = row.encoded or row.image.tobytes()
            return (content, [] if row.encoded else list(row.image.shape), row.label), len(content) + 32


def _completion(turns: Sequence[Mapping[str, str]], is_chat: bool) -> Row:
    return CompletionRow(tuple((turn["role"], turn["content"]) for turn in turns), is_chat)


def _image(content: bytes, shape: Sequence[int], said: int | Sequence[float]) -> Row:
    import numpy as np

    label = said if isinstance(said, int) else tuple(said)
    if not shape:
        return ImageRow(decode_picture(content, "a frozen row"), label, content)
    return ImageRow(np.frombuffer(content, np.uint8).reshape(shape), label)


@contextlib.contextmanager
def _space_needed(what: str) -> Iterator[None]:
    """Report an OSError as a lack of space: all others of the file system are reported elsewhere."""
    try:
        yield
    except OSError as error:
        raise Unavailable(f"no temporary file for {what}: {error}", tempfile.gettempdir(), "make space") from error


def _some(writer: _Writer, where: str, todo: str, side: str = "") -> None:
    if not writer.count:
        raise InvalidInput(f"has no rows{side}", where, todo)


def _number(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "big")
