"""Files of this machine that a task names, sent to a service that cannot read them; the task then names what was sent.

What the service has already is not sent, whoever of the team sent it: a command that was ended goes on where it was
when it is typed again, and the same submission sends nothing twice.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from configs.errors import InvalidInput, OnebasisError, TooManyRequests, Unavailable, renamed
from configs.places import is_in_bucket
from configs.task_spec import FILE_KEYS, TaskSpec
from configs.uploads import FILES_MAX, SentFile, UploadName, check_names, is_upload
from orchestrator.api.client import REMOTE, Client
from orchestrator.api.requests import KeepUpload, MissingFiles, SendPiece, Submit
from orchestrator.commands import display
from subspace_store.commands.terminal import counted, me, note, telling
from subspace_store.formats.adapter_files import READ_FILES, refuse_pickle

Json = dict[str, Any]
T = TypeVar("T")

PIECE_BYTES = 2**20
"""Bytes of the first piece of a file; later ones are longer on a fast line and shorter on a slow one."""
PIECE_BYTES_MIN, PIECE_BYTES_MAX = 2**16, 8 * 2**20
FAST_SECONDS, SLOW_SECONDS = 1.0, 10.0
"""A piece that takes less, or more, is followed by one twice or half as long: the service waits a minute for each."""
FAILURES_MAX = 8
"""Failures in a row after which nothing more is tried: after half a minute."""
WAIT_SECONDS, WAIT_SECONDS_MAX = 0.5, 10.0
"""Wait after the first failure; each further one doubles it."""


@dataclass(frozen=True)
class Sent:
    """A task as a service elsewhere is asked about it."""

    spec: TaskSpec
    own: Mapping[str, str] = field(default_factory=dict)
    """What it names of an upload, to the place on this machine that it came from."""

    def ask(self, client: Client, **how: Any) -> Json:
        """Submit it. Where the answer, or an error, names a file that was sent, it names the one of this machine.

        Args:
            how: Of `Submit`.
        """
        try:
            answer = client.ask(Submit(task=self.spec, by=me(), **how))
        except OnebasisError as error:
            told = error.renamed(self.own)
            if told is error:
                raise
            raise told from error
        return answer | {"warnings": [renamed(warning, self.own) for warning in answer["warnings"]]}


def with_its_files(client: Client, task: TaskSpec, their_files: bool, as_json: bool) -> Sent:
    """The task as it can be submitted: if the service is elsewhere, its files are sent first.

    Args:
        their_files: The files are where the service runs, at these paths: the person says so.

    Raises:
        InvalidInput: A file is not there, is no plain file or cannot be called so; names the key.
        TooLarge: The service takes no file of that size, or no more of the team's.
        Unavailable: The service stays away. What was sent stays there for a day.
    """
    if REMOTE.get() is None or their_files:
        return Sent(task)
    files: dict[str, Path] = {}
    names: dict[tuple[str, str], str] = {}
    for (section, key), folder in FILE_KEYS.items():
        place = getattr(getattr(task, section), key)
        if not place or is_upload(place) or is_in_bucket(place):
            continue
        found = _files(Path(place), folder, f"{section}.{key}")
        names[section, key] = folder if Path(place).is_dir() else next(iter(found))
        files |= found
    if not files:
        return Sent(task)
    upload = _sent(client, task.team, files, display.silent_sending if as_json else display.sending)
    spec, own = task, {}
    for (section, key), name in names.items():
        changed = getattr(spec, section)
        own[sent := str(UploadName(upload, name))] = getattr(changed, key)
        spec = spec.model_copy(update={section: changed.model_copy(update={key: sent})})
    return Sent(spec, own)


def _files(place: Path, folder: str, key: str) -> dict[str, Path]:
    """Name in the upload to file, of one place that a task names."""
    try:
        if folder == "adapter" and place.is_dir():
            refuse_pickle(place)
            found = {f"{folder}/{name}": place / name for name in READ_FILES if (place / name).exists()}
        elif place.is_dir():
            inner = [one for one in sorted(place.rglob("*")) if one.is_symlink() or not one.is_dir()]
            found = {f"{folder}/{one.relative_to(place)}": one for one in inner}
        else:
            found = {f"{folder}/{place.name}": place}
        if wrong := next((path for path in found.values() if not path.is_file()), None):
            what = "is no plain file" if wrong.exists() else "there is no such file"
            raise InvalidInput(f"{wrong}: {what}", key, "check the path")
        if not found:
            raise InvalidInput(f"{place}: nothing to send is in this folder", key, "check the path")
        if len(found) > FILES_MAX:
            what = f"{place} has {len(found):,} files, and {FILES_MAX:,} can be sent"
            raise InvalidInput(what, key, "write fewer, larger ones")
        check_names(found)
    except OSError as error:
        raise InvalidInput(f"cannot look at {place}: {error.strerror}", key, "check the path and its rights") from error
    except ValueError as error:
        raise InvalidInput(str(error), key, "rename it") from error
    return found


def _sent(client: Client, team: str, files: Mapping[str, Path], told: display.Sending) -> str:
    """Send what the service has not yet. Returns: The upload's id."""
    with telling(f"reading {counted(len(files), 'file')} to send"):
        facts = {name: _facts(path) for name, path in files.items()}
    answer = _patiently(lambda: client.ask(MissingFiles(team=team, files=facts)))
    upload: str = answer["upload_id"]
    if answer["is_kept"]:
        return upload
    paths = {file.sha256: files[name] for name, file in facts.items()}
    missing = answer["missing"]
    try:
        with told(len(missing), sum(one["bytes"] - one["from"] for one in missing)) as count:
            for one in missing:
                file = SentFile(sha256=one["sha256"], bytes=one["bytes"])
                _send(client, team, paths[file.sha256], file, one["from"], count)
    except KeyboardInterrupt:
        note("what was sent stays there for a day: the same command goes on from it")
        raise
    _patiently(lambda: client.ask(KeepUpload(team=team, files=facts)))
    return upload


