"""The ledger in figures, by indices: what has ended is only looked at as far as an hour back."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Engine, Select, func, select

from ncr_upload.adapters.sql.engine import READ_ONLY, translated_errors
from ncr_upload.adapters.sql.rows import read_now
from ncr_upload.adapters.sql.tables import db_now, jobs
from ncr_upload.application.ports import Figures
from ncr_upload.domain.jobs import Status

HOUR_SECONDS = 3600.0


class SqlStatistics:
    """`Statistics` on SQL."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def figures(self, batch_timeout_seconds: float) -> Figures:
        """See `Statistics.figures`."""
        by_status = select(jobs.c.status, func.count()).group_by(jobs.c.status)
        with translated_errors(self._engine), self._engine.connect().execution_options(**READ_ONLY) as connection:
            now = read_now(connection)
            live = _tally(connection, by_status.where(jobs.c.live_job_id.is_not(None)))
            ended = _tally(connection, by_status.where(jobs.c.finished_at >= now - HOUR_SECONDS))
            due = select(func.min(jobs.c.claimable_at)).where(jobs.c.claimable_at <= db_now())
            oldest = connection.execute(due).scalar()
            stalled = _read_stalled(connection, now - batch_timeout_seconds)
        return Figures(live, ended, 0.0 if oldest is None else max(0.0, now - oldest), len(stalled))

    def stalled(self, batch_timeout_seconds: float) -> list[str]:
        """See `Statistics.stalled`."""
        with translated_errors(self._engine), self._engine.connect().execution_options(**READ_ONLY) as connection:
            return _read_stalled(connection, read_now(connection) - batch_timeout_seconds)


def _tally(connection: Connection, query: Select[Any]) -> dict[Status, int]:
    return {Status(status): count for status, count in connection.execute(query)}


def _read_stalled(connection: Connection, since: float) -> list[str]:
    running = select(jobs.c.batch_id).where(jobs.c.live_job_id.is_not(None), jobs.c.batch_id.is_not(None)).distinct()
    moved = (jobs.c.created_at, jobs.c.started_at, jobs.c.finished_at)
    idle = (
        select(jobs.c.batch_id)
        .where(jobs.c.batch_id.in_(running))
        .group_by(jobs.c.batch_id)
        .having(*(func.coalesce(func.max(moment), 0.0) < since for moment in moved))
    )
    return sorted(connection.execute(idle).scalars())
