"""The ledger as callers see it."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, Engine, Select, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from ncr_upload.adapters.sql.engine import READ_ONLY, translated_errors
from ncr_upload.adapters.sql.rows import problem_columns, read_now, read_task, task_of, write_event
from ncr_upload.adapters.sql.tables import batches, db_now, events, jobs
from ncr_upload.adapters.sql.tables import idempotency as idempotency_keys
from ncr_upload.application.ports import AlreadyLive, BatchCounts, CancelAnswer, Idempotency, KeyReused, Page
from ncr_upload.domain.errors import Unavailable
from ncr_upload.domain.jobs import TERMINAL, Event, NewJob, Problem, Stage, Status, Task

ROWS_PER_STATEMENT = 500
RACES = 3
CALLER = "api"
CANCELLED_MESSAGE = "the caller cancelled the job before a worker had it"


class SqlSubmissions:
    """`Submissions` on SQL."""

    def __init__(self, engine: Engine, *, max_attempts: int) -> None:
        self._engine = engine
        columns = (column.name for column in jobs.columns if column.name not in ("id", "live_job_id"))
        self._blank: dict[str, Any] = dict.fromkeys(columns) | {"max_attempts": max_attempts}

    def accept(
        self,
        new_jobs: Sequence[NewJob],
        *,
        batch_id: str | None,
        release: int,
        remark: str = "accepted",
        idempotency: Idempotency | None = None,
    ) -> list[Task] | list[AlreadyLive] | KeyReused:
        """See `Submissions.accept`."""
        with translated_errors(self._engine):
            for _ in range(RACES):
                try:
                    with self._engine.begin() as connection:
                        return self._insert(connection, new_jobs, batch_id, release, remark, idempotency)
                except IntegrityError:
                    if idempotency is not None and (first := self._find_first(idempotency)) is not None:
                        return first
                    live = self._find_live([job.job_id for job in new_jobs])
                    if live:
                        return live
        raise Unavailable(
            "submit_contended",
            "the same jobs were submitted and ended several times in this moment",
            "Send the request again.",
            1,
        )

    def _insert(
        self,
        connection: Connection,
        new_jobs: Sequence[NewJob],
        batch_id: str | None,
        release: int,
        remark: str,
        idempotency: Idempotency | None,
    ) -> list[Task]:
        now = read_now(connection)
        if batch_id is not None:
            connection.execute(insert(batches).values(batch_id=batch_id, created_at=now, total_jobs=len(new_jobs)))
        held = f"{remark}; waits for its turn in the batch"
        rows = [
            self._blank | _row(job, batch_id, now, remark if index < release else held, released=index < release)
            for index, job in enumerate(new_jobs)
        ]
        connection.execute(insert(jobs), rows)
        connection.execute(insert(events), [_accepted_event(row) for row in rows])
        if idempotency is not None:
            first = {"task_id": rows[0]["task_id"], "batch_id": batch_id, "created_at": now}
            key = {"idempotency_key": idempotency.key, "fingerprint": idempotency.fingerprint}
            connection.execute(insert(idempotency_keys).values(**key, **first))
        return [task_of(row) for row in rows]

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

    def cancel(self, task_id: str) -> CancelAnswer | None:
        """See `Submissions.cancel`."""
        with translated_errors(self._engine), self._engine.begin() as connection:
            row = connection.execute(select(jobs).where(jobs.c.task_id == task_id).with_for_update()).mappings().one_or_none()
            if row is None:
                return None
            task = task_of(row)
            if task.status in TERMINAL:
                return CancelAnswer.CANCELLED if task.status is Status.CANCELLED else CancelAnswer.ENDED
            if row["publish_fence"] is not None:
                return CancelAnswer.PUBLISHING
            waiting = row["worker"] is None
            mine = update(jobs).where(jobs.c.task_id == task_id)
            connection.execute(mine.values(**(_cancelled() if waiting else {"cancel_requested": 1})))
            write_event(
                connection,
                task_id,
                attempt=task.attempt,
                stage=task.stage,
                kind=Status.CANCELLED.value if waiting else "cancel_requested",
                actor=CALLER,
                message=CANCELLED_MESSAGE if waiting else "the caller asked for the job to be cancelled",
            )
        return CancelAnswer.CANCELLED if waiting else CancelAnswer.REQUESTED

    def history(self, task_id: str) -> list[Event]:
        """Everything that happened to the task, oldest first."""
        query = select(events).where(events.c.task_id == task_id).order_by(events.c.id)
        with translated_errors(self._engine), self._engine.connect().execution_options(**READ_ONLY) as connection:
            rows = connection.execute(query).mappings().all()
        return [Event(r["at"], r["attempt"], Stage(r["stage"]), r["kind"], r["actor"], r["message"]) for r in rows]

    def active(
        self, *, username: str | None, campaign: str | None, status: Status | None, limit: int, cursor: str | None
    ) -> Page:
        """Live tasks, oldest first."""
        query = select(jobs).where(jobs.c.live_job_id.is_not(None))
        wanted = {"username": username, "campaign": campaign, "status": status.value if status else None}
        for name, value in wanted.items():
            if value is not None:
                query = query.where(jobs.c[name] == value)
        with translated_errors(self._engine), self._engine.connect().execution_options(**READ_ONLY) as connection:
            return _page(connection, query, limit, cursor)

    def batch(self, batch_id: str, *, limit: int, cursor: str | None) -> tuple[BatchCounts, Page] | None:
        """Counts and one page of the batch's tasks, or None if this id was never issued."""
        of_batch = jobs.c.batch_id == batch_id
        tally = select(jobs.c.status, func.count(), func.max(jobs.c.updated_at)).where(of_batch).group_by(jobs.c.status)
        with translated_errors(self._engine), self._engine.connect().execution_options(**READ_ONLY) as connection:
            created_at = connection.execute(select(batches.c.created_at).where(batches.c.batch_id == batch_id)).scalar()
            if created_at is None:
                return None
            now, rows = read_now(connection), connection.execute(tally).all()
            counts = {Status(status): count for status, count, _ in rows}
            updated_at = max((latest for _, _, latest in rows), default=created_at)
            page = _page(connection, select(jobs).where(of_batch), limit, cursor)
        return BatchCounts(batch_id, now, created_at, updated_at, counts), page


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


