"""The studio's tables (docs/contract.md, section 1). They belong to the studio: read and updated here, never altered."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
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
    Update,
    cast,
    func,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.dialects import sqlite
from sqlalchemy.dialects.mysql import TEXT, TINYTEXT
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from ncr_upload.adapters.sql.engine import READ_ONLY, redactor_of, translated_errors
from ncr_upload.adapters.sql.refusals import rejected_rows, rejecting
from ncr_upload.adapters.sql.rows import read_now
from ncr_upload.adapters.sql.studio_tables import adapt_tables, find_lasting, is_job, job_value
from ncr_upload.application.ports import Recording, StudioJob, Verdict
from ncr_upload.domain.errors import Rejected
from ncr_upload.domain.jobs import Task
from ncr_upload.domain.packages import SourceFile
from ncr_upload.domain.text import bound_json, parse_json

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

ANSWER_BYTES = 262_144
"""Of a validator's answer so much is kept."""

SMALL_ANSWER_BYTES = 60_000
"""Where the column is a TEXT of MySQL, or nobody knows what it is."""

RECORDED = frozenset({"job_details", "email", "history_log"})
"""Where the rows of a delivery go."""

WORDS_OF_CALLERS = {
    "email": ("campagin",),
    "history_log": ("action_by",),
    "validation_failed_req": ("username", "campaign"),
}
"""The studio's columns that take what a caller wrote, by table."""

TAKEN_SECONDS = 60.0
"""What the tables took from a user for a campaign, they are believed to take again for so long."""

TAKEN_KEPT = 1000


_CHECK_NOW = text("SET CONSTRAINTS ALL IMMEDIATE")
"""Constraints that PostgreSQL would look at when the transaction ends. Taken back with the savepoint."""


class SqlCatalogue:
    """`Catalogue` on SQL. `zone` is the studio's: its times are written in it, to the second."""

    def __init__(self, engine: Engine, zone: ZoneInfo) -> None:
        self._engine = engine
        self._zone = zone
        self._adapted: dict[str, Table] | None = None
        self._can_undo: bool | None = None
        self._taken: dict[tuple[str, str], float] = {}

    def find_job(self, job_id: str, row_id: int | None) -> StudioJob:
        """See `Catalogue.find_job`."""
        with translated_errors(self._engine), self._engine.connect().execution_options(**READ_ONLY) as connection:
            rows = self.read_rows(connection, job_id)
        if row_id is not None and rows:
            rows = [row for row in rows if row.id == row_id]
            if not rows:
                raise row_mismatch(job_id, row_id)
        return _choose(job_id, rows)

    def read_rows(self, connection: Connection, job_id: str) -> list[Any]:
        """The job's active rows: id, job_id, sku_id, is_uploaded."""
        table = self._table(connection, "job_details")
        query = select(table.c.id, table.c.job_id, table.c.sku_id, table.c.is_uploaded).where(
            is_job(connection, table.c.job_id, job_id), table.c.status == "Active"
        )
        return [row for row in connection.execute(query) if str(row.job_id) == job_id]

    def list_files(self, job_id: str) -> Sequence[SourceFile]:
        """See `Catalogue.list_files`."""
        with translated_errors(self._engine), self._engine.connect().execution_options(**READ_ONLY) as connection:
            table = self._table(connection, "job_files")
            query = select(table.c.file_path, cast(table.c.timestamp, String(32))).where(
                is_job(connection, table.c.job_id, job_id), table.c.file_type == "base"
            )
            rows = connection.execute(query).all()
        return [SourceFile(path or "", stamp or "") for path, stamp in rows]

    def delivered(self, task: Task, sku: str) -> Recording:
        """See `Catalogue.delivered`."""

        def write(connection: Connection) -> str | None:
            now = self.local_now(connection)
            details, email, history = (self._table(connection, name) for name in ("job_details", "email", "history_log"))
            updated = connection.execute(
                _awaiting(connection, details, task).values(
                    is_reviewed=0,
                    is_uploaded=0,
                    job_status="IAPPROVED",
                    upload_count=func.coalesce(details.c.upload_count, 0) + 1,
                    uploadTime=now,
                    updateTime=now,
                )
            )
            connection.execute(insert(email).values(sku=sku, status="Waiting", campagin=task.campaign))
            connection.execute(insert(history).values(sku_id=sku, action="review", action_by=task.username, timestamp=now))
            if updated.rowcount == 0:
                return "the studio had withdrawn the upload meanwhile: no row of job_details was awaiting, none was updated"
            return None

        return write

    def rehearsed(self, task: Task, sku: str) -> Recording:
        """See `Catalogue.rehearsed`."""
        record = self.delivered(task, sku)
        values = self.written(task, sku)

        def write(connection: Connection) -> None:
            if self._can_undo is None:
                self._can_undo = not self.is_delivered_to(find_lasting(connection))
            if not self._can_undo:
                return
            trial = connection.begin_nested()
            try:
                with rejected_rows(values, lambda: self._adapted or {}):
                    record(connection)
                    if connection.dialect.name == "postgresql":
                        connection.execute(_CHECK_NOW)
            except BaseException:
                with suppress(SQLAlchemyError):  # MySQL takes the whole transaction back after a deadlock
                    trial.rollback()
                raise
            trial.rollback()
            self._remember_taken(task)

        return write

    def foreseen(self, task: Task, sku: str) -> Recording | None:
        """See `Catalogue.foreseen`."""
        if time.monotonic() - self._taken.get((task.username, task.campaign), -TAKEN_SECONDS) < TAKEN_SECONDS:
            return None
        return self.rehearsed(task, sku)

    def _remember_taken(self, task: Task) -> None:
        if len(self._taken) >= TAKEN_KEPT:
            self._taken.clear()
        self._taken[task.username, task.campaign] = time.monotonic()

    def written(self, task: Task, sku: str | None, **more: Any) -> dict[str, Any]:
        """Return what the recordings write, by column or parameter, to name the value that is refused."""
        return {
            "username": task.username,
            "campaign": task.campaign,
            "sku": sku,
            "job_id": task.job_id,
            "row_id": task.row_id,
            "action_by": task.username,
            "campagin": task.campaign,
            "sku_id": sku,
            "action": "review",
            "status": "Waiting",
            "job_status": "IAPPROVED",
            **more,
        }

    def is_delivered_to(self, tables: Sequence[str]) -> bool:
        """Whether the rows of a delivery go into one of these tables, as far as is known."""
        return not RECORDED.isdisjoint(table.lower() for table in tables)

    def judged(self, task: Task, verdict: Verdict) -> Recording:
        """See `Catalogue.judged`."""
        return self._rejecting(self._judged(task, verdict), task, task.sku, json=verdict.body, response=verdict.http_status)

    def _rejecting(self, record: Recording, task: Task, sku: str | None, **more: Any) -> Recording:
        return rejecting(record, self.written(task, sku, **more), lambda: self._adapted or {})

    def _judged(self, task: Task, verdict: Verdict) -> Recording:
        def write(connection: Connection) -> None:
            table = self._table(connection, "model_validation")
            shown = bound_answer(self._engine, verdict.body, _room_of(table.c["json"]))
            values = {"response": verdict.http_status, "json": shown}
            newest = update(table).values(values)
            if connection.execute(newest.where(is_job(connection, table.c.job_id, task.job_id))).rowcount:
                return
            try:
                with connection.begin_nested():
                    connection.execute(insert(table).values(job_id=job_value(table.c.job_id, task.job_id), **values))
            except IntegrityError:
                # The studio's own unique key takes two jobs for one whose ids differ only in case: the newest wins.
                if not connection.execute(newest.where(table.c.job_id == job_value(table.c.job_id, task.job_id))).rowcount:
                    raise

        return write

    def refused(self, task: Task, sku: str, verdict: Verdict, api_url: str) -> Recording:
        """See `Catalogue.refused`."""

        def write(connection: Connection) -> None:
            self.judged(task, verdict)(connection)
            if verdict.http_status != 200:
                self.unanswered(task, sku, verdict.http_status, api_url)(connection)
            waiting = _awaiting(connection, self._table(connection, "job_details"), task)
            connection.execute(waiting.values(is_uploaded=0, updateTime=self.local_now(connection)))

        return self._rejecting(write, task, sku, api_url=api_url, response=verdict.http_status)

    def unanswered(self, task: Task, sku: str, http_status: int, api_url: str) -> Recording:
        """See `Catalogue.unanswered`."""

        def write(connection: Connection) -> None:
            table = self._table(connection, "validation_failed_req")
            connection.execute(
                insert(table).values(
                    job_id=job_value(table.c.job_id, task.job_id),
                    sku_id=sku,
                    response=http_status,
                    api_url=api_url,
                    username=task.username,
                    campaign=task.campaign,
                    row_id=task.row_id,
                    timestamp=self.local_now(connection),
                )
            )

        return self._rejecting(write, task, sku, api_url=api_url, response=http_status)

    def local_now(self, connection: Connection) -> datetime:
        """The database's clock in the studio's zone, to the second."""
        return datetime.fromtimestamp(read_now(connection), self._zone).replace(microsecond=0, tzinfo=None)

    def _table(self, connection: Connection, name: str) -> Table:
        """The studio's table as it is; looked up once."""
        if self._adapted is None:
            self._adapted = adapt_tables(connection, studio)
        return self._adapted[name]


