"""Files and folders that a person names: made absolute where they are read, `~` included.

A field that names a place says so in its type, `Annotated[str, Located(absolute)]`, and `located` finds it by that
type: there is no list of such fields to keep. tests/configs/test_places.py finds a field that was forgotten.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from configs.document import Section
from configs.errors import InvalidInput
from configs.uploads import is_upload, upload_named

S = TypeVar("S", bound=Section)
BUCKET = "s3://"
"""How a place in a bucket begins."""


@dataclass(frozen=True)
class Located:
    """Marks a field that names a place, or several.

    Args:
        absolute: Makes the value absolute; is given the value and the folder that relative paths start from.
    """

    absolute: Callable[[str, Path], str]


def home(path: str) -> Path:
    """A path in which `~` is replaced by the home folder of the user who runs this, and `~ann` by that of ann.

    Raises:
        InvalidInput: There is no user of that name.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        todo = "write ./ in front of it if the name of the file begins with ~"
        raise InvalidInput("there is no home folder of that user", path, todo) from error


def absolute(path: str, root: Path) -> str:
    """A path from anywhere. Links stay links: what they point to may change."""
    return str(root / home(path))


def is_in_bucket(place: str) -> bool:
    """Whether a place is in a bucket, and is no path."""
    return place.startswith(BUCKET)


def in_bucket(place: str) -> str:
    """`s3://BUCKET/KEY` as it is, without a slash at its end.

    Raises:
        InvalidInput: It names no bucket, or its key has empty parts, `.` or `..`, which may be read in two ways.
    """
    parts = place.removeprefix(BUCKET).rstrip("/").split("/")
    if not is_in_bucket(place) or any(part in ("", ".", "..") or not part.isprintable() for part in parts):
        raise InvalidInput("names no place in a bucket", place, "write s3://BUCKET/FOLDER/FILE, without empty parts")
    return BUCKET + "/".join(parts)


def real(path: str, root: Path) -> str:
    """A path from anywhere, links resolved; `upload:ID/NAME` and `s3://BUCKET/KEY`, which are no paths, as they are."""
    if is_upload(path):
        return str(upload_named(path))
    if is_in_bucket(path):
        return in_bucket(path)
    if re.match(r"[a-z][a-z0-9+.-]*:/", path):
        raise InvalidInput(
            "is a URL, and only files, folders and s3:// are read", path, "download it, and name the file"
        )
    try:
        return str((root / home(path)).resolve())
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a name with a zero byte
        raise InvalidInput(f"is no path: {error}", path, "correct the path") from error


def database(url: str, root: Path) -> str:
    """The URL of an SQLite file with an absolute path; any other URL as it is."""
    found = re.match(r"(sqlite(?:\+\w+)?:///)(?!:memory:)(.+)", url, re.DOTALL)
    return f"{found[1]}{absolute(found[2], root)}" if found else url


def storage(url: str, root: Path) -> str:
    """`file:FOLDER` with an absolute path; any other address as it is."""
    found = re.match(r"file:(?://(?=[/~]))?(.*)", url, re.DOTALL)
    return f"file:{absolute(found[1], root)}" if found and found[1] else url


def database_or_folder(address: str, root: Path) -> str:
    """MLflow's tracking address: a database, a server, or a folder."""
    if re.match(r"[a-z][a-z0-9+.-]+:", address):
        return storage(database(address, root), root)
    return address if address in ("", "databricks") else absolute(address, root)


def unless_address(place: str, root: Path) -> str:
    """A folder; an address (`s3://…`) as it is."""
    return place if ":" in place else absolute(place, root)


def model(source: str, root: Path) -> str:
    """A base model's folder; a hub id or `package:…` as it is."""
    if source.startswith("package:") or not (is_local(source) or (root / source).is_dir()):
        return source
    return absolute(source, root)


def is_local(source: str) -> bool:
    """Whether a base model's source needs no hub."""
    return source.startswith(("package:", "/", ".", "~")) or Path(source).is_dir()


OpenFile = Callable[[Path], BinaryIO]
"""How a file is opened to be read. A caller that may not read all files hands such a function down to the place that
opens the file: checking a name earlier is no help, since it can mean another file a moment later."""


def open_anywhere(path: Path) -> BinaryIO:
    """Open any file. Raises OSError."""
    return path.open("rb")


def open_below(path: Path, roots: Iterable[Path], closed: Collection[Path] = ()) -> BinaryIO:
    """Open a plain file below some folders, safe against somebody who renames it, or a folder above it, meanwhile.

    The check is made on the opened file, by its descriptor, and not on its name; nothing else is opened to be read.

    Args:
        closed: As for `is_below`.

    Raises:
        OutsideError: The file, links resolved, is in none of these folders, or is a folder, a pipe or a device.
        OSError: The file cannot be opened.
    """
    # O_PATH finds it and opens nothing: a pipe would be waited for, a device may act on being opened.
    handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        found = f"/proc/self/fd/{handle}"
        real = Path(os.readlink(found))
        if not is_below(real, roots, closed) or not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OutsideError(str(path))
        return open(found, "rb")
    finally:
        os.close(handle)


def is_below(path: Path, roots: Iterable[Path], closed: Collection[Path] = ()) -> bool:
    """Whether a real path lies below one of some folders.

    Args:
        closed: Folders, links resolved, whose files do not count, but for those of a root that lies in them.
    """
    around = [real for root in roots if path.is_relative_to(real := root.resolve())]
    shut = [folder for folder in closed if path.is_relative_to(folder)]
    return any(all(folder in root.parents for folder in shut) for root in around)


class OutsideError(Exception):
    """The name does not lead to a plain file below the allowed folders."""


def located(section: S, root: Path) -> S:
    """The same section with all its places absolute, those of inner sections too.

    Args:
        root: Folder that relative paths start from.

    Raises:
        InvalidInput: A path begins with `~` and the name of a user that does not exist.
    """
    changes = {}
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        mark = next((mark for mark in field.metadata if isinstance(mark, Located)), None)
        if mark is not None:
            changes[name] = _each(value, mark, root)
        elif isinstance(value, Section):
            changes[name] = located(value, root)
        elif isinstance(value, tuple) and value and isinstance(value[0], Section):
            changes[name] = tuple(located(one, root) for one in value)
        elif isinstance(value, dict) and any(isinstance(one, Section) for one in value.values()):
            changes[name] = {key: located(one, root) for key, one in value.items()}
    return section.model_copy(update=changes)


def _each(value: Any, mark: Located, root: Path) -> Any:
    if isinstance(value, str):
        return mark.absolute(value, root)
    return tuple(_each(item, mark, root) for item in value) if isinstance(value, tuple) else value
