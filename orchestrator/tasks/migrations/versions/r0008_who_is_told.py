"""What webhooks are told of, what each was sent, and what was answered before publishing."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision: str = "0008"
down_revision: str | None = "0007"


def upgrade() -> None:
    op.create_table(
        "happenings",
        sa.Column("happening_id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("key", sa.String(200), nullable=False, unique=True),
        sa.Column("kind", sa.String(20), nullable=False),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("sentence", sa.Text, nullable=False),
        sa.Column("team", sa.String(63), nullable=False),
        sa.Column("task_id", sa.String(40), nullable=False),
        sa.Column("title", sa.String(130), nullable=False),
        sa.Column("base_model", sa.String(63), nullable=False),
        sa.Column("version", sa.BigInteger),
        sa.Column("is_given_out", sa.Boolean, nullable=False),
    )
    op.create_index("happenings_to_give_out", "happenings", ["is_given_out", "happening_id"])
    op.create_table(
        "deliveries",
        sa.Column("happening_id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("hook", sa.String(130), primary_key=True),
        sa.Column("tries", sa.Integer, nullable=False),
        sa.Column("due_at", sa.Float),
        sa.Column("tried_at", sa.Float),
        sa.Column("status", sa.String(20), nullable=False),
        sa.Column("answer", sa.Text, nullable=False),
    )
    op.create_index("deliveries_by_due", "deliveries", ["due_at"])
    op.create_index("deliveries_by_hook", "deliveries", ["hook", "happening_id"])
    op.create_table(
        "followers",
        sa.Column("name", sa.String(80), primary_key=True),
        sa.Column("number", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "verdicts",
        sa.Column("base_model", sa.String(63), primary_key=True),
        sa.Column("version", sa.BigInteger, primary_key=True),
        sa.Column("is_passed", sa.Boolean, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("code", sa.String(40), nullable=False),
        sa.Column("at", sa.Float, nullable=False),
    )
