"""STAGE_BEFORE_VERDICT on real servers: quicker, and the partner still sees nothing before the verdict."""

from __future__ import annotations

from collections.abc import Iterator
from urllib.parse import unquote

import pytest

from fault_proxy import FaultProxy, fault_proxy
from fault_table import fault
from ncr_upload.domain.jobs import Status
from ncr_upload.entrypoints.embedded.product import Product
from outcomes import assert_delivered_once, assert_told, assert_undelivered
from patience import until
from servers import Answer, Forward, Gateway, Request, pass_on, start_gateway
from workplace import Workplace


@pytest.fixture(autouse=True)
def _ahead(workplace: Workplace) -> None:
    workplace.change(stage_before_verdict=True)


@pytest.fixture
def validator(workplace: Workplace) -> Iterator[Gateway]:
    url = workplace.settings.validator_api_url or ""
    with start_gateway(url.removesuffix("/validate")) as gateway:
        workplace.change(validator_api_url=f"{gateway.url}/validate")
        yield gateway


@pytest.fixture
def partner(workplace: Workplace) -> Iterator[FaultProxy]:
    with fault_proxy((workplace.settings.sftp_host or "", workplace.settings.sftp_port)) as proxy:
        workplace.change(sftp_host="127.0.0.1", sftp_port=proxy.port)
        yield proxy


def test_a_product_arrives_whole_and_is_recorded_once(workplace: Workplace, job_id: str, product: Product) -> None:
    workplace.place(job_id, product)
    task = workplace.deliver(job_id)
    assert_delivered_once(workplace, task, product, spent=1)
    assert_told(workplace, task, "nothing is visible before the verdict")


def test_everything_is_staged_and_nothing_visible_while_the_validator_judges(
    workplace: Workplace, validator: Gateway, job_id: str, product: Product
) -> None:
    staging, seen = workplace.sftp.folder / ".ncr-staging", list[dict[str, bytes] | None]()

    def all_is_staged() -> bool:
        return len([path for path in staging.rglob("package/*/**/*") if path.is_file()]) == len(product.delivered)

    def look(_request: Request, forward: Forward) -> Answer:
        until(all_is_staged, 30)
        seen.append(workplace.delivered(job_id))
        return forward()

    validator.spoil = look
    workplace.place(job_id, product)
    assert_delivered_once(workplace, workplace.deliver(job_id), product, spent=1)
    assert seen == [None]


@fault(
    "Validator: a no for a package that is staged already",
    injector="HTTP gateway",
    invariants="LOPRH",
    outcome="the delivery before stays as it was; staging is removed",
)
def test_a_no_removes_what_was_staged_and_leaves_the_delivery_before(
    workplace: Workplace, validator: Gateway, job_id: str, product: Product, small: Product
) -> None:
    workplace.place(job_id, product)
    assert workplace.deliver(job_id).status is Status.COMPLETED
    validator.spoil = lambda _request, _forward: Answer(200, b'{"data": [{"result": "Invalid"}]}')
    workplace.place(job_id, small)
    assert workplace.deliver(job_id).status is Status.VALIDATION_FAILED
    assert workplace.delivered(job_id) == product.delivered
    assert workplace.leftovers() == []


@fault(
    "Validator: no verdict for a package that is staged already",
    injector="HTTP gateway",
    invariants="LOPRH",
    outcome="the next attempt uploads nothing again",
)
def test_what_was_staged_before_no_verdict_came_is_not_sent_again(
    workplace: Workplace, validator: Gateway, partner: FaultProxy, job_id: str, product: Product
) -> None:
    validator.spoil = lambda _request, _forward: Answer(503, delay_seconds=1)
    workplace.place(job_id, product)
    (task,) = workplace.submit(job_id)
    assert workplace.attempt(task).status is Status.PENDING
    first = partner.count()["up"]
    assert workplace.delivered(job_id) is None
    assert workplace.studio_rows("email") == []
    validator.spoil = pass_on
    workplace.let_time_pass()
    assert workplace.attempt(task).status is Status.COMPLETED
    total = sum(len(content) for content in product.delivered.values())
    again = partner.count()["up"] - first
    assert first + again < total * 1.5, "what the first attempt staged was not sent twice"
    assert workplace.delivered(job_id) == product.delivered


@fault(
    "SFTP: connection cut while the validator still judges",
    injector="fault proxy",
    invariants="LOPRH",
    outcome="tried again; never recorded as delivered",
)
def test_an_upload_that_fails_before_the_verdict_ends_the_attempt(
    workplace: Workplace, partner: FaultProxy, job_id: str, product: Product
) -> None:
    partner.cut_after(20_000, "up")
    workplace.place(job_id, product)
    (task,) = workplace.submit(job_id)
    waiting = workplace.attempt(task)
    assert waiting.status is Status.PENDING
    assert_told(workplace, waiting, "transient", f"127.0.0.1:{partner.port}", "attempt 1 of 3")
    workplace.let_time_pass()
    assert workplace.attempt(task).status is Status.COMPLETED
    assert workplace.delivered(job_id) == product.delivered
    assert workplace.leftovers() == []


@fault(
    "S3: an object gone while others are staged already",
    injector="HTTP gateway",
    invariants="LOPRH",
    outcome="failed, naming the object; staging is removed",
)
def test_an_object_that_is_gone_leaves_nothing_staged(workplace: Workplace, job_id: str, product: Product) -> None:
    key = sorted(product.targets)[-1]
    workplace.place(job_id, product)
    (task,) = workplace.submit(job_id)
    with start_gateway(workplace.s3.endpoint) as storage:
        workplace.change(wasabi_endpoint=storage.url)

        def lose(request: Request, forward: Forward) -> Answer:
            gone = request.method == "GET" and unquote(request.path).endswith(key)
            return Answer(404, b"<Error><Code>NoSuchKey</Code></Error>") if gone else forward()

        storage.spoil = lose
        failed = workplace.attempt(task)
    assert (failed.status, failed.problem and failed.problem.code) == (Status.FAILED, "object_missing")
    assert key in failed.message
    workplace.sweep(task)
    assert_undelivered(workplace, failed)
