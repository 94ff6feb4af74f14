"""Batches in the ledger, held to the same promises on every database and in the twin."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from fault_table import fault
from ledgers import Ledger
from ncr_upload.application.ports import AlreadyLive, CancelAnswer, Idempotency
from ncr_upload.domain.batches import Share, WorkerRoom
from ncr_upload.domain.errors import CancelRequested
from ncr_upload.domain.jobs import NewJob, Problem, Stage, Status, Task
from ncr_upload.domain.packages import PackageFile, PackageSize

PROBLEM = Problem("object_missing", "rejected", "gone", "put it back")


def jobs(*job_ids: str) -> list[NewJob]:
    return [NewJob(job_id, "ann", "spring") for job_id in job_ids]


def fail(ledger: Ledger, task: Task, status: Status = Status.FAILED) -> None:
    ledger.claims.finish(ledger.claim(task), status=status, stage=Stage.LOOKUP, message="", problem=PROBLEM)


def test_one_live_job_refuses_the_whole_batch_and_accepts_none_of_it(ledger: Ledger) -> None:
    (live,) = ledger.accept("job-2")
    refused = ledger.submissions.accept([NewJob(f"job-{n}", "ann", "spring") for n in (1, 2, 3)], batch_id="b1", release=3)
    assert refused == [AlreadyLive("job-2", live.task_id)]
    assert ledger.submissions.active(username=None, campaign=None, status=None, limit=9, cursor=None).total == 1
    assert ledger.submissions.batch("b1", limit=9, cursor=None) is None


def test_a_batch_keeps_at_most_so_many_in_flight_and_goes_on_when_one_ends(ledger: Ledger) -> None:
    tasks = ledger.accept(*(f"job-{n}" for n in range(5)), batch_id="b1", release=2)
    assert ledger.recovery.due(10) == [tasks[0].task_id, tasks[1].task_id]
    assert ledger.recovery.release_batch_jobs(2) == []
    ledger.claims.finish(ledger.claim(tasks[0]), status=Status.FAILED, stage=Stage.LOOKUP, message="", problem=PROBLEM)
    assert ledger.recovery.release_batch_jobs(2) == [tasks[2].task_id]


@fault(
    "Beat: two sweep at once",
    injector="threads",
    invariants="LO",
    outcome="no more of a batch is released than by one alone",
)
def test_of_many_sweepers_at_once_no_more_is_released_than_by_one(ledger: Ledger) -> None:
    tasks = ledger.accept(*(f"job-{n}" for n in range(30)), batch_id="b1", release=0)
    start = threading.Barrier(6)

    def sweep() -> list[str]:
        start.wait()
        return ledger.recovery.release_batch_jobs(4)

    with ThreadPoolExecutor(6) as sweepers:
        released = [each for sweeping in [sweepers.submit(sweep) for _ in range(6)] for each in sweeping.result()]
    assert sorted(released) == sorted(task.task_id for task in tasks[:4])
    assert len(ledger.recovery.due(100)) == 4


def test_a_batch_is_counted_by_status_and_paged(ledger: Ledger) -> None:
    tasks = ledger.accept(*(f"job-{n}" for n in range(5)), batch_id="b1", release=5)
    ledger.claim(tasks[0])
    found = ledger.submissions.batch("b1", limit=2, cursor=None)
    assert found is not None
    counts, page = found
    assert set(counts.shares) == {Share(Status.PROCESSING, Stage.LOOKUP, 1), Share(Status.PENDING, Stage.QUEUED, 4)}
    assert (counts.started_at is not None, counts.finished_at) == (True, None)
    seen = [task.task_id for task in page.tasks]
    while page.cursor is not None:
        again = ledger.submissions.batch("b1", limit=2, cursor=page.cursor)
        assert again is not None
        page = again[1]
        seen.extend(task.task_id for task in page.tasks)
    assert seen == [task.task_id for task in tasks]


def test_a_batch_knows_when_it_ended_and_how_large_its_jobs_were(ledger: Ledger) -> None:
    tasks = ledger.accept("job-1", "job-2", batch_id="b1", release=5)
    claim = ledger.uploading(tasks[0])
    ledger.claims.advance(claim, status=Status.UPLOADING, stage=Stage.UPLOAD, message="", size=PackageSize(1, 99))
    begun = ledger.submissions.batch("b1", limit=2, cursor=None)
    assert begun is not None
    assert Share(Status.UPLOADING, Stage.UPLOAD, 1, 1, 99) in begun[0].shares
    file = PackageFile("k", "t", 100, "0" * 64, 0, "e")
    ledger.claims.advance(claim, status=Status.UPLOADING, stage=Stage.UPLOAD, message="", files=[file])
    fail(ledger, tasks[1])
    found = ledger.submissions.batch("b1", limit=2, cursor=None)
    assert found is not None
    assert Share(Status.UPLOADING, Stage.UPLOAD, 1, 1, 100) in found[0].shares
    assert found[0].finished_at is None
    ledger.claims.finish(claim, status=Status.COMPLETED, stage=Stage.DONE, message="", problem=None)
    ended = ledger.submissions.batch("b1", limit=2, cursor=None)
    assert ended is not None
    assert ended[0].finished_at is not None
    assert ended[0].started_at is not None
    assert ended[0].started_at <= ended[0].finished_at


def test_a_batch_leaves_out_what_is_live_and_remembers_it(ledger: Ledger) -> None:
    (running,) = ledger.accept("job-2")
    answer = ledger.submissions.accept(jobs("job-1", "job-2", "job-3"), batch_id="b1", release=9, skip_live=True)
    assert [task.job_id for task in answer] == ["job-1", "job-3"]
    conflict = AlreadyLive("job-2", running.task_id)
    assert ledger.submissions.conflicts("b1") == [conflict]
    found = ledger.submissions.batch("b1", limit=9, cursor=None)
    assert found is not None
    assert found[0].conflicts == (conflict,)
    assert found[1].total == 2


def test_a_batch_of_live_jobs_alone_is_refused_all_the_same(ledger: Ledger) -> None:
    (running,) = ledger.accept("job-1")
    answer = ledger.submissions.accept(jobs("job-1"), batch_id="b1", release=9, skip_live=True)
    assert answer == [AlreadyLive("job-1", running.task_id)]
    assert ledger.submissions.batch("b1", limit=9, cursor=None) is None


def test_a_repeated_batch_keeps_its_conflicts(ledger: Ledger) -> None:
    (running,) = ledger.accept("job-2")
    key = Idempotency("k-1", "f" * 64)
    for _ in range(2):
        answer = ledger.submissions.accept(jobs("job-1", "job-2"), batch_id="b1", release=9, skip_live=True, idempotency=key)
        assert [task.job_id for task in answer] == ["job-1"]
        assert ledger.submissions.conflicts("b1") == [AlreadyLive("job-2", running.task_id)]


def test_workers_without_room_get_no_further_batch_jobs(ledger: Ledger) -> None:
    tasks = ledger.accept(*(f"job-{n}" for n in range(6)), batch_id="b1", release=1)
    assert ledger.recovery.release_batch_jobs(5, [WorkerRoom(0, 4)]) == []
    assert ledger.recovery.release_batch_jobs(5, [WorkerRoom(2, 4)]) == [tasks[1].task_id]
    assert len(ledger.recovery.release_batch_jobs(5, [WorkerRoom(4, 4)])) == 3


def test_little_room_is_shared_among_the_batches(ledger: Ledger) -> None:
    large = ledger.accept(*(f"large-{n}" for n in range(9)), batch_id="b1", release=2)
    small = ledger.accept("small-1", "small-2", batch_id="b2", release=0)
    released = ledger.recovery.release_batch_jobs(5, [WorkerRoom(4, 8)])
    assert sorted(released) == sorted([small[0].task_id, small[1].task_id])
    assert set(released).isdisjoint({task.task_id for task in large})


def test_cancelling_a_batch_ends_what_waits_and_asks_the_rest_to_stop(ledger: Ledger) -> None:
    tasks = ledger.accept(*(f"job-{n}" for n in range(5)), batch_id="b1", release=4)
    fail(ledger, tasks[0])
    running = ledger.claim(tasks[1])
    publishing = ledger.uploading(tasks[2])
    ledger.claims.advance(publishing, status=Status.UPLOADING, stage=Stage.PUBLISH, message="", announce_publish=True)
    assert ledger.submissions.cancel_batch("b1") == {
        CancelAnswer.ENDED: 1,
        CancelAnswer.REQUESTED: 1,
        CancelAnswer.PUBLISHING: 1,
        CancelAnswer.CANCELLED: 2,
    }
    with pytest.raises(CancelRequested):
        ledger.claims.renew(running)
    ledger.claims.renew(publishing)
    assert [ledger.status(task) for task in tasks[3:]] == [Status.CANCELLED] * 2
    assert [event.kind for event in ledger.submissions.history(tasks[4].task_id)] == ["accepted", "cancelled"]
    assert ledger.recovery.release_batch_jobs(5) == []


def test_cancelling_a_batch_twice_is_harmless_and_an_unknown_one_is_told(ledger: Ledger) -> None:
    (task,) = ledger.accept("job-1", batch_id="b1")
    for _ in range(2):
        assert ledger.submissions.cancel_batch("b1") == {CancelAnswer.CANCELLED: 1}
    assert len(ledger.submissions.history(task.task_id)) == 2
    assert ledger.submissions.cancel_batch("never") is None


def test_the_unsuccessful_jobs_of_a_batch_are_those_that_failed_or_were_refused(ledger: Ledger) -> None:
    tasks = ledger.accept(*(f"job-{n}" for n in range(4)), batch_id="b1")
    fail(ledger, tasks[1])
    fail(ledger, tasks[2], Status.VALIDATION_FAILED)
    ledger.submissions.cancel(tasks[3].task_id)
    assert ledger.submissions.unsuccessful("b1") == jobs("job-1", "job-2")
    assert ledger.submissions.unsuccessful("never") is None
