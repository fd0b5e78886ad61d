"""The base model of a task as a column, copied out of its record."""

from __future__ import annotations

import json

import sqlalchemy as sa
from alembic import op

revision: str = "0006"
down_revision: str | None = "0005"

PAGE = 1000
"""Rows in memory at once."""


def upgrade() -> None:
    op.add_column("tasks", sa.Column("base_model", sa.String(63), nullable=False, server_default=""))
    _copy_base_models()
    op.drop_index("tasks_by_version", "tasks")
    op.create_index("tasks_by_version", "tasks", ["base_model", "state", "version", "task_id"])
    op.create_index("tasks_by_base_model", "tasks", ["base_model", "submitted_at", "task_id"])


def _copy_base_models() -> None:
    """A record that cannot be read keeps an empty one, and is told when it is read."""
    page = sa.text(f"SELECT task_id, record FROM tasks WHERE task_id > :last ORDER BY task_id LIMIT {PAGE}")
    found = sa.text("UPDATE tasks SET base_model = :base_model WHERE task_id = :task_id")
    last = ""
    while rows := list(op.get_bind().execute(page, {"last": last})):
        changes = [{"task_id": task_id, "base_model": name} for task_id, record in rows if (name := _name_in(record))]
        if changes:
            op.get_bind().execute(found, changes)
        last = rows[-1][0]


def _name_in(record: str) -> str:
    try:
        return str(json.loads(record)["spec"]["base_model"])[:63]
    except (ValueError, KeyError, TypeError):
        return ""
