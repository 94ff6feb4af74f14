"""The ledger as the sweeper sees it. Safe to run twice at once."""

from __future__ import annotations

from sqlalchemy import ColumnElement, Connection, Engine, func, select, update

from ncr_upload.adapters.sql.engine import READ_ONLY, translated_errors
from ncr_upload.adapters.sql.rows import problem_columns, task_of, write_event
from ncr_upload.adapters.sql.tables import batches, db_now, jobs
from ncr_upload.domain.batches import BatchLoad, release_next
from ncr_upload.domain.jobs import LIVE, Problem, Status, Task

SWEEPER = "sweeper"


class SqlRecovery:
    """`Recovery` on SQL."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def due(self, limit: int) -> list[str]:
        """See `Recovery.due`."""
        return self._claimable(jobs.c.worker.is_(None), limit)

    def abandoned(self, limit: int) -> list[str]:
        """See `Recovery.abandoned`."""
        return self._claimable(jobs.c.worker.is_not(None), limit)

    def _claimable(self, which: ColumnElement[bool], limit: int) -> list[str]:
        query = (
            select(jobs.c.task_id)
            .where(jobs.c.claimable_at <= db_now(), jobs.c.attempt < jobs.c.max_attempts, which)
            .order_by(jobs.c.claimable_at)
            .limit(limit)
        )
        with translated_errors(self._engine), self._engine.connect().execution_options(**READ_ONLY) as connection:
            return list(connection.execute(query).scalars())

    def exhausted(self, limit: int) -> list[Task]:
        """See `Recovery.exhausted`."""
        query = select(jobs).where(jobs.c.claimable_at <= db_now(), jobs.c.attempt >= jobs.c.max_attempts).limit(limit)
        with translated_errors(self._engine), self._engine.connect().execution_options(**READ_ONLY) as connection:
            return [task_of(row) for row in connection.execute(query).mappings()]

    def give_up(self, task: Task, problem: Problem) -> bool:
        """See `Recovery.give_up`."""
        with translated_errors(self._engine), self._engine.begin() as connection:
            ended = connection.execute(
                update(jobs)
                .where(
                    jobs.c.task_id == task.task_id,
                    jobs.c.attempt == task.attempt,
                    jobs.c.claimable_at <= db_now(),
                    jobs.c.status.in_([status.value for status in LIVE]),
                )
                .values(
                    status=Status.FAILED.value,
                    message=problem.message,
                    claimable_at=None,
                    fence=jobs.c.fence + 1,
                    finished_at=db_now(),
                    updated_at=db_now(),
                    **problem_columns(problem),
                )
            )
            if ended.rowcount != 1:
                return False
            write_event(
                connection,
                task.task_id,
                attempt=task.attempt,
                stage=task.stage,
                kind=Status.FAILED,
                actor=SWEEPER,
                message=problem.message,
            )
        return True

    def release_batch_jobs(self, batch_size: int) -> list[str]:
        """See `Recovery.release_batch_jobs`. Each batch's row is locked while its jobs are counted, so two sweepers
        together release no more than one alone."""
        held = func.count() - func.count(jobs.c.claimable_at)
        waiting_batches = (
            select(jobs.c.batch_id)
            .where(jobs.c.live_job_id.is_not(None), jobs.c.batch_id.is_not(None))
            .group_by(jobs.c.batch_id)
        ).having(held > 0)
        with translated_errors(self._engine):
            with self._engine.connect().execution_options(**READ_ONLY) as connection:
                batch_ids = list(connection.execute(waiting_batches).scalars())
            released: list[str] = []
            for batch_id in batch_ids:
                with self._engine.begin() as connection:
                    released.extend(_release(connection, batch_id, batch_size))
        return released


def _release(connection: Connection, batch_id: str, batch_size: int) -> list[str]:
    connection.execute(select(batches.c.batch_id).where(batches.c.batch_id == batch_id).with_for_update())
    live = (jobs.c.batch_id == batch_id, jobs.c.live_job_id.is_not(None))
    in_flight, held = connection.execute(
        select(func.count(jobs.c.claimable_at), func.count() - func.count(jobs.c.claimable_at)).where(*live)
    ).one()
    room = release_next([BatchLoad(batch_id, in_flight=in_flight, held=held)], batch_size=batch_size).get(batch_id, 0)
    if room == 0:
        return []
    rows = connection.execute(
        select(jobs.c.id, jobs.c.task_id).where(*live, jobs.c.claimable_at.is_(None)).order_by(jobs.c.id).limit(room)
    ).all()
    connection.execute(
        update(jobs)
        .where(jobs.c.id.in_([row.id for row in rows]))
        .values(claimable_at=db_now(), updated_at=db_now(), message="accepted")
    )
    return [row.task_id for row in rows]
