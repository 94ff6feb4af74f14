"""The ledger as a worker sees it: every write carries the fence of its claim."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Double,
    Engine,
    Select,
    Text,
    Update,
    bindparam,
    case,
    cast,
    delete,
    insert,
    literal,
    literal_column,
    select,
    update,
)
from sqlalchemy.exc import SQLAlchemyError

from ncr_upload.adapters.sql.engine import AT_ONCE, READ_ONLY, translated_errors, whole_transaction
from ncr_upload.adapters.sql.rows import (
    bounded_message,
    has_attempt_left,
    line_of,
    problem_columns,
    read_row,
    task_of,
    with_line,
    write_event,
)
from ncr_upload.adapters.sql.tables import db_now, files, jobs
from ncr_upload.application.ports import Recording
from ncr_upload.domain.errors import CancelRequested, LeaseLost
from ncr_upload.domain.jobs import LIVE, Claim, Problem, Stage, Status, Task, may_follow
from ncr_upload.domain.packages import DeliveredFile, PackageFile, PackageSize, measure
from ncr_upload.domain.retries import count_attempt

CLEANING_GRACE_SECONDS = 10.0
"""An attempt that has just ended the task gets so long to remove its own staging before the sweeper sends another worker."""


class SqlClaims:
    """`Claims` on SQL."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._tells = engine.dialect.update_returning
        self._at_once = engine.dialect.name == "postgresql"

    @whole_transaction
    def claim(self, task_id: str, worker: str, lease_seconds: float) -> Claim | None:
        """See `Claims.claim`. The database's clock alone decides whether the task is due. The row of one that is belongs to
        this transaction, or on PostgreSQL, which then needs none, is written only as it was read; one that somebody else
        writes is taken not to be due: to wait for it would keep the worker from every other task."""
        with translated_errors(self._engine), self._claiming() as connection:
            due = _DUE_AS_SEEN if self._at_once else _DUE_AND_MINE
            found = connection.execute(due, {"wanted": task_id}).mappings().one_or_none()
            if found is None:
                return None
            changed = _claimed(found, worker[:255], lease_seconds)
            row = {**found, **changed}
            task = task_of(row)
            message = f"{task.message}: {count_attempt(task.attempt, task.max_attempts)} begins (fence {row['fence']})"
            line: Any = {"attempt": task.attempt, "stage": Stage.LOOKUP, "kind": "claimed", "actor": worker, "message": message}
            values = {"wanted": task_id, **{f"new_{name}": value for name, value in changed.items()}}
            if self._at_once:
                claimed = connection.execute(_CLAIM_AS_SEEN, values | {"seen": row["version"]} | line_of(**line))
                if claimed.first() is None:
                    return None
            else:
                connection.execute(_CLAIM, values)
                write_event(connection, task_id, **line)
        return Claim(task, row["fence"], worker, lease_seconds, bool(row["cancel_requested"]), row["publish_fence"])

    def _claiming(self) -> AbstractContextManager[Connection]:
        return self._engine.connect().execution_options(**AT_ONCE) if self._at_once else self._engine.begin()

    @whole_transaction
    def renew(self, claim: Claim) -> None:
        """See `Claims.renew`."""
        with translated_errors(self._engine), self._engine.begin() as connection:
            renewed = connection.execute(_RENEW, _mine(claim) | {"lease": claim.lease_seconds})
            if renewed.rowcount != 1:
                raise LeaseLost(claim.task.task_id, claim.fence)
            _refuse_cancelled(connection, claim)

    def delivered_files(self, job_id: str) -> Sequence[DeliveredFile]:
        """See `Claims.delivered_files`."""
        last = (
            select(jobs.c.task_id)
            .where(jobs.c.job_id == job_id, jobs.c.status == Status.COMPLETED.value)
            .order_by(jobs.c.id.desc())
            .limit(1)
            .scalar_subquery()
        )
        query = select(files.c.target, files.c.size, files.c.sha256, files.c.mtime).where(
            files.c.task_id == last, files.c.mtime.is_not(None)
        )
        with translated_errors(self._engine), self._engine.connect().execution_options(**READ_ONLY) as connection:
            return [DeliveredFile(*row) for row in connection.execute(query)]

    def package_sizes(self, task_id: str) -> Mapping[str, int]:
        """See `Claims.package_sizes`."""
        query = select(files.c.target, files.c.size).where(files.c.task_id == task_id)
        with translated_errors(self._engine), self._engine.connect().execution_options(**READ_ONLY) as connection:
            return {row.target: row.size for row in connection.execute(query)}

    @whole_transaction
    def advance(
        self,
        claim: Claim,
        *,
        status: Status,
        stage: Stage,
        message: str,
        also: Recording | None = None,
        sku: str | None = None,
        verdict: str | None = None,
        size: PackageSize | None = None,
        files: Sequence[PackageFile] | None = None,
        announce_staging: bool = False,
        announce_publish: bool = False,
        retract_publish: bool = False,
    ) -> None:
        """See `Claims.advance`."""
        message = bounded_message(self._engine, message)
        values: dict[str, Any] = {"stage": stage.value, "message": message}
        if sku is not None:
            values["sku"] = sku
        if verdict is not None:
            values["verdict"] = verdict
        if files is not None:
            size = measure(files)
        if size is not None:
            values.update(file_count=size.files, byte_count=size.bytes)
        if announce_staging:
            values["staging_due_at"] = db_now()
        if announce_publish:
            values["publish_fence"] = claim.fence
        if retract_publish:
            values["publish_fence"] = None
        with translated_errors(self._engine), self._engine.begin() as connection:
            if announce_publish:
                _refuse_cancelled(connection, claim)
            _move(connection, claim, _moving(status).values(**values), {})
            if files is not None:
                _record_files(connection, claim.task.task_id, files)
            remark = also(connection) if also is not None else None
            write_event(
                connection,
                claim.task.task_id,
                attempt=claim.task.attempt,
                stage=stage,
                kind="stage",
                actor=claim.worker,
                message=f"{message}; {remark}" if remark else message,
            )

    @whole_transaction
    def finish(
        self,
        claim: Claim,
        *,
        status: Status,
        stage: Stage,
        message: str,
        problem: Problem | None,
        also: Recording | None = None,
    ) -> Task:
        """See `Claims.finish`."""
        message = bounded_message(self._engine, message)
        values = {"stage": stage.value, "message": message, **problem_columns(problem, self._engine)}
        ended = {f"new_{name}": value for name, value in values.items()}
        line: Any = {"attempt": claim.task.attempt, "stage": stage, "kind": status.value, "actor": claim.worker}
        with translated_errors(self._engine):
            try:
                if self._at_once and also is None:
                    given = ended | line_of(**line, message=message)
                    with self._engine.connect().execution_options(**AT_ONCE) as connection:
                        return _told(connection, claim, _finishing_with_line(status), given)
                with self._engine.begin() as connection:
                    task = _move_and_tell(connection, claim, _finishing(status, self._tells), ended)
                    remark = also(connection) if also is not None else None
                    whole = f"{message}; {remark}" if remark else message
                    write_event(connection, claim.task.task_id, **line, message=whole)
            except (SQLAlchemyError, LeaseLost):
                # The commit may have happened although its answer was lost, now or on an earlier call.
                found = self._find_finished(claim, status)
                if found is None:
                    raise
                return found
        return task

    def _find_finished(self, claim: Claim, status: Status) -> Task | None:
        with self._engine.connect().execution_options(**READ_ONLY) as connection:
            row = read_row(connection, claim.task.task_id)
        ended = row is not None and row["status"] == status.value and row["fence"] == claim.fence
        return task_of(row) if ended else None

    @whole_transaction
    def put_back(
        self,
        claim: Claim,
        *,
        problem: Problem,
        message: str,
        delay_seconds: float,
        spend_attempt: bool,
        waits_for: str | None = None,
    ) -> Task:
        """See `Claims.put_back`."""
        message = bounded_message(self._engine, message)
        values = {
            "stage": Stage.QUEUED.value,
            "message": message,
            "claimable_at": db_now() + delay_seconds,
            "worker": None,
            "waits_for": waits_for,
            "attempt": jobs.c.attempt if spend_attempt else jobs.c.attempt - 1,
            **problem_columns(problem, self._engine),
        }
        with translated_errors(self._engine), self._engine.begin() as connection:
            _refuse_cancelled(connection, claim)
            move = _telling(_moving(Status.PENDING).values(**values), self._tells)
            task = _move_and_tell(connection, claim, move, {})
            write_event(
                connection,
                claim.task.task_id,
                attempt=claim.task.attempt,
                stage=Stage.QUEUED,
                kind="put_back",
                actor=claim.worker,
                message=message,
            )
        return task


