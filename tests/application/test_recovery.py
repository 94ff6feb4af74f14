"""The sweep rings for what nobody rings for, and little more."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fault_table import fault
from ledger_twin import MemoryJobQueue, MemoryLedger, MemoryStatusBoard, MemoryWorkerReports
from ncr_upload.application import recovery
from ncr_upload.application.recovery import ReleaseLimits, SweepPorts, sweep
from ncr_upload.domain.jobs import NewJob, Problem, Stage, Status, Task


@pytest.fixture
def now() -> list[float]:
    return [1000.0]


@pytest.fixture
def ledger(now: list[float]) -> MemoryLedger:
    return MemoryLedger(clock=lambda: now[0])


@pytest.fixture
def queue() -> MemoryJobQueue:
    return MemoryJobQueue()


@pytest.fixture
def sweep_once(ledger: MemoryLedger, queue: MemoryJobQueue) -> Callable[[], list[str]]:
    """Sweeps, and returns the tasks it rang for."""
    ports = SweepPorts(ledger, ledger, ledger, ledger, ledger, queue, MemoryStatusBoard(), MemoryWorkerReports())

    def run() -> list[str]:
        before = len(queue.rung)
        sweep(ports, ReleaseLimits(5, 30))
        return queue.rung[before:]

    return run


def accept(ledger: MemoryLedger, now: list[float], job_id: str) -> str:
    """A task one second younger than the one before it."""
    now[0] += 1
    tasks = ledger.accept([NewJob(job_id, "ann", "spring")], batch_id=None, release=1)
    assert isinstance(tasks, list)
    assert isinstance(tasks[0], Task)
    return tasks[0].task_id


@fault(
    "Worker: dead while the queue is never empty",
    injector="lease run out behind waiting messages",
    invariants="L",
    outcome="rung for before all that waits",
)
def test_a_job_whose_worker_died_is_rung_for_while_newer_ones_keep_the_queue_busy(
    ledger: MemoryLedger, queue: MemoryJobQueue, sweep_once: Callable[[], list[str]], now: list[float]
) -> None:
    dead = accept(ledger, now, "job-dead")
    assert ledger.claim(dead, "worker", 20) is not None
    now[0] += 30
    for number in range(3):
        queue.ring([accept(ledger, now, f"job-{number}")])
    assert sweep_once() == []
    assert queue.rung_first == [dead]
    sweep_once()
    assert queue.rung_first == [dead], "its message waits"


def test_what_an_ended_task_left_behind_is_rung_for_before_all_that_waits(
    ledger: MemoryLedger, queue: MemoryJobQueue, sweep_once: Callable[[], list[str]], now: list[float]
) -> None:
    left = accept(ledger, now, "job-left")
    claim = ledger.claim(left, "worker", 20)
    assert claim is not None
    ledger.advance(claim, status=Status.PROCESSING, stage=Stage.UPLOAD, message="", announce_staging=True)
    ledger.finish(claim, status=Status.FAILED, stage=Stage.UPLOAD, message="", problem=None)
    now[0] += 30
    queue.ring([accept(ledger, now, "job-new")])
    sweep_once()
    assert queue.rung_first == [left]


def test_a_task_whose_message_waits_is_not_rung_for_again(
    ledger: MemoryLedger, queue: MemoryJobQueue, sweep_once: Callable[[], list[str]], now: list[float]
) -> None:
    for number in range(3):
        queue.ring([accept(ledger, now, f"job-{number}")])
    assert sweep_once() == []


@fault(
    "Redis: a ring lost behind a long queue",
    injector="message dropped",
    invariants="LS",
    outcome="the oldest are rung for first",
)
def test_a_job_whose_ring_was_lost_is_rung_for_behind_more_waiting_ones_than_one_sweep_lists(
    ledger: MemoryLedger,
    queue: MemoryJobQueue,
    sweep_once: Callable[[], list[str]],
    now: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recovery, "AT_ONCE", 2)
    lost = accept(ledger, now, "job-lost")
    for number in range(5):
        queue.ring([accept(ledger, now, f"job-{number}")])
    assert sweep_once() == [lost]


def test_a_due_probe_is_rung_for_once_while_no_worker_has_heard(
    ledger: MemoryLedger, queue: MemoryJobQueue, sweep_once: Callable[[], list[str]], now: list[float]
) -> None:
    ledger.park("partner@sftp:22:/", Problem("disk_full", "parked", "full", "Make room."), 30)
    sweep_once()
    assert "probe" not in queue.duties
    now[0] += 31
    sweep_once()
    assert "probe" in queue.duties
    queue.rung_first.append("as if the ring waited for a worker")
    queue.duties.clear()
    sweep_once()
    assert queue.duties == []
