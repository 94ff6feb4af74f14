"""Ledgers under test: on SQL, and the twin in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import Engine, text

from ledger_twin import MemoryLedger
from ncr_upload.adapters.sql.claims import SqlClaims
from ncr_upload.adapters.sql.recovery import SqlRecovery
from ncr_upload.adapters.sql.submissions import SqlSubmissions
from ncr_upload.domain.jobs import Claim, NewJob, Stage, Status, Task


class Ledger:
    """The three faces of one ledger, and what tests do behind its back."""

    def __init__(
        self, submissions: Any, claims: Any, recovery: Any, expire: Callable[[str], None], cancel: Callable[[str], None]
    ):
        self.submissions, self.claims, self.recovery = submissions, claims, recovery
        self._expire, self._cancel = expire, cancel

    def accept(self, *job_ids: str, batch_id: str | None = None, release: int = 100) -> list[Task]:
        accepted = self.submissions.accept([NewJob(j, "ann", "spring") for j in job_ids], batch_id=batch_id, release=release)
        assert all(isinstance(item, Task) for item in accepted)
        return list(accepted)

    def claim(self, task: Task, worker: str = "w1", lease_seconds: float = 20) -> Claim:
        claim: Claim | None = self.claims.claim(task.task_id, worker, lease_seconds)
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
        return Status(found.status)

    def expire(self, task: Task) -> None:
        """As if the lease had ended long ago."""
        self._expire(task.task_id)

    def request_cancel(self, task: Task) -> None:
        self._cancel(task.task_id)


def sql_ledger(engine: Engine) -> Ledger:
    def run(statement: str, task_id: str) -> None:
        with engine.begin() as connection:
            connection.execute(text(statement), {"t": task_id})

    return Ledger(
        SqlSubmissions(engine, max_attempts=3),
        SqlClaims(engine),
        SqlRecovery(engine),
        lambda task_id: run("UPDATE ncr_jobs SET claimable_at = 1 WHERE task_id = :t", task_id),
        lambda task_id: run("UPDATE ncr_jobs SET cancel_requested = 1 WHERE task_id = :t", task_id),
    )


def memory_ledger() -> Ledger:
    twin = MemoryLedger(max_attempts=3)
    return Ledger(twin, twin, twin, twin.expire, twin.request_cancel)
