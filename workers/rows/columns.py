"""What the rows of every format have in common: the columns that they must have, and how large one may be."""

from __future__ import annotations

import difflib
import itertools
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from configs.errors import InvalidInput

ROW_BYTES_MAX = 64 * 2**20
"""Most bytes of one row. Compressed zeros or one huge value would else be read into memory whole."""
LINE_CHARACTERS_MAX = 2**24
"""Most characters of one line of a text file, and of one row of a table in it. A line parsed as JSON takes up to sixty
times as many bytes."""
ROWS_FREE = 100_000
"""Rows that a file of any size may have. Beyond them, it has at most one for each of its bytes: the texts of real rows
differ, and cannot be compressed so far. Checking a row takes about 10 µs, and 42 kB of parquet could hold ten
million."""
UNPACKED_BYTES_FREE = 2**26
UNPACKED_RATIO_MAX = 200
"""A compressed file may unpack to `UNPACKED_BYTES_FREE`, and beyond that to this many times its size. Tables of
examples compress to a third or a tenth, with one long prompt in every row to a fiftieth; a kilobyte can hold a megabyte
of zeros."""
COLUMNS_MAX = 10_000
SHOWN_NAMES = 20
SHOWN_CHARACTERS = 100
NEAR_NAMES_MAX = 200
"""Number of names that are searched for one that resembles a wrong one."""

UNREAD_MAX = 1000
"""Most names of unread columns that are remembered: each row of JSON lines may have others."""
PARTS_OF_INPUTS = (
    "tools", "functions", "documents", "system", "system_prompt", "instruction", "input", "context", "history",
    "question", "passage", "premise", "hypothesis", "text_pair", "sentence1", "sentence2",
)  # fmt: skip
"""Names of columns which in common formats are a part of what the model is given."""
OF_MESSAGES = "[]."
"""Mark in the name of a key of messages, `messages[].name`: chat templates may write any of them."""
QUOTES = {"'": "'", '"': '"', "`": "`", "‘": "’", "“": "”", "„": "“", "«": "»"}
"""Marks around a quotation, each with the one that ends it."""
NOTHING: tuple[Any, ...] = (None, "", [], {})
"""Values that say nothing."""

Values = Mapping[str, Any]
Columns = Mapping[str, str]
"""Key of the task file's section `data` to the column that it names."""


class Quotes:
    """Quotes that stand around every text of a column: of a program that writes a field in others than double ones, or
    puts it into quotes twice."""

    def __init__(self) -> None:
        self._rows = 0
        self._mark = ""

    def meet(self, text: str) -> None:
        """Take the text of the next row."""
        if not self._rows or self._mark:
            text = text.strip()
            is_quoted = len(text) > 1 and QUOTES.get(text[0]) == text[-1]
            self._mark = text[0] if is_quoted and self._mark in ("", text[0]) else ""
            self._rows += 1

    @property
    def around_all(self) -> str:
        """The opening and the closing mark; empty unless all texts have them, and there are several."""
        return f"{self._mark}…{QUOTES[self._mark]}" if self._mark and self._rows > 1 else ""


class GivenAway:
    """Rows whose input says the answer: a column of labels, or a copy of one, is read as a text."""

    def __init__(self) -> None:
        self._rows = self._count = 0

    def meet(self, texts: Iterable[str], answer: Collection[str]) -> None:
        """Take the texts of the next row's input, and its answer as it may be written, in small letters."""
        longest = max(map(len, answer), default=0)
        self._rows += 1
        self._count += any(len(text) <= longest + 2 and text.strip().casefold() in answer for text in texts)

    def told(self, path: str) -> Iterator[str]:
        """A sentence where half of a file's rows or more are so, and there are several."""
        if self._rows > 1 and self._count >= self._rows / 2:
            yield (
                f"in {self._count} of {self._rows} rows of {path} a text of the input is the answer itself: the score "
                "would say that the model can copy it → name another column in data"
            )