def row_mismatch(job_id: str, row_id: int) -> Rejected:
    return Rejected(
        "row_mismatch",
        f"row_id {row_id} is not an active row of job '{job_id}' in job_details",
        "Send the id of the job's own active row, or leave row_id out.",
    )


def _choose(job_id: str, rows: Sequence[Any]) -> StudioJob:
    awaiting = [row for row in rows if row.is_uploaded == 1]
    candidates = awaiting or list(rows)
    sku = choose_sku(job_id, [row.sku_id for row in candidates])
    chosen = next(row for row in candidates if row.sku_id == sku)
    return StudioJob(chosen.id, sku, awaiting=bool(awaiting))


def choose_sku(job_id: str, found: Sequence[str | None]) -> str:
    """The only one. Raises `Rejected` ('sku_not_found', 'sku_ambiguous')."""
    skus = sorted({sku for sku in found if sku})
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
    return skus[0]


def _awaiting(connection: Connection, details: Table, task: Task) -> Update:
    statement = update(details).where(details.c.is_uploaded == 1, is_job(connection, details.c.job_id, task.job_id))
    return statement.where(details.c.id == task.row_id) if task.row_id is not None else statement


def bound_answer(engine: Engine, body: str, max_bytes: int) -> Any:
    """Return a validator's answer as it is kept: without secrets, written in at most so many bytes, and such that every
    database takes it as JSON (none takes NaN, half a surrogate pair, or a hundred levels)."""
    try:
        answer = parse_json(body.encode("utf-8", "replace"))
    except ValueError:
        answer = {"body": body}
    return redactor_of(engine).redact_json(bound_json(answer, max_bytes))


def _room_of(column: Column[Any]) -> int:
    """How many bytes of JSON the studio's own column holds."""
    kind = column.info.get("real_type")
    if isinstance(kind, TEXT | TINYTEXT):
        return min(ANSWER_BYTES, SMALL_ANSWER_BYTES if isinstance(kind, TEXT) else 255)
    if isinstance(kind, String) and kind.length:
        return min(ANSWER_BYTES, kind.length)
    return ANSWER_BYTES
