"""The ledger's promises (docs/reliability.md), on SQL and its twin alike: accept once, claim by lease and fence, finish once,
recover."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from fault_table import fault
from ledgers import Ledger
from ncr_upload.application.ports import AlreadyLive, CancelAnswer, Idempotency, KeyReused, Successor, Wanted
from ncr_upload.domain.errors import CancelRequested, LeaseLost
from ncr_upload.domain.jobs import Claim, NewJob, Problem, Stage, Status, Task
from ncr_upload.domain.packages import DeliveredFile, PackageFile

PROBLEM = Problem("code", "transient", "what", "next")
JOB = NewJob("job-1", "ann", "spring", 7)


def test_an_accepted_job_is_pending_with_its_facts_and_a_history(ledger: Ledger) -> None:
    (task,) = ledger.submissions.accept([JOB], batch_id=None, release=1)
    assert isinstance(task, Task)
    assert ledger.submissions.task(task.task_id) == task
    assert (task.job_id, task.username, task.campaign, task.row_id) == ("job-1", "ann", "spring", 7)
    assert (task.status, task.attempt) == (Status.PENDING, 0)
    assert [event.kind for event in ledger.submissions.history(task.task_id)] == ["accepted"]


def test_an_id_never_issued_has_no_task(ledger: Ledger) -> None:
    assert ledger.submissions.task("never") is None


def test_a_live_job_id_is_not_accepted_again_and_the_running_task_is_named(ledger: Ledger) -> None:
    (first,) = ledger.accept("job-1")
    assert ledger.submissions.accept([JOB], batch_id=None, release=1) == [AlreadyLive("job-1", first.task_id)]


def test_an_ended_job_id_is_accepted_again_under_a_new_task(ledger: Ledger) -> None:
    (first,) = ledger.accept("job-1")
    ledger.claims.finish(ledger.claim(first), status=Status.FAILED, stage=Stage.LOOKUP, message="no", problem=PROBLEM)
    (second,) = ledger.accept("job-1")
    assert second.task_id != first.task_id


def test_job_ids_that_differ_in_case_are_different_jobs(ledger: Ledger) -> None:
    assert len(ledger.accept("job-a", "JOB-A")) == 2


@fault(
    "Caller: the same job many times at once",
    injector="threads",
    invariants="LO",
    outcome="one is accepted, the others are told its task",
)
def test_of_many_submits_at_once_exactly_one_is_accepted(ledger: Ledger) -> None:
    answers: list[Any] = []
    start = threading.Barrier(12)

    def submit() -> None:
        start.wait()
        answers.extend(ledger.submissions.accept([JOB], batch_id=None, release=1))

    threads = [threading.Thread(target=submit) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    accepted = [answer for answer in answers if isinstance(answer, Task)]
    assert len(accepted) == 1
    assert {answer.task_id for answer in answers} == {accepted[0].task_id}


def test_a_claim_is_exclusive_until_its_lease_ends(ledger: Ledger) -> None:
    (task,) = ledger.accept("job-1")
    first = ledger.claim(task)
    assert ledger.claims.claim(task.task_id, "w2", 20) is None
    ledger.expire(task)
    second = ledger.claim(task, "w2")
    assert (second.fence, second.task.attempt) == (first.fence + 1, 2)


@fault("Redis: one message given to many workers", injector="threads", invariants="O", outcome="one has the claim")
def test_of_many_claims_at_once_exactly_one_wins(ledger: Ledger) -> None:
    (task,) = ledger.accept("job-1")
    won: list[Claim] = []
    start = threading.Barrier(8)

    def claim(worker: str) -> None:
        start.wait()
        taken = ledger.claims.claim(task.task_id, worker, 20)
        if taken is not None:
            won.append(taken)

    threads = [threading.Thread(target=claim, args=(f"w{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1


def test_a_renewed_lease_lasts_from_now(ledger: Ledger) -> None:
    (task,) = ledger.accept("job-1")
    claim = ledger.claim(task)
    ledger.expire(task)
    ledger.claims.renew(claim)
    assert ledger.claims.claim(task.task_id, "w2", 20) is None


@fault("Worker: stale, every write", injector="claim taken over", invariants="OS", outcome="refused, nothing changed")
def test_a_stale_worker_can_write_nothing(ledger: Ledger) -> None:
    (task,) = ledger.accept("job-1")
    stale = ledger.claim(task)
    ledger.expire(task)
    ledger.claim(task, "w2")
    written: list[str] = []
    for attempt in (
        lambda: ledger.claims.renew(stale),
        lambda: ledger.claims.advance(
            stale, status=Status.PROCESSING, stage=Stage.DOWNLOAD, message="", also=lambda _: written.append("advance")
        ),
        lambda: ledger.claims.put_back(stale, problem=PROBLEM, message="", delay_seconds=0, spend_attempt=True),
        lambda: ledger.claims.finish(
            stale,
            status=Status.FAILED,
            stage=Stage.LOOKUP,
            message="",
            problem=None,
            also=lambda _: written.append("finish"),
        ),
    ):
        with pytest.raises(LeaseLost):
            attempt()
    assert written == []
    assert ledger.status(task) is Status.PROCESSING


@fault("Database: the answer to a finish lost", injector="the same call again", invariants="OH", outcome="recorded once")
def test_a_finish_repeated_after_a_lost_answer_records_once(ledger: Ledger) -> None:
    (task,) = ledger.accept("job-1")
    claim = ledger.uploading(task)
    recorded: list[int] = []
    for _ in range(2):
        ended = ledger.claims.finish(
            claim, status=Status.COMPLETED, stage=Stage.DONE, message="", problem=None, also=lambda _: recorded.append(1)
        )
        assert ended == ledger.submissions.task(task.task_id)
    assert recorded == [1]
    assert [event.kind for event in ledger.submissions.history(task.task_id)].count("completed") == 1


def test_due_tasks_are_told_oldest_first_without_the_newest(ledger: Ledger) -> None:
    task_ids = [task.task_id for task in ledger.accept(*(f"job-{number}" for number in range(5)))]
    assert ledger.recovery.due(10) == task_ids
    assert ledger.recovery.due(10, 2) == task_ids[:3]
    assert ledger.recovery.due(1, 2) == task_ids[:1]
    assert ledger.recovery.due(10, 5) == ledger.recovery.due(10, 9) == []


def test_a_task_put_back_waits_until_it_is_due(ledger: Ledger) -> None:
    (task,) = ledger.accept("job-1")
    waiting = ledger.claims.put_back(ledger.claim(task), problem=PROBLEM, message="later", delay_seconds=60, spend_attempt=True)
    assert waiting == ledger.submissions.task(task.task_id)
    assert (waiting.status, waiting.problem, waiting.message) == (Status.PENDING, PROBLEM, "later")
    assert waiting.due_at is not None
    assert waiting.due_at > waiting.updated_at + 59
    assert ledger.claims.claim(task.task_id, "w2", 20) is None
    assert ledger.recovery.due(10) == []


def test_an_unspent_attempt_is_not_counted(ledger: Ledger) -> None:
    (task,) = ledger.accept("job-1")
    for _ in range(5):
        claim = ledger.claim(task)
        assert claim.task.attempt == 1
        ledger.claims.put_back(claim, problem=PROBLEM, message="", delay_seconds=0, spend_attempt=False)


def test_a_task_whose_worker_dies_every_time_is_given_up_and_frees_its_job_id(ledger: Ledger) -> None:
    (task,) = ledger.accept("job-1")
    for _ in range(3):
        assert ledger.recovery.exhausted(10) == []
        ledger.claim(task)
        ledger.expire(task)
    assert ledger.claims.claim(task.task_id, "w9", 20) is None
    (dead,) = ledger.recovery.exhausted(10)
    assert ledger.recovery.give_up(dead, PROBLEM)
    assert not ledger.recovery.give_up(dead, PROBLEM)
    assert ledger.status(task) is Status.FAILED
    assert len(ledger.accept("job-1")) == 1


def test_waiting_and_abandoned_tasks_are_named_apart_and_running_or_ended_ones_not_at_all(ledger: Ledger) -> None:
    waiting, running, expired, ended = ledger.accept("waiting", "running", "expired", "ended")
    ledger.claim(running)
    ledger.claim(expired)
    ledger.expire(expired)
    ledger.claims.finish(ledger.claim(ended), status=Status.FAILED, stage=Stage.LOOKUP, message="", problem=PROBLEM)
    assert ledger.recovery.due(10) == [waiting.task_id]
    assert ledger.recovery.abandoned(10) == [expired.task_id]


def test_a_task_that_is_taken_over_says_whose_lease_ran_out(ledger: Ledger) -> None:
    (task,) = ledger.accept("job-1")
    ledger.claim(task, worker="host:7")
    ledger.expire(task)
    assert "worker host:7" in ledger.claim(task, worker="host:8").task.message
    claims = [event.message for event in ledger.submissions.history(task.task_id) if event.kind == "claimed"]
    assert ["lease of worker host:7 ran out" in message for message in claims] == [False, True]


def test_a_waiting_task_is_cancelled_at_once_and_frees_its_job_id(ledger: Ledger) -> None:
    (task,) = ledger.accept("job-1")
    assert ledger.submissions.cancel(task.task_id) is CancelAnswer.CANCELLED
    assert ledger.submissions.cancel(task.task_id) is CancelAnswer.CANCELLED
    assert ledger.status(task) is Status.CANCELLED
    assert ledger.claims.claim(task.task_id, "w1", 20) is None
    assert [event.kind for event in ledger.submissions.history(task.task_id)] == ["accepted", "cancelled"]
    assert len(ledger.accept("job-1")) == 1


def test_a_held_job_of_a_batch_is_cancelled_at_once(ledger: Ledger) -> None:
    _, held = ledger.accept("job-1", "job-2", batch_id="b1", release=1)
    assert ledger.submissions.cancel(held.task_id) is CancelAnswer.CANCELLED
    assert ledger.recovery.release_batch_jobs(5) == []


def test_a_running_task_hears_of_its_cancellation_at_every_next_step(ledger: Ledger) -> None:
    (task,) = ledger.accept("job-1")
    claim = ledger.uploading(task)
    assert ledger.submissions.cancel(task.task_id) is CancelAnswer.REQUESTED
    for step in (
        lambda: ledger.claims.renew(claim),
        lambda: ledger.claims.put_back(claim, problem=PROBLEM, message="", delay_seconds=0, spend_attempt=True),
        lambda: ledger.claims.advance(claim, status=Status.UPLOADING, stage=Stage.PUBLISH, message="", announce_publish=True),
    ):
        with pytest.raises(CancelRequested):
            step()
    ledger.expire(task)
    assert ledger.claim(task, "w2").cancel_requested


def test_a_task_that_is_being_published_is_not_cancelled(ledger: Ledger) -> None:
    (task,) = ledger.accept("job-1")
    claim = ledger.uploading(task)
    ledger.claims.advance(claim, status=Status.UPLOADING, stage=Stage.PUBLISH, message="", announce_publish=True)
    assert ledger.submissions.cancel(task.task_id) is CancelAnswer.PUBLISHING
    ledger.claims.renew(claim)


def test_a_publish_that_did_not_happen_can_be_retracted_and_the_task_cancelled(ledger: Ledger) -> None:
    (task,) = ledger.accept("job-1")
    claim = ledger.uploading(task)
    ledger.claims.advance(claim, status=Status.UPLOADING, stage=Stage.PUBLISH, message="", announce_publish=True)
    ledger.expire(task)
    again = ledger.claim(task, "w2")
    ledger.claims.advance(again, status=Status.PROCESSING, stage=Stage.LOOKUP, message="", retract_publish=True)
    assert ledger.submissions.cancel(task.task_id) is CancelAnswer.REQUESTED


def test_an_ended_or_unknown_task_is_not_cancelled(ledger: Ledger) -> None:
    (task,) = ledger.accept("job-1")
    ledger.claims.finish(ledger.claim(task), status=Status.FAILED, stage=Stage.LOOKUP, message="", problem=PROBLEM)
    assert ledger.submissions.cancel(task.task_id) is CancelAnswer.ENDED
    assert ledger.submissions.cancel("never") is None
    assert ledger.status(task) is Status.FAILED


def test_an_announced_publish_is_told_to_the_next_claim(ledger: Ledger) -> None:
    (task,) = ledger.accept("job-1")
    claim = ledger.uploading(task)
    ledger.claims.advance(claim, status=Status.UPLOADING, stage=Stage.PUBLISH, message="", announce_publish=True)
    ledger.expire(task)
    assert ledger.claim(task, "w2").publish_fence == claim.fence


def test_active_jobs_are_filtered(ledger: Ledger) -> None:
    ledger.submissions.accept([NewJob("a", "ann", "spring"), NewJob("b", "bob", "autumn")], batch_id=None, release=2)

    def total(**wanted: Any) -> int:
        filters = {"username": None, "campaign": None, "status": None, **wanted}
        return ledger.submissions.active(limit=10, cursor=None, **filters).total

    assert (total(), total(username="bob"), total(campaign="spring"), total(status=Status.PROCESSING)) == (2, 1, 1, 0)


def test_an_ended_task_with_staging_is_cleaned_up_after_by_one_worker(ledger: Ledger) -> None:
    staged, unstaged, running = ledger.accept("staged", "unstaged", "running")
    for task in (staged, running):
        claim = ledger.claim(task)
        ledger.claims.advance(claim, status=Status.VALIDATION_PASSED, stage=Stage.VALIDATE, message="", announce_staging=True)
        if task is staged:
            ledger.claims.finish(claim, status=Status.FAILED, stage=Stage.UPLOAD, message="", problem=PROBLEM)
    ledger.claims.finish(ledger.claim(unstaged), status=Status.FAILED, stage=Stage.LOOKUP, message="", problem=PROBLEM)
    assert ledger.cleaning.unclean(10) == [], "the worker that ended it has not had its own chance"
    ledger.forget_grace(staged)
    assert ledger.cleaning.unclean(10) == [staged.task_id]
    assert ledger.cleaning.take_cleaning(staged.task_id, 60)
    assert not ledger.cleaning.take_cleaning(staged.task_id, 60)
    ledger.forget_grace(staged)
    assert ledger.cleaning.take_cleaning(staged.task_id, 60), "the worker that had taken it was killed"
    ledger.cleaning.cleaned(staged.task_id)
    ledger.forget_grace(running)
    assert ledger.cleaning.unclean(10) == []


def test_a_repeated_request_is_answered_as_the_first_time_even_after_its_end(ledger: Ledger) -> None:
    key = Idempotency("k-1", "f" * 64)
    first = ledger.submissions.accept([JOB], batch_id=None, release=1, idempotency=key)
    assert isinstance(first, list)
    (task,) = first
    assert isinstance(task, Task)
    assert _ids(ledger.submissions.accept([JOB], batch_id=None, release=1, idempotency=key)) == [task.task_id]
    ledger.claims.finish(ledger.claim(task), status=Status.FAILED, stage=Stage.LOOKUP, message="", problem=PROBLEM)
    (again,) = ledger.submissions.accept([JOB], batch_id=None, release=1, idempotency=key)  # type: ignore[misc]
    assert isinstance(again, Task)
    assert (again.task_id, again.status, again.message) == (task.task_id, Status.PENDING, "accepted")
    assert ledger.submissions.active(username=None, campaign=None, status=None, limit=9, cursor=None).total == 0


def test_a_key_used_for_another_request_is_refused(ledger: Ledger) -> None:
    ledger.submissions.accept([JOB], batch_id=None, release=1, idempotency=Idempotency("k-1", "f" * 64))
    other = ledger.submissions.accept(
        [NewJob("job-2", "ann", "spring")], batch_id=None, release=1, idempotency=Idempotency("k-1", "0" * 64)
    )
    assert other == KeyReused("k-1")
    assert ledger.submissions.active(username=None, campaign=None, status=None, limit=9, cursor=None).total == 1


def test_a_repeated_batch_is_answered_with_its_first_batch(ledger: Ledger) -> None:
    jobs = [NewJob(f"job-{n}", "ann", "spring") for n in range(3)]
    key = Idempotency("k-1", "f" * 64)
    first = ledger.submissions.accept(jobs, batch_id="b1", release=2, idempotency=key)
    again = ledger.submissions.accept(jobs, batch_id="b2", release=2, idempotency=key)
    assert _ids(first) == _ids(again)
    assert ledger.submissions.batch("b2", limit=9, cursor=None) is None


@fault(
    "Caller: the same Idempotency-Key many times at once",
    injector="threads",
    invariants="LO",
    outcome="one is accepted, all get its answer",
)
def test_of_many_repeats_at_once_one_task_is_accepted(ledger: Ledger) -> None:
    answers: list[list[str]] = []
    start = threading.Barrier(12)

    def submit() -> None:
        start.wait()
        answers.append(_ids(ledger.submissions.accept([JOB], batch_id=None, release=1, idempotency=Idempotency("k", "f"))))

    threads = [threading.Thread(target=submit) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 12
    assert len({tuple(answer) for answer in answers}) == 1


def _ids(answer: object) -> list[str]:
    assert isinstance(answer, list)
    assert all(isinstance(task, Task) for task in answer)
    return [task.task_id for task in answer]


def test_the_ledger_tells_the_status_of_the_tasks_it_knows(ledger: Ledger) -> None:
    running, ended = ledger.accept("job-1", "job-2")
    ledger.claim(running)
    ledger.submissions.cancel(ended.task_id)
    found = ledger.cleaning.find_statuses([running.task_id, "never-issued", ended.task_id])
    assert found == {running.task_id: Status.PROCESSING, ended.task_id: Status.CANCELLED}
    assert ledger.cleaning.find_statuses([]) == {}


def test_the_janitor_learns_which_tasks_have_ended_long_ago(ledger: Ledger) -> None:
    ended, running = ledger.accept("ended", "running")
    ledger.claims.finish(ledger.claim(ended), status=Status.FAILED, stage=Stage.LOOKUP, message="", problem=PROBLEM)
    asked = [ended.task_id, running.task_id, "never-issued"]
    assert ledger.cleaning.ended_long_ago(asked, -1) == {ended.task_id: True, running.task_id: False}
    assert ledger.cleaning.ended_long_ago(asked, 3600) == {ended.task_id: False, running.task_id: False}
    assert ledger.cleaning.ended_long_ago([], 0) == {}


def test_an_idempotency_key_is_forgotten_when_it_is_old(ledger: Ledger) -> None:
    key = Idempotency("k-1", "f" * 64)
    ledger.submissions.accept([JOB], batch_id=None, release=1, idempotency=key)
    assert ledger.cleaning.forget_keys(3600) == 0
    assert isinstance(ledger.submissions.accept([JOB], batch_id=None, release=1, idempotency=key)[0], Task)
    assert ledger.cleaning.forget_keys(-1) == 1
    assert isinstance(ledger.submissions.accept([JOB], batch_id=None, release=1, idempotency=key)[0], AlreadyLive)


def test_jobs_sent_together_are_accepted_each_on_its_own_with_its_own_answer(ledger: Ledger) -> None:
    (live,) = ledger.accept("job-2")
    key = Idempotency("k-1", "f" * 64)
    ledger.submissions.accept([NewJob("job-3", "ann", "spring")], batch_id=None, release=1, idempotency=key)
    wanted = [
        Wanted(NewJob("job-1", "ann", "spring")),
        Wanted(NewJob("job-2", "bob", "spring")),
        Wanted(NewJob("job-3", "ann", "spring"), idempotency=key),
        Wanted(NewJob("job-4", "ann", "spring"), idempotency=Idempotency("k-1", "0" * 64)),
        Wanted(NewJob("job-5", "ann", "spring"), "a remark", Idempotency("k-5", "f" * 64)),
        Wanted(NewJob("job-1", "ann", "spring")),
    ]
    one, two, three, four, five, again = ledger.submissions.accept_each(wanted)
    assert isinstance(one, Task)
    assert two == AlreadyLive("job-2", live.task_id)
    assert isinstance(three, Task)
    assert three.job_id == "job-3"
    assert four == KeyReused("k-1")
    assert isinstance(five, Task)
    assert again == AlreadyLive("job-1", one.task_id)
    page = ledger.submissions.active(username=None, campaign=None, status=None, limit=9, cursor=None)
    assert sorted(task.job_id for task in page.tasks) == ["job-1", "job-2", "job-3", "job-5"]
    assert [event.message for event in ledger.submissions.history(five.task_id)] == ["a remark"]


def test_many_tasks_are_read_in_the_order_asked_for(ledger: Ledger) -> None:
    first, second = ledger.accept("job-1", "job-2")
    found = ledger.submissions.tasks([second.task_id, "never", first.task_id])
    assert [None if task is None else task.job_id for task in found] == ["job-2", None, "job-1"]


def test_the_files_of_the_last_delivery_are_told_with_the_times_they_had_at_the_destination(ledger: Ledger) -> None:
    def end(status: Status, *files: PackageFile) -> None:
        task = ledger.accept("job-1")[0]
        claim = ledger.uploading(task)
        ledger.claims.advance(claim, status=Status.UPLOADING, stage=Stage.PUBLISH, message="", files=files)
        problem = None if status is Status.COMPLETED else PROBLEM
        ledger.claims.finish(claim, status=status, stage=Stage.DONE, message="", problem=problem)

    assert list(ledger.claims.delivered_files("job-1")) == []
    end(Status.COMPLETED, PackageFile("k", "S/a", 3, "aa", 1, "e", mtime=1000))
    end(Status.COMPLETED, PackageFile("k", "S/b", 5, "bb", 1, "e", mtime=2**33), PackageFile("k", "S/c", 5, "cc", 1, "e"))
    end(Status.FAILED, PackageFile("k", "S/d", 7, "dd", 1, "e", mtime=3000))
    assert list(ledger.claims.delivered_files("job-1")) == [DeliveredFile("S/b", 5, "bb", 2**33)]
    assert list(ledger.claims.delivered_files("JOB-1")) == []


def test_what_was_set_aside_may_go_once_the_task_or_a_later_one_of_its_job_was_delivered(ledger: Ledger) -> None:
    (first,) = ledger.accept("job-1")
    assert ledger.cleaning.find_successor(first.task_id) is Successor.UNKNOWN, "it runs"
    ledger.claims.finish(ledger.claim(first), status=Status.FAILED, stage=Stage.LOOKUP, message="", problem=PROBLEM)
    assert ledger.cleaning.find_successor(first.task_id) is Successor.NONE
    (second,) = ledger.accept("job-1")
    assert ledger.cleaning.find_successor(first.task_id) is Successor.UNKNOWN, "the later one may be publishing"
    claim = ledger.uploading(second)
    ledger.claims.finish(claim, status=Status.COMPLETED, stage=Stage.DONE, message="", problem=None)
    assert ledger.cleaning.find_successor(first.task_id) is Successor.DELIVERED
    assert ledger.cleaning.find_successor(second.task_id) is Successor.DELIVERED
    assert ledger.cleaning.find_successor("never-issued") is Successor.UNKNOWN


def test_what_is_kept_at_the_destination_is_said_once_in_the_history(ledger: Ledger) -> None:
    (task,) = ledger.accept("job-1")
    ledger.claims.finish(ledger.claim(task), status=Status.FAILED, stage=Stage.LOOKUP, message="", problem=PROBLEM)
    for _ in range(2):
        ledger.cleaning.note_kept(task.task_id, "the previous delivery is kept in staging")
    said = [event.kind for event in ledger.submissions.history(task.task_id)]
    assert said.count("kept") == 1
    assert said[-1] == "kept"


def test_the_sizes_of_an_announced_package_are_known_to_the_next_attempt(ledger: Ledger) -> None:
    (task,) = ledger.accept("job-1")
    assert ledger.claims.package_sizes(task.task_id) == {}
    package = [PackageFile(f"key/{name}", f"SKU/{name}", size, "a" * 64, 1, "") for name, size in (("a.glb", 3), ("b.png", 0))]
    claim = ledger.uploading(task)
    ledger.claims.advance(claim, status=Status.UPLOADING, stage=Stage.PUBLISH, message="", files=package, announce_publish=True)
    assert ledger.claims.package_sizes(task.task_id) == {"SKU/a.glb": 3, "SKU/b.png": 0}
