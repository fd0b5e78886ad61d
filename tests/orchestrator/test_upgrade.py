"""A newer release goes on with what an earlier one left, and an older one is refused before anything ends."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from configs.errors import Corrupt, Exit, InvalidInput
from orchestrator.commands.cli import app
from orchestrator.tasks.database import Database, look
from orchestrator.tasks.tables import HEAD
from orchestrator.tasks.task_queue import TaskQueue
from orchestrator.upgrade import check_readable
from subspace_store.commands.state_folder import keep_settings
from tests.builders import settings
from tests.orchestrator.tasks.golden import GOLDEN, facts, unpacked


def typed(*words: str, code: int = 0) -> Any:
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == code, done.output
    return json.loads(done.stdout)


def test_an_older_database_is_kept_in_a_file_and_brought_up_to_date(tmp_path: Path) -> None:
    unpacked("release-0.3", tmp_path)
    mine = settings(tmp_path)
    keep_settings(mine, tmp_path)
    was = look(mine.database_url).revision
    done = typed("upgrade", "--stay-down", "--state-dir", str(tmp_path))
    assert (done["revision_before"], look(mine.database_url).revision) == (was, HEAD)
    kept = Path(done["database_before"])
    assert kept.stat().st_mode & 0o077 == 0
    assert kept.parent.stat().st_mode & 0o077 == 0
    again = typed("upgrade", "--stay-down", "--state-dir", str(tmp_path))
    assert (again["revision_before"], again["database_before"]) == (HEAD, None)
    # The way back: an empty database, filled from the file.
    for file in tmp_path.glob("tasks.db*"):
        shutil.move(file, tmp_path / f"gone-{file.name}")
    assert typed("restore", str(kept), "--state-dir", str(tmp_path))["rows"] > 5
    queue = TaskQueue(mine.database_url)
    assert facts(queue) == json.loads((GOLDEN / "release-0.3.json").read_text())
    queue.close()


def test_a_database_of_a_newer_release_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    mine = settings(tmp_path)
    keep_settings(mine, tmp_path)
    Database(mine.database_url).close()
    with sqlite3.connect(tmp_path / "tasks.db") as connection:
        connection.execute("UPDATE onebasis_schema SET version_num = '9999'")
    connection.close()
    error = typed("upgrade", "--state-dir", str(tmp_path), code=Exit.INPUT)["error"]
    assert "9999" in error["what"]
    with pytest.raises(InvalidInput):
        check_readable(mine)


def test_a_store_of_a_newer_format_is_refused(tmp_path: Path) -> None:
    mine = settings(tmp_path, storage={"url": f"file:{tmp_path}/store"})
    (tmp_path / "store/tiny").mkdir(parents=True)
    (tmp_path / "store/tiny/FORMAT").write_text('{"format": 99, "base_model": "tiny", "base_sha256": ""}')
    with pytest.raises(Corrupt, match="newer onebasis"):
        check_readable(mine)


def test_nothing_to_upgrade_where_no_service_has_run(tmp_path: Path) -> None:
    assert typed("upgrade", "--state-dir", str(tmp_path), code=Exit.UNAVAILABLE)["error"]["todo"]
