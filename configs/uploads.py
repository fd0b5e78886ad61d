"""What an upload is called, and what the files in it may be called. Pure.

An upload is a set of files that a team sent to the service, each under a name of its own. Its id is the digest of those
names with the files' digests and sizes: the same files under the same names are the same upload, and an upload never
changes. In a task document `upload:ID/NAME` names a file or a folder in it, and `upload:ID` the whole as a folder.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from configs.document import Section
from configs.errors import InvalidInput
from configs.limits import short
from configs.plain_text import odd_character

UPLOAD = "upload:"
"""How a place in a task document begins that is no path."""
FILES_MAX = 1000
"""Files of one upload: the shards of a large data set."""
NAME_BYTES_MAX = 255
"""Bytes of one part of a name: the longest that file systems keep."""
DEPTH_MAX = 8
"""Parts of a name."""

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$", description="64 hexadecimal digits, of small letters")]
Size = Annotated[int, Field(ge=0, le=2**53)]


class SentFile(Section):
    """What one file of an upload holds."""

    sha256: Sha256
    bytes: Size


@dataclass(frozen=True)
class UploadName:
    """What `upload:ID/NAME` says."""

    upload_id: str
    name: str
    """Name of a file or a folder in it; empty: the whole."""

    def __str__(self) -> str:
        return f"{UPLOAD}{self.upload_id}{'/' if self.name else ''}{self.name}"


def upload_id(files: Mapping[str, SentFile]) -> str:
    """The id of the upload that these files are, by their names."""
    facts = {name: [file.sha256, file.bytes] for name, file in files.items()}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def is_upload(place: str) -> bool:
    """Whether a place is meant to be in an upload, and is no path."""
    return place.startswith(UPLOAD)


def upload_named(place: str, key: str = "") -> UploadName:
    """What a place that begins with `upload:` says.

    Args:
        key: Where it stands.

    Raises:
        InvalidInput: It is written in another way.
    """
    found = re.fullmatch(rf"{UPLOAD}([0-9a-f]{{64}})(?:/(.+))?", place, re.DOTALL)
    if found is None:
        todo = "write upload:ID/NAME, with the 64 hexadecimal digits of its id; put ./ before it if a file is called so"
        raise InvalidInput(f"{short(place)} names no upload", key, todo)
    try:
        check_names([found[2]] if found[2] else [])
    except ValueError as error:
        raise InvalidInput(f"{short(place)}: {error}", key, "write a name that the upload has") from error
    return UploadName(found[1], found[2] or "")


def check_names(names: Collection[str]) -> None:
    """Refuse names that lead out of a folder, that some machine cannot keep, or that two machines read differently.

    Raises:
        ValueError: With the first name that is wrong.
    """
    folders: dict[str, str] = {}
    seen: dict[str, str] = {}
    for name in names:
        parts = name.split("/")
        if wrong := next((why for part in parts if (why := _wrong(part))), ""):
            raise ValueError(f"{short(name)} is no name of a file here: {wrong}")
        if len(parts) > DEPTH_MAX:
            raise ValueError(f"{short(name)} has more than {DEPTH_MAX} parts")
        if (other := seen.setdefault(_folded(name), name)) != name:
            raise ValueError(f"{short(other)} and {short(name)} are the same name on some machines")
        for depth in range(1, len(parts)):
            folder = "/".join(parts[:depth])
            if (other := folders.setdefault(_folded(folder), folder)) != folder:
                raise ValueError(f"the folders {short(other)} and {short(folder)} are the same name on some machines")
    if both := sorted(seen.keys() & folders.keys()):
        raise ValueError(f"{short(seen[both[0]])} is a file and a folder")


def _wrong(part: str) -> str:
    """Why a part of a name is none; empty: it is one."""
    if part in ("", ".", ".."):
        return "it has to be relative, without empty parts, . and .."
    if "\\" in part:
        return "it has a backslash"
    if odd_character(part) is not None:
        return "it has a character that is no plain text"
    return f"a part has more than {NAME_BYTES_MAX} bytes" if len(part.encode()) > NAME_BYTES_MAX else ""


def _folded(name: str) -> str:
    """The name as file systems compare it that know no capital letters, or one form of Unicode alone."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