def _move(connection: Connection, claim: Claim, move: Update, values: dict[str, Any]) -> None:
    """One status move under the fence; from an illegal status it is refused like a lost lease."""
    if connection.execute(move, _mine(claim) | values).rowcount != 1:
        raise LeaseLost(claim.task.task_id, claim.fence)


def _move_and_tell(connection: Connection, claim: Claim, move: Update, values: dict[str, Any]) -> Task:
    """The same, for a move that returns the row where the database can: the task as it is now."""
    if not move.returning_column_descriptions:
        _move(connection, claim, move, values)
        return task_of(read_row(connection, claim.task.task_id))
    return _told(connection, claim, move, values)


def _told(connection: Connection, claim: Claim, move: Update | Select[Any], values: dict[str, Any]) -> Task:
    row = connection.execute(move, _mine(claim) | values).mappings().one_or_none()
    if row is None:
        raise LeaseLost(claim.task.task_id, claim.fence)
    return task_of(row)


def _mine(claim: Claim) -> dict[str, Any]:
    return {"wanted": claim.task.task_id, "under": claim.fence}


def _refuse_cancelled(connection: Connection, claim: Claim) -> None:
    """Raises `CancelRequested` if the caller has cancelled the task; else nobody can until this transaction ends."""
    wish = select(jobs.c.cancel_requested).where(jobs.c.task_id == claim.task.task_id).with_for_update()
    if connection.execute(wish).scalar_one():
        raise CancelRequested(claim.task.task_id)


