"""GPUs of each order, and GPU-seconds of each team."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision: str = "0010"
down_revision: str | None = "0009"


def upgrade() -> None:
    # Of what was charged before nobody knows the GPUs: it counts by its places alone.
    op.add_column("uses", sa.Column("gpus", sa.Float, nullable=False, server_default="0"))
    op.add_column("team_uses", sa.Column("gpu_seconds", sa.Float, nullable=False, server_default="0"))
