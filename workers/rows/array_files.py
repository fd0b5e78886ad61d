"""Rows of .npz files: arrays of equal length, one for each column, read along their first axis a piece at a time."""

from __future__ import annotations

import contextlib
import lzma
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.errors import InvalidInput
from configs.places import OpenFile
from workers.rows.columns import ROW_BYTES_MAX, Columns, Unread, Values, check_header
from workers.rows.text_lines import HEAD_BYTES, ZIP_MAGIC, check_format

ARRAY_BYTES = 2**20
"""Bytes of an array that are read at once."""
UNZIPPABLE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError, ValueError)
"""What zipfile raises on damaged or locked archives."""
NUMPYS_OWN = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Compression methods that numpy uses. Others can ask for gigabytes of memory in a few bytes."""


def read_npz(path: Path, columns: Columns, open_file: OpenFile, unread: Unread) -> Iterator[tuple[str, Values]]:
    """See `row_files.read_file`."""
    try:
        with contextlib.ExitStack() as opening:
            file = opening.enter_context(open_file(path))
            check_format(file.read(HEAD_BYTES), str(path), ZIP_MAGIC)
            archive = opening.enter_context(zipfile.ZipFile(file))
            names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
            check_header(columns, names, str(path), unread)
            arrays = [_Array(archive, column, str(path)) for column in columns.values()]
            for array in arrays[1:]:
                if array.length != arrays[0].length:
                    raise InvalidInput(
                        f"'{array.name}' has {array.length} rows, '{arrays[0].name}' {arrays[0].length}",
                        str(path),
                        "give each row its picture and its label",
                    )
            for number, row in enumerate(zip(*arrays, strict=True), start=1):
                yield f"{path}, row {number}", dict(zip(columns.values(), row, strict=True))
    except UNZIPPABLE as error:
        raise InvalidInput(f"is not a readable .npz file: {error}", str(path), "write it with numpy.savez") from error


class _Array:
    """One array of an .npz file, read along its first axis. numpy.load would read it whole."""

    def __init__(self, archive: zipfile.ZipFile, name: str, path: str) -> None:
        from numpy.lib import format as npy

        self.name, self.where = name, f"{path}, array '{name}'"
        if (packed := archive.getinfo(f"{name}.npy").compress_type) not in NUMPYS_OWN:
            raise InvalidInput(f"is packed as numpy packs nothing ({packed})", self.where, "write it with numpy.savez")
        self.file = archive.open(f"{name}.npy")
        try:
            version = npy.read_magic(self.file)
            read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
            self.shape, is_fortran, self.dtype = read_header(self.file)
        except (ValueError, KeyError) as error:
            raise InvalidInput(f"is no plain array: {error}", self.where, "write it with numpy.savez") from error
        if self.dtype.hasobject:
            raise InvalidInput(
                "holds Python objects, which are pickled; pickles are never read",
                self.where,
                "save an array of numbers: pictures of one size as N×H×W×C uint8, or parquet for others",
            )
        if not self.shape or (is_fortran and len(self.shape) > 1):
            raise InvalidInput(
                f"has shape {self.shape}" + (" in Fortran's order" if is_fortran else ""),
                self.where,
                "the first axis counts the rows; numpy.ascontiguousarray puts it first in the file too",
            )
        self.length = int(self.shape[0])

    def __iter__(self) -> Iterator[Any]:
        import numpy as np

        row_bytes = self.dtype.itemsize
        for size in self.shape[1:]:
            row_bytes *= size
        if not 0 < row_bytes <= ROW_BYTES_MAX:
            raise InvalidInput(
                f"has rows of {row_bytes} bytes (shape {self.shape}); 1 to {ROW_BYTES_MAX} are read",
                self.where,
                "give smaller pictures, or encoded ones in parquet",
            )
        rows_at_once = max(1, ARRAY_BYTES // row_bytes)
        for start in range(0, self.length, rows_at_once):
            count = min(rows_at_once, self.length - start)
            content = self.file.read(count * row_bytes)
            if len(content) < count * row_bytes:
                raise InvalidInput(f"ends before row {self.length}", self.where, "write the file again")
            rows = np.frombuffer(content, self.dtype).reshape(count, *self.shape[1:])
            yield from rows.tolist() if rows.ndim == 1 else rows