def _moved_on(column: Any, seconds: float) -> Any:
    """So many seconds from now, if the column has a value; else NULL."""
    return case((column.is_not(None), db_now() + seconds))


def _has_status(statuses: Iterable[Status]) -> ColumnElement[bool]:
    """With a parameter for each: SQLAlchemy would write a list out anew whenever the statement is run."""
    return jobs.c.status.in_([literal(status.value) for status in statuses])


_OWNED = update(jobs).where(
    jobs.c.task_id == bindparam("wanted"),
    jobs.c.fence == bindparam("under"),
    _has_status(LIVE),
    jobs.c.worker.is_not(None),
)
"""The task `wanted`, if it is claimed `under` this fence."""

_RENEW = _OWNED.values(claimable_at=db_now() + bindparam("lease", type_=Double()))


@cache
def _moving(status: Status) -> Update:
    from_statuses = [now for now in Status if now is status or may_follow(now, status)]
    return _OWNED.where(_has_status(from_statuses)).values(status=status.value, updated_at=db_now())


@cache
def _finishing(status: Status, tells: bool) -> Update:
    """Values are given as `new_…`."""
    given = ("stage", "message", *problem_columns(None))
    move = _moving(status).values(
        claimable_at=None,
        finished_at=db_now(),
        staging_due_at=_moved_on(jobs.c.staging_due_at, CLEANING_GRACE_SECONDS),
        **{name: bindparam(f"new_{name}") for name in given},
    )
    return _telling(move, tells)


@cache
def _finishing_with_line(status: Status) -> Select[Any]:
    return with_line(_finishing(status, tells=False), *jobs.c)


def _telling(move: Update, tells: bool) -> Update:
    return move.returning(jobs) if tells else move


_DUE = select(jobs, db_now().label("now")).where(
    jobs.c.task_id == bindparam("wanted"),
    jobs.c.claimable_at <= db_now(),
    has_attempt_left(),
    _has_status(LIVE),
)
_DUE_AND_MINE = _DUE.with_for_update(skip_locked=True)
_version: ColumnElement[str] = cast(literal_column("ncr_jobs.xmin"), Text())
"""PostgreSQL's own: every write of the row, whatever it changes, gives it another."""

_DUE_AS_SEEN = _DUE.add_columns(_version.label("version"))


def _claimed(row: Any, worker: str, lease_seconds: float) -> dict[str, Any]:
    """What a claim changes in the row of a due task, read `now`."""
    taken_over = f"the lease of worker {row['worker']} ran out, and another worker has taken the job over"
    return {
        "status": Status.PROCESSING.value,
        "stage": Stage.LOOKUP.value,
        "message": taken_over if row["worker"] is not None else "a worker has taken the job",
        "claimable_at": row["now"] + lease_seconds,
        "fence": row["fence"] + 1,
        "attempt": row["attempt"] + 1,
        "worker": worker,
        "waits_for": None,
        "updated_at": row["now"],
        "started_at": row["now"] if row["started_at"] is None else row["started_at"],
        **problem_columns(None),
    }


_CLAIMED_COLUMNS = (
    *("status", "stage", "message", "claimable_at", "fence", "attempt", "worker", "waits_for", "updated_at", "started_at"),
    *problem_columns(None),
)
_CLAIM = (
    update(jobs)
    .where(jobs.c.task_id == bindparam("wanted"))
    .values({name: bindparam(f"new_{name}") for name in _CLAIMED_COLUMNS})
)
"""Values are given as `new_…`. Made once: building takes as long as running it."""

_AS_SEEN = (
    select(jobs.c.id)
    .where(jobs.c.task_id == bindparam("wanted"), _version == bindparam("seen"))
    .with_for_update(skip_locked=True)
    .scalar_subquery()
)
_CLAIM_AS_SEEN = with_line(_CLAIM.where(jobs.c.id == _AS_SEEN), jobs.c.task_id)
"""Finds nothing where the row has been written since, or is being written."""


def _record_files(connection: Connection, task_id: str, package: Sequence[PackageFile]) -> None:
    connection.execute(delete(files).where(files.c.task_id == task_id))
    rows = [
        {
            "task_id": task_id,
            "target": file.target,
            "object_key": file.key,
            "size": file.size,
            "sha256": file.sha256,
            "crc32": file.crc32,
            "etag": file.etag,
            "mtime": file.mtime,
        }
        for file in package
    ]
    if rows:
        connection.execute(insert(files), rows)
