"""What the workers last said of themselves: one row each."""

from __future__ import annotations

from sqlalchemy import Engine, delete, insert, select, update
from sqlalchemy.exc import IntegrityError

from ncr_upload.adapters.sql.engine import READ_ONLY, translated_errors
from ncr_upload.adapters.sql.tables import db_now, workers
from ncr_upload.application.ports import Memory, WorkerReport
from ncr_upload.domain.batches import WorkerRoom

FORGET_SECONDS = 24 * 3600.0


class SqlWorkerReports:
    """`WorkerReports` on SQL."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def report(self, report: WorkerReport) -> None:
        """See `WorkerReports.report`."""
        facts = {
            "seen_at": db_now(),
            "capacity": report.room.capacity,
            "configured": report.room.configured,
            "memory_used": report.memory.used,
            "memory_total": report.memory.total,
            "memory_source": report.memory.source,
            "resident_bytes": report.resident_bytes,
            "free_disk_bytes": report.free_disk_bytes,
        }
        again = update(workers).where(workers.c.worker == report.worker).values(**facts)
        with translated_errors(self._engine):
            with self._engine.begin() as connection:
                connection.execute(delete(workers).where(workers.c.seen_at < db_now() - FORGET_SECONDS))
                if connection.execute(again).rowcount:
                    return
            try:
                with self._engine.begin() as connection:
                    connection.execute(insert(workers).values(worker=report.worker, **facts))
            except IntegrityError:  # somebody of the same name was faster
                with self._engine.begin() as connection:
                    connection.execute(again)

    def recent(self, within_seconds: float) -> list[WorkerReport]:
        """See `WorkerReports.recent`."""
        query = select(workers).where(workers.c.seen_at >= db_now() - within_seconds).order_by(workers.c.worker)
        with translated_errors(self._engine), self._engine.connect().execution_options(**READ_ONLY) as connection:
            rows = connection.execute(query).mappings().all()
        return [
            WorkerReport(
                row["worker"],
                WorkerRoom(row["capacity"], row["configured"]),
                Memory(row["memory_used"], row["memory_total"], row["memory_source"]),
                row["resident_bytes"],
                row["free_disk_bytes"],
                row["seen_at"],
            )
            for row in rows
        ]

    def leave(self, worker: str) -> None:
        """See `WorkerReports.leave`."""
        with translated_errors(self._engine), self._engine.begin() as connection:
            connection.execute(delete(workers).where(workers.c.worker == worker))
