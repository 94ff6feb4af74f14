"""Ledgers under test: on SQL, and the twin in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import Engine, text

from ledger_twin import MemoryLedger
from ncr_upload.adapters.sql.claims import SqlClaims
from ncr_upload.adapters.sql.cleaning import SqlCleaning
from ncr_upload.adapters.sql.history import SqlHistory
from ncr_upload.adapters.sql.parking import SqlDuties, SqlParking
from ncr_upload.adapters.sql.recovery import SqlRecovery
from ncr_upload.adapters.sql.submissions import SqlSubmissions
from ncr_upload.application.ports import Claims, Cleaning, Duties, History, Parking, Recovery, Submissions
from ncr_upload.domain.jobs import Claim, NewJob, Stage, Status, Task


@dataclass(frozen=True)
class Ledger:
    """The faces of one ledger, and what tests do behind its back."""

    submissions: Submissions
    claims: Claims
    recovery: Recovery
    cleaning: Cleaning
    parking: Parking
    duties: Duties
    history: History
    make_probe_due: Callable[[float], None]
    """As if every parked destination had been parked, and its probe due, so many seconds ago."""
    set_time: Callable[[str, str], None]
    """Sets a column that holds a time to long ago, for the task with this id; NULL stays."""

    def accept(self, *job_ids: str, batch_id: str | None = None, release: int = 100) -> list[Task]:
        accepted = self.submissions.accept([NewJob(j, "ann", "spring") for j in job_ids], batch_id=batch_id, release=release)
        assert all(isinstance(item, Task) for item in accepted)
        return [item for item in accepted if isinstance(item, Task)]

    def claim(self, task: Task, worker: str = "w1", lease_seconds: float = 20) -> Claim:
        claim = self.claims.claim(task.task_id, worker, lease_seconds)
        assert claim is not None
        return claim

    def uploading(self, task: Task) -> Claim:
        claim = self.claim(task)
        for status in (Status.VALIDATION_PASSED, Status.UPLOADING):
            self.claims.advance(claim, status=status, stage=Stage.UPLOAD, message="")
        return claim

    def status(self, task: Task) -> Status:
        found = self.submissions.task(task.task_id)
        assert found is not None
        return found.status

    def expire(self, task: Task) -> None:
        """As if the lease had ended long ago."""
        self.set_time("claimable_at", task.task_id)

    def forget_grace(self, task: Task) -> None:
        """As if the task had ended a while ago."""
        self.set_time("staging_due_at", task.task_id)


def sql_ledger(engine: Engine) -> Ledger:
    def run(statement: str, task_id: str) -> None:
        with engine.begin() as connection:
            connection.execute(text(statement), {"t": task_id})

    def make_probe_due(seconds_ago: float) -> None:
        with engine.begin() as connection:
            connection.execute(text("UPDATE ncr_parked_destinations SET probe_at = since - :s"), {"s": seconds_ago})

    return Ledger(
        SqlSubmissions(engine, max_attempts=3),
        SqlClaims(engine),
        SqlRecovery(engine),
        SqlCleaning(engine),
        SqlParking(engine),
        SqlDuties(engine),
        SqlHistory(engine),
        make_probe_due,
        lambda column, task_id: run(f"UPDATE ncr_jobs SET {column} = 1 WHERE task_id = :t AND {column} IS NOT NULL", task_id),
    )


def memory_ledger() -> Ledger:
    twin = MemoryLedger(max_attempts=3)
    return Ledger(twin, twin, twin, twin, twin, twin, twin, twin.make_probe_due, twin.set_time)
