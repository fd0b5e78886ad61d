"""A service's stored state under a new release: whether it can be read, and its task database brought up to date.

Stores need no migration: what an earlier release wrote is read as it is. A database is copied to a file before its
tables are changed, so that the earlier release can be gone back to (`onebasis restore FILE`).
"""

from __future__ import annotations

import time
from pathlib import Path

from configs.errors import Conflict, InvalidInput
from configs.settings import Settings
from orchestrator.backup import dump_to_file
from orchestrator.tasks.database import Database, look
from orchestrator.tasks.leader_lease import others_there
from orchestrator.tasks.tables import HEAD
from subspace_store.commands.state_folder import member_id
from subspace_store.log.store_format import check_format
from subspace_store.log.version_log import VersionLog
from subspace_store.storage.opening import open_storage

FOLDER = "before-upgrade"
"""Folder in the state folder for copies of databases."""


def check_readable(settings: Settings) -> str | None:
    """Refuse to go back: what a newer release has written is not read by this one, and nothing is changed.

    Returns:
        Revision of the database's tables; None: there are none.

    Raises:
        InvalidInput: The database's tables are of a newer release.
        Corrupt: A store has a format or a record of a newer release.
        Unavailable: The database or a storage is away.
    """
    seen = look(settings.database_url)
    if seen.is_newer:
        raise InvalidInput(
            f"the task database has tables of revision {seen.revision}, which a newer onebasis made; this release "
            f"knows those up to {HEAD}",
            "database_url",
            "install that release again; or restore a backup of before it",
        )
    for base in settings.bases:
        storage = open_storage(settings.storage, base.name)
        check_format(storage, base.name, base.weights_sha256)
        VersionLog(storage).open()
    return seen.revision


def check_alone(settings: Settings, state_dir: Path) -> None:
    """Refuse to change tables that control planes of an earlier release still use. Raises Conflict."""
    if others := others_there(settings.database_url, member_id(state_dir)):
        todo = "`onebasis down` there, upgrade all of them, and start them afterwards"
        raise Conflict(f"other control planes of this service run: {', '.join(others)}", "database_url", todo)


def bring_up_to_date(settings: Settings, state_dir: Path) -> Path | None:
    """Bring the database's tables to those of this release, in one transaction.

    Returns:
        The file with the database of before; None if nothing had to be changed.
    """
    revision = look(settings.database_url).revision
    if revision in (None, HEAD):
        return None
    at = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    file = state_dir / FOLDER / f"tasks-{revision}-{at}.jsonl.gz"
    dump_to_file(settings, file)
    Database(settings.database_url).close()
    return file
