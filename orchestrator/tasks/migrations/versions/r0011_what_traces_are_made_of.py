"""What traces are made of: the facts of events, and where and when orders were done."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision: str = "0011"
down_revision: str | None = "0010"


def upgrade() -> None:
    op.add_column("events", sa.Column("facts", sa.Text))
    op.add_column("uses", sa.Column("worker", sa.String(80), nullable=False, server_default=""))
    op.add_column("uses", sa.Column("done_at", sa.Text))
