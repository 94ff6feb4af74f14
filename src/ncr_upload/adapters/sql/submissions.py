"""The ledger as callers see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from sqlalchemy import Connection, Engine, Select, bindparam, func, insert, select, update
from sqlalchemy.exc import DataError, IntegrityError

from ncr_upload.adapters.sql.engine import READ_ONLY, translated_errors, whole_transaction
from ncr_upload.adapters.sql.new_tasks import make_task, make_tasks, write_tasks
from ncr_upload.adapters.sql.rows import problem_columns, read_now, read_task, task_of
from ncr_upload.adapters.sql.tables import batches, conflicts, db_now, events, jobs, live_first
from ncr_upload.adapters.sql.tables import idempotency as idempotency_keys
from ncr_upload.application.metrics import OnEnded, ignore_end
from ncr_upload.application.ports import AlreadyLive, BatchCounts, CancelAnswer, Idempotency, KeyReused, Page, Wanted
from ncr_upload.domain.batches import Share
from ncr_upload.domain.errors import Unavailable
from ncr_upload.domain.jobs import TERMINAL, Event, NewJob, Problem, Stage, Status, Task
from ncr_upload.domain.text import STATUS, bound_text

ROWS_PER_STATEMENT = 100
"""Whose ids fit into the least `max_allowed_packet` that servers are run with: 16 KB."""

RACES = 3
CALLER = "api"
CANCELLED_MESSAGE = "the caller cancelled the job before a worker had it"
CANCEL_REQUESTED_MESSAGE = "the caller asked for the job to be cancelled"


class SqlSubmissions:
    """`Submissions` on SQL."""

    def __init__(self, engine: Engine, *, max_attempts: int, on_ended: OnEnded = ignore_end) -> None:
        self._engine = engine
        self._max_attempts = max_attempts
        self._on_ended = on_ended

    @whole_transaction
    def accept(
        self,
        new_jobs: Sequence[NewJob],
        *,
        batch_id: str | None,
        release: int,
        remark: str = "accepted",
        skip_live: bool = False,
        idempotency: Idempotency | None = None,
    ) -> list[Task] | list[AlreadyLive] | KeyReused:
        """See `Submissions.accept`."""
        skipped: list[AlreadyLive] = []
        with translated_errors(self._engine):
            for _ in range(RACES):
                live_ids = {each.job_id for each in skipped}
                left = [job for job in new_jobs if job.job_id not in live_ids]
                try:
                    with self._engine.begin() as connection:
                        return self._insert(connection, left, batch_id, release, remark, idempotency, skipped)
                except IntegrityError:
                    if idempotency is not None and (first := self._find_first(idempotency)) is not None:
                        return first
                    live = self._find_live([job.job_id for job in new_jobs])
                    if live and (not skip_live or len(live) == len(new_jobs)):
                        return live
                    skipped = live
        raise Unavailable(
            "submit_contended",
            "the same jobs were submitted and ended several times in this moment",
            "Send the request again.",
            1,
        )

    def accept_each(self, wanted: Sequence[Wanted]) -> list[Task | AlreadyLive | KeyReused | Unavailable]:
        """See `Submissions.accept_each`. If the database refuses one, it says so of all: those are halved until it is found."""
        try:
            if len(wanted) == 1:
                return [self._accept_one(wanted[0])]
            tasks = self._accept_together(wanted)
        except Unavailable as error:
            return [error] * len(wanted)
        if tasks is not None:
            return [*tasks]
        middle = len(wanted) // 2
        return [*self.accept_each(wanted[:middle]), *self.accept_each(wanted[middle:])]

    def _accept_one(self, wanted: Wanted) -> Task | AlreadyLive | KeyReused:
        found = self.accept([wanted.job], batch_id=None, release=1, remark=wanted.remark, idempotency=wanted.idempotency)
        return found if isinstance(found, KeyReused) else found[0]

    @whole_transaction
    def _accept_together(self, wanted: Sequence[Wanted]) -> list[Task] | None:
        with translated_errors(self._engine):
            try:
                with self._engine.begin() as connection:
                    now = read_now(connection)
                    tasks = [make_task(each.job, each.remark, now, self._max_attempts) for each in wanted]
                    write_tasks(connection, tasks, None)
                    for each, task in zip(wanted, tasks, strict=True):
                        if each.idempotency is not None:
                            _write_key(connection, each.idempotency, task)
            except (IntegrityError, DataError):
                return None
        return tasks

    def _insert(
        self,
        connection: Connection,
        new_jobs: Sequence[NewJob],
        batch_id: str | None,
        release: int,
        remark: str,
        idempotency: Idempotency | None,
        skipped: Sequence[AlreadyLive],
    ) -> list[Task]:
        now = read_now(connection)
        if batch_id is not None:
            connection.execute(insert(batches).values(batch_id=batch_id, created_at=now, total_jobs=len(new_jobs)))
        if skipped:
            left_out = [{"batch_id": batch_id, "job_id": each.job_id, "task_id": each.task_id} for each in skipped]
            connection.execute(insert(conflicts), left_out)
        tasks = make_tasks(new_jobs, batch_id, now, release=release, remark=remark, max_attempts=self._max_attempts)
        write_tasks(connection, tasks, batch_id)
        if idempotency is not None:
            _write_key(connection, idempotency, tasks[0])
        return tasks

    def _find_first(self, idempotency: Idempotency) -> list[Task] | KeyReused | None:
        """What the key was answered the first time; None if it is new."""
        with self._engine.connect().execution_options(**READ_ONLY) as connection:
            known = select(idempotency_keys).where(idempotency_keys.c.idempotency_key == idempotency.key)
            row = connection.execute(known).mappings().one_or_none()
            if row is None:
                return None
            if row["fingerprint"] != idempotency.fingerprint:
                return KeyReused(idempotency.key)
            batch_id = row["batch_id"]
            mine = jobs.c.task_id == row["task_id"] if batch_id is None else jobs.c.batch_id == batch_id
            found = connection.execute(select(jobs).where(mine).order_by(jobs.c.id)).mappings().all()
        return [replace(task_of(each), status=Status.PENDING, stage=Stage.QUEUED, message="accepted") for each in found]

    def _find_live(self, job_ids: Sequence[str]) -> list[AlreadyLive]:
        found: list[AlreadyLive] = []
        with self._engine.connect().execution_options(**READ_ONLY) as connection:
            for start in range(0, len(job_ids), ROWS_PER_STATEMENT):
                chunk = job_ids[start : start + ROWS_PER_STATEMENT]
                query = select(jobs.c.job_id, jobs.c.task_id).where(jobs.c.live_job_id.in_(chunk)).order_by(jobs.c.id)
                found.extend(AlreadyLive(job_id, task_id) for job_id, task_id in connection.execute(query))
        return found

    def task(self, task_id: str) -> Task | None:
        """The task, or None if this id was never issued."""
        with translated_errors(self._engine), self._engine.connect().execution_options(**READ_ONLY) as connection:
            return read_task(connection, task_id)

    def tasks(self, task_ids: Sequence[str]) -> list[Task | None]:
        """See `Submissions.tasks`."""
        count = 1 << (len(task_ids) - 1).bit_length()
        wanted = {f"wanted_{number}": task_ids[min(number, len(task_ids) - 1)] for number in range(count)}
        with translated_errors(self._engine), self._engine.connect().execution_options(**READ_ONLY) as connection:
            found = {row["task_id"]: task_of(row) for row in connection.execute(_tasks_of(count), wanted).mappings()}
        return [found.get(task_id) for task_id in task_ids]

    @whole_transaction
    def cancel(self, task_id: str) -> CancelAnswer | None:
        """See `Submissions.cancel`."""
        with translated_errors(self._engine), self._engine.begin() as connection:
            row = connection.execute(select(jobs).where(jobs.c.task_id == task_id).with_for_update()).one_or_none()
            if row is None:
                return None
            answer = _cancel_answer(row)
            waited = answer is CancelAnswer.CANCELLED and row.status != Status.CANCELLED.value
            if waited or answer is CancelAnswer.REQUESTED:
                _update_all(connection, [row], _cancelled() if waited else {"cancel_requested": 1})
                connection.execute(insert(events).values(_cancel_event(row, read_now(connection), waited=waited)))
        if waited:
            self._on_ended(Status.CANCELLED, 1)
        return answer

    def history(self, task_id: str) -> list[Event]:
        """Everything that happened to the task, oldest first."""
        query = select(events).where(events.c.task_id == task_id).order_by(events.c.id)
        with translated_errors(self._engine), self._engine.connect().execution_options(**READ_ONLY) as connection:
            rows = connection.execute(query).mappings().all()
        # Releases before this one wrote longer messages.
        told = [bound_text(row["message"], STATUS) for row in rows]
        return [
            Event(r["at"], r["attempt"], Stage(r["stage"]), r["kind"], r["actor"], message)
            for r, message in zip(rows, told, strict=True)
        ]

    def active(
        self, *, username: str | None, campaign: str | None, status: Status | None, limit: int, cursor: str | None
    ) -> Page:
        """Live tasks, oldest first."""
        query = live_first(select(jobs).where(jobs.c.live_job_id.is_not(None)))
        wanted = {"username": username, "campaign": campaign, "status": status.value if status else None}
        for name, value in wanted.items():
            if value is not None:
                query = query.where(jobs.c[name] == value)
        with translated_errors(self._engine), self._engine.connect().execution_options(**READ_ONLY) as connection:
            return _page(connection, query, limit, cursor)

    def batch(self, batch_id: str, *, limit: int, cursor: str | None) -> tuple[BatchCounts, Page] | None:
        """Counts and one page of the batch's tasks, or None if this id was never issued."""
        of_batch = jobs.c.batch_id == batch_id
        tally = (
            select(
                *(jobs.c.status, jobs.c.stage, func.count(), func.count(jobs.c.byte_count), func.sum(jobs.c.byte_count)),
                *(func.max(jobs.c.updated_at), func.min(jobs.c.started_at)),
                *(func.max(jobs.c.started_at), func.max(jobs.c.finished_at)),
            )
            .where(of_batch)
            .group_by(jobs.c.status, jobs.c.stage)
        )
        with translated_errors(self._engine), self._engine.connect().execution_options(**READ_ONLY) as connection:
            created_at = connection.execute(select(batches.c.created_at).where(batches.c.batch_id == batch_id)).scalar()
            if created_at is None:
                return None
            now, rows = read_now(connection), connection.execute(tally).all()
            page = _page(connection, select(jobs).where(of_batch), limit, cursor)
            left_out = _read_conflicts(connection, batch_id)
        shares = tuple(
            Share(Status(status), Stage(stage), count, sized, int(size or 0)) for status, stage, count, sized, size, *_ in rows
        )
        updated, started, last_started, finished = zip(*(row[5:] for row in rows), strict=True)
        ended = all(share.status in TERMINAL for share in shares)
        counts = BatchCounts(
            batch_id,
            now,
            created_at,
            updated_at=max(updated),
            moved_at=max(at for at in (created_at, *last_started, *finished) if at is not None),
            shares=shares,
            started_at=min((at for at in started if at is not None), default=None),
            finished_at=max((at for at in finished if at is not None), default=None) if ended else None,
            conflicts=tuple(left_out),
        )
        return counts, page

    def conflicts(self, batch_id: str) -> list[AlreadyLive]:
        """See `Submissions.conflicts`."""
        with translated_errors(self._engine), self._engine.connect().execution_options(**READ_ONLY) as connection:
            return _read_conflicts(connection, batch_id)

    def unsuccessful(self, batch_id: str) -> list[NewJob] | None:
        """See `Submissions.unsuccessful`."""
        ended_badly = [Status.FAILED.value, Status.VALIDATION_FAILED.value]
        query = (
            select(jobs.c.job_id, jobs.c.username, jobs.c.campaign, jobs.c.row_id)
            .where(jobs.c.batch_id == batch_id, jobs.c.status.in_(ended_badly))
            .order_by(jobs.c.id)
        )
        with translated_errors(self._engine), self._engine.connect().execution_options(**READ_ONLY) as connection:
            if not _is_batch(connection, batch_id):
                return None
            return [NewJob(*row) for row in connection.execute(query)]

    @whole_transaction
    def cancel_batch(self, batch_id: str) -> dict[CancelAnswer, int] | None:
        """See `Submissions.cancel_batch`."""
        with translated_errors(self._engine), self._engine.begin() as connection:
            if not _is_batch(connection, batch_id):
                return None
            columns = (jobs.c.id, jobs.c.task_id, jobs.c.status, jobs.c.stage, jobs.c.attempt, jobs.c.worker)
            query = select(*columns, jobs.c.publish_fence).where(jobs.c.batch_id == batch_id).order_by(jobs.c.id)
            rows = connection.execute(query.with_for_update()).all()
            by_answer: dict[CancelAnswer, list[Any]] = {answer: [] for answer in CancelAnswer}
            for row in rows:
                by_answer[_cancel_answer(row)].append(row)
            waiting = [row for row in by_answer[CancelAnswer.CANCELLED] if row.status != Status.CANCELLED.value]
            running = by_answer[CancelAnswer.REQUESTED]
            _update_all(connection, waiting, _cancelled())
            _update_all(connection, running, {"cancel_requested": 1})
            now = read_now(connection)
            told = [_cancel_event(row, now, waited=True) for row in waiting]
            if told := told + [_cancel_event(row, now, waited=False) for row in running]:
                connection.execute(insert(events), told)
        self._on_ended(Status.CANCELLED, len(waiting))
        return {answer: len(found) for answer, found in by_answer.items() if found}


