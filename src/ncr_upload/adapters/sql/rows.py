"""Between rows of the ledger and the domain's values."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Column, ColumnElement, Connection, Engine, Select, Update, and_, bindparam, insert, or_, select

from ncr_upload.adapters.sql.engine import redactor_of
from ncr_upload.adapters.sql.tables import db_now, events, jobs
from ncr_upload.domain.jobs import Problem, Stage, Status, Task, progress_percent
from ncr_upload.domain.retries import LOOKS
from ncr_upload.domain.text import STATUS, bound_text


def task_of(row: Any) -> Task:
    """The task a row of `ncr_jobs` holds."""
    status, stage = Status(row["status"]), Stage(row["stage"])
    waiting = status is Status.PENDING and row["worker"] is None
    return Task(
        task_id=row["task_id"],
        job_id=row["job_id"],
        username=row["username"],
        campaign=row["campaign"],
        row_id=row["row_id"],
        batch_id=row["batch_id"],
        status=status,
        stage=stage,
        progress=progress_percent(stage),
        message=bound_text(row["message"], STATUS),  # releases before this one wrote longer ones
        attempt=row["attempt"],
        max_attempts=row["max_attempts"],
        created_at=row["created_at"],
        updated_at=row["updated_at"],
        started_at=row["started_at"],
        finished_at=row["finished_at"],
        due_at=row["claimable_at"] if waiting else None,
        sku=row["sku"],
        verdict=row["verdict"],
        files=row["file_count"],
        bytes=row["byte_count"],
        problem=_problem_of(row),
        publish_announced=row["publish_fence"] is not None,
    )


_FREE = select(jobs.c.id).where(jobs.c.task_id == bindparam("wanted")).with_for_update(skip_locked=True)


def take_row(connection: Connection, task_id: str) -> bool:
    """Whether this transaction has the task's row to itself; at once, where somebody else writes it or there is none. A worker
    that waited for one row would be kept from every other task."""
    return connection.execute(_FREE, {"wanted": task_id}).first() is not None


def has_attempt_left() -> ColumnElement[bool]:
    """Whether the task may be claimed once more."""
    looks = and_(jobs.c.publish_fence.is_not(None), jobs.c.attempt < jobs.c.max_attempts + LOOKS)
    return or_(jobs.c.attempt < jobs.c.max_attempts, looks)


def _problem_of(row: Any) -> Problem | None:
    if row["problem_code"] is None:
        return None
    return Problem(row["problem_code"], row["problem_class"], row["problem_message"], row["problem_next_step"])


def problem_columns(problem: Problem | None, writer: Engine | None = None) -> dict[str, Any]:
    """The columns that hold `problem`; all NULL for None. What comes from outside is told to `writer`'s redactor first."""
    if problem is not None and writer is not None:
        problem = redactor_of(writer).redact_problem(problem)
    return {
        "problem_code": problem.code if problem else None,
        "problem_class": problem.error_class if problem else None,
        "problem_message": problem.message if problem else None,
        "problem_next_step": problem.next_step if problem else None,
    }


_NOW = select(db_now())
_TASK = select(jobs).where(jobs.c.task_id == bindparam("wanted"))
_EVENT = insert(events).values(at=db_now()).inline()  # its id is not asked for


def read_now(connection: Connection) -> float:
    """The database's clock."""
    return float(connection.execute(_NOW).scalar_one())


def read_row(connection: Connection, task_id: str) -> Any:
    """The task's row of `ncr_jobs` by column name, or None."""
    return connection.execute(_TASK, {"wanted": task_id}).mappings().one_or_none()


def read_task(connection: Connection, task_id: str) -> Task | None:
    row = read_row(connection, task_id)
    return task_of(row) if row is not None else None


def bounded_message(writer: Engine | Connection, message: str) -> str:
    """The message as it is written: without secrets, and no longer than a status may be. The last gate before the ledger."""
    return redactor_of(writer).bound(message, STATUS)


def write_event(connection: Connection, task_id: str, *, attempt: int, stage: str, kind: str, actor: str, message: str) -> None:
    """Add a line to the task's history."""
    told = bounded_message(connection, message)
    line = {"task_id": task_id, "attempt": attempt, "stage": stage, "kind": kind, "actor": actor[:255], "message": told}
    connection.execute(_EVENT, line)


def line_of(*, attempt: int, stage: str, kind: str, actor: str, message: str) -> dict[str, Any]:
    """What `with_line` is given for the line of the history."""
    return {"line_attempt": attempt, "line_stage": stage, "line_kind": kind, "line_actor": actor[:255], "line_message": message}


def with_line(move: Update, *told: Column[Any]) -> Select[Any]:
    """On PostgreSQL: the change of a task's row, and if there is one the line of its history, in one statement, which needs no
    transaction. Finds these columns of the row as it is then."""
    moved = move.returning(*told).cte("moved")
    given = [bindparam(name, type_=events.c[name.removeprefix("line_")].type) for name in _LINE]
    columns = ["task_id", "at", *(name.removeprefix("line_") for name in _LINE)]
    line = insert(events).from_select(columns, select(moved.c.task_id, db_now(), *given)).cte("line")
    return select(moved).add_cte(line)


_LINE = ("line_attempt", "line_stage", "line_kind", "line_actor", "line_message")
