"""What a document from outside may be, whatever it says: its bytes, its depth, the number and size of its values.

Every document passes here before anything is made of it: task files, settings, bodies of requests. So no code behind
has to ask how long a text, how large a number or how deep a list can be, and no message becomes longer than a screen.
"""

from __future__ import annotations

import math
import os
import reprlib
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.errors import InvalidInput, TooLarge
from configs.plain_text import escaped, in_one_line, odd_character

BYTES_MAX = 4 * 2**20
"""Bytes of a document. Most are a few kilobytes; 100,000 label names are two million bytes. Rows come in files."""
VALUES_MAX = 250_000
"""Values in a document, those of an alias counted wherever it stands."""
DEPTH_MAX = 64
"""Levels of lists and mappings in each other; a DeepSpeed configuration has four."""
KEYS_MAX = 10_000
"""Keys of one mapping: the teams of a large service."""
TEXT_MAX = 4096
"""Characters of one text: the longest path of Linux."""
WHOLE_MAX = 2**63 - 1
"""The largest whole number that databases and other programs keep."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def short(value: Any) -> str:
    """A value as Python writes it, cut to what fits into a line. Cost: the same for a large value."""
    return escaped(_SHORT.repr(value))[:120]


def short_text(text: str) -> str:
    """A text cut in the same way, without quotes."""
    return short(text)[1:-1]


def read_bytes(path: Path, bytes_max: int = BYTES_MAX) -> bytes:
    """What a plain file holds. A pipe would be waited for, and a device can be read for ever: they are refused.

    Raises:
        InvalidInput: There is no such file, it cannot be read, or it is no plain file.
        TooLarge: It has more bytes.
    """
    where = str(path)
    try:
        # Without O_NONBLOCK, opening a pipe waits for its other end.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if what := _other_than_a_file(os.fstat(handle).st_mode):
            os.close(handle)
            raise InvalidInput(f"cannot read the file: it is {what}", where, "name a file")
        with open(handle, "rb") as file:
            content = file.read(bytes_max + 1)
    except (OSError, ValueError) as error:
        raise InvalidInput(f"cannot read the file: {error}", where, "check the path") from error
    if len(content) > bytes_max:
        raise TooLarge(f"has more than {bytes_max:,} bytes", where, "rows belong in files of their own", bytes_max)
    return content


def _other_than_a_file(mode: int) -> str:
    if stat.S_ISREG(mode):
        return ""
    names = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return names.get(stat.S_IFMT(mode), "a device")


def check_values(values: Any, where: str) -> None:
    """Refuse what no document may hold, by the path of its key.

    Args:
        values: Mappings, lists, texts, numbers, booleans and None, as a JSON or YAML reader makes them.

    Raises:
        InvalidInput: Lists or mappings too deep, too many values or keys, a text that is too long or not plain, a
            number that is too large or none.
    """
    waiting: list[tuple[tuple[Any, ...], Any]] = [((), values)]
    count = 0
    while waiting:
        path, value = waiting.pop()
        count += 1
        if count > VALUES_MAX:
            raise InvalidInput(f"has more than {VALUES_MAX:,} values", where, "write fewer")
        if problem := _problem(value):
            raise InvalidInput(f"{key_path(path)}: {problem}", where, "correct that value")
        if isinstance(value, Mapping | list | tuple):
            if len(path) >= DEPTH_MAX:
                raise too_deep(where)
            inner = value.items() if isinstance(value, Mapping) else enumerate(value)
            waiting += [((*path, key), item) for key, item in inner]
        for key in value if isinstance(value, Mapping) else ():
            if isinstance(key, str) and (problem := _problem(key)):
                raise InvalidInput(f"{key_path((*path, key))}: the key {problem}", where, "correct that key")


def _problem(value: Any) -> str:
    """What is wrong with one value by itself; empty: nothing."""
    match value:
        case str():
            if len(value) > TEXT_MAX:
                return f"has {len(value):,} characters, more than {TEXT_MAX:,}"
            if odd := odd_character(value):
                return f"must be one line of plain text, and holds {odd}"
        case bool():
            return ""
        case int() if abs(value) > WHOLE_MAX:
            return "is a number of more than 19 digits"
        case float() if not math.isfinite(value):
            return f"is no finite number: {value}"
        case Mapping() if len(value) > KEYS_MAX:
            return f"has {len(value):,} keys, more than {KEYS_MAX:,}"
    return ""


def too_deep(where: str) -> InvalidInput:
    return InvalidInput(f"has more than {DEPTH_MAX} lists or mappings in each other", where, "write it flatter")


def key_path(location: tuple[Any, ...]) -> str:
    """The path of a key for people, short and plain however odd the keys are."""
    path = in_one_line(".".join(str(part) if isinstance(part, int) else str(part)[:80] for part in location[:12]))
    return path[:200] or "(document)"
