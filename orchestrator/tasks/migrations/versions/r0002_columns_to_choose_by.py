"""Columns and indexes to choose tasks by without reading their records; worker-seconds as rows of their own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from alembic import op

revision: str = "0002"
down_revision: str | None = "0001"

HALF_LIFE_SECONDS = 7 * 24 * 3600.0
PAGE = 1000
"""Rows in memory at once."""


def upgrade() -> None:
    op.create_table(
        "uses",
        sa.Column("task_id", sa.String(40), primary_key=True),
        sa.Column("token", sa.String(120), primary_key=True),
        sa.Column("team", sa.String(63), nullable=False),
        sa.Column("what", sa.String(20), nullable=False),
        sa.Column("seconds", sa.Float, nullable=False),
        sa.Column("ended_at", sa.Float, nullable=False),
    )
    op.create_table(
        "team_uses",
        sa.Column("team", sa.String(63), primary_key=True),
        sa.Column("seconds", sa.Float, nullable=False),
        sa.Column("at", sa.Float, nullable=False),
    )
    op.add_column("tasks", sa.Column("priority", sa.Integer, nullable=False, server_default="0"))
    op.add_column("tasks", sa.Column("version", sa.Integer, nullable=False, server_default="0"))
    op.add_column("tasks", sa.Column("content_sha256", sa.String(64), nullable=False, server_default=""))
    _copy_fields()
    _copy_uses()
    op.drop_column("tasks", "train_seconds")
    op.drop_column("tasks", "ended_training_at")
    op.drop_index("tasks_by_state", "tasks")
    op.create_index("tasks_by_content", "tasks", ["team", "content_sha256"])
    op.create_index("tasks_by_age", "tasks", ["submitted_at", "task_id"])
    op.create_index("tasks_by_team", "tasks", ["team", "submitted_at", "task_id"])
    op.create_index("tasks_by_state", "tasks", ["state", "submitted_at", "task_id"])
    op.create_index("tasks_by_version", "tasks", ["state", "version", "task_id"])
    op.create_index("tasks_in_line", "tasks", ["state", "team", "priority", "submitted_at", "task_id"])


def _copy_fields() -> None:
    """Priority and version out of the records; a record that cannot be read keeps 0, and is told when it is read."""
    found = sa.text("UPDATE tasks SET priority = :priority, version = :version WHERE task_id = :task_id")
    for rows in _pages("task_id, record"):
        changes = [values for task_id, record in rows if (values := _fields(task_id, record))]
        if changes:
            op.get_bind().execute(found, changes)


def _fields(task_id: str, record: str) -> dict[str, Any] | None:
    try:
        values = json.loads(record)
        return {"task_id": task_id, "priority": -int(values["spec"]["priority"]), "version": int(values["version"])}
    except (ValueError, KeyError, TypeError):
        return None


def _copy_uses() -> None:
    """What a task had cost was one number, worth what it was at one time."""
    kept = sa.text("INSERT INTO uses VALUES (:task_id, 'release-0.3', :team, 'train', :seconds, :ended_at)")
    sums: dict[str, tuple[float, float]] = {}
    for rows in _pages("task_id, team, train_seconds, ended_training_at"):
        uses = [
            {"task_id": task_id, "team": team, "seconds": seconds, "ended_at": ended_at}
            for task_id, team, seconds, ended_at in rows
            if seconds is not None and ended_at is not None
        ]
        if uses:
            op.get_bind().execute(kept, uses)
        for use in uses:
            before, at = sums.get(use["team"], (0.0, use["ended_at"]))
            newest = max(at, use["ended_at"])
            then = before * 0.5 ** ((newest - at) / HALF_LIFE_SECONDS)
            this = use["seconds"] * 0.5 ** ((newest - use["ended_at"]) / HALF_LIFE_SECONDS)
            sums[use["team"]] = (then + this, newest)
    if sums:
        op.get_bind().execute(
            sa.text("INSERT INTO team_uses VALUES (:team, :seconds, :at)"),
            [{"team": team, "seconds": seconds, "at": at} for team, (seconds, at) in sums.items()],
        )


def _pages(columns: str) -> Iterator[list[Any]]:
    """All rows of `tasks`, the first column its key, page by page: a database of years does not fit into memory."""
    last = ""
    while True:
        page = sa.text(f"SELECT {columns} FROM tasks WHERE task_id > :last ORDER BY task_id LIMIT {PAGE}")
        rows = list(op.get_bind().execute(page, {"last": last}))
        if not rows:
            return
        yield rows
        last = rows[-1][0]
