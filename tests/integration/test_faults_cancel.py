"""A cancelled job is never published, a published one never cancelled: at every stage, and in races against the finish."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator

import pytest

from fault_table import fault
from ncr_upload.application.ports import CancelAnswer
from ncr_upload.domain.jobs import Status, Task
from ncr_upload.entrypoints.embedded.product import Product
from outcomes import assert_delivered_once, assert_undelivered
from servers import Answer, start_http
from workplace import Workplace

BEFORE_PUBLISH = [
    "lookup:before",
    "lookup:after",
    "download:before",
    "download:after",
    "validate:before",
    "validate:after",
    "stage:before",
    "stage:after",
]
FROM_PUBLISH_ON = ["publish:before", "publish:after", "record:before"]
ROUNDS = 40


@pytest.fixture
def quick(workplace: Workplace) -> Iterator[Workplace]:
    """With a validator that passes everything at once: these tests are about the ledger and the destination."""
    with start_http(Answer(200, b'{"data": [{"result": "Valid"}]}')) as validator:
        workplace.change(validator_api_url=validator.url)
        yield workplace


def cancel(workplace: Workplace, task: Task) -> CancelAnswer | None:
    answer: CancelAnswer | None = workplace.ports().submissions.cancel(task.task_id)
    return answer


def assert_cancelled(workplace: Workplace, task: Task) -> None:
    assert (task.status, task.problem and task.problem.code) == (Status.CANCELLED, "cancelled"), task.message
    workplace.sweep(task)
    assert_undelivered(workplace, task)
    assert workplace.studio_rows("job_details")[0]["is_uploaded"] == 1


@fault("Cancel: while queued", injector="cancel", invariants="LOPRH", outcome="cancelled at once; a late ring does nothing")
def test_a_job_cancelled_while_it_waits_is_never_begun(quick: Workplace, job_id: str, small: Product) -> None:
    quick.place(job_id, small)
    (task,) = quick.submit(job_id)
    assert cancel(quick, task) is CancelAnswer.CANCELLED
    assert cancel(quick, task) is CancelAnswer.CANCELLED
    ended = quick.attempt(task)
    assert_cancelled(quick, ended)
    assert not any("attempt 1" in line for line in quick.history(ended))


@fault(
    "Cancel: between two attempts", injector="cancel", invariants="LOPRH", outcome="cancelled at once; nothing staged is left"
)
def test_a_job_cancelled_while_it_waits_for_its_next_try_is_not_tried_again(
    workplace: Workplace, job_id: str, small: Product
) -> None:
    workplace.place(job_id, small)
    workplace.sftp.fault("cut-on-write")
    (task,) = workplace.submit(job_id)
    assert workplace.attempt(task).status is Status.PENDING
    assert cancel(workplace, task) is CancelAnswer.CANCELLED
    workplace.let_time_pass()
    assert_cancelled(workplace, workplace.attempt(task))


@pytest.mark.parametrize("point", BEFORE_PUBLISH)
@fault(
    "Cancel: at each stage before the publish", injector="cancel", invariants="LOPRH", outcome="cancelled; nothing is visible"
)
def test_a_job_cancelled_at_any_stage_before_its_publish_is_not_published(
    quick: Workplace, job_id: str, small: Product, point: str
) -> None:
    answers: list[CancelAnswer | None] = []
    quick.place(job_id, small)
    (task,) = quick.submit(job_id)
    ended = quick.attempt(task, lambda reached: answers.append(cancel(quick, task)) if reached == point else None)
    assert answers == [CancelAnswer.REQUESTED]
    assert_cancelled(quick, ended)


@pytest.mark.parametrize("point", FROM_PUBLISH_ON)
@fault("Cancel: from the publish on", injector="cancel", invariants="LOPRH", outcome="too late: delivered, recorded once")
def test_a_job_cancelled_from_its_publish_on_is_delivered(quick: Workplace, job_id: str, small: Product, point: str) -> None:
    answers: list[CancelAnswer | None] = []
    quick.place(job_id, small)
    (task,) = quick.submit(job_id)
    ended = quick.attempt(task, lambda reached: answers.append(cancel(quick, task)) if reached == point else None)
    assert answers == [CancelAnswer.PUBLISHING]
    assert_delivered_once(quick, ended, small, spent=1)
    assert cancel(quick, task) is CancelAnswer.ENDED
    assert quick.attempt(task).status is Status.COMPLETED


@fault(
    "Cancel: after a publish whose answer was lost",
    injector="SFTP server aborts, then cancel",
    invariants="LOPRH",
    outcome="too late: found published, recorded once",
)
def test_a_job_that_may_be_published_cannot_be_cancelled(quick: Workplace, job_id: str, small: Product) -> None:
    quick.place(job_id, small)
    quick.sftp.fault("cut-after-publish")
    (task,) = quick.submit(job_id)
    assert quick.attempt(task).status is Status.PENDING
    assert cancel(quick, task) is CancelAnswer.PUBLISHING
    quick.let_time_pass()
    assert_delivered_once(quick, quick.attempt(task), small, spent=2)


@fault(
    "Cancel: against the finish",
    injector=f"{ROUNDS} races of threads",
    invariants="LOPRH",
    outcome="either cancelled and nothing visible, or delivered and recorded once",
)
def test_a_cancel_that_races_with_the_finish_is_either_or_never_both(
    quick: Workplace, job_id: str, product: Product, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cancel falls at a random moment, most often close to the announcement of the publish."""
    random.seed(4)
    ports = quick.ports()
    monkeypatch.setattr(quick, "ports", lambda: ports)
    key = product.main_model
    quick.put_objects({key: product.files[key]})
    cancelled = []
    for number in range(ROUNDS):
        task, answer = race(
            quick, f"{job_id}-{number}", key, from_point=random.choice(["lookup:before", "stage:before", "stage:after"])
        )
        assert (task.status, answer) in ALLOWED, task.message
        shown = {product.targets[key]: product.files[key]} if task.status is Status.COMPLETED else None
        assert quick.delivered(task.job_id) == shown
        cancelled += [task] if shown is None else []
        assert len(quick.studio_rows("email")) == len(quick.studio_rows("history_log")) == number + 1 - len(cancelled)
    for task in cancelled:
        quick.sweep(task)
    assert quick.leftovers() == []
    assert 0 < len(cancelled) < ROUNDS, "all races went one way: they were none"


ALLOWED = {
    (Status.CANCELLED, CancelAnswer.REQUESTED),
    (Status.COMPLETED, CancelAnswer.PUBLISHING),
    (Status.COMPLETED, CancelAnswer.ENDED),
}


def race(workplace: Workplace, job_id: str, key: str, from_point: str) -> tuple[Task, CancelAnswer | None]:
    """A whole attempt against a cancel that comes a random moment after the point."""
    workplace.list_job(job_id, "SKU1", [key])
    (task,) = workplace.submit(job_id)
    begun = threading.Event()
    answers: list[CancelAnswer | None] = []

    def cancel_soon() -> None:
        begun.wait(60)
        time.sleep(random.uniform(0, 0.06))
        answers.append(cancel(workplace, task))

    canceller = threading.Thread(target=cancel_soon)
    canceller.start()
    ended = workplace.attempt(task, lambda reached: begun.set() if reached == from_point else None)
    canceller.join()
    return ended, answers[0]
