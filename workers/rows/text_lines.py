"""The lines of a text file, whatever program wrote it: gzipped or not, UTF-8 or UTF-16, any line ends.

Nothing here knows what a line means. What is no text (a spreadsheet, a web page, a parquet file under a wrong name) is
recognised by its first bytes, and no file costs more than its size allows: see `columns.UNPACKED_RATIO_MAX`.
"""

from __future__ import annotations

import codecs
import gzip
import io
import itertools
import os
import zlib
from collections.abc import Iterator
from typing import IO, Any, cast

from configs.errors import InvalidInput
from workers.rows.columns import LINE_CHARACTERS_MAX, check_unpacked, too_large

GZIP_MAGIC = b"\x1f\x8b"
PARQUET_MAGIC = b"PAR1"
ZIP_MAGIC = b"PK\x03\x04"
HEAD_BYTES = 24
"""First bytes of a file: enough to recognise its format."""
EMPTY_LINES_FREE = 10_000
"""Empty lines that a file may have, beyond one for each line that is not empty."""
FORMATS = {
    ZIP_MAGIC: ("a zip archive, as .xlsx spreadsheets are", "save the table as CSV (UTF-8), or unpack it"),
    b"\xd0\xcf\x11\xe0": ("an old spreadsheet (.xls)", "save the table as CSV (UTF-8)"),
    PARQUET_MAGIC: ("a parquet file", "name it .parquet"),
    b"ARROW1": ("an Arrow file", "write parquet, or a folder by datasets' save_to_disk"),
    b"\x93NUMPY": ("a numpy array", "write an .npz with the arrays of all columns"),
    b"SQLite format 3": ("an SQLite database", "export the table as CSV"),
    b"%PDF": ("a PDF document", "give a table of rows"),
    b"BZh": ("packed by bzip2", "unpack it, or pack it with gzip"),
    b"\xfd7zXZ": ("packed by xz", "unpack it, or pack it with gzip"),
    b"\x28\xb5\x2f\xfd": ("packed by zstd", "unpack it, or pack it with gzip"),
    b"version https://git-lfs": ("a Git LFS pointer and not the file itself", "git lfs pull"),
    b"<!doctype": ("a web page", "download the file itself: often a login or an error page comes in its place"),
    b"<html": ("a web page", "download the file itself: often a login or an error page comes in its place"),
    b"<?xml": ("an XML document", "write JSON lines or CSV"),
    codecs.BOM_UTF32_LE: ("UTF-32", "save it as UTF-8"),
    codecs.BOM_UTF32_BE: ("UTF-32", "save it as UTF-8"),
}
"""First bytes of files that are neither tables nor JSON lines: what such a file is, and what to do."""


def numbered_lines(file: IO[bytes], path: str) -> Iterator[tuple[int, str]]:
    """The lines of a file, each with its own end (`\\n`, `\\r\\n` or `\\r`) and its number, counted from 1.

    Args:
        file: The file at its beginning; seekable.
        path: For messages.

    Raises:
        InvalidInput: No text; neither UTF-8 nor UTF-16 with its mark; a line that is too long; damaged or packed
            beyond reason; almost nothing but empty lines.
    """
    try:
        yield from _lines(_unpacked(file, path), path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InvalidInput(f"is not a complete gzip file: {error}", path, "pack it again") from error


def check_format(head: bytes, path: str, promised: bytes = b"") -> None:
    """Refuse a file that begins like another format than its name says.

    Args:
        head: Its first `HEAD_BYTES`.
        promised: What it should begin with; empty for text.

    Raises:
        InvalidInput: Says what the file is.
    """
    if promised and head.startswith(promised):
        return
    found = next((told for magic, told in FORMATS.items() if head.lower().startswith(magic.lower())), None)
    if found is None and promised and head.startswith(GZIP_MAGIC):
        found = ("packed by gzip", "unpack it")
    if found is None and promised and head and head.isascii():
        found = ("text", "name it .csv or .jsonl, as what it is")
    if found:
        raise InvalidInput(f"is not what its name says: it is {found[0]}", path, found[1])


def _unpacked(file: IO[bytes], path: str) -> io.BufferedReader:
    packed = file.read(2) == GZIP_MAGIC
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if packed:
        return io.BufferedReader(_Unpacked(file, size, path))
    return file if isinstance(file, io.BufferedReader) else io.BufferedReader(cast(Any, file))


class _Unpacked(io.RawIOBase):
    """Content of a gzip file; refused once it is too much for the file's size."""

    def __init__(self, file: IO[bytes], size: int, path: str) -> None:
        self._file = gzip.GzipFile(fileobj=file)
        self._size, self._path = size, path
        self._read = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)
        self._read += count
        check_unpacked(self._read, self._size, self._path)
        return count


def _lines(file: io.BufferedReader, path: str) -> Iterator[tuple[int, str]]:
    head = file.peek(HEAD_BYTES)[:HEAD_BYTES]
    check_format(head, path)
    is_utf16 = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    # Bytes that are not UTF-8 are kept for the moment as lone surrogates, so that the line with them can be named.
    encoding, errors = ("utf-16", "strict") if is_utf16 else ("utf-8-sig", "surrogateescape")
    text = io.TextIOWrapper(file, encoding, errors, newline="")
    empty_lines = said_lines = 0
    for number in itertools.count(1):
        try:
            line = text.readline(LINE_CHARACTERS_MAX + 1)
        except UnicodeDecodeError as error:
            where = f"{path}, at line {number} or soon after"
            raise InvalidInput(f"is not UTF-16: {error.reason}", where, "save the file as UTF-8") from error
        if not line:
            return
        if len(line) > LINE_CHARACTERS_MAX:
            raise too_large(f"{path}, line {number}", LINE_CHARACTERS_MAX)
        if line.isspace():
            empty_lines += 1
            if empty_lines > EMPTY_LINES_FREE + said_lines:
                raise InvalidInput(
                    f"{empty_lines} of its first {number} lines are empty", path, "write one row per line"
                )
        else:
            said_lines += 1
            if "\0" in line or not (line.isascii() or is_utf16):
                _check_characters(line, f"{path}, line {number}")
        yield number, line


def _check_characters(line: str, where: str) -> None:
    if "\0" in line:
        raise InvalidInput(
            "holds zero bytes: it is UTF-16 without its mark, or no text file", where, "save the file as UTF-8"
        )
    try:
        line.encode()
    except UnicodeEncodeError as error:
        byte = ord(line[error.start]) - 0xDC00
        raise InvalidInput(
            f"is not UTF-8: byte 0x{byte:02x} at character {error.start + 1}",
            where,
            "save the file as UTF-8; older programs write Windows-1252 or Latin-1, which do not say what they are",
        ) from error
