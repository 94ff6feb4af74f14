"""When a delivered file was written, by the destination's clock; what all workers share of a destination."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def exact(length: int) -> Any:
    return sa.String(length).with_variant(sa.String(length, collation="utf8mb4_bin"), "mysql", "mariadb")


def upgrade() -> None:
    op.add_column("ncr_files", sa.Column("mtime", sa.BigInteger, nullable=True))
    op.create_index("ix_ncr_jobs_job_id", "ncr_jobs", ["job_id"])
    op.create_table(
        "ncr_connections",
        sa.Column("destination", exact(255), primary_key=True),
        sa.Column("slot", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("holder", exact(36), nullable=True),
        sa.Column("lease_until", sa.Double, nullable=False),
    )
    op.create_table(
        "ncr_pace",
        sa.Column("destination", exact(255), primary_key=True),
        sa.Column("free_at", sa.Double, nullable=False),
    )


def downgrade() -> None:
    op.drop_table("ncr_pace")
    op.drop_table("ncr_connections")
    op.drop_index("ix_ncr_jobs_job_id", "ncr_jobs")
    op.drop_column("ncr_files", "mtime")
