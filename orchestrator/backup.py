"""A whole service in an archive, and out of it: its task database, its stores, its identity and its settings.

The database is read first and each log afterwards: the service brings a database that is older than the log up to date
from it, and the other way round published tasks would be missing. What can be made anew (MLflow, pictures, Ray's
files) is left out, and so are files that teams are sending at the moment.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.document import check_document
from configs.errors import Conflict, Corrupt, InvalidInput, NotFound
from configs.settings import Settings, StorageSettings
from orchestrator.tasks.database import look
from orchestrator.tasks.database_dump import dump, load
from subspace_store.archive import Archive, Copied, Copy
from subspace_store.backup import StoreCopy, check_empty, copy_store, restore_store
from subspace_store.commands.state_folder import (
    RESTORE_FILE,
    SERVICE_FILE,
    SETTINGS_FILE,
    join_service,
    keep_settings,
    make_private,
    open_private,
    service_identity,
)
from subspace_store.storage.opening import open_storage
from subspace_store.subspace_reader import SubspaceReader
from subspace_store.verify import verify

FORMAT = 1
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Backup:
    """A backup's list: everything that it consists of."""

    name: str
    """Its time in UTC, and a random part."""
    created_at: float
    """Unix seconds."""
    service_id: str
    service_name: str
    """Machine and folder of the service, for people."""
    settings: dict[str, Any]
    """Settings of the service, as plain values."""
    database: Copy
    stores: dict[str, StoreCopy]
    """Base model to its store."""

    @property
    def objects(self) -> int:
        """Number of objects of all stores."""
        return sum(len(store.objects) for store in self.stores.values())

    @property
    def size_bytes(self) -> int:
        """Bytes of all that it consists of."""
        copies = [copy for store in self.stores.values() for copy in store.objects.values()]
        return self.database.size_bytes + sum(copy.size_bytes for copy in copies)


def archive_at(url: str, storage: StorageSettings | None, endpoint_url: str | None = None) -> Archive:
    """The archive at an address.

    Args:
        url: `file:FOLDER` or `s3://BUCKET/PREFIX`.
        storage: How the service's own storage is reached; a bucket of backups is reached in the same way.
        endpoint_url: Address of an S3 server, if it is another one.
    """
    how = storage or StorageSettings()
    changes = {"url": url} | ({"endpoint_url": endpoint_url} if endpoint_url else {})
    if url.startswith("file:"):
        make_private(Path(url.removeprefix("file:")))  # settings and databases may contain a password
    return Archive(open_storage(how.model_copy(update=changes)))


def make_backup(settings: Settings, state_dir: Path, archive: Archive, say: Say) -> tuple[Backup, Copied]:
    """Copy a service that runs, or one that is down. What the archive has already is not copied again.

    Returns:
        The backup, and how much of it was new.

    Raises:
        Corrupt: An object that a version needs is gone or damaged: no backup was made.
        Unavailable: The database or a storage was away; made again, it goes on where it stopped.
        InvalidInput: No service has run here.
    """
    if not (state_dir / SERVICE_FILE).exists():
        raise InvalidInput("no onebasis service has run here", str(state_dir), "go to the folder where one is")
    for base in settings.base_names:
        store = open_storage(settings.storage, base).url
        if f"{archive.storage.url}/".startswith(f"{store}/"):
            raise InvalidInput("lies in the store that is to be copied", archive.storage.url, "name another place")
    now, identity = time.time(), service_identity(state_dir)
    before = newest_of(archive, identity.service_id)
    name = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime(now))}.{int(now % 1 * 1e6):06d}Z-{secrets.token_hex(2)}"
    archive.begin(name)
    say("copying the task database")
    database = archive.put(_packed(dump(settings.database_url)))
    stores = {}
    for base in settings.base_names:
        storage = open_storage(settings.storage, base)
        say(f"copying the store at {storage.url}")
        stores[base] = copy_store(storage, archive, before.stores.get(base) if before else None)
    made = Backup(
        name=name,
        created_at=now,
        service_id=identity.service_id,
        service_name=identity.name,
        settings=settings.model_dump(mode="json"),
        database=database,
        stores=stores,
    )
    archive.note(name, {"format": FORMAT, **asdict(made)})
    return made, archive.copied


def read_backup(archive: Archive, name: str | None = None) -> Backup:
    """A backup by its name; the newest whole one, where none is named.

    Raises:
        NotFound: There is none; a backup that was cut off does not count.
        Corrupt: Its list is damaged.
    """
    names = archive.noted()
    if not names:
        begun = archive.cut_off()
        what = f"no whole backup is here; that of {begun[-1]} was cut off" if begun else "no backup is here"
        raise NotFound(what, archive.storage.url, "`onebasis backup PLACE` makes one")
    if name is not None and name not in names:
        raise NotFound(f"there is no backup {name}", archive.storage.url, "`onebasis restore PLACE --list` shows them")
    facts = archive.read(name or names[-1])
    if facts.pop("format") != FORMAT:
        raise InvalidInput("a newer onebasis made this backup", archive.storage.url, "use that one to restore it")
    stores = {
        base: StoreCopy(one["seq"], one["head_sha256"], {key: Copy(**copy) for key, copy in one["objects"].items()})
        for base, one in facts.pop("stores").items()
    }
    return Backup(database=Copy(**facts.pop("database")), stores=stores, **facts)


