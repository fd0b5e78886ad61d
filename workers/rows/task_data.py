"""Rows of every kind of task: their types, and the check of each row of a file.

Light on purpose (no torch, no transformers, numpy and pictures only for pictures): the control plane checks every
submission with it. Files are read by row_files.py, labels interpreted by labels.py, rows kept by frozen_rows.py;
tokenising happens batch by batch while training, so that the first step does not wait for the whole file.
"""

from __future__ import annotations

import base64
import hashlib
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import InvalidInput
from configs.places import OpenFile, open_anywhere
from configs.plain_text import visible
from configs.task_spec import DataSpec, TaskSpec
from workers.rows.columns import (
    NOTHING,
    OF_MESSAGES,
    Columns,
    GivenAway,
    Quotes,
    Unread,
    Values,
    check_columns,
    check_different,
)
from workers.rows.labels import Labels, earlier_index, is_missing, missing
from workers.rows.row_files import read_file, read_json_lines
from workers.rows.text_lines import numbered_lines

if TYPE_CHECKING:
    from numpy import uint8
    from numpy.typing import NDArray

PICTURE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""Picture formats that are decoded; some of the others start other programs."""
GRAY_MODES = ("1", "L")
COLOUR_MODES = ("P", "PA", "LA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
PIXELS_MAX = 89_478_485
"""Most pixels of one picture, Pillow's own limit: a few kilobytes of PNG unpack to gigabytes."""
SIDES_MAX = 200
"""Most times that a picture may be longer than it is wide, or the other way round. Many image processors bring the
shorter side to their size: of 1×80,000,000 pixels they would make 224×17,920,000,000. The number is Qwen2-VL's."""
TEXT_CHARACTERS_MAX = 2**22
"""Most characters of one text in any format: eight times what data.max_length allows, at four characters a token. A
tokenizer takes a hundred bytes and a microsecond for each, before it truncates."""
NORMALISED_MAX = 2**14
"""Most characters of a text that is brought into form NFKC: Python's takes the square of a run of combining marks."""
MESSAGES_MAX = 4096
"""Most messages of one chat."""
FLOAT32_MAX = 3.4e38


Label = int | float | tuple[float, ...]
"""An index into the task's label_names, a number, or a number for each of them."""


@dataclass(frozen=True)
class TextRow:
    """One text, or two, with its label."""

    text: str
    text_pair: str | None
    label: int | float
    """Index into the task's label_names; for sequence_regression a finite number."""


TEXT_COLUMNS = ("text_column", "text_pair_column", "prompt_column", "completion_column")
"""Keys that name columns of texts."""
Turn = tuple[str, str]
"""(role, content) of one message; the role is `system`, `user` or `assistant`."""
ROLES = ("system", "user", "assistant")
UNREAD_KEYS = ("tool_calls", "function_call", "reasoning_content", "thinking")
"""Keys of a message that a chat template would write beside the content, and which are not kept: without them another
chat would be learnt."""


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
    label: int | tuple[float, ...]
    """Index into the task's label_names; for image_regression a finite number for each of them."""
    encoded: bytes = field(default=b"", repr=False)
    """The file that the picture was decoded from, if it came as one: kept instead of ten times as many pixels."""


Row = TextRow | CompletionRow | ImageRow
UNANSWERED = "?"
"""The last turn of a question, at which nobody looks: chat templates refuse an empty one."""


Complaint = Callable[[Row], str]
"""Why a base model cannot read a row; empty where it can."""


def rows_in(
    path: Path,
    spec: TaskSpec,
    open_file: OpenFile = open_anywhere,
    complaint: Complaint = lambda row: "",
    unread: Unread | None = None,
) -> Iterator[Row]:
    """The rows of a file of any format, each checked; the file is never in memory.

    Args:
        unread: Takes what is not read: names of columns and of keys of messages, earlier answers.

    Raises:
        InvalidInput: See `read_file`; or a value is missing, of the wrong type, empty, out of range or unknown; or the
            base model cannot read the row. Names the file and the row, counted from 1.
    """
    labels, columns, unread = Labels(spec.data.label_names), columns_of(spec), unread or Unread()
    make, given = _maker(spec, labels.index), GivenAway()
    check_different(columns)
    quotes = {columns[key]: Quotes() for key in TEXT_COLUMNS if key in columns}
    for where, values in read_file(path, columns, open_file, unread):
        row = _made(make, values, where)
        for column, found in quotes.items():
            found.meet(values[column])
        if not isinstance(row, ImageRow):
            given.meet(_inputs_of(row), _answer_of(row, spec.data))
            unread.damage.meet(parts_of(row), where)
        if messages := columns.get("messages_column"):
            unread.meet(columns, _other_keys(values[messages], messages), where)
            if sum(message["role"] == "assistant" for message in values[messages]) > 1:
                unread.meet_answers(where)
        if said := complaint(row):
            raise InvalidInput(said, where, "mend the row, or drop it")
        yield row
    unread.numbered_labels |= labels.are_numbered
    for column, found in quotes.items():
        unread.meet_quotes(column, found, str(path))
    unread.meet_given_away(given, str(path))