_BETWEEN = "\x80-\xbf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"
"""The bytes 80 to BF, which begin no character of UTF-8, read as Latin-1 or Windows-1252."""
MISREAD = re.compile(
    # Not what may follow a capital à at a word's end: quotes, dashes, dots.
    "Ã[\x80-\x9f¡-ª¬-º¼-¿€ƒˆ‰ŠŒŽ˜™šœžŸ]|Â[\x80-ª¬-º¼-¿]|â€|â\x80|ðŸ|ð\x9f|ï»¿" + f"|(?:[ÐÑ][{_BETWEEN}]){{2}}"
)
"""UTF-8 that was read as Latin-1 or Windows-1252: `Ã©` for é, `â€™` for ’."""
LOST = "\ufffd"
"""What programs write in the place of bytes that they could not read."""


class Damage:
    """Texts of a file that were damaged before they came here."""

    def __init__(self) -> None:
        self._rows: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def meet(self, texts: Iterable[str], where: str) -> None:
        """Take the texts of the next row."""
        texts = [text for text in texts if not text.isascii()]
        if any(LOST in text for text in texts):
            self._take("", where)
        if found := next((found for text in texts if (found := MISREAD.search(text))), None):
            self._take(found[0], where)

    def _take(self, found: str, where: str) -> None:
        kind = "misread" if found else "lost"
        self._rows[kind] += 1
        self._first.setdefault(kind, f"first in {where}" + (f": {found!r}" if found else ""))

    def told(self) -> Iterator[str]:
        """Sentences for the owner of the task."""
        for kind, (what, todo) in {
            "misread": (
                "what looks like UTF-8 read as Latin-1 or Windows-1252",
                "read the original as UTF-8 and save it again",
            ),
            "lost": (
                "the character U+FFFD, which programs write for bytes that they could not read: those are lost",
                "read the original in its own encoding and save it as UTF-8",
            ),
        }.items():
            if count := self._rows[kind]:
                rows = "1 row has" if count == 1 else f"{count:,} rows have"
                yield f"{rows} {what} ({self._first[kind]}) → {todo}"


class Unread:
    """What files have and the task does not read, or not as it may be meant: columns that it does not name, lines
    inside a field that look like rows, answers before a chat's last, quotes around every text of a column, texts that
    were damaged before, inputs that say the answer. Each with the place where it was met first."""

    def __init__(self) -> None:
        self.damage = Damage()
        self.numbered_labels = False
        """Whether a file says its labels by index."""
        self._places: dict[str, str] = {}
        self._lines = self._answers = 0
        self._first_lines = self._first_answers = ""
        self._quoted: list[str] = []
        self._given_away: list[str] = []

    def meet(self, columns: Columns, names: Iterable[str], where: str) -> None:
        """Take the names of a file's or a row's columns."""
        if len(self._places) < UNREAD_MAX:
            for name in names:
                if name not in self._places and name not in columns.values():
                    self._places[name] = where

    def meet_lines(self, count: int, where: str) -> None:
        """Take the number of lines inside one field that look like rows of their own."""
        self._first_lines = self._first_lines or where
        self._lines += count

    def meet_answers(self, where: str) -> None:
        """Take a chat in which the assistant answers more than once."""
        self._first_answers = self._first_answers or where
        self._answers += 1

    def meet_quotes(self, column: str, quotes: Quotes, path: str) -> None:
        """Take what is around the texts of a column of a file, when all its rows were read."""
        if quotes.around_all:
            self._quoted.append(
                f"every text of the column {shown([column])} in {path} stands in quotes, {quotes.around_all}: they are "
                "read as a part of the text → if they are not meant, take them away: around a field of a table only "
                "double quotes are taken off"
            )

    def meet_given_away(self, given: GivenAway, path: str) -> None:
        """Take how many inputs of a file say their answers, when all its rows were read."""
        self._given_away += given.told(path)

    def told(self) -> Iterator[str]:
        """Sentences for the owner of the task; none where all is read."""
        yield from self._given_away
        yield from self.damage.told()
        yield from self._quoted
        if self._answers:
            chats = "1 chat has" if self._answers == 1 else f"{self._answers:,} chats have"
            yield (
                f"{chats} more than one message of the assistant's (first in {self._first_answers}): only the last is "
                "learnt and scored, those before are read as given → write a chat for each answer that is to be learnt"
            )
        if self._lines:
            lines = (
                "1 line looks like a row of its own" if self._lines == 1 else f"{self._lines:,} lines look like rows"
            )
            yield (
                f"{lines}, inside a field in double quotes (first in {self._first_lines}): read as a part of that "
                "field → if rows are meant, a double quote is opened there that a later row closes: double it"
            )
        parts = [name for name in self._places if name in PARTS_OF_INPUTS or OF_MESSAGES in name]
        if parts:
            yield (
                f"not read, though in common formats a part of what the model is given: {shown(parts)} (first in "
                f"{self._places[parts[0]]}): the rows are learnt and scored without it → write it into the texts that "
                "are read, or name its column in data"
            )
        if others := [name for name in self._places if name not in parts]:
            yield f"columns that are not read: {shown(others)} (first in {self._places[others[0]]})"