@cache
def _tasks_of(count: int) -> Select[Any]:
    """So many tasks, `wanted_0` and so on: made once for each power of two, since making it takes longer than running it."""
    return select(jobs).where(jobs.c.task_id.in_([bindparam(f"wanted_{number}") for number in range(count)]))


def _write_key(connection: Connection, idempotency: Idempotency, first: Task) -> None:
    """What a repeat with the key is answered by: the task, or the batch it is the first of."""
    answer = {"task_id": first.task_id, "batch_id": first.batch_id, "created_at": first.created_at}
    key = {"idempotency_key": idempotency.key, "fingerprint": idempotency.fingerprint}
    connection.execute(insert(idempotency_keys).values(**key, **answer))


def _is_batch(connection: Connection, batch_id: str) -> bool:
    return connection.execute(select(batches.c.batch_id).where(batches.c.batch_id == batch_id)).first() is not None


def _read_conflicts(connection: Connection, batch_id: str) -> list[AlreadyLive]:
    query = select(conflicts.c.job_id, conflicts.c.task_id).where(conflicts.c.batch_id == batch_id).order_by(conflicts.c.id)
    return [AlreadyLive(job_id, task_id) for job_id, task_id in connection.execute(query)]


def _cancel_answer(row: Any) -> CancelAnswer:
    """What a wish to cancel comes to for this row of `ncr_jobs`, locked."""
    status = Status(row.status)
    if status in TERMINAL:
        return CancelAnswer.CANCELLED if status is Status.CANCELLED else CancelAnswer.ENDED
    if row.publish_fence is not None:
        return CancelAnswer.PUBLISHING
    return CancelAnswer.CANCELLED if row.worker is None else CancelAnswer.REQUESTED


