"""Parked destinations, which task waits for one, and duties."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def exact(length: int) -> Any:
    return sa.String(length).with_variant(sa.String(length, collation="utf8mb4_bin"), "mysql", "mariadb")


def upgrade() -> None:
    op.add_column("ncr_jobs", sa.Column("waits_for", exact(255)))
    op.create_index("ix_ncr_jobs_waits_for", "ncr_jobs", ["waits_for"])
    op.create_table(
        "ncr_parked_destinations",
        sa.Column("destination", exact(255), primary_key=True),
        sa.Column("since", sa.Double, nullable=False),
        sa.Column("code", sa.String(64), nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("next_step", sa.Text, nullable=False),
        sa.Column("probe_at", sa.Double, nullable=False),
        sa.Column("probe_seconds", sa.Double, nullable=False),
        sa.Column("probes", sa.Integer, nullable=False),
        sa.Column("healed_at", sa.Double),
        mysql_engine="InnoDB",
        mysql_charset="utf8mb4",
    )
    op.create_table(
        "ncr_duties",
        sa.Column("name", exact(64), primary_key=True),
        sa.Column("due_at", sa.Double, nullable=False),
        mysql_engine="InnoDB",
        mysql_charset="utf8mb4",
    )


def downgrade() -> None:
    op.drop_table("ncr_duties")
    op.drop_table("ncr_parked_destinations")
    op.drop_index("ix_ncr_jobs_waits_for", "ncr_jobs")
    op.drop_column("ncr_jobs", "waits_for")
