"""The service's own tables (prefix `ncr_`) and the database's clock.

Column names are wire format. The migrations in `ncr_upload.migrations` make these tables; a test holds the two together.
Times are seconds since the epoch, by the database's clock alone.
"""

from __future__ import annotations

from typing import Any, TypeVarTuple

from sqlalchemy import (
    BigInteger,
    Column,
    Computed,
    Double,
    Index,
    Integer,
    MetaData,
    Select,
    SmallInteger,
    String,
    Table,
    Text,
    and_,
    or_,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.expression import ColumnElement

from ncr_upload.adapters.sql.session import FreeText
from ncr_upload.domain.jobs import LIVE

Ts = TypeVarTuple("Ts")
metadata = MetaData()
PARTIAL_INDICES = ("postgresql", "sqlite")
"""Databases that have them."""

BigId = BigInteger().with_variant(Integer, "sqlite")
"""SQLite only numbers rows by itself in a column of exactly the type INTEGER."""


def exact(length: int) -> Any:
    return String(length).with_variant(String(length, collation="utf8mb4_bin"), "mysql", "mariadb")


_live_statuses = ", ".join(f"'{status.value}'" for status in sorted(LIVE))

jobs = Table(
    "ncr_jobs",
    metadata,
    Column("id", BigId, primary_key=True, autoincrement=True),
    Column("task_id", exact(36), nullable=False, unique=True),
    Column("job_id", exact(128), nullable=False),
    Column("username", String(128), nullable=False),
    Column("campaign", String(128), nullable=False),
    Column("row_id", BigInteger),
    Column("batch_id", exact(36), index=True),
    Column("status", String(20), nullable=False),
    Column("stage", String(20), nullable=False),
    Column("message", FreeText, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("max_attempts", Integer, nullable=False),
    # The whole schedule in one column: when this task may be claimed next. Waiting: when it is due. Claimed: when the
    # lease ends. NULL: ended, or a batch job that has not been released.
    Column("claimable_at", Double, index=True),
    Column("fence", Integer, nullable=False),
    Column("publish_fence", Integer),
    # Staging folders of the task may be at the destination: once it has ended, they are to be removed from then on.
    Column("staging_due_at", Double, index=True),
    Column("worker", String(255)),
    # The parked destination that a waiting task waits for; see `parked_destinations`.
    Column("waits_for", exact(255), index=True),
    Column("cancel_requested", SmallInteger, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("updated_at", Double, nullable=False),
    Column("started_at", Double),
    Column("finished_at", Double),
    Column("sku", String(255)),
    Column("verdict", String(64)),
    Column("file_count", Integer),
    Column("byte_count", BigInteger),
    Column("problem_code", String(64)),
    Column("problem_class", String(16)),
    Column("problem_message", FreeText),
    Column("problem_next_step", FreeText),
    # One live task per job_id, kept by the database: NULL, and so never a duplicate, once the task has ended.
    Column("live_job_id", exact(128), Computed(f"CASE WHEN status IN ({_live_statuses}) THEN job_id END", persisted=True)),
    Index("uq_ncr_jobs_live", "live_job_id", unique=True),
    Index("ix_ncr_jobs_finished_at", "finished_at"),
    Index("ix_ncr_jobs_job_id", "job_id"),
)


def _partial_index(name: str, *columns: Column[Any], where: ColumnElement[bool]) -> None:
    Index(name, *columns, postgresql_where=where, sqlite_where=where)


_is_live, _is_released = jobs.c.live_job_id.is_not(None), jobs.c.claimable_at.is_not(None)
_partial_index("ix_ncr_jobs_live_id", jobs.c.id, where=_is_live)
_partial_index("ix_ncr_jobs_live_status", jobs.c.status, where=_is_live)  # to count by: the smallest of them all
# What a sweep looks for, where thousands wait. Each has all the columns that counting asks for.
_partial_index(
    *("ix_ncr_jobs_waiting", jobs.c.claimable_at, jobs.c.id, jobs.c.worker),
    where=and_(_is_released, jobs.c.worker.is_(None)),
)
_partial_index(
    *("ix_ncr_jobs_taken", jobs.c.claimable_at, jobs.c.id),
    where=and_(_is_released, or_(jobs.c.worker.is_not(None), jobs.c.attempt >= jobs.c.max_attempts)),
)
_partial_index(
    *("ix_ncr_jobs_in_flight", jobs.c.batch_id, jobs.c.claimable_at),
    where=and_(_is_released, jobs.c.batch_id.is_not(None)),
)
_partial_index(
    *("ix_ncr_jobs_live_batch", jobs.c.batch_id, jobs.c.claimable_at, jobs.c.id),
    where=and_(_is_live, jobs.c.batch_id.is_not(None)),
)


def live_first(query: Select[*Ts]) -> Select[*Ts]:
    """The query, told to MySQL to begin with the live jobs: without a partial index it would rather walk the primary key."""
    for mysql in ("mysql", "mariadb"):
        query = query.with_hint(jobs, "FORCE INDEX (uq_ncr_jobs_live)", mysql)
    return query


batches = Table(
    "ncr_batches",
    metadata,
    Column("batch_id", exact(36), primary_key=True),
    Column("created_at", Double, nullable=False, index=True),
    Column("total_jobs", Integer, nullable=False),
)

conflicts = Table(
    "ncr_batch_conflicts",
    metadata,
    Column("id", BigId, primary_key=True, autoincrement=True),
    Column("batch_id", exact(36), nullable=False, index=True),
    Column("job_id", exact(128), nullable=False),
    Column("task_id", exact(36), nullable=False),
)

events = Table(
    "ncr_events",
    metadata,
    Column("id", BigId, primary_key=True, autoincrement=True),
    Column("task_id", exact(36), nullable=False, index=True),
    Column("at", Double, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("stage", String(20), nullable=False),
    Column("kind", String(20), nullable=False),
    Column("actor", String(255), nullable=False),
    Column("message", FreeText, nullable=False),
)

files = Table(
    "ncr_files",
    metadata,
    Column("id", BigId, primary_key=True, autoincrement=True),
    Column("task_id", exact(36), nullable=False, index=True),
    Column("target", Text, nullable=False),
    Column("object_key", Text, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("crc32", BigInteger, nullable=False),
    Column("etag", String(255), nullable=False),
    # When it was written at the destination, by whose clock; NULL where that is not known for certain.
    Column("mtime", BigInteger),
)

# The connections that all workers may have to a destination: as many rows as SFTP_MAX_CONNECTIONS, and who holds each.
connections = Table(
    "ncr_connections",
    metadata,
    Column("destination", exact(255), primary_key=True),
    Column("slot", Integer, primary_key=True, autoincrement=False),
    Column("holder", exact(36)),
    Column("lease_until", Double, nullable=False),
)

# When the bytes that are booked for a destination will all have been sent.
pace = Table(
    "ncr_pace",
    metadata,
    Column("destination", exact(255), primary_key=True),
    Column("free_at", Double, nullable=False),
)

workers = Table(
    "ncr_workers",
    metadata,
    Column("worker", exact(255), primary_key=True),
    Column("seen_at", Double, nullable=False, index=True),
    Column("capacity", Integer, nullable=False),
    Column("configured", Integer, nullable=False),
    Column("memory_used", BigInteger, nullable=False),
    Column("memory_total", BigInteger, nullable=False),
    Column("memory_source", String(16), nullable=False),
    Column("resident_bytes", BigInteger, nullable=False),
    Column("free_disk_bytes", BigInteger, nullable=False),
)


idempotency = Table(
    "ncr_idempotency",
    metadata,
    Column("idempotency_key", exact(255), primary_key=True),
    Column("fingerprint", String(64), nullable=False),
    Column("task_id", exact(36), nullable=False),
    Column("batch_id", exact(36)),
    Column("created_at", Double, nullable=False, index=True),
)


parked_destinations = Table(
    "ncr_parked_destinations",
    metadata,
    Column("destination", exact(255), primary_key=True),
    Column("since", Double, nullable=False),
    Column("code", String(64), nullable=False),
    Column("message", FreeText, nullable=False),
    Column("next_step", FreeText, nullable=False),
    Column("probe_at", Double, nullable=False),
    Column("probe_seconds", Double, nullable=False),
    Column("probes", Integer, nullable=False),
    # NULL while it is parked. Kept for a while after, so that one which is parked again soon is probed less often.
    Column("healed_at", Double),
)

duties = Table(
    "ncr_duties",
    metadata,
    Column("name", exact(64), primary_key=True),
    Column("due_at", Double, nullable=False),
)

metrics = Table(
    "ncr_metrics",
    metadata,
    # One row a process, and one for all that were folded into it. State: see `SqlMetrics`.
    Column("process", exact(64), primary_key=True),
    Column("state", SmallInteger, nullable=False),
    Column("stored_at", Double, nullable=False, index=True),
    Column("counts", Text, nullable=False),
)


class db_now(ColumnElement[float]):
    """Seconds since the epoch by the database's clock, with fractions, at the time the row is looked at: also after a wait for
    its lock. A search for rows by it uses no index in PostgreSQL and MySQL."""

    inherit_cache = True
    _traverse_internals: Any = ()  # no two differ: without this, SQLAlchemy compiles every statement with it anew
    type = Double()


class statement_now(ColumnElement[float]):
    """The same when the statement began: one value, so that a search by it can use an index."""

    inherit_cache = True
    _traverse_internals: Any = ()  # no two differ: without this, SQLAlchemy compiles every statement with it anew
    type = Double()


@compiles(db_now, "sqlite")
@compiles(statement_now, "sqlite")
def _sqlite_now(*_: Any, **__: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(db_now, "postgresql")
def _postgresql_now(*_: Any, **__: Any) -> str:
    return "CAST(EXTRACT(EPOCH FROM clock_timestamp()) AS DOUBLE PRECISION)"


@compiles(statement_now, "postgresql")
def _postgresql_statement_now(*_: Any, **__: Any) -> str:
    return "CAST(EXTRACT(EPOCH FROM statement_timestamp()) AS DOUBLE PRECISION)"


@compiles(db_now, "mysql")
@compiles(db_now, "mariadb")
def _mysql_now(*_: Any, **__: Any) -> str:
    return "(UNIX_TIMESTAMP(SYSDATE(6)) + 0e0)"


@compiles(statement_now, "mysql")
@compiles(statement_now, "mariadb")
def _mysql_statement_now(*_: Any, **__: Any) -> str:
    return "(UNIX_TIMESTAMP(NOW(6)) + 0e0)"
