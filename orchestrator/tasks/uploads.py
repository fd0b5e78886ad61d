"""Files that teams sent: what of them has come, and where admission finds them.

```
STATE_DIR/uploads/TEAM/parts/SHA256.BYTES   what has come of a file, in order from its first byte
                      /whole/SHA256         a file that is as its digest says
                      /sets/ID/NAME         an upload: its files by their names, links to the whole ones
                      /brought/CHECK/N/NAME a file in a bucket, while a submission that names it is checked
```

On the control plane's disk and not on the object storage: admission reads rows with libraries that need a file, and
freezes what it read on the storage anyway. What is sent twice lies here once, within a team; between teams nothing is
shared, so that nobody learns from the answer that another team has a file. A file goes when no upload has it any more,
which the file system counts, and an upload a day after its last use. Whatever is killed at whatever moment leaves a
part that is right as far as it goes.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from configs.errors import Conflict, InvalidInput, TooLarge, Unavailable
from configs.settings import Settings
from configs.uploads import SentFile, UploadName, upload_id

log = logging.getLogger("onebasis.uploads")

FOLDER = "uploads"
"""Name of the folder, in the state folder."""
PIECE_BYTES_MAX = 8 * 2**20
"""Bytes of one piece: at most so many are sent again after a cut."""
UPLOADS_MAX = 10_000
"""Uploads of one team: those of a day."""
FREE_BYTES_MIN = 2**30
"""Bytes that stay free on the disk, since the task database may lie there too."""
UNUSED_SECONDS = 86_400.0
"""Time since its last use after which an upload, or a part of a file, is deleted."""
LOOK_SECONDS = 3600.0
"""Interval at which unused ones are looked for."""
LOCKS = 64


def uploads_folder(state_dir: str) -> Path:
    """Where the uploads of all teams lie, links resolved."""
    return Path(state_dir).resolve() / FOLDER


@dataclass(frozen=True)
class TeamFolder:
    """Where one team's files lie."""

    path: Path

    @property
    def parts(self) -> Path:
        return self.path / "parts"

    @property
    def whole(self) -> Path:
        return self.path / "whole"

    @property
    def sets(self) -> Path:
        return self.path / "sets"

    @property
    def brought(self) -> Path:
        return self.path / "brought"

    def find(self, name: UploadName, key: str) -> Path:
        """Where a file, or a folder, of an upload lies. Counts as a use of it.

        Args:
            key: Key of the task document that names it.

        Raises:
            InvalidInput: The team has no such upload (another one may), or it has no such file.
        """
        folder = self.sets / name.upload_id
        try:
            os.utime(folder)
        except OSError as error:
            raise InvalidInput(
                f"there is no upload {name.upload_id}: it was never complete, or is deleted, as it was not used for "
                f"{UNUSED_SECONDS / 3600:.0f} hours",
                key,
                "`onebasis submit` the task file again where its files are: they are sent with it",
            ) from error
        found = folder / name.name
        if not found.exists():
            raise InvalidInput(f"the upload {name.upload_id} has no {name.name!r}", key, "name a file that it has")
        return found

    def make(self) -> None:
        for folder in (self.path.parent, self.path, self.parts, self.whole, self.sets, self.brought):
            folder.mkdir(mode=0o700, exist_ok=True)

    def bytes_held(self) -> int:
        """Bytes of all that lies here, each file once."""
        found = 0
        for folder in (self.parts, self.whole):
            with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):  # it is whole by now, or given up
                        found += entry.stat().st_size
        return found


def team_folder(settings: Settings, team: str) -> TeamFolder:
    """Where the files of a team lie."""
    return TeamFolder(uploads_folder(settings.state_dir) / team)


