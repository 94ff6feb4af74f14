"""The ledger as the sweeper sees it. Safe to run twice at once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from sqlalchemy import ColumnElement, Connection, Engine, Select, and_, func, literal_column, not_, select, update

from ncr_upload.adapters.sql.engine import READ_ONLY, translated_errors, whole_transaction
from ncr_upload.adapters.sql.rows import has_attempt_left, problem_columns, task_of, write_event
from ncr_upload.adapters.sql.tables import PARTIAL_INDICES, batches, db_now, jobs, live_first, statement_now
from ncr_upload.application.metrics import OnEnded, ignore_end
from ncr_upload.domain.batches import BatchLoad, WorkerRoom, plan_room, release_next
from ncr_upload.domain.jobs import LIVE, Problem, Status, Task

SWEEPER = "sweeper"


class SqlRecovery:
    """`Recovery` on SQL."""

    def __init__(self, engine: Engine, on_ended: OnEnded = ignore_end) -> None:
        self._engine = engine
        self._on_ended = on_ended

    def due(self, limit: int, but_newest: int = 0) -> list[str]:
        """See `Recovery.due`. Those that are left out are counted where they are."""
        is_waiting = (jobs.c.claimable_at <= statement_now(), jobs.c.worker.is_(None))
        with translated_errors(self._engine), self._engine.connect().execution_options(**READ_ONLY) as connection:
            if but_newest:
                # Exhausted ones too, of which the sweep leaves none: whether one is, no index tells.
                waiting = select(jobs.c.id).where(*is_waiting).limit(limit + but_newest).subquery()
                count = connection.execute(select(func.count()).select_from(waiting)).scalar_one()
                limit = min(limit, max(0, count - but_newest))
            return _oldest(connection, limit, *is_waiting) if limit else []

    def abandoned(self, limit: int) -> list[str]:
        """See `Recovery.abandoned`."""
        with translated_errors(self._engine), self._engine.connect().execution_options(**READ_ONLY) as connection:
            return _oldest(connection, limit, jobs.c.claimable_at <= statement_now(), jobs.c.worker.is_not(None))

    def exhausted(self, limit: int) -> list[Task]:
        """See `Recovery.exhausted`."""
        spent = jobs.c.attempt >= jobs.c.max_attempts  # true of each that has none left: said for the index
        query = select(jobs).where(jobs.c.claimable_at <= statement_now(), spent, not_(has_attempt_left()))
        query = query.limit(literal_column(str(limit)))  # PostgreSQL takes a parameter for small, and reads every due job
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
        self._on_ended(Status.FAILED, 1)
        return True

    @whole_transaction
    def release_batch_jobs(self, batch_size: int, workers: Sequence[WorkerRoom] = ()) -> list[str]:
        """See `Recovery.release_batch_jobs`. Each batch's row is locked while its jobs are counted, so two sweepers
        together release no more of a batch than one alone."""
        with translated_errors(self._engine):
            with self._engine.connect().execution_options(**READ_ONLY) as connection:
                loads = _read_loads(connection, batch_size)
            room = plan_room(workers, in_flight=sum(load.in_flight for load in loads))
            released: list[str] = []
            for batch_id, count in release_next(loads, batch_size=batch_size, room=room).items():
                with self._engine.begin() as connection:
                    released.extend(_release(connection, batch_id, count, batch_size))
        return released


def _oldest(connection: Connection, limit: int, *which: ColumnElement[bool]) -> list[str]:
    query = select(jobs.c.task_id).where(*which, has_attempt_left()).order_by(jobs.c.claimable_at, jobs.c.id)
    return list(connection.execute(query.limit(limit)).scalars())


def _read_loads(connection: Connection, most_held: int) -> list[BatchLoad]:
    """Every batch that has live jobs. Where an index tells which are held, no more than `most_held` of a batch are counted."""
    if connection.dialect.name not in PARTIAL_INDICES:
        return [BatchLoad(*row) for row in connection.execute(_count_live())]
    # In this order: what another sweeper releases in between is counted in both, so that no more is released for it.
    held = dict(connection.execute(_count_held(most_held)).all())
    in_flight = dict(connection.execute(_count_in_flight()).all())
    return [BatchLoad(batch_id, in_flight.get(batch_id, 0), held.get(batch_id, 0)) for batch_id in held.keys() | in_flight]


@cache
def _count_live() -> Select[str, int, int]:
    batch_id = func.coalesce(jobs.c.batch_id, "")  # said so that no database looks through the batches of the past
    in_flight = func.count(jobs.c.claimable_at)
    live = select(batch_id, in_flight, func.count() - in_flight).where(jobs.c.live_job_id.is_not(None), batch_id != "")
    return live_first(live).group_by(batch_id)


@cache
def _count_in_flight() -> Select[str, int]:
    released = and_(jobs.c.batch_id.is_not(None), jobs.c.claimable_at.is_not(None))
    return select(jobs.c.batch_id, func.count()).where(released).group_by(jobs.c.batch_id)


@cache
def _count_held(most: int) -> Select[str, int]:
    """From each batch id in the index of live batch jobs straight to the next: those between are not looked at. `most` is
    written out, so that PostgreSQL plans it once."""
    is_live = and_(jobs.c.live_job_id.is_not(None), jobs.c.batch_id.is_not(None))
    first = select(func.min(jobs.c.batch_id).label("batch_id")).where(is_live).cte("live_batches", recursive=True)
    after = select(func.min(jobs.c.batch_id)).where(is_live, jobs.c.batch_id > first.c.batch_id).scalar_subquery()
    found = first.union_all(select(after).where(first.c.batch_id.is_not(None)))
    held = select(jobs.c.id).where(is_live, jobs.c.batch_id == found.c.batch_id, jobs.c.claimable_at.is_(None))
    some = held.limit(literal_column(str(most))).correlate(found).subquery()
    count = select(func.count()).select_from(some).scalar_subquery()
    return select(found.c.batch_id, count).where(found.c.batch_id.is_not(None))


def _release(connection: Connection, batch_id: str, count: int, batch_size: int) -> list[str]:
    connection.execute(select(batches.c.batch_id).where(batches.c.batch_id == batch_id).with_for_update())
    live = (jobs.c.batch_id == batch_id, jobs.c.live_job_id.is_not(None))
    in_flight = connection.execute(select(func.count()).where(*live, jobs.c.claimable_at.is_not(None))).scalar_one()
    room = min(count, batch_size - in_flight)
    if room <= 0:
        return []
    rows = connection.execute(
        select(jobs.c.id, jobs.c.task_id)
        .where(*live, jobs.c.claimable_at.is_(None))
        .order_by(jobs.c.claimable_at, jobs.c.id)  # by id: as the index is ordered
        .limit(room)
        .with_for_update()  # so none of them is cancelled before it is released
    ).all()
    connection.execute(
        update(jobs)
        .where(jobs.c.id.in_([row.id for row in rows]))
        .values(claimable_at=db_now(), updated_at=db_now(), message="accepted")
    )
    return [row.task_id for row in rows]