def newest_of(archive: Archive, service_id: str) -> Backup | None:
    """The newest whole backup of a service in an archive that several may share."""
    for name in reversed(archive.noted()):
        if (found := read_backup(archive, name)).service_id == service_id:
            return found
    return None


def kept_settings(backup: Backup) -> Settings:
    """The settings that a backup has. Their paths are those of the service that it was made of."""
    return check_document(backup.settings, Settings, f"backup {backup.name}")


def restore(backup: Backup, archive: Archive, settings: Settings, say: Say) -> int:
    """Make a service of a backup, in places where nothing is; `up` goes on with it.

    Begun and not ended, it is done again from the beginning; until then nothing starts there.

    Args:
        settings: Of the service as it shall be: other places, another kind of database, but the same base models.

    Returns:
        The number of objects of all stores.

    Raises:
        Conflict: Something is in one of these places.
        Corrupt: The backup is damaged, or what was restored is not what the log says.
        InvalidInput: The settings lack a base model that the backup has.
    """
    state_dir = Path(settings.state_dir)
    if lost := [base for base, store in backup.stores.items() if store.seq and base not in settings.base_names]:
        todo = "restore with settings that have it; it can leave the service afterwards"
        raise InvalidInput(f"these settings have no base model {lost[0]}, and the backup has", "base_models", todo)
    storages = {base: open_storage(settings.storage, base) for base in backup.stores if base in settings.base_names}
    make_private(state_dir)
    if not _goes_on(backup, settings, state_dir):
        for name in (SERVICE_FILE, SETTINGS_FILE):
            if (state_dir / name).exists():
                raise Conflict("a service is here", str(state_dir), "restore into an empty folder, or move it away")
        if look(settings.database_url).revision is not None:
            todo = "name an empty database in database_url, or move away what is there"
            raise Conflict("the database has tables of onebasis already", "database_url", todo)
        for storage in storages.values():
            check_empty(storage)
    with open_private(state_dir / RESTORE_FILE, "w") as begun:
        json.dump(_marker(backup, settings), begun)
    total = 0
    for base, storage in storages.items():
        say(f"writing the store at {storage.url}")
        total += restore_store(archive, backup.stores[base], storage)
    for base, storage in storages.items():
        if not backup.stores[base].seq:
            continue  # there was no store yet
        say(f"checking every byte at {storage.url}")
        if findings := verify(SubspaceReader.open(storage), deep=True):
            first = findings[0]
            todo = "use an earlier backup: `onebasis restore PLACE --list` shows them"
            raise Corrupt(f"was restored, and {first.what} ({len(findings)} findings)", first.where, todo)
    if look(settings.database_url).revision is None:  # its rows and tables are one transaction
        say("filling the task database")
        load(settings.database_url, _unpacked(archive.get(backup.database)))
    join_service(state_dir, backup.service_id)
    keep_settings(settings, state_dir)
    (state_dir / RESTORE_FILE).unlink()
    return total


def dump_to_file(settings: Settings, file: Path) -> None:
    """Write the task database to a file that its owner alone may read, whole or not at all. See `restore_database`."""
    make_private(file.parent)
    new = file.with_name(f".{file.name}.new")
    handle = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "wb") as out:
        out.write(_packed(dump(settings.database_url)))
        out.flush()
        os.fsync(out.fileno())
    new.replace(file)


def restore_database(settings: Settings, file: Path) -> int:
    """Fill an empty task database from such a file. Returns the number of rows."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise InvalidInput(
            f"cannot be read: {error.strerror}", str(file), "name a file of `onebasis upgrade`"
        ) from error
    return load(settings.database_url, _unpacked(content))


def _marker(backup: Backup, settings: Settings) -> dict[str, Any]:
    return {"backup": backup.name, "settings": settings.model_dump(mode="json")}


def _goes_on(backup: Backup, settings: Settings, state_dir: Path) -> bool:
    """Whether this very restore was begun here and not ended. Raises Conflict if it was another one."""
    file = state_dir / RESTORE_FILE
    if not file.exists():
        return False
    if json.loads(file.read_text()) != json.loads(json.dumps(_marker(backup, settings))):
        todo = "end that one; or delete this folder, its database and its stores, and begin anew"
        raise Conflict("another restore was begun here and not ended", str(state_dir), todo)
    return True


def _packed(lines: Iterator[bytes]) -> bytes:
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=5, mtime=0) as out:
        out.writelines(lines)
    return packed.getvalue()


def _unpacked(content: bytes) -> Iterator[bytes]:
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as packed:
            yield from packed
    except (OSError, EOFError) as error:
        raise Corrupt(f"the dump of the task database is damaged: {error}", "backup", "use an earlier one") from error
