"""The ledger as the janitor sees it."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import ColumnElement, Engine, and_, delete, select, update

from ncr_upload.adapters.sql.engine import READ_ONLY, translated_errors, whole_transaction
from ncr_upload.adapters.sql.rows import bounded_message, read_row, take_row, write_event
from ncr_upload.adapters.sql.tables import db_now, events, idempotency, jobs, statement_now
from ncr_upload.application.ports import Successor
from ncr_upload.domain.jobs import LIVE, Status

JANITOR = "janitor"

IDS_AT_ONCE = 250


class SqlCleaning:
    """`Cleaning` on SQL."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def find_statuses(self, task_ids: Sequence[str]) -> dict[str, Status]:
        """See `Cleaning.find_statuses`."""
        found: dict[str, Status] = {}
        with translated_errors(self._engine), self._engine.connect().execution_options(**READ_ONLY) as connection:
            for start in range(0, len(task_ids), IDS_AT_ONCE):
                some = task_ids[start : start + IDS_AT_ONCE]
                rows = connection.execute(select(jobs.c.task_id, jobs.c.status).where(jobs.c.task_id.in_(some)))
                found.update((row.task_id, Status(row.status)) for row in rows)
        return found

    def unclean(self, limit: int) -> list[str]:
        """See `Cleaning.unclean`."""
        query = select(jobs.c.task_id).where(*_is_unclean(statement_now())).order_by(jobs.c.staging_due_at).limit(limit)
        with translated_errors(self._engine), self._engine.connect().execution_options(**READ_ONLY) as connection:
            return list(connection.execute(query).scalars())

    @whole_transaction
    def take_cleaning(self, task_id: str, hold_seconds: float) -> bool:
        """See `Cleaning.take_cleaning`."""
        take = (
            update(jobs).where(jobs.c.task_id == task_id, *_is_unclean(db_now())).values(staging_due_at=db_now() + hold_seconds)
        )
        with translated_errors(self._engine), self._engine.begin() as connection:
            return take_row(connection, task_id) and connection.execute(take).rowcount == 1

    @whole_transaction
    def cleaned(self, task_id: str) -> None:
        """See `Cleaning.cleaned`."""
        with translated_errors(self._engine), self._engine.begin() as connection:
            connection.execute(update(jobs).where(jobs.c.task_id == task_id).values(staging_due_at=None))

    def find_successor(self, task_id: str) -> Successor:
        """See `Cleaning.find_successor`."""
        own = select(jobs.c.id, jobs.c.job_id, jobs.c.status).where(jobs.c.task_id == task_id).subquery()
        later = select(own.c.status, jobs.c.status.label("later")).select_from(
            own.outerjoin(jobs, and_(jobs.c.job_id == own.c.job_id, jobs.c.id > own.c.id))
        )
        with translated_errors(self._engine), self._engine.connect().execution_options(**READ_ONLY) as connection:
            found = {status for row in connection.execute(later) for status in row if status is not None}
        if Status.COMPLETED.value in found:
            return Successor.DELIVERED
        own_or_later_lives = any(status.value in found for status in LIVE)
        return Successor.UNKNOWN if own_or_later_lives or not found else Successor.NONE

    @whole_transaction
    def note_kept(self, task_id: str, message: str) -> None:
        """See `Cleaning.note_kept`."""
        message = bounded_message(self._engine, message)
        last = select(events.c.message).where(events.c.task_id == task_id).order_by(events.c.id.desc()).limit(1)
        with translated_errors(self._engine), self._engine.begin() as connection:
            row = read_row(connection, task_id)
            if row is None or connection.execute(last).scalar() == message:
                return
            line = {"attempt": row["attempt"], "stage": row["stage"], "kind": "kept", "actor": JANITOR, "message": message}
            write_event(connection, task_id, **line)

    def ended_long_ago(self, task_ids: Sequence[str], seconds: float) -> dict[str, bool]:
        """See `Cleaning.ended_long_ago`."""
        found: dict[str, bool] = {}
        with translated_errors(self._engine), self._engine.connect().execution_options(**READ_ONLY) as connection:
            for start in range(0, len(task_ids), IDS_AT_ONCE):
                asked = jobs.c.task_id.in_(task_ids[start : start + IDS_AT_ONCE])
                rows = connection.execute(select(jobs.c.task_id, db_now() - jobs.c.finished_at).where(asked))
                found |= {task_id: age is not None and age > seconds for task_id, age in rows}
        return found

    @whole_transaction
    def forget_keys(self, seconds: float) -> int:
        """See `Cleaning.forget_keys`."""
        old = delete(idempotency).where(idempotency.c.created_at < statement_now() - seconds)
        with translated_errors(self._engine), self._engine.begin() as connection:
            return connection.execute(old).rowcount


def _is_unclean(now: ColumnElement[float]) -> tuple[ColumnElement[bool], ...]:
    return (jobs.c.staging_due_at <= now, jobs.c.finished_at.is_not(None))