def _facts(path: Path) -> SentFile:
    try:
        with path.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
            return SentFile(sha256=digest, bytes=content.tell())
    except OSError as error:
        raise InvalidInput(f"cannot be read: {error.strerror}", str(path), "check its rights") from error


def _send(client: Client, team: str, path: Path, file: SentFile, start: int, count: Callable[[int], None]) -> None:
    """Send a file from a byte on. count: Is told how many bytes more are there."""
    at, size, failures = start, PIECE_BYTES, 0
    with path.open("rb") as source:
        while True:
            source.seek(at)
            content = source.read(min(size, file.bytes - at))
            if len(content) < min(size, file.bytes - at):
                raise _changed(path)
            piece = SendPiece(team=team, sha256=file.sha256, bytes=file.bytes, offset=at)
            started = time.monotonic()
            try:
                answer = _patiently(lambda piece=piece, content=content: client.send(piece, content))  # type: ignore[misc]
            except Unavailable as error:
                failures, size = failures + 1, max(PIECE_BYTES_MIN, size // 4)
                if failures >= FAILURES_MAX:
                    raise _given_up(error) from error
                if failures == 1:
                    note(f"sending was cut off, and is tried again: {error.what}")
                time.sleep(min(WAIT_SECONDS * 2 ** (failures - 1), WAIT_SECONDS_MAX))
                continue  # what came of it is told by the answer to the next
            except InvalidInput as error:
                if _facts(path) != file:
                    raise _changed(path) from error
                raise
            failures = 0 if answer["from"] > at else failures + 1
            count(answer["from"] - at)
            at = answer["from"]
            if answer["is_whole"]:
                return
            if failures >= FAILURES_MAX:
                raise _given_up(Unavailable("the service takes nothing more of it", str(path)))
            size = next_size(size, time.monotonic() - started)


def next_size(size: int, seconds: float) -> int:
    """Bytes of the piece after one of so many bytes that took so long."""
    if seconds < FAST_SECONDS:
        return min(2 * size, PIECE_BYTES_MAX)
    return max(size // 2, PIECE_BYTES_MIN) if seconds > SLOW_SECONDS else size


def _patiently(ask: Callable[[], T]) -> T:
    """Ask as soon as it is allowed: many small files are more requests than a token may make at once."""
    while True:
        try:
            return ask()
        except TooManyRequests as error:
            time.sleep(error.retry_seconds)


def _given_up(error: Unavailable) -> Unavailable:
    what = f"sending was cut off {FAILURES_MAX} times in a row, at last: {error.what}"
    return Unavailable(what, error.where, "the same command goes on from what has come")


def _changed(path: Path) -> InvalidInput:
    return InvalidInput("was written while it was sent", str(path), "submit it again when it is complete")
