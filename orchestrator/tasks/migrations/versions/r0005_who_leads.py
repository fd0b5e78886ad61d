"""Which of several control planes leads, and which stand by."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision: str = "0005"
down_revision: str | None = "0004"


def upgrade() -> None:
    lease = op.create_table(
        "leadership",
        sa.Column("fence", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("holder", sa.String(120), nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("since", sa.Float, nullable=False),
        sa.Column("until", sa.Float, nullable=False),
        sa.Column("service_id", sa.String(40), nullable=False),
        sa.Column("settings", sa.Text, nullable=False),
    )
    free = {"holder": "", "name": "", "url": "", "since": 0.0, "until": 0.0, "service_id": "", "settings": ""}
    op.bulk_insert(lease, [{"fence": 0, **free}])
    op.create_table(
        "control_planes",
        sa.Column("member_id", sa.String(120), primary_key=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("since", sa.Float, nullable=False),
        sa.Column("seen_at", sa.Float, nullable=False),
    )
