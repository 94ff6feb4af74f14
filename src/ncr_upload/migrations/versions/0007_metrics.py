"""What each process has counted, for the counters and histograms of `/metrics`."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def exact(length: int) -> Any:
    return sa.String(length).with_variant(sa.String(length, collation="utf8mb4_bin"), "mysql", "mariadb")


def upgrade() -> None:
    op.create_table(
        "ncr_metrics",
        sa.Column("process", exact(64), primary_key=True),
        sa.Column("state", sa.SmallInteger, nullable=False),
        sa.Column("stored_at", sa.Double, nullable=False),
        sa.Column("counts", sa.Text, nullable=False),
    )
    op.create_index("ix_ncr_metrics_stored_at", "ncr_metrics", ["stored_at"])


def downgrade() -> None:
    op.drop_table("ncr_metrics")
