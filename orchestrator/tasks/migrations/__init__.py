"""How the tables of older releases become those of this one: one file in versions/ for each change, run in turn.

A file here is never changed once it was released, and imports nothing of ours that may change.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.script import ScriptDirectory
from sqlalchemy.engine import Connection

from configs.errors import InvalidInput

VERSION_TABLE = "onebasis_schema"


def migrate(connection: Connection, known: str | None, to: str = "head") -> None:
    """Bring the tables up to date inside the connection's transaction: all of it, or nothing.

    Args:
        known: Revision of the tables that are there; None: none are.
        to: Revision that they are to have.

    Raises:
        InvalidInput: A newer release made these tables.
    """
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    script = ScriptDirectory.from_config(config)
    revisions = {revision.revision for revision in script.walk_revisions()}
    if newer := [one for one in (known, to) if one not in (None, "head") and one not in revisions]:
        raise InvalidInput(
            f"the task database has tables of revision {newer[0]}; this release knows those up to "
            f"{script.get_current_head()}",
            "database_url",
            "use a newer onebasis, or another database",
        )

    def to_head(present: Any, _: Any) -> Any:
        return script._upgrade_revs(to, present)

    with EnvironmentContext(config, script, fn=to_head) as environment:
        environment.configure(connection=connection, version_table=VERSION_TABLE)
        context = environment.get_context()
        if known is not None:
            context.stamp(script, known)  # release 0.3 kept no revision
        environment.run_migrations()
