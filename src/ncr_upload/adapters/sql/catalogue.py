"""The studio's tables (DESIGN 3.1). They belong to the studio: read and updated here, never altered."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Connection,
    DateTime,
    Engine,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    cast,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.dialects import sqlite

from ncr_upload.adapters.sql.engine import READ_ONLY, translated_errors
from ncr_upload.adapters.sql.rows import read_now
from ncr_upload.application.ports import Recording, StudioJob, Verdict
from ncr_upload.domain.errors import Rejected
from ncr_upload.domain.jobs import Task
from ncr_upload.domain.packages import SourceFile

studio = MetaData()
LocalTime = DateTime().with_variant(sqlite.DATETIME(truncate_microseconds=True), "sqlite")  # type: ignore[no-untyped-call]

job_details = Table(
    "job_details",
    studio,
    Column("id", BigInteger, primary_key=True),
    Column("job_id", String(128)),
    Column("sku_id", String(255)),
    Column("status", String(32)),
    Column("is_reviewed", Integer),
    Column("is_uploaded", Integer),
    Column("job_status", String(32)),
    Column("upload_count", Integer),
    Column("uploadTime", LocalTime),
    Column("updateTime", LocalTime),
    Column("campaign", String(128)),
)
job_files = Table(
    "job_files",
    studio,
    Column("id", BigInteger, primary_key=True),
    Column("job_id", String(128)),
    Column("file_path", Text),
    Column("file_type", String(32)),
    Column("timestamp", LocalTime),
)
model_validation = Table(
    "model_validation",
    studio,
    Column("job_id", String(128)),
    Column("response", Integer),
    Column("json", JSON(none_as_null=True)),
)
validation_failed_req = Table(
    "validation_failed_req",
    studio,
    Column("job_id", String(128)),
    Column("sku_id", String(255)),
    Column("response", Integer),
    Column("api_url", Text),
    Column("username", String(128)),
    Column("campaign", String(128)),
    Column("row_id", BigInteger),
    Column("timestamp", LocalTime),
)
email = Table("email", studio, Column("sku", String(255)), Column("status", String(32)), Column("campagin", String(128)))
history_log = Table(
    "history_log",
    studio,
    Column("sku_id", String(255)),
    Column("action", String(32)),
    Column("action_by", String(128)),
    Column("timestamp", LocalTime),
)


class SqlCatalogue:
    """`Catalogue` on SQL. `zone` is the studio's: its times are written in it, to the second."""

    def __init__(self, engine: Engine, zone: ZoneInfo) -> None:
        self._engine = engine
        self._zone = zone

    def find_job(self, job_id: str, row_id: int | None) -> StudioJob:
        """See `Catalogue.find_job`."""
        query = select(job_details.c.id, job_details.c.job_id, job_details.c.sku_id, job_details.c.is_uploaded).where(
            job_details.c.job_id == job_id, job_details.c.status == "Active"
        )
        with translated_errors(self._engine), self._engine.connect().execution_options(**READ_ONLY) as connection:
            found = connection.execute(query).all()
        # A numeric column would let the database take '12x' for 12; only the very same text is the job.
        rows = [row for row in found if str(row.job_id) == job_id]
        if row_id is not None and rows:
            rows = [row for row in rows if row.id == row_id]
            if not rows:
                raise Rejected(
                    "row_mismatch",
                    f"row_id {row_id} is not an active row of job '{job_id}' in job_details",
                    "Send the id of the job's own active row, or leave row_id out.",
                )
        return _choose(job_id, rows)

    def list_files(self, job_id: str) -> Sequence[SourceFile]:
        """See `Catalogue.list_files`."""
        query = select(job_files.c.job_id, job_files.c.file_path, cast(job_files.c.timestamp, String(32))).where(
            job_files.c.job_id == job_id, job_files.c.file_type == "base"
        )
        with translated_errors(self._engine), self._engine.connect().execution_options(**READ_ONLY) as connection:
            rows = connection.execute(query).all()
        return [SourceFile(path or "", stamp or "") for owner, path, stamp in rows if str(owner) == job_id]

    def delivered(self, task: Task, sku: str) -> Recording:
        """See `Catalogue.delivered`."""

        def write(connection: Connection) -> str | None:
            now = self._local_now(connection)
            updated = connection.execute(
                _awaiting(task).values(
                    is_reviewed=0,
                    is_uploaded=0,
                    job_status="IAPPROVED",
                    upload_count=_plus_one(job_details.c.upload_count),
                    uploadTime=now,
                    updateTime=now,
                )
            )
            connection.execute(insert(email).values(sku=sku, status="Waiting", campagin=task.campaign))
            connection.execute(insert(history_log).values(sku_id=sku, action="review", action_by=task.username, timestamp=now))
            if updated.rowcount == 0:
                return "the studio had withdrawn the upload meanwhile: no row of job_details was awaiting, none was updated"
            return None

        return write

    def judged(self, task: Task, verdict: Verdict) -> Recording:
        """See `Catalogue.judged`."""

        def write(connection: Connection) -> None:
            values = {"response": verdict.http_status, "json": _as_json(verdict.body)}
            newest = update(model_validation).where(model_validation.c.job_id == task.job_id).values(values)
            if connection.execute(newest).rowcount == 0:
                connection.execute(insert(model_validation).values(job_id=task.job_id, **values))

        return write

    def refused(self, task: Task, sku: str, verdict: Verdict, api_url: str) -> Recording:
        """See `Catalogue.refused`."""

        def write(connection: Connection) -> None:
            self.judged(task, verdict)(connection)
            if verdict.http_status != 200:
                self.unanswered(task, sku, verdict.http_status, api_url)(connection)
            connection.execute(_awaiting(task).values(is_uploaded=0, updateTime=self._local_now(connection)))

        return write

    def unanswered(self, task: Task, sku: str, http_status: int, api_url: str) -> Recording:
        """See `Catalogue.unanswered`."""

        def write(connection: Connection) -> None:
            connection.execute(
                insert(validation_failed_req).values(
                    job_id=task.job_id,
                    sku_id=sku,
                    response=http_status,
                    api_url=api_url,
                    username=task.username,
                    campaign=task.campaign,
                    row_id=task.row_id,
                    timestamp=self._local_now(connection),
                )
            )

        return write

    def _local_now(self, connection: Connection) -> datetime:
        return datetime.fromtimestamp(read_now(connection), self._zone).replace(microsecond=0, tzinfo=None)


def _choose(job_id: str, rows: Sequence[Any]) -> StudioJob:
    awaiting = [row for row in rows if row.is_uploaded == 1]
    candidates = awaiting or list(rows)
    skus = sorted({row.sku_id for row in candidates if row.sku_id})
    if not skus:
        raise Rejected(
            "sku_not_found",
            f"job '{job_id}' has no row with status 'Active' and a sku_id in job_details",
            "Check the job_id, and that the studio has activated the job and given it a SKU.",
        )
    if len(skus) > 1:
        raise Rejected(
            "sku_ambiguous",
            f"job '{job_id}' has active rows for several SKUs: {', '.join(skus[:5])}",
            "Send the row_id of the one to deliver, or deactivate the others.",
        )
    chosen = next(row for row in candidates if row.sku_id == skus[0])
    return StudioJob(chosen.id, chosen.sku_id, awaiting=bool(awaiting))


def _awaiting(task: Task) -> Any:
    statement = update(job_details).where(job_details.c.is_uploaded == 1, job_details.c.job_id == task.job_id)
    return statement.where(job_details.c.id == task.row_id) if task.row_id is not None else statement


def _plus_one(column: Any) -> Any:
    return func.coalesce(column, 0) + 1


def _as_json(body: str) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return {"body": body}
