"""What keeps a queued task from standing in line, as columns; tasks behind others; pauses of teams, of the service."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision: str = "0003"
down_revision: str | None = "0002"


def upgrade() -> None:
    op.add_column("tasks", sa.Column("blocked", sa.String(20), nullable=False, server_default=""))
    op.add_column("tasks", sa.Column("not_before", sa.Float))
    op.add_column("tasks", sa.Column("gave_back_at", sa.Float))
    op.add_column("tasks", sa.Column("max_run_seconds", sa.Float))
    op.drop_index("tasks_in_line", "tasks")
    op.create_index("tasks_in_line", "tasks", ["state", "blocked", "team", "priority", "submitted_at", "task_id"])
    op.create_index("tasks_by_due", "tasks", ["state", "blocked", "not_before"])
    op.create_table(
        "awaits",
        sa.Column("after_id", sa.String(40), primary_key=True),
        sa.Column("task_id", sa.String(40), primary_key=True),
    )
    op.create_table(
        "pauses",
        sa.Column("team", sa.String(63), primary_key=True),
        sa.Column("by", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("at", sa.Float, nullable=False),
    )