def read_rows(content: bytes, spec: TaskSpec, where: str = "rows", are_earlier: bool = False) -> tuple[Row, ...]:
    """The rows of a file of JSON lines, gzipped or not, that is in memory.

    Args:
        are_earlier: Release 0.3 froze them: their labels are read as it did.

    Raises:
        InvalidInput: See `rows_in`; or there are none.
    """
    names = spec.data.label_names
    make = _maker(spec, (lambda value, *_: earlier_index(value, names)) if are_earlier else Labels(names).index)
    lines = numbered_lines(BytesIO(content), where)
    rows = tuple(
        _made(make, values, place) for place, values in read_json_lines(lines, where, columns_of(spec), Unread())
    )
    if not rows:
        raise InvalidInput("has no rows", where, "give at least one row")
    return rows


def questions_in(
    path: Path, spec: TaskSpec, open_file: OpenFile = open_anywhere, unread: Unread | None = None
) -> Iterator[Row]:
    """The rows of a file of any format without what they should be answered: labels and completions need not be there.

    Raises:
        InvalidInput: See `rows_in`.
    """
    columns, make = inputs_of(spec), _asker(spec)
    check_different(columns)
    for where, values in read_file(path, columns, open_file, unread or Unread()):
        yield _made(make, values, where)


def question(values: Values, spec: TaskSpec, where: str) -> Row:
    """One row to be answered, of values by the names of the task's columns.

    Raises:
        InvalidInput: A value is missing, of the wrong type, empty, or there is one that is not read.
    """
    columns = inputs_of(spec)
    if others := sorted(values.keys() - set(columns.values())):
        raise InvalidInput(
            f"has {', '.join(f'{name!r:.100}' for name in others)}, which the task does not read",
            where,
            f"give {' and '.join(columns.values())}",
        )
    check_columns(columns, values, where)
    return _made(_asker(spec), values, where)


def question_of(row: Row) -> dict[str, Any]:
    """The inputs of a row by their canonical names, as JSON values; a picture as its file, in base64."""
    match row:
        case TextRow():
            return {"text": row.text} | ({} if row.text_pair is None else {"text_pair": row.text_pair})
        case CompletionRow(is_chat=True):
            return {"messages": [{"role": role, "content": content} for role, content in row.turns[:-1]]}
        case CompletionRow():
            return {"prompt": row.turns[0][1]}
    return {"image": base64.b64encode(row.encoded or _as_png(row.image)).decode()}


def _as_png(pixels: NDArray[uint8]) -> bytes:
    from PIL import Image

    buffer = BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(buffer, "PNG")
    return buffer.getvalue()


def inputs_of(spec: TaskSpec) -> Columns:
    """As `columns_of`, without the answer's."""
    answers = {"label_column", "completion_column"}
    return {key: name for key, name in columns_of(spec).items() if key not in answers}


def columns_of(spec: TaskSpec) -> Columns:
    """The columns that rows of the task must have, by the key that names each."""
    data = spec.data
    match spec.kind:
        case "causal_lm" if data.messages_column:
            keys = ["messages_column"]
        case "causal_lm":
            keys = ["prompt_column", "completion_column"]
        case "image_classification" | "image_regression" | "image_text":
            keys = ["image_column", "label_column"]
        case _:
            keys = ["text_column", *(["text_pair_column"] if data.text_pair_column else []), "label_column"]
    return {key: str(getattr(data, key)) for key in keys}


def input_digest(row: Row) -> bytes:
    """A digest of all of a row but its label, the same whichever file it came from."""
    if isinstance(row, ImageRow):
        return hashlib.sha256(str(row.image.shape).encode() + row.image.tobytes()).digest()
    return _digest_of(parts_of(row))