def check_different(columns: Columns) -> None:
    """Refuse columns of a task that are one: a label that is also read as a text is given away, and a text that is its
    own pair says nothing. Raises InvalidInput."""
    for (key, column), (other, same) in itertools.combinations(columns.items(), 2):
        if column == same:
            raise InvalidInput(
                f"is '{column}', and data.{key} is that column too",
                f"data.{other}",
                "name the column that holds it; what the model is given and what it should answer are two columns",
            )


def too_large(where: str, characters: int = 0) -> InvalidInput:
    """The refusal of a row above `ROW_BYTES_MAX`, or above so many characters."""
    size = f"{characters} characters" if characters else f"{ROW_BYTES_MAX} bytes"
    return InvalidInput(f"is a row of more than {size}", where, "shorten it; in a text file, write one row per line")


def check_count(rows: int, size_bytes: int, where: str) -> None:
    """Refuse a file that has more rows than one of its size can have, see `ROWS_FREE`. Raises InvalidInput."""
    if rows > ROWS_FREE + size_bytes:
        raise InvalidInput(
            f"has more than {ROWS_FREE + size_bytes} rows in {size_bytes} bytes, which is no table of examples",
            where,
            "give each example once, or write the file unpacked",
        )


def check_unpacked(bytes_: int, size_bytes: int, where: str) -> None:
    """Refuse what a file of this size unpacks to, if it is too much, see `UNPACKED_RATIO_MAX`. Raises InvalidInput."""
    bytes_max = UNPACKED_BYTES_FREE + UNPACKED_RATIO_MAX * size_bytes
    if bytes_ > bytes_max:
        raise InvalidInput(
            f"unpacks to more than {bytes_max} bytes, which is {UNPACKED_BYTES_FREE} and {UNPACKED_RATIO_MAX} times its"
            " size",
            where,
            "if it is a table of examples, give it unpacked",
        )


def check_columns(columns: Columns, names: Collection[str], where: str, or_else: str = "") -> None:
    """Refuse a file, or a row, that lacks a column. Raises InvalidInput.

    Args:
        or_else: What else to do where no name is like the column's.
    """
    for key, column in columns.items():
        if column not in names:
            short = (name for name in names if len(name) <= SHOWN_CHARACTERS)
            near = difflib.get_close_matches(column, itertools.islice(short, NEAR_NAMES_MAX), 1)
            raise InvalidInput(
                f"has no column {shown([column])}; it has {shown(sorted(names))}",
                where,
                f"data.{key} names the column" + (f"; did you mean {shown(near)}?" if near else or_else),
            )


def check_header(columns: Columns, names: Sequence[str], where: str, unread: Unread, or_else: str = "") -> None:
    """As `check_columns`; and refuse a file that has such a column twice, or too many. Raises InvalidInput.

    Args:
        unread: Takes the names of the others.
        or_else: As in `check_columns`.
    """
    if len(names) > COLUMNS_MAX:
        raise InvalidInput(
            f"has {len(names)} columns, more than {COLUMNS_MAX}", where, "leave out those that the task does not name"
        )
    check_columns(columns, names, where, or_else)
    for column in columns.values():
        if names.count(column) > 1:
            raise InvalidInput(f"has the column {shown([column])} twice", where, "name each column once")
    unread.meet(columns, names, where)


def shown(names: Sequence[str]) -> str:
    """Some names for a message. Quotes show spaces; escapes make control and half characters harmless."""
    quoted = (f"{name!r:.{SHOWN_CHARACTERS}}" for name in names[:SHOWN_NAMES])
    return ", ".join(quoted) + (", …" if len(names) > SHOWN_NAMES else "")
