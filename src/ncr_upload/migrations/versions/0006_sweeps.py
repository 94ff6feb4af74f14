"""Indices for what a sweep looks for and for how many jobs are live, among thousands of jobs that wait."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

INDICES = {
    "ix_ncr_jobs_live_status": (["status"], "live_job_id IS NOT NULL"),
    "ix_ncr_jobs_waiting": (["claimable_at", "id", "worker"], "claimable_at IS NOT NULL AND worker IS NULL"),
    "ix_ncr_jobs_taken": (
        ["claimable_at", "id"],
        "claimable_at IS NOT NULL AND (worker IS NOT NULL OR attempt >= max_attempts)",
    ),
    "ix_ncr_jobs_in_flight": (["batch_id", "claimable_at"], "claimable_at IS NOT NULL AND batch_id IS NOT NULL"),
    "ix_ncr_jobs_live_batch": (["batch_id", "claimable_at", "id"], "live_job_id IS NOT NULL AND batch_id IS NOT NULL"),
}


def upgrade() -> None:
    if op.get_bind().dialect.name in ("postgresql", "sqlite"):  # MySQL has no partial index
        for name, (columns, condition) in INDICES.items():
            op.create_index(name, "ncr_jobs", columns, postgresql_where=sa.text(condition), sqlite_where=sa.text(condition))


def downgrade() -> None:
    if op.get_bind().dialect.name in ("postgresql", "sqlite"):
        for name in INDICES:
            op.drop_index(name, "ncr_jobs")
