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
            stalled = connection.execute(_stalled(now - batch_timeout_seconds)).scalar_one()
        return Figures(live, ended, 0.0 if oldest is None else max(0.0, now - oldest), stalled)


def _tally(connection: Connection, query: Select[Any]) -> dict[Status, int]:
    return {Status(status): count for status, count in connection.execute(query)}


def _stalled(since: float) -> Select[Any]:
    running = select(jobs.c.batch_id).where(jobs.c.live_job_id.is_not(None), jobs.c.batch_id.is_not(None)).distinct()
    idle = (
        select(jobs.c.batch_id)
        .where(jobs.c.batch_id.in_(running))
        .group_by(jobs.c.batch_id)
        .having(func.max(jobs.c.updated_at) < since)
    )
    return select(func.count()).select_from(idle.subquery())