def _update_all(connection: Connection, rows: Sequence[Any], values: dict[str, Any]) -> None:
    for start in range(0, len(rows), ROWS_PER_STATEMENT):
        chunk = [row.id for row in rows[start : start + ROWS_PER_STATEMENT]]
        connection.execute(update(jobs).where(jobs.c.id.in_(chunk)).values(**values))


def _cancel_event(row: Any, now: float, *, waited: bool) -> dict[str, Any]:
    return {
        "task_id": row.task_id,
        "at": now,
        "attempt": row.attempt,
        "stage": row.stage,
        "kind": Status.CANCELLED.value if waited else "cancel_requested",
        "actor": CALLER,
        "message": CANCELLED_MESSAGE if waited else CANCEL_REQUESTED_MESSAGE,
    }


def _cancelled() -> dict[str, Any]:
    problem = Problem("cancelled", "cancelled", CANCELLED_MESSAGE, "Submit the job again if needed.")
    return {
        "status": Status.CANCELLED.value,
        "message": CANCELLED_MESSAGE,
        "claimable_at": None,
        "fence": jobs.c.fence + 1,
        "cancel_requested": 1,
        "finished_at": db_now(),
        "updated_at": db_now(),
        **problem_columns(problem),
    }


def _page(connection: Connection, query: Select[Any], limit: int, cursor: str | None) -> Page:
    total = connection.execute(select(func.count()).select_from(query.subquery())).scalar_one()
    after = int(cursor) if cursor and cursor.isdecimal() else 0
    rows = connection.execute(query.where(jobs.c.id > after).order_by(jobs.c.id).limit(limit + 1)).mappings().all()
    shown = rows[:limit]
    return Page(tuple(task_of(row) for row in shown), total, str(shown[-1]["id"]) if len(rows) > limit else None)