def likenesses(row: Row, digest: bytes) -> tuple[bytes, bytes]:
    """Two more digests of a row's input: of its texts as they are read (`as_read`), and of that in small letters.

    They are for finding rows that are the same to a reader. What is kept is identified by `input_digest`, whatever
    later releases call the same.

    Args:
        digest: Its `input_digest`, which is also that of a picture's likenesses.
    """
    if isinstance(row, ImageRow):
        return digest, digest
    parts = parts_of(row)
    read = [as_read(part) for part in parts]
    folded = [part.casefold() for part in read]
    alike = digest if read == parts else _digest_of(read)
    return alike, alike if folded == read else _digest_of(folded)


def as_read(text: str) -> str:
    """A text as a reader sees it: in Unicode's form NFKC, one space in the place of any white space and none around it,
    without characters that show nothing."""
    if not text.isascii():
        text = visible(unicodedata.normalize("NFKC", text) if len(text) <= NORMALISED_MAX else text)
    return " ".join(text.split())


def parts_of(row: TextRow | CompletionRow) -> list[str]:
    """The texts of a row, and what tells rows of the same texts apart."""
    if isinstance(row, TextRow):
        return [row.text] if row.text_pair is None else [row.text, row.text_pair]
    return [str(row.is_chat), *(part for turn in row.turns for part in turn)]


def _digest_of(parts: Sequence[str]) -> bytes:
    # The lengths say where each part ends, so that different rows never give the same text.
    return hashlib.sha256("".join([*(f"{len(part)} " for part in parts), "\n", *parts]).encode()).digest()


def _inputs_of(row: TextRow | CompletionRow) -> list[str]:
    """The texts that the model is given."""
    return parts_of(row) if isinstance(row, TextRow) else [text for _, text in row.turns[:-1]]


def _answer_of(row: TextRow | CompletionRow, data: DataSpec) -> tuple[str, ...]:
    """What the model should answer, as a column of answers may write it, in small letters."""
    if isinstance(row, CompletionRow):
        return (row.completion.strip().casefold(),)
    label = row.label
    return (f"{label:g}", str(label)) if isinstance(label, float) else (str(label), data.label_names[label].casefold())


def label_of(row: Row) -> Label | None:
    """The label; None for rows that have none."""
    return None if isinstance(row, CompletionRow) else row.label


def decode_picture(content: bytes, where: str) -> NDArray[uint8]:
    """The pixels of an encoded picture, H×W×C; C is 1 for gray ones, else 3, without transparency.

    Raises:
        InvalidInput: Not a picture of a format that is known, damaged, or too large.
    """
    import numpy as np
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(BytesIO(content), formats=PICTURE_FORMATS) as picture:
            _check_size(picture.width, picture.height, where)
            if picture.mode not in GRAY_MODES + COLOUR_MODES:
                raise InvalidInput(
                    f"is a picture of mode {picture.mode}; pixels must have 8 bits", where, "save it as 8-bit PNG"
                )
            upright = ImageOps.exif_transpose(picture)  # cameras store the rotation beside the pixels
            pixels = np.asarray(upright.convert("L" if picture.mode in GRAY_MODES else "RGB"))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InvalidInput(f"is too large a picture: {error}", where, "make it smaller") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what Pillow's decoders raise on damaged files
        reason = "" if isinstance(error, UnidentifiedImageError) else f" ({error})"
        raise InvalidInput(
            f"is not a picture that can be decoded{reason}", where, f"formats: {', '.join(PICTURE_FORMATS)}"
        ) from error
    return pixels.reshape(*pixels.shape[:2], -1)


def _check_size(width: int, height: int, where: str) -> None:
    if width * height > PIXELS_MAX:
        raise InvalidInput(
            f"is too large a picture: {width}×{height} pixels, more than {PIXELS_MAX}", where, "make it smaller"
        )
    if max(width, height) > SIDES_MAX * min(width, height):
        raise InvalidInput(
            f"is too long a picture: of {width}×{height} pixels one side is more than {SIDES_MAX} times the other",
            where,
            "cut it into parts, or drop the row",
        )


Make = Callable[[Values, str], Row]
LabelIndex = Callable[[Any, str, str], int]
"""As `Labels.index`."""


def _made(make: Make, values: Values, where: str) -> Row:
    try:
        return make(values, where)
    except RecursionError as error:
        raise InvalidInput("holds lists in lists, too deep to be read", where, "drop the row") from error


