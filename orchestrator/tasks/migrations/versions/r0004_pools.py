"""The pool of each task, places of each order, and workers and machines that are drained."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision: str = "0004"
down_revision: str | None = "0003"


def upgrade() -> None:
    # Empty: the next start gives each waiting task its pool.
    op.add_column("tasks", sa.Column("pool", sa.String(63), nullable=False, server_default=""))
    op.add_column("uses", sa.Column("places", sa.Integer, nullable=False, server_default="1"))
    op.drop_index("tasks_in_line", "tasks")
    op.create_index(
        "tasks_in_line", "tasks", ["state", "blocked", "team", "pool", "priority", "submitted_at", "task_id"]
    )
    op.create_index("tasks_by_pool", "tasks", ["state", "pool", "submitted_at", "task_id"])
    op.create_table(
        "drains",
        sa.Column("what", sa.String(255), primary_key=True),
        sa.Column("is_node", sa.Boolean, primary_key=True),
        sa.Column("by", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("waits", sa.Boolean, nullable=False),
    )
