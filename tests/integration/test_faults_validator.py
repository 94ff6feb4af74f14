"""A validator in trouble: no answer is ever taken for a pass, and one that was lost is asked for again."""

from __future__ import annotations

import email
import email.policy
import json
import time
from collections.abc import Callable, Iterator

import pytest

from fault_table import fault
from ncr_upload.domain.jobs import Status, Task
from ncr_upload.entrypoints.embedded.product import Product
from outcomes import assert_delivered_once, assert_failed, assert_told, assert_undelivered
from servers import Answer, Forward, Gateway, Request, pass_on, start_gateway
from workplace import Workplace

Spoil = Callable[[Request, Forward], Answer]


@pytest.fixture
def validator(workplace: Workplace) -> Iterator[Gateway]:
    """The real validator behind a gateway, which the worker is pointed at."""
    url = workplace.settings.validator_api_url or ""
    with start_gateway(url.removesuffix("/validate")) as gateway:
        workplace.change(validator_api_url=f"{gateway.url}/validate")
        yield gateway


def try_once(workplace: Workplace, job_id: str) -> Task:
    (task,) = workplace.submit(job_id)
    return workplace.attempt(task)


def say(status: int, body: bytes = b"", **more: object) -> Spoil:
    return lambda _request, _forward: Answer(status, body, **more)  # type: ignore[arg-type]


def judge_another(_request: Request, forward: Forward) -> Answer:
    """The real verdict, as it is given about another SKU."""
    answer = forward()
    verdict = json.loads(answer.body)
    verdict["data"][0]["sku_id"] = "SKU2"
    return Answer(200, json.dumps(verdict).encode())


def judge_and_hang_up(_request: Request, forward: Forward) -> Answer:
    forward()
    return Answer(cut=True)


