"""The ledger: jobs, batches, events, files."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

BigId = sa.BigInteger().with_variant(sa.Integer, "sqlite")
LIVE = "'pending', 'processing', 'uploading', 'validation_passed'"


def exact(length: int) -> Any:
    return sa.String(length).with_variant(sa.String(length, collation="utf8mb4_bin"), "mysql", "mariadb")


def upgrade() -> None:
    op.create_table(
        "ncr_jobs",
        sa.Column("id", BigId, primary_key=True, autoincrement=True),
        sa.Column("task_id", exact(36), nullable=False, unique=True),
        sa.Column("job_id", exact(128), nullable=False),
        sa.Column("username", sa.String(128), nullable=False),
        sa.Column("campaign", sa.String(128), nullable=False),
        sa.Column("row_id", sa.BigInteger),
        sa.Column("batch_id", exact(36), index=True),
        sa.Column("status", sa.String(20), nullable=False),
        sa.Column("stage", sa.String(20), nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("max_attempts", sa.Integer, nullable=False),
        sa.Column("claimable_at", sa.Double, index=True),
        sa.Column("fence", sa.Integer, nullable=False),
        sa.Column("publish_fence", sa.Integer),
        sa.Column("staging_due_at", sa.Double, index=True),
        sa.Column("worker", sa.String(255)),
        sa.Column("cancel_requested", sa.SmallInteger, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("updated_at", sa.Double, nullable=False),
        sa.Column("started_at", sa.Double),
        sa.Column("finished_at", sa.Double),
        sa.Column("sku", sa.String(255)),
        sa.Column("verdict", sa.String(64)),
        sa.Column("file_count", sa.Integer),
        sa.Column("byte_count", sa.BigInteger),
        sa.Column("problem_code", sa.String(64)),
        sa.Column("problem_class", sa.String(16)),
        sa.Column("problem_message", sa.Text),
        sa.Column("problem_next_step", sa.Text),
        sa.Column("live_job_id", exact(128), sa.Computed(f"CASE WHEN status IN ({LIVE}) THEN job_id END", persisted=True)),
        sa.Index("uq_ncr_jobs_live", "live_job_id", unique=True),
        mysql_engine="InnoDB",
        mysql_charset="utf8mb4",
    )
    op.create_table(
        "ncr_batches",
        sa.Column("batch_id", exact(36), primary_key=True),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("total_jobs", sa.Integer, nullable=False),
        mysql_engine="InnoDB",
        mysql_charset="utf8mb4",
    )
    op.create_table(
        "ncr_events",
        sa.Column("id", BigId, primary_key=True, autoincrement=True),
        sa.Column("task_id", exact(36), nullable=False, index=True),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("stage", sa.String(20), nullable=False),
        sa.Column("kind", sa.String(20), nullable=False),
        sa.Column("actor", sa.String(255), nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        mysql_engine="InnoDB",
        mysql_charset="utf8mb4",
    )
    op.create_table(
        "ncr_files",
        sa.Column("id", BigId, primary_key=True, autoincrement=True),
        sa.Column("task_id", exact(36), nullable=False, index=True),
        sa.Column("target", sa.Text, nullable=False),
        sa.Column("object_key", sa.Text, nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("crc32", sa.BigInteger, nullable=False),
        sa.Column("etag", sa.String(255), nullable=False),
        mysql_engine="InnoDB",
        mysql_charset="utf8mb4",
    )
    op.create_table(
        "ncr_idempotency",
        sa.Column("idempotency_key", exact(255), primary_key=True),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("task_id", exact(36), nullable=False),
        sa.Column("batch_id", exact(36)),
        sa.Column("created_at", sa.Double, nullable=False, index=True),
        mysql_engine="InnoDB",
        mysql_charset="utf8mb4",
    )


def downgrade() -> None:
    for name in ("ncr_idempotency", "ncr_files", "ncr_events", "ncr_batches", "ncr_jobs"):
        op.drop_table(name)
