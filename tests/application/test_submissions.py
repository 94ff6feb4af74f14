"""Accepting jobs: all or none, never slowed down by Redis, never lost with it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fault_table import fault
from ledger_twin import MemoryHost, MemoryJobQueue, MemoryLedger, MemoryStatusBoard, MemoryWorkerReports
from ncr_upload.application.doorbell import WAITING_RINGS, Doorbell
from ncr_upload.application.ports import CancelAnswer, Memory, Wanted, WorkerReport
from ncr_upload.application.recovery import ReleaseLimits
from ncr_upload.application.submissions import (
    Accepted,
    AlreadyRunning,
    Answer,
    Busy,
    Repeated,
    SubmitLimits,
    SubmitPorts,
    cancel,
    find_repeated,
    submit,
    submit_batch,
)
from ncr_upload.domain.admission import AdmissionLimits
from ncr_upload.domain.batches import WorkerRoom
from ncr_upload.domain.errors import Unavailable
from ncr_upload.domain.jobs import NewJob, Status
from patience import until

JOB = NewJob("job-1", "ann", "spring", 7)


def limits(batch_size: int = 5) -> SubmitLimits:
    return SubmitLimits(AdmissionLimits(80), ReleaseLimits(batch_size, report_seconds=30))


class Desk:
    """The submission use cases on twins."""

    def __init__(self) -> None:
        self.ledger = MemoryLedger()
        self.host = MemoryHost()
        self.queue = MemoryJobQueue()
        self.board = MemoryStatusBoard()
        self.reports = MemoryWorkerReports()
        self.doorbell = Doorbell(self.queue, self.board)

    def submit(self, job: NewJob = JOB) -> Answer:
        return submit(Wanted(job), self.ports(), limits())

    def submit_batch(self, *job_ids: str, batch_size: int = 5) -> Answer:
        jobs = [NewJob(job_id, "ann", "spring") for job_id in job_ids]
        return submit_batch(jobs, self.ports(), limits(batch_size))

    def ports(self) -> SubmitPorts:
        return SubmitPorts(self.ledger, self.ledger, self.reports, self.host, self.doorbell)

    def count_live(self) -> int:
        return self.ledger.active(username=None, campaign=None, status=None, limit=1, cursor=None).total


@pytest.fixture
def desk() -> Desk:
    return Desk()


def accepted(answer: Answer) -> Accepted:
    assert isinstance(answer, Accepted)
    return answer


def test_an_accepted_job_is_in_the_ledger_rung_for_and_shown_as_pending(desk: Desk) -> None:
    (task,) = accepted(desk.submit()).tasks
    desk.doorbell.close(20)
    assert desk.ledger.task(task.task_id) == task
    assert desk.queue.rung == [task.task_id]
    (view,) = desk.board.read([task.task_id])
    assert view is not None
    assert (view["status"], view["row_id"]) == ("pending", 7)


def test_a_job_in_flight_is_not_accepted_again_and_its_task_is_named(desk: Desk) -> None:
    (task,) = accepted(desk.submit()).tasks
    again = desk.submit()
    assert isinstance(again, AlreadyRunning)
    assert [(live.job_id, live.task_id) for live in again.live] == [("job-1", task.task_id)]


def test_memory_over_the_limit_accepts_nothing(desk: Desk) -> None:
    desk.host = MemoryHost(used=81)
    answer = desk.submit()
    assert isinstance(answer, Busy)
    assert answer.memory.used == 81
    assert answer.defer.retry_after_seconds > 0
    assert desk.count_live() == 0


def test_memory_at_the_limit_still_accepts(desk: Desk) -> None:
    desk.host = MemoryHost(used=80)
    assert isinstance(desk.submit(), Accepted)


def test_a_batch_is_accepted_whole_and_only_its_first_jobs_are_rung_for(desk: Desk) -> None:
    batch = accepted(desk.submit_batch("a", "b", "c", batch_size=2))
    desk.doorbell.close(20)
    assert [task.job_id for task in batch.tasks] == ["a", "b", "c"]
    assert {task.batch_id for task in batch.tasks} == {batch.batch_id}
    assert desk.queue.rung == [task.task_id for task in batch.tasks[:2]]


def test_one_job_in_flight_refuses_its_whole_batch_and_all_such_are_named(desk: Desk) -> None:
    for job_id in ("b", "c"):
        desk.submit(NewJob(job_id, "ann", "spring"))
    answer = desk.submit_batch("a", "b", "c")
    assert isinstance(answer, AlreadyRunning)
    assert [live.job_id for live in answer.live] == ["b", "c"]
    assert desk.count_live() == 2


def test_jobs_named_twice_are_found_with_both_positions() -> None:
    jobs = [NewJob(job_id, "ann", "spring") for job_id in ("a", "b", "a", "A", "a")]
    assert find_repeated(jobs) == [Repeated("a", 0, 2), Repeated("a", 0, 4)]


@fault("API: Redis away at a submit", injector="twin that raises", invariants="LSA", outcome="accepted; the sweeper rings")
def test_a_job_is_accepted_while_redis_is_away(desk: Desk) -> None:
    desk.queue.away = desk.board.away = True
    (task,) = accepted(desk.submit()).tasks
    desk.doorbell.close(20)
    assert desk.ledger.due(10) == [task.task_id]  # so the sweeper rings for it
    assert desk.queue.rung == []


@fault(
    "API: Redis frozen at a submit", injector="twin that hangs", invariants="LSA", outcome="accepted at once; the sweeper rings"
)
def test_a_frozen_queue_holds_no_submit_up(desk: Desk) -> None:
    desk.queue.thawed.clear()
    job_ids = [f"job-{n}" for n in range(WAITING_RINGS + 10)]  # more than may wait to be rung for
    for job_id in job_ids:
        assert isinstance(desk.submit(NewJob(job_id, "ann", "spring")), Accepted)
    assert len(desk.ledger.due(2 * WAITING_RINGS)) == len(job_ids)
    desk.queue.thawed.set()
    desk.doorbell.close(20)


def test_rings_behind_a_failed_one_are_dropped_and_later_ones_ring_again(desk: Desk) -> None:
    desk.queue.thawed.clear()
    for job_id in ("a", "b", "c"):
        desk.submit(NewJob(job_id, "ann", "spring"))
    desk.queue.away = True
    desk.queue.thawed.set()
    until(lambda: desk.doorbell.waiting == 0)
    desk.queue.away = False
    (task,) = accepted(desk.submit(NewJob("d", "ann", "spring"))).tasks
    until(lambda: task.task_id in desk.queue.rung)
    assert len(desk.queue.rung) < 4


def test_the_pending_view_of_a_late_ring_does_not_cover_what_a_worker_shows(desk: Desk) -> None:
    desk.queue.thawed.clear()
    (task,) = accepted(desk.submit()).tasks
    final = {"task_id": task.task_id, "status": Status.COMPLETED.value}
    desk.board.post([final], live=False, fence=1)
    desk.queue.thawed.set()
    desk.doorbell.close(20)
    assert desk.queue.rung == [task.task_id]
    assert desk.board.read([task.task_id]) == [final]


def test_a_worker_short_of_room_is_sent_no_more_of_a_new_batch_than_it_can_bear(desk: Desk) -> None:
    report = WorkerReport("w1", WorkerRoom(capacity=1, configured=4), Memory(1, 2, "host"), 1, 1)
    desk.reports.report(report)
    batch = accepted(desk.submit_batch("a", "b", "c", batch_size=3))
    desk.doorbell.close(20)
    assert desk.ledger.due(9) == desk.queue.rung
    assert [desk.ledger.task(task_id).job_id for task_id in desk.queue.rung] == ["a"]  # type: ignore[union-attr]
    assert len(batch.tasks) == 3


def test_a_waiting_job_that_is_cancelled_lets_the_next_of_its_batch_begin_at_once(desk: Desk) -> None:
    batch = accepted(desk.submit_batch("a", "b", "c", batch_size=1))
    until(lambda: len(desk.queue.rung) == 1)
    assert cancel(batch.tasks[0].task_id, desk.ports(), limits(1)) is CancelAnswer.CANCELLED
    until(lambda: desk.queue.rung == [task.task_id for task in batch.tasks[:2]])
    assert desk.ledger.due(9) == [batch.tasks[1].task_id]


def test_a_cancel_stands_even_if_the_next_job_cannot_be_released_now(desk: Desk) -> None:
    batch = accepted(desk.submit_batch("a", "b", batch_size=1))
    ports = replace(desk.ports(), reports=AwayReports())
    assert cancel(batch.tasks[0].task_id, ports, limits(1)) is CancelAnswer.CANCELLED
    assert desk.ledger.release_batch_jobs(1) == [batch.tasks[1].task_id]  # as the sweeper does


class AwayReports(MemoryWorkerReports):
    def recent(self, within_seconds: float) -> list[WorkerReport]:
        raise Unavailable("database_unavailable", "away", "start it")