def _row(job: NewJob, batch_id: str | None, now: float, message: str, *, released: bool) -> dict[str, Any]:
    return {
        "task_id": str(uuid.uuid4()),
        "job_id": job.job_id,
        "username": job.username,
        "campaign": job.campaign,
        "row_id": job.row_id,
        "batch_id": batch_id,
        "status": Status.PENDING.value,
        "stage": Stage.QUEUED.value,
        "message": message,
        "attempt": 0,
        "claimable_at": now if released else None,
        "fence": 0,
        "cancel_requested": 0,
        "created_at": now,
        "updated_at": now,
    }


def _accepted_event(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "task_id": row["task_id"],
        "at": row["created_at"],
        "attempt": 0,
        "stage": Stage.QUEUED.value,
        "kind": "accepted",
        "actor": f"user {row['username']}"[:255],
        "message": row["message"],
    }


def _page(connection: Connection, query: Select[Any], limit: int, cursor: str | None) -> Page:
    total = connection.execute(select(func.count()).select_from(query.subquery())).scalar_one()
    after = int(cursor) if cursor and cursor.isdecimal() else 0
    rows = connection.execute(query.where(jobs.c.id > after).order_by(jobs.c.id).limit(limit + 1)).mappings().all()
    shown = rows[:limit]
    return Page(tuple(task_of(row) for row in shown), total, str(shown[-1]["id"]) if len(rows) > limit else None)
