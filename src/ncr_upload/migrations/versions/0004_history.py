"""Indices for what is live among a million that have ended, and for what is old enough to go."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

LIVE = sa.text("live_job_id IS NOT NULL")


def upgrade() -> None:
    if op.get_bind().dialect.name in ("postgresql", "sqlite"):  # MySQL has no partial index
        op.create_index("ix_ncr_jobs_live_id", "ncr_jobs", ["id"], postgresql_where=LIVE, sqlite_where=LIVE)
    op.create_index("ix_ncr_jobs_finished_at", "ncr_jobs", ["finished_at"])
    op.create_index("ix_ncr_batches_created_at", "ncr_batches", ["created_at"])


def downgrade() -> None:
    op.drop_index("ix_ncr_batches_created_at", "ncr_batches")
    op.drop_index("ix_ncr_jobs_finished_at", "ncr_jobs")
    if op.get_bind().dialect.name in ("postgresql", "sqlite"):
        op.drop_index("ix_ncr_jobs_live_id", "ncr_jobs")
