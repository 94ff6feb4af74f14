"""New tasks: made and written so that 10,000 of them cost little more than a bare bulk insert of their rows."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Table, insert, literal, select

from ncr_upload.adapters.sql.tables import events, jobs
from ncr_upload.domain.jobs import NewJob, Stage, Status, Task, progress_percent

COLUMNS = (
    *("task_id", "job_id", "username", "campaign", "row_id", "batch_id", "status", "stage", "message", "attempt"),
    *("max_attempts", "created_at", "updated_at", "claimable_at", "fence", "cancel_requested"),
)

EVENT_COLUMNS = ("task_id", "at", "attempt", "stage", "kind", "actor", "message")
ACCEPTED = "accepted"


def make_tasks(
    new_jobs: Sequence[NewJob], batch_id: str | None, now: float, *, release: int, remark: str, max_attempts: int
) -> list[Task]:
    """Tasks as they are when accepted `now`: the first `release` of them due at once, the others held."""
    held = f"{remark}; waits for its turn in the batch"
    status, stage, progress = Status.PENDING, Stage.QUEUED, progress_percent(Stage.QUEUED)
    tasks = []
    for index, job in enumerate(new_jobs):
        message, due_at = (remark, now) if index < release else (held, None)
        who = (str(uuid.uuid4()), job.job_id, job.username, job.campaign, job.row_id, batch_id)
        tasks.append(Task(*who, status, stage, progress, message, 0, max_attempts, now, now, due_at=due_at))
    return tasks


def make_task(job: NewJob, remark: str, now: float, max_attempts: int) -> Task:
    """One on its own, due at once."""
    return make_tasks([job], None, now, release=1, remark=remark, max_attempts=max_attempts)[0]


def write_tasks(connection: Connection, tasks: Sequence[Task], batch_id: str | None) -> None:
    """The rows of new tasks, and the first line of each one's history.

    The columns go to the driver as they are: with those that stay NULL, and by way of SQLAlchemy, 10,000 tasks take twice as
    long.
    """
    status, stage = Status.PENDING.value, Stage.QUEUED.value
    rows = [
        (
            *(task.task_id, task.job_id, task.username, task.campaign, task.row_id, task.batch_id, status, stage, task.message),
            *(0, task.max_attempts, task.created_at, task.updated_at, task.due_at, 0, 0),
        )
        for task in tasks
    ]
    _insert(connection, jobs, COLUMNS, rows)
    if batch_id is None:
        first = [(task.task_id, task.created_at, 0, stage, ACCEPTED, f"user {task.username}", task.message) for task in tasks]
        _insert(connection, events, EVENT_COLUMNS, first)
    else:
        _write_history(connection, batch_id)


def _insert(connection: Connection, table: Table, columns: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> None:
    mark = "?" if connection.dialect.paramstyle == "qmark" else "%s"
    places = ", ".join([mark] * len(columns))
    statement = f"INSERT INTO {table.name} ({', '.join(columns)}) VALUES ({places})"  # noqa: S608 - names of ours only
    connection.exec_driver_sql(statement, rows)


def _write_history(connection: Connection, batch_id: str) -> None:
    """Of a batch by one statement, from the rows that were just written."""
    written = select(
        *(jobs.c.task_id, jobs.c.created_at, literal(0), literal(Stage.QUEUED.value), literal(ACCEPTED)),
        *(literal("user ") + jobs.c.username, jobs.c.message),
    ).where(jobs.c.batch_id == batch_id)
    connection.execute(insert(events).from_select(EVENT_COLUMNS, written.order_by(jobs.c.id)))
