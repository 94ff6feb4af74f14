"""The studio's side for development and tests: its tables as the studio has them, and jobs put into them.

In production these tables belong to the studio and nothing here runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    DateTime,
    Engine,
    Integer,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    delete,
    insert,
    inspect,
    select,
    text,
    update,
)
from sqlalchemy.dialects.mysql import MEDIUMTEXT
from sqlalchemy.dialects.sqlite import DATETIME as SQLITE_DATETIME

_META = MetaData()


# Whole seconds in SQLite too, as the other two databases keep them.
_MOMENT = DateTime().with_variant(SQLITE_DATETIME(truncate_microseconds=True), "sqlite")  # type: ignore[no-untyped-call]


def _id() -> Column[int]:
    return Column("id", Integer, primary_key=True, autoincrement=True)


JOB_DETAILS = Table(
    "job_details",
    _META,
    _id(),
    Column("job_id", String(128), nullable=False, index=True),
    Column("sku_id", String(255)),
    Column("status", String(32), server_default="Active"),
    Column("is_reviewed", SmallInteger, server_default="0"),
    Column("is_uploaded", SmallInteger, server_default="0"),
    Column("job_status", String(64)),
    Column("upload_count", Integer, server_default="0"),
    Column("uploadTime", _MOMENT),
    Column("updateTime", _MOMENT),
    Column("campaign", String(255)),
)
JOB_FILES = Table(
    "job_files",
    _META,
    _id(),
    Column("job_id", String(128), nullable=False, index=True),
    Column("file_path", String(1024), nullable=False),
    Column("file_type", String(32), server_default="base"),
    Column("timestamp", _MOMENT, server_default=text("CURRENT_TIMESTAMP")),
)
MODEL_VALIDATION = Table(
    "model_validation",
    _META,
    _id(),
    Column("job_id", String(128), nullable=False, unique=True),
    Column("response", Integer),
    Column("json", Text().with_variant(MEDIUMTEXT(), "mysql", "mariadb")),
)
VALIDATION_FAILED_REQ = Table(
    "validation_failed_req",
    _META,
    _id(),
    Column("job_id", String(128), index=True),
    Column("sku_id", String(255)),
    Column("response", Integer),
    Column("api_url", String(1024)),
    Column("username", String(128)),
    Column("campaign", String(255)),
    Column("row_id", Integer),
    Column("timestamp", _MOMENT, server_default=text("CURRENT_TIMESTAMP")),
)
EMAIL = Table(
    "email",
    _META,
    _id(),
    Column("sku", String(255), index=True),
    Column("status", String(32), server_default="Waiting"),
    Column("campagin", String(255)),
)
HISTORY_LOG = Table(
    "history_log",
    _META,
    _id(),
    Column("sku_id", String(255), index=True),
    Column("action", String(64)),
    Column("action_by", String(128)),
    Column("timestamp", _MOMENT, server_default=text("CURRENT_TIMESTAMP")),
)


class RowTaken(Exception):
    """The wanted `job_details.id` is another job's."""


@dataclass(frozen=True, slots=True)
class Listed:
    """One `job_files` row: an object key and when the artist uploaded it (studio time)."""

    key: str
    at: datetime
    file_type: str = "base"


def create_tables(engine: Engine) -> None:
    """Create the studio's tables that are missing; those that exist stay as they are."""
    _META.create_all(engine)


def add_job(
    engine: Engine,
    job_id: str,
    sku: str | None,
    files: Iterable[Listed],
    *,
    campaign: str | None = None,
    row_id: int | None = None,
) -> int:
    """Put a job in place that awaits upload, with its files; returns its `job_details.id`.

    The same job put in place again awaits again, with these files instead of its former ones. Raises `RowTaken` when
    `row_id` belongs to another job.
    """
    with engine.begin() as connection:
        row = _find_row(connection, job_id, row_id)
        if row is None:
            row = _insert_job(connection, job_id, sku, campaign, row_id)
        else:
            values = {"sku_id": sku, "status": "Active", "is_uploaded": 1, "job_status": "UPLOADED", "campaign": campaign}
            connection.execute(update(JOB_DETAILS).where(JOB_DETAILS.c.id == row).values(**values))
        connection.execute(delete(JOB_FILES).where(JOB_FILES.c.job_id == job_id))
        rows = [
            {"job_id": job_id, "file_path": listed.key, "file_type": listed.file_type, "timestamp": listed.at}
            for listed in files
        ]
        if rows:
            connection.execute(insert(JOB_FILES), rows)
        return row


def _find_row(connection: Connection, job_id: str, row_id: int | None) -> int | None:
    found = connection.execute(
        select(JOB_DETAILS.c.id)
        .where(JOB_DETAILS.c.job_id == job_id, JOB_DETAILS.c.status == "Active")
        .order_by(JOB_DETAILS.c.id)
    ).scalar()
    if row_id is None or found == row_id:
        return found
    owner = connection.execute(select(JOB_DETAILS.c.job_id).where(JOB_DETAILS.c.id == row_id)).scalar()
    if owner is not None or found is not None:
        raise RowTaken(f"job_details.id {row_id} cannot be job '{job_id}': it is '{owner}', and the job's own row is {found}")
    return None


def _insert_job(connection: Connection, job_id: str, sku: str | None, campaign: str | None, row_id: int | None) -> int:
    values: dict[str, Any] = {"job_id": job_id, "sku_id": sku, "status": "Active", "is_reviewed": 0, "is_uploaded": 1}
    values |= {"job_status": "UPLOADED", "upload_count": 0, "campaign": campaign}
    if row_id is not None:
        values["id"] = row_id
    inserted = connection.execute(insert(JOB_DETAILS).values(**values)).inserted_primary_key
    assert inserted is not None
    if row_id is not None and connection.dialect.name == "postgresql":
        # A given id does not move PostgreSQL's sequence, which would hand it out again.
        connection.execute(
            text("SELECT setval(pg_get_serial_sequence('job_details', 'id'), (SELECT max(id) FROM job_details))")
        )
    return int(inserted[0])


def read_rows(engine: Engine, job_id: str, sku: str) -> dict[str, list[dict[str, Any]]]:
    """Every row of the studio's tables that is about the job or its SKU, by table; `job_files` left out."""
    wanted = {
        JOB_DETAILS: JOB_DETAILS.c.job_id == job_id,
        MODEL_VALIDATION: MODEL_VALIDATION.c.job_id == job_id,
        VALIDATION_FAILED_REQ: VALIDATION_FAILED_REQ.c.job_id == job_id,
        EMAIL: EMAIL.c.sku == sku,
        HISTORY_LOG: HISTORY_LOG.c.sku_id == sku,
    }
    with engine.connect() as connection:
        return {
            table.name: [dict(row) for row in connection.execute(select(table).where(where).order_by(table.c.id)).mappings()]
            for table, where in wanted.items()
        }


def missing_tables(engine: Engine) -> set[str]:
    """The studio's tables that the database does not have."""
    return set(_META.tables) - set(inspect(engine).get_table_names())