class Uploads:
    """The uploads of a service. Every method may be called from any thread.

    Args:
        settings: Those that count now.
    """

    def __init__(self, settings: Callable[[], Settings]) -> None:
        self._settings = settings
        self._locks = tuple(threading.Lock() for _ in range(LOCKS))
        """Each for the files whose digest it gets: one piece of a file at a time is put behind the others."""
        self._sets = threading.Lock()
        """For making and deleting uploads, and whole files that no upload has."""
        self._looked_at = 0.0

    def missing(self, team: str, files: Mapping[str, SentFile]) -> dict[str, Any]:
        """Which of these files have to be sent, and from which byte on; the id, and whether the upload is there.

        Raises:
            TooLarge: A file is, or the team would have too much here; nothing has to be sent to learn that.
        """
        folder, upload = self._folder(team), upload_id(files)
        with contextlib.suppress(OSError):
            os.utime(folder.sets / upload)
            return {"upload_id": upload, "is_kept": True, "missing": []}
        for name, file in files.items():
            self._check_size(file.bytes, name)
        missing: dict[str, dict[str, Any]] = {}
        for file in files.values():
            try:
                os.utime(folder.whole / file.sha256)  # so that it stays until the upload is kept
            except OSError:
                come = _size(folder.parts / _part(file))
                missing[file.sha256] = {"sha256": file.sha256, "bytes": file.bytes, "from": come}
        self._check_room(folder, sum(one["bytes"] - one["from"] for one in missing.values()))
        return {"upload_id": upload, "is_kept": False, "missing": list(missing.values())}

    def piece(self, team: str, file: SentFile, offset: int) -> Piece:
        """Something to write a piece of a file to.

        Args:
            offset: Place of the piece's first byte in the file.

        Raises:
            TooLarge: The file is, or the team has too much here.
            Unavailable: The disk is nearly full.
        """
        folder = self._folder(team)
        self._check_size(file.bytes, file.sha256)
        self._check_room(folder, min(PIECE_BYTES_MAX, max(0, file.bytes - offset)))
        try:
            folder.make()
            arriving = tempfile.TemporaryFile(dir=folder.parts)  # noqa: SIM115 (Piece.close); it has no name
        except OSError as error:
            raise _unwritable(error) from error
        lock = self._locks[int(file.sha256[:8], 16) % LOCKS]
        return Piece(folder, file, offset, arriving, lock)

    def keep(self, team: str, files: Mapping[str, SentFile]) -> dict[str, Any]:
        """Make an upload of files that have all come. The same again is the same upload.

        Raises:
            Conflict: Some have not come, or are deleted since.
        InvalidInput: A file has another size than is said.
            TooLarge: The team has too many uploads.
        """
        folder, upload = self._folder(team), upload_id(files)
        place, new = folder.sets / upload, folder.sets / f".{upload}.{secrets.token_hex(4)}"
        answer = {"upload_id": upload, "files": len(files), "bytes": sum(file.bytes for file in files.values())}
        with self._sets:
            try:
                os.utime(place)
                return answer | {"is_new": False}
            except OSError:
                pass
            for name, file in files.items():
                if file.bytes != _size(whole := folder.whole / file.sha256) and whole.exists():
                    raise InvalidInput(f"has not {file.bytes:,} bytes: its digest is of another size", name, "say both")
            if len(_names(folder.sets)) >= UPLOADS_MAX:
                what = f"team {team} has {UPLOADS_MAX:,} uploads here, which is the most"
                raise TooLarge(what, "team", "send the files of several tasks as one upload", UPLOADS_MAX)
            try:
                folder.make()
                new.mkdir(mode=0o700)
                for name, file in files.items():
                    (new / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                    os.link(folder.whole / file.sha256, new / name)
                os.rename(new, place)
            except FileNotFoundError as error:
                shutil.rmtree(new, ignore_errors=True)
                gone = sum(not (folder.whole / file.sha256).exists() for file in files.values())
                raise Conflict(
                    f"{gone} of its files are not here", upload, "ask which are missing, and send them"
                ) from error
            except OSError as error:
                shutil.rmtree(new, ignore_errors=True)
                raise _unwritable(error) from error
        return answer | {"is_new": True}

    def delete_unused(self, now: float | None = None) -> None:
        """Delete what was not used for a day, if that was not done in the last hour. Files of teams that have left the
        settings, too.

        Args:
            now: Unix time; does it at once. Default: now, if it is time.
        """
        if now is None:
            now = time.time()
            if now < self._looked_at + LOOK_SECONDS:
                return
        self._looked_at = now
        for name in _names(uploads_folder(self._settings().state_dir)):
            self._delete_unused_of(TeamFolder(uploads_folder(self._settings().state_dir) / name), now - UNUSED_SECONDS)

    def _delete_unused_of(self, folder: TeamFolder, before: float) -> None:
        with self._sets:
            for name in _names(folder.sets, hidden=True):  # hidden: a killed process was making it
                if _changed_at(folder.sets / name) < before:
                    shutil.rmtree(folder.sets / name, ignore_errors=True)
                    log.info("the upload %s of team %s was not used for a day: deleted", name, folder.path.name)
            for name in _names(folder.whole):
                path = folder.whole / name
                with contextlib.suppress(OSError):
                    if path.stat().st_nlink == 1 and _changed_at(path) < before:
                        path.unlink()
        for name in _names(folder.brought):  # of a check that was killed
            if _changed_at(folder.brought / name) < before:
                shutil.rmtree(folder.brought / name, ignore_errors=True)
        for name in _names(folder.parts):
            with self._locks[int(name[:8], 16) % LOCKS]:
                if _changed_at(folder.parts / name) < before:
                    (folder.parts / name).unlink(missing_ok=True)

    def _folder(self, team: str) -> TeamFolder:
        settings = self._settings()
        if team not in settings.teams:
            known = ", ".join(sorted(settings.teams))
            raise InvalidInput(f"there is no team '{team}'", "team", f"teams of this service: {known}")
        return team_folder(settings, team)

    def _check_size(self, size_bytes: int, where: str) -> None:
        limit = self._settings().server.upload_bytes_max
        if size_bytes > limit:
            what = f"has {size_bytes:,} bytes, and a file that is sent may have {limit:,}"
            raise TooLarge(what, where, "bring fewer rows, or ask for a larger server.upload_bytes_max", limit)

    def _check_room(self, folder: TeamFolder, more_bytes: int) -> None:
        limit, held = self._settings().server.upload_team_bytes_max, folder.bytes_held()
        if held + more_bytes > limit:
            raise TooLarge(
                f"team {folder.path.name} has {held:,} bytes of files here, and would have {held + more_bytes:,}; it "
                f"may have {limit:,}",
                "",
                "wait a day, after which unused ones are deleted; or ask for a larger server.upload_team_bytes_max",
                limit,
            )
        free = shutil.disk_usage(Path(self._settings().state_dir)).free
        if free - more_bytes < FREE_BYTES_MIN:
            raise Unavailable("the disk of the service is nearly full", "uploads", "tell those who run the service")


class Piece:
    """A piece of a file while it arrives: written to, then ended, closed in any case."""

    def __init__(self, folder: TeamFolder, file: SentFile, offset: int, arriving: IO[bytes], lock: threading.Lock):
        self._folder, self._file, self._offset, self._lock = folder, file, offset, lock
        self._arriving = arriving
        self._size = 0

    def write(self, content: bytes) -> None:
        """Take some bytes.

        Raises:
            TooLarge: The piece is too long, or longer than the rest of its file.
            Unavailable: The disk is full.
        """
        self._size += len(content)
        if self._size > PIECE_BYTES_MAX:
            what = f"a piece has more than {PIECE_BYTES_MAX:,} bytes"
            raise TooLarge(what, self._file.sha256, "send it in smaller ones", PIECE_BYTES_MAX)
        if self._offset + self._size > self._file.bytes:
            what = f"more has come than the {self._file.bytes:,} bytes that were said"
            raise TooLarge(what, self._file.sha256, "the file has changed: submit it again", self._file.bytes)
        try:
            self._arriving.write(content)
        except OSError as error:
            raise _unwritable(error) from error

    def end(self) -> dict[str, Any]:
        """Put the piece behind what has come before, as far as it is new; the file's last byte has its digest checked.

        Returns:
            From which byte on the file has to be sent, and whether it is whole. A piece that begins behind that byte is
            not taken: send from there.

        Raises:
            InvalidInput: The file is not what its digest says; what came of it is deleted.
            Unavailable: The disk is full.
        """
        file, whole, part = self._file, self._folder.whole / self._file.sha256, self._folder.parts / _part(self._file)
        with self._lock:
            try:
                if whole.exists():
                    os.utime(whole)
                    return {"from": file.bytes, "is_whole": True}
                come = _size(part)
                if self._offset <= come < self._offset + self._size or not part.exists():
                    come = self._append(part, come)
                if come == file.bytes:
                    self._complete(part, whole)
            except OSError as error:
                raise _unwritable(error) from error
        return {"from": come, "is_whole": come == file.bytes}

    def _append(self, part: Path, come: int) -> int:
        """Returns: The part's bytes after that."""
        if self._offset > come:
            return come
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as behind:
            self._arriving.seek(come - self._offset)
            shutil.copyfileobj(self._arriving, behind, 2**20)
        return _size(part)

    def _complete(self, part: Path, whole: Path) -> None:
        with part.open("rb") as content:
            found = hashlib.file_digest(content, "sha256").hexdigest()
            if found == self._file.sha256:
                os.fsync(content.fileno())
        if found != self._file.sha256:
            part.unlink()
            raise InvalidInput(
                f"what came has the digest {found}: it was changed while it was sent, or damaged on the way; it is "
                "deleted",
                self._file.sha256,
                "submit it again",
            )
        part.chmod(0o400)
        part.rename(whole)

    def close(self) -> None:
        """Give the temporary file back."""
        self._arriving.close()


def _part(file: SentFile) -> str:
    return f"{file.sha256}.{file.bytes}"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _changed_at(path: Path) -> float:
    """Unix time; infinity for what is not there."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")


def _names(folder: Path, hidden: bool = False) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if hidden or not name.startswith("."))
    except FileNotFoundError:
        return []


def _unwritable(error: OSError) -> Unavailable:
    return Unavailable(f"the service cannot keep the file: {error.strerror}", "uploads", "tell those who run it")
