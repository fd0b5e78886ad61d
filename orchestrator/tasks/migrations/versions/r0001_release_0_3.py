"""The tables of release 0.3, which made them without a revision."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision: str = "0001"
down_revision: str | None = None


def upgrade() -> None:
    op.create_table(
        "tasks",
        sa.Column("task_id", sa.String(40), primary_key=True),
        sa.Column("team", sa.String(63), nullable=False),
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("client_key", sa.String(120), nullable=False),
        sa.Column("state", sa.String(20), nullable=False),
        sa.Column("token", sa.String(40), nullable=False),
        sa.Column("revision", sa.Integer, nullable=False),
        sa.Column("submitted_at", sa.Float, nullable=False),
        sa.Column("train_seconds", sa.Float),
        sa.Column("ended_training_at", sa.Float),
        sa.Column("lease_until", sa.Float),
        sa.Column("progress", sa.Text),
        sa.Column("record", sa.Text, nullable=False),
        sa.UniqueConstraint("team", "client_key"),
    )
    op.create_index("tasks_by_state", "tasks", ["state"])
    op.create_index("tasks_by_name", "tasks", ["team", "name"])
    op.create_table(
        "events",
        sa.Column("event_id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("task_id", sa.String(40), nullable=False),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("kind", sa.String(40), nullable=False),
        sa.Column("text", sa.Text, nullable=False),
    )
    op.create_index("events_by_task", "events", ["task_id", "event_id"])