def half_a_verdict(_request: Request, forward: Forward) -> Answer:
    answer = forward()
    answer.announced, answer.body = len(answer.body), answer.body[: len(answer.body) // 2]
    return answer


def undecided(name: str, spoil: Spoil, cause: str, status: int | None) -> object:
    mark = fault(
        f"Validator: {name}",
        injector="HTTP gateway",
        invariants="LOPRH",
        outcome="never a pass; asked again, then delivered, recorded once",
    )
    return pytest.param(spoil, cause, status, id=name.replace(" ", "-"), marks=mark)


VALID = b'{"data": [{"result": "Valid"}]}'


@pytest.mark.parametrize(
    ("spoil", "cause", "status"),
    [
        undecided("500", say(500), "answered 500", 500),
        undecided("503", say(503, b"busy"), "answered 503", 503),
        undecided("429", say(429), "answered 429", 429),
        undecided("408", say(408), "answered 408", 408),
        undecided("connection cut", say(200, cut=True), "", None),
        undecided("no answer in time", say(200, VALID, delay_seconds=6), "in time", None),
        undecided("slow drip", say(200, VALID, drip_seconds=0.4), "in time", None),
        undecided("garbage instead of JSON", say(200, b"<html>Valid</html>"), "no verdict", None),
        undecided("a verdict without a result", say(200, b'{"data": []}'), "no result", None),
        undecided("a verdict on another SKU", judge_another, "SKU2", None),
        undecided("half a verdict", half_a_verdict, "", None),
    ],
)
def test_what_is_no_verdict_delays_the_job_and_passes_nothing(
    workplace: Workplace, job_id: str, small: Product, validator: Gateway, spoil: Spoil, cause: str, status: int | None
) -> None:
    workplace.place(job_id, small)
    validator.spoil = spoil
    patient = workplace.settings
    workplace.change(validator_timeout_seconds=3 if "in time" in cause else 60)
    waiting = try_once(workplace, job_id)
    assert (waiting.status, waiting.problem and waiting.problem.code) == (Status.PENDING, "validator_undecided")
    assert_told(workplace, waiting, "transient", cause, "attempt 1 of 3", "next try in")
    assert_undelivered(workplace, waiting)
    assert workplace.studio_rows("model_validation") == []
    assert [row["response"] for row in workplace.studio_rows("validation_failed_req")] == ([status] if status else [])
    validator.spoil, workplace.settings = pass_on, patient
    workplace.let_time_pass()
    assert_delivered_once(workplace, workplace.attempt(waiting), small, spent=2)


@fault(
    "Validator: in trouble for ever",
    injector="HTTP gateway",
    invariants="LPRH",
    outcome="fails when its attempts are spent; each non-200 answer is one row of the studio's",
)
def test_a_validator_that_never_decides_lets_nothing_pass(
    workplace: Workplace, job_id: str, small: Product, validator: Gateway
) -> None:
    workplace.place(job_id, small)
    validator.spoil = say(503)
    task = workplace.deliver(job_id)
    assert_failed(workplace, task, "validator_undecided", "transient", "answered 503", "attempt 3 of 3", "given up")
    assert [row["response"] for row in workplace.studio_rows("validation_failed_req")] == [503] * 3
    assert workplace.studio_rows("model_validation") == []


@pytest.mark.parametrize("status", [429, 503])
@fault(
    "Validator: Retry-After",
    injector="HTTP gateway",
    invariants="LH",
    outcome="asked again no earlier, and never later than RETRY_MAX_SECONDS",
)
def test_a_validators_wish_to_be_asked_later_is_kept(
    workplace: Workplace, job_id: str, small: Product, validator: Gateway, status: int
) -> None:
    workplace.place(job_id, small)
    workplace.change(retry_max_seconds=1000)
    validator.spoil = say(status, headers={"Retry-After": "600"})
    before = time.time()
    waiting = try_once(workplace, job_id)
    assert waiting.due_at is not None
    assert waiting.due_at >= before + 590
    assert_told(workplace, waiting, f"answered {status}", "next try in 600 s")
    workplace.attempt(waiting)
    assert len(validator.requests) == 1, "a ring before it is due asked it again"
    workplace.let_time_pass()
    workplace.change(retry_max_seconds=300)
    assert "next try in 300 s" in workplace.attempt(waiting).message


@fault(
    "Validator: unknown verdict",
    injector="HTTP gateway",
    invariants="LOPR",
    outcome="a no: nothing is delivered, its word is told",
)
def test_a_verdict_nobody_knows_is_no_pass(workplace: Workplace, job_id: str, small: Product, validator: Gateway) -> None:
    workplace.place(job_id, small)
    validator.spoil = say(200, b'{"data": [{"result": "Valid"}, {"result": "Excellent"}]}')
    task = workplace.deliver(job_id)
    assert (task.status, task.attempt) == (Status.VALIDATION_FAILED, 1)
    assert "'Excellent'" in task.message
    assert_undelivered(workplace, task)
    assert [row["response"] for row in workplace.studio_rows("model_validation")] == [200]
    assert workplace.studio_rows("job_details")[0]["is_uploaded"] == 0


@fault(
    "Validator: answer lost after it ran",
    injector="HTTP gateway",
    invariants="LOPRH",
    outcome="asked again with the same zip, to the byte; one row of model_validation",
)
def test_a_lost_verdict_is_asked_for_again_with_the_same_zip(
    workplace: Workplace, job_id: str, small: Product, validator: Gateway
) -> None:
    workplace.place(job_id, small)
    validator.spoil = judge_and_hang_up
    waiting = try_once(workplace, job_id)
    assert_told(workplace, waiting, "transient", "validator", "attempt 1 of 3")
    validator.spoil = pass_on
    workplace.let_time_pass()
    time.sleep(2.1)  # the zip's clock ticks every two seconds: a zip with today's times would differ
    assert_delivered_once(workplace, workplace.attempt(waiting), small, spent=2)
    first, second = (zip_of(request) for request in validator.requests)
    assert first[:2] == b"PK"
    assert first == second


def zip_of(request: Request) -> bytes:
    head = f"Content-Type: {request.headers['content-type']}\r\n\r\n".encode()
    (part,) = email.message_from_bytes(head + request.body, policy=email.policy.HTTP).iter_parts()
    content = part.get_payload(decode=True)
    assert isinstance(content, bytes)
    return content
