"""The ledger as the sweeper sees it. Safe to run twice at once."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import ColumnElement, Connection, Engine, func, not_, select, update

from ncr_upload.adapters.sql.engine import READ_ONLY, translated_errors, whole_transaction
from ncr_upload.adapters.sql.rows import has_attempt_left, problem_columns, task_of, write_event
from ncr_upload.adapters.sql.tables import batches, db_now, jobs, live_first, statement_now
from ncr_upload.domain.batches import BatchLoad, WorkerRoom, plan_room, release_next
from ncr_upload.domain.jobs import LIVE, Problem, Status, Task

SWEEPER = "sweeper"


class SqlRecovery:
    """`Recovery` on SQL."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def due(self, limit: int, but_newest: int = 0) -> list[str]:
        """See `Recovery.due`. Those that are left out are counted where they are."""
        return self._claimable(jobs.c.worker.is_(None), limit, but_newest)

    def abandoned(self, limit: int) -> list[str]:
        """See `Recovery.abandoned`."""
        return self._claimable(jobs.c.worker.is_not(None), limit)

    def _claimable(self, which: ColumnElement[bool], limit: int, but_newest: int = 0) -> list[str]:
        query = select(jobs.c.task_id).where(jobs.c.claimable_at <= statement_now(), has_attempt_left(), which)
        with translated_errors(self._engine), self._engine.connect().execution_options(**READ_ONLY) as connection:
            if but_newest:
                all_of_them = query.limit(limit + but_newest).subquery()
                count = connection.execute(select(func.count()).select_from(all_of_them)).scalar_one()
                limit = min(limit, max(0, count - but_newest))
            oldest = query.order_by(jobs.c.claimable_at, jobs.c.id).limit(limit)
            return list(connection.execute(oldest).scalars()) if limit else []

    def exhausted(self, limit: int) -> list[Task]:
        """See `Recovery.exhausted`."""
        query = select(jobs).where(jobs.c.claimable_at <= statement_now(), not_(has_attempt_left())).limit(limit)
        with translated_errors(self._engine), self._engine.connect().execution_options(**READ_ONLY) as connection:
            return [task_of(row) for row in connection.execute(query).mappings()]

    @whole_transaction
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

    @whole_transaction
    def release_batch_jobs(self, batch_size: int, workers: Sequence[WorkerRoom] = ()) -> list[str]:
        """See `Recovery.release_batch_jobs`. Each batch's row is locked while its jobs are counted, so two sweepers
        together release no more of a batch than one alone."""
        with translated_errors(self._engine):
            with self._engine.connect().execution_options(**READ_ONLY) as connection:
                loads = _read_loads(connection)
            room = plan_room(workers, in_flight=sum(load.in_flight for load in loads))
            released: list[str] = []
            for batch_id, count in release_next(loads, batch_size=batch_size, room=room).items():
                with self._engine.begin() as connection:
                    released.extend(_release(connection, batch_id, count, batch_size))
        return released


def _read_loads(connection: Connection) -> list[BatchLoad]:
    """Every batch that has live jobs."""
    batch_id = func.coalesce(jobs.c.batch_id, "")  # said so that no database looks through the batches of the past
    in_flight = func.count(jobs.c.claimable_at)
    live = select(batch_id, in_flight, func.count() - in_flight).where(jobs.c.live_job_id.is_not(None), batch_id != "")
    return [BatchLoad(*row) for row in connection.execute(live_first(live).group_by(batch_id))]


def _release(connection: Connection, batch_id: str, count: int, batch_size: int) -> list[str]:
    connection.execute(select(batches.c.batch_id).where(batches.c.batch_id == batch_id).with_for_update())
    live = (jobs.c.batch_id == batch_id, jobs.c.live_job_id.is_not(None))
    in_flight = connection.execute(select(func.count(jobs.c.claimable_at)).where(*live)).scalar_one()
    room = min(count, batch_size - in_flight)
    if room <= 0:
        return []
    rows = connection.execute(
        select(jobs.c.id, jobs.c.task_id)
        .where(*live, jobs.c.claimable_at.is_(None))
        .order_by(jobs.c.id)
        .limit(room)
        .with_for_update()  # so none of them is cancelled before it is released
    ).all()
    connection.execute(
        update(jobs)
        .where(jobs.c.id.in_([row.id for row in rows]))
        .values(claimable_at=db_now(), updated_at=db_now(), message="accepted")
    )
    return [row.task_id for row in rows]
