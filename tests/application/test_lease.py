"""A claim is kept alive while its worker is, and no longer."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from fault_table import fault
from ledger_twin import MemoryLedger
from ncr_upload.application.lease import Lease
from ncr_upload.domain.errors import CancelRequested, HandedOver, LeaseLost, Unavailable
from ncr_upload.domain.jobs import Claim, NewJob, Task
from patience import allowed


@pytest.fixture
def ledger() -> MemoryLedger:
    return MemoryLedger()


def claim_one(ledger: MemoryLedger, lease_seconds: float) -> Claim:
    (task,) = ledger.accept([NewJob("job-1", "ann", "spring")], batch_id=None, release=1)
    assert isinstance(task, Task)
    claim = ledger.claim(task.task_id, "w1", lease_seconds)
    assert claim is not None
    return claim


def wait_for_end(lease: Lease) -> None:
    deadline = time.monotonic() + 10
    while lease.ended is None and time.monotonic() < deadline:
        time.sleep(0.01)


def test_a_lease_is_renewed_for_as_long_as_the_attempt_runs(ledger: MemoryLedger) -> None:
    lease_seconds = allowed(2)
    claim = claim_one(ledger, lease_seconds)
    with Lease(ledger, claim, renew_seconds=0.05, asked_at=time.monotonic()) as lease:
        time.sleep(1.5 * lease_seconds)
        lease.check()
        assert ledger.claim(claim.task.task_id, "w2", 1) is None


def test_a_lease_lasts_from_when_the_claim_was_asked_for(ledger: MemoryLedger) -> None:
    """The process may have stood still before it heard the answer."""
    with (
        Lease(ledger, claim_one(ledger, 20), renew_seconds=5, asked_at=time.monotonic() - 20) as lease,
        pytest.raises(LeaseLost),
    ):
        lease.check()


@pytest.mark.parametrize("wish", [LeaseLost, CancelRequested])
def test_a_lost_or_cancelled_claim_is_told_at_once_and_at_every_check(ledger: MemoryLedger, wish: type[Exception]) -> None:
    claim = claim_one(ledger, 20)
    told: list[int] = []
    with Lease(ledger, claim, renew_seconds=0.05, asked_at=time.monotonic()) as lease:
        lease.when_ended(lambda: told.append(1))
        if wish is LeaseLost:
            ledger.set_time("claimable_at", claim.task.task_id)
            assert ledger.claim(claim.task.task_id, "w2", 20) is not None
        else:
            ledger.cancel(claim.task.task_id)
        wait_for_end(lease)
        with pytest.raises(wish):
            lease.check()
    assert told == [1]


@fault(
    "Worker: the database is away while its lease runs",
    injector="twin that raises",
    invariants="LO",
    outcome="stops before its next outside effect",
)
def test_a_claim_that_cannot_be_renewed_is_lost_when_its_time_is_up(ledger: MemoryLedger) -> None:
    class Away:
        def renew(self, _: Claim) -> None:
            raise Unavailable("database_unavailable", "away", "Look at it.")

    away: Any = Away()
    with Lease(away, claim_one(ledger, 2), renew_seconds=0.05, asked_at=time.monotonic()) as lease:
        lease.check()
        wait_for_end(lease)
        with pytest.raises(LeaseLost):
            lease.check()


def test_a_process_that_stood_still_for_longer_than_its_lease_does_not_renew_it(
    ledger: MemoryLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = claim_one(ledger, 20)
    renewed: list[Claim] = []
    monkeypatch.setattr(ledger, "renew", renewed.append)
    with Lease(ledger, claim, renew_seconds=2, asked_at=time.monotonic()) as lease:
        lease._good_until = time.monotonic() - 1  # as after SIGSTOP and SIGCONT
        wait_for_end(lease)
        assert isinstance(lease.ended, LeaseLost)
    assert renewed == []


@pytest.mark.parametrize("late", [False, True])
def test_what_runs_under_a_lease_is_stopped_when_it_ends_or_has_ended(ledger: MemoryLedger, late: bool) -> None:
    async def work() -> None:
        if not late:
            lease.end(HandedOver())
        await asyncio.sleep(30)

    with Lease(ledger, claim_one(ledger, 20), renew_seconds=5, asked_at=time.monotonic()) as lease:
        if late:
            lease.end(HandedOver())
        with pytest.raises(HandedOver):
            lease.run(work())
