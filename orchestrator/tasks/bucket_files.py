"""Files in buckets that a task names: brought to this machine while its submission is checked, and frozen from here.

Each is read in one state, within the limits of files that are sent. A task is trained on the frozen copy: objects that
change later change nothing.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from configs.errors import InvalidInput, NotFound, TooLarge, Unavailable
from configs.places import in_bucket
from configs.settings import Settings
from configs.uploads import FILES_MAX, check_names
from orchestrator.tasks.uploads import FREE_BYTES_MIN, TeamFolder

if TYPE_CHECKING:
    from subspace_store.storage.s3 import S3Storage


class BucketFiles:
    """What one submission names in buckets, until `close`.

    Args:
        settings: Those of the team: which parts of buckets may be named, and how large files may be.
        team: Where the files are put.
    """

    def __init__(self, settings: Settings, team: TeamFolder) -> None:
        self._allowed = settings.data_buckets
        self._server = settings.server
        self._team = team
        self._folder: Path | None = None
        self._bytes_left = settings.server.upload_team_bytes_max
        self.places: dict[str, str] = {}
        """Path of what was brought to the place that the task names."""

    @property
    def folder(self) -> Path:
        """Below which all files are put."""
        return self._team.brought

    def find(self, place: str, key: str, only: Sequence[str] = ()) -> Path:
        """Bring a file, or all files below a place.

        Args:
            place: `s3://BUCKET/KEY`.
            key: Key of the task document that names it.
            only: Names of the files of a folder that are wanted; empty: all.

        Raises:
            InvalidInput: It may not be named, nothing is there, or a file there can have no such name here.
            TooLarge: A file has more bytes than one that is sent may have; or all of them.
            Unavailable: The server, or its answer, does not come; or the disk is nearly full.
        """
        place = in_bucket(place)
        known = next((path for path, other in self.places.items() if other == place), None)
        if known is not None:
            return Path(known)
        storage, inner = self._opened(place, key)
        try:
            names = storage.keys(inner)
        except NotFound as error:
            raise InvalidInput(f"{place}: {error.what}", key, "check the name of the bucket") from error
        if inner in names and any(name.startswith(f"{inner}/") for name in names):
            raise InvalidInput(f"{place} is an object, and others lie below it", key, "name one of them, or rename it")
        here = self._made() / str(len(self.places))
        here.mkdir(mode=0o700)
        path = here / inner.rpartition("/")[2]
        if inner in names:
            self._bring(storage, inner, path, key)
        else:
            below = [name for name in names if name.startswith(f"{inner}/") and not name.endswith("/")]
            self._bring_all(
                storage, [name for name in below if not only or name[len(inner) + 1 :] in only], inner, path, key
            )
        self.places[str(path)] = place
        return path

    def close(self) -> None:
        """Delete what was brought."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _opened(self, place: str, key: str) -> tuple[S3Storage, str]:
        """The longest part of a bucket that may be read in which the place lies, and its key there."""
        around = (one for one in self._allowed if place.startswith(f"{one.url}/"))
        found = max(around, key=lambda one: len(one.url), default=None)
        if found is None:
            known = ", ".join(one.url for one in self._allowed)
            todo = f"name something below one of: {known}" if known else "ask for `data_buckets`, or send the files"
            raise InvalidInput(f"{place} is in no part of a bucket that this service reads for the team", key, todo)
        from subspace_store.storage.s3 import S3Storage  # imports boto3, which few submissions need

        where = found.model_dump()
        return S3Storage(where.pop("url"), **where), place[len(found.url) + 1 :]

    def _made(self) -> Path:
        if self._folder is None:
            try:
                self._team.make()
                self._folder = Path(tempfile.mkdtemp(dir=self.folder)).resolve()
            except OSError as error:
                raise Unavailable(
                    f"the service cannot keep files: {error.strerror}", "data_buckets", "tell those who run it"
                ) from error
        return self._folder

    def _bring_all(self, storage: S3Storage, names: Sequence[str], inner: str, path: Path, key: str) -> None:
        if not names:
            raise InvalidInput(
                f"{storage.url}/{inner}: there is no such object, and none below it", key, "check the place"
            )
        if len(names) > FILES_MAX:
            what = f"{len(names):,} objects are below {storage.url}/{inner}, and {FILES_MAX:,} are read"
            raise InvalidInput(what, key, "write fewer, larger ones")
        try:
            check_names([name[len(inner) + 1 :] for name in names])
        except ValueError as error:
            raise InvalidInput(str(error), key, "rename it") from error
        for name in names:
            file = path / name[len(inner) + 1 :]
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._bring(storage, name, file, key)

    def _bring(self, storage: S3Storage, name: str, path: Path, key: str) -> None:
        most, at = min(self._server.upload_bytes_max, self._bytes_left), f"{storage.url}/{name}"
        try:
            room = shutil.disk_usage(self.folder).free - FREE_BYTES_MIN
            with open(path, "xb", opener=lambda file, flags: os.open(file, flags, 0o600)) as file:
                if not storage.download(name, file, min(most, max(room, 0))):
                    if room < most:
                        raise Unavailable(
                            "the disk of the service is nearly full", at, "tell those who run the service"
                        )
                    what = f"{at} has more than the {most:,} bytes that may be read of it"
                    raise TooLarge(what, key, "bring fewer rows, or ask for a larger server.upload_bytes_max", most)
                self._bytes_left -= file.tell()
        except NotFound as error:
            raise InvalidInput(f"{at} was deleted while it was read", key, "check the place") from error
        except OSError as error:
            raise Unavailable(
                f"the service cannot keep {at}: {error.strerror}", key, "tell those who run it"
            ) from error
