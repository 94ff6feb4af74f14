"""What a batch left out because it was in flight already; what the workers say of themselves."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

BigId = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def exact(length: int) -> Any:
    return sa.String(length).with_variant(sa.String(length, collation="utf8mb4_bin"), "mysql", "mariadb")


def upgrade() -> None:
    op.create_table(
        "ncr_batch_conflicts",
        sa.Column("id", BigId, primary_key=True, autoincrement=True),
        sa.Column("batch_id", exact(36), nullable=False, index=True),
        sa.Column("job_id", exact(128), nullable=False),
        sa.Column("task_id", exact(36), nullable=False),
    )

    op.create_table(
        "ncr_workers",
        sa.Column("worker", exact(255), primary_key=True),
        sa.Column("seen_at", sa.Double, nullable=False, index=True),
        sa.Column("capacity", sa.Integer, nullable=False),
        sa.Column("configured", sa.Integer, nullable=False),
        sa.Column("memory_used", sa.BigInteger, nullable=False),
        sa.Column("memory_total", sa.BigInteger, nullable=False),
        sa.Column("memory_source", sa.String(16), nullable=False),
        sa.Column("resident_bytes", sa.BigInteger, nullable=False),
        sa.Column("free_disk_bytes", sa.BigInteger, nullable=False),
    )


def downgrade() -> None:
    op.drop_table("ncr_workers")
    op.drop_table("ncr_batch_conflicts")