def _maker(spec: TaskSpec, index: LabelIndex) -> Make:
    """What makes a row of checked values of the task's kind."""
    data = spec.data
    match spec.kind:
        case "causal_lm" if data.messages_column:
            return lambda values, where: _chat(values, str(data.messages_column), where)
        case "causal_lm":
            return lambda values, where: CompletionRow(
                (
                    ("user", _text(values, data.prompt_column, where)),
                    ("assistant", _text(values, data.completion_column, where)),
                ),
                is_chat=False,
            )
        case "sequence_regression":
            return lambda values, where: TextRow(*_texts(values, data, where), _number(values, data, where))
    if spec.kind in ("image_classification", "image_text"):
        return lambda values, where: _picture(values, data, index, where)
    if spec.kind == "image_regression":
        return lambda values, where: _picture(values, data, partial(_numbers, len(data.label_names)), where)
    return lambda values, where: TextRow(
        *_texts(values, data, where), index(values[data.label_column], data.label_column, where)
    )


def _asker(spec: TaskSpec) -> Make:
    """As `_maker`, of values without an answer."""
    data = spec.data
    if spec.kind == "causal_lm" and data.messages_column:
        column = data.messages_column
        return lambda values, where: _asked_chat(values, column, where)
    none = [0.0] * len(data.label_names) if spec.kind == "image_regression" else 0
    nothing: Values = {data.label_column: none, data.completion_column: UNANSWERED}
    make = _maker(spec, lambda *_: 0)
    return lambda values, where: make({**nothing, **values}, where)


def _asked_chat(values: Values, column: str, where: str) -> CompletionRow:
    """A chat that waits for the assistant; an answer at its end, as rows to learn from have it, is left out."""
    messages = values[column]
    if isinstance(messages, list) and messages and isinstance(messages[-1], dict):
        is_answered = messages[-1].get("role") == "assistant"
        messages = [*(messages[:-1] if is_answered else messages), {"role": "assistant", "content": UNANSWERED}]
    return _chat({column: messages}, column, where)


def _texts(values: Values, data: DataSpec, where: str) -> tuple[str, str | None]:
    pair = data.text_pair_column
    return _text(values, data.text_column, where), _text(values, pair, where) if pair else None


def _text(values: Values, column: str, where: str) -> str:
    return _checked_text(values[column], f"column '{column}'", where)


def _checked_text(text: Any, name: str, where: str) -> str:
    if not isinstance(text, str):
        raise InvalidInput(f"{name} must be a string, not {type(text).__name__}", where, "give a text, or drop the row")
    if len(text) > TEXT_CHARACTERS_MAX:
        raise InvalidInput(
            f"{name} has {len(text)} characters, more than {TEXT_CHARACTERS_MAX}", where, "shorten it, or drop the row"
        )
    if not visible(text):
        raise InvalidInput(f"{name} is empty", where, "drop the row or fill in the text")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can write half of a character
            raise InvalidInput(
                f"{name} is no Unicode text: {error}", where, "write characters, not surrogates"
            ) from None
    return text


def _number(values: Values, data: DataSpec, where: str) -> float:
    return _finite(values[data.label_column], data.label_column, where)


def _numbers(count: int, given: Any, column: str, where: str) -> tuple[float, ...]:
    """The numbers of a label that is a list of them, or of points."""
    label = given.tolist() if hasattr(given, "tolist") else given
    if is_missing(label) and not isinstance(label, list):
        raise missing(column, where, label)
    parts = label if isinstance(label, list) else [label]
    are_points = bool(parts) and all(isinstance(part, list) and len(part) == 2 for part in parts)
    flat = [number for point in parts for number in point] if are_points else parts
    if len(flat) != count:
        raise InvalidInput(
            f"column '{column}' has {len(flat)} numbers, and data.label_names are {count}",
            where,
            "give a list with one number for each name, in their order",
        )
    return tuple(_finite(number, column, where) for number in flat)


def _finite(label: Any, column: str, where: str) -> float:
    name = f"column '{column}'"
    if is_missing(label) and not isinstance(label, float | Decimal):  # what is not a number is reported below
        raise missing(column, where, label)
    if not isinstance(label, int | float | str | Decimal) or isinstance(label, bool):
        raise InvalidInput(
            f"{name} must be a number, not {type(label).__name__}", where, "write a number with a point, like 3.5"
        )
    try:
        number = float(label.replace("_", "?") if isinstance(label, str) else label)  # Python reads 1_2 as 12
    except (ValueError, OverflowError):
        raise InvalidInput(
            f"{name} must be a number, not {label!r:.100}", where, "write a number with a point, like 3.5"
        ) from None
    if not abs(number) <= FLOAT32_MAX:  # nor NaN
        raise InvalidInput(f"{name} is {number}", where, "drop the row or give a finite number that float32 holds")
    return number


def _chat(values: Values, column: str, where: str) -> CompletionRow:
    messages = values[column]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise InvalidInput(
            f"column '{column}' must be a list of {{role, content}}, not {type(messages).__name__}",
            where,
            'write [{"role": "user", "content": …}, {"role": "assistant", "content": …}]',
        )
    if len(messages) > MESSAGES_MAX:
        raise InvalidInput(
            f"column '{column}' has {len(messages)} messages, more than {MESSAGES_MAX}", where, "cut the chat in parts"
        )
    turns = []
    for number, message in enumerate(messages, start=1):
        name = f"message {number} of column '{column}'"
        if missing := {"role", "content"} - message.keys():
            raise InvalidInput(f"{name} has no {' and no '.join(sorted(missing))}", where, "write {role, content}")
        if (role := message["role"]) not in ROLES:
            said = f"{role!r:.100}" if isinstance(role, str) else f"of type {type(role).__name__}"
            raise InvalidInput(f"{name} has the role {said}", where, f"roles are: {', '.join(ROLES)}")
        if unread := [key for key in UNREAD_KEYS if message.get(key)]:
            raise InvalidInput(
                f"{name} has {unread[0]}, which is not read", where, "write what is to be learnt into content"
            )
        turns.append((message["role"], _checked_text(message["content"], name, where)))
    if len(turns) < 2 or turns[-1][0] != "assistant":
        last = f"is the {turns[-1][0]}'s" if len(turns) > 1 else f"is one of {len(turns)}"
        raise InvalidInput(
            f"the last message of column '{column}' {last}",
            where,
            "it is what the model learns to answer: end with the assistant's, after at least one other",
        )
    return CompletionRow(tuple(turns), is_chat=True)


def _other_keys(messages: Sequence[Mapping[str, Any]], column: str) -> Iterator[str]:
    """Names of what messages hold beside role and content."""
    for message in messages:
        others = message.keys() - {"role", "content"}
        yield from (f"{column}{OF_MESSAGES}{key}" for key in sorted(others) if message[key] not in NOTHING)


def _picture(
    values: Values, data: DataSpec, index: Callable[[Any, str, str], int | tuple[float, ...]], where: str
) -> ImageRow:
    label = index(values[data.label_column], data.label_column, where)
    picture, name = values[data.image_column], f"column '{data.image_column}'"
    if isinstance(picture, dict):  # as `datasets` keeps them
        if not isinstance(picture.get("bytes"), bytes):
            raise InvalidInput(
                f"{name} names a file ({picture.get('path')!r:.200}) and does not hold it",
                where,
                "embed the pictures: datasets does so in to_parquet; files that rows name are not opened",
            )
        picture = picture["bytes"]
    if isinstance(picture, bytes):
        return ImageRow(decode_picture(picture, f"{where}, {name}"), label, picture)
    return ImageRow(_pixels(picture, name, where), label)


def _pixels(picture: Any, name: str, where: str) -> NDArray[uint8]:
    import numpy as np

    if not isinstance(picture, np.ndarray | list):
        raise InvalidInput(
            f"{name} must be pixels or a picture's bytes, not {type(picture).__name__}",
            where,
            "embed the pictures; files that rows name are not opened",
        )
    try:
        pixels = np.asarray(picture)
    except ValueError as error:
        raise InvalidInput(f"{name} has rows of several lengths", where, "pixels are H×W or H×W×C") from error
    if (
        isinstance(picture, list)
        and pixels.dtype.kind == "i"
        and pixels.size
        and 0 <= pixels.min() <= pixels.max() <= 255
    ):
        pixels = pixels.astype(np.uint8)
    if pixels.dtype != np.uint8:
        raise InvalidInput(
            f"{name} must be uint8, whole numbers from 0 to 255, not {pixels.dtype}",
            where,
            "do not scale or normalise pixels: the model's own preprocessing does",
        )
    shape = pixels.shape if pixels.ndim != 2 else (*pixels.shape, 1)
    if len(shape) != 3 or shape[2] not in (1, 3) or 0 in shape:
        raise InvalidInput(
            f"{name} has shape {pixels.shape}", where, "pixels are H×W, H×W×1 or H×W×3: colours come last"
        )
    _check_size(shape[1], shape[0], f"{where}, {name}")
    return pixels.reshape(shape)
