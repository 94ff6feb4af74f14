"""Object storage in trouble: the job waits and is then delivered whole, or ends naming what is wrong; never a part of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import pytest

from fault_table import fault
from ncr_upload.domain.jobs import Status, Task
from ncr_upload.entrypoints.embedded.product import Product
from outcomes import assert_delivered_once, assert_failed, assert_told, assert_undelivered
from servers import Answer, Forward, Gateway, Request, pass_on, start_gateway, start_http
from workplace import Workplace

Spoil = Callable[[Request, Forward], Answer]


@pytest.fixture
def store(workplace: Workplace) -> Iterator[Gateway]:
    """The real storage behind a gateway, which the worker is pointed at."""
    with start_gateway(workplace.s3.endpoint) as gateway:
        workplace.change(wasabi_endpoint=gateway.url)
        yield gateway


def try_once(workplace: Workplace, job_id: str) -> Task:
    (task,) = workplace.submit(job_id)
    return workplace.attempt(task)


def is_of_main_model(request: Request) -> bool:
    return request.path.endswith("/SKU1.glb")


def answer_always(status: int, code: str = "") -> Spoil:
    body = f"<Error><Code>{code}</Code></Error>".encode() if code else b""
    return lambda _request, _forward: Answer(status, body)


def cut(_request: Request, _forward: Forward) -> Answer:
    return Answer(cut=True)


def flip_a_bit(request: Request, forward: Forward) -> Answer:
    answer = forward()
    if is_of_main_model(request) and request.method == "GET":
        answer.body = answer.body[:-1] + bytes([answer.body[-1] ^ 1])
    return answer


def send_nothing_of_the_body(request: Request, forward: Forward) -> Answer:
    answer = forward()
    if is_of_main_model(request) and request.method == "GET":
        answer.announced, answer.body = len(answer.body), b""
    return answer


def storage_fault(name: str) -> pytest.MarkDecorator:
    return fault(
        f"S3: {name}", injector="HTTP gateway", invariants="LOPRH", outcome="tried again, then delivered whole, recorded once"
    )


@pytest.mark.parametrize(
    ("spoil", "code", "cause"),
    [
        pytest.param(answer_always(500), "storage_unavailable", "500", id="500", marks=storage_fault("500")),
        pytest.param(
            answer_always(503, "SlowDown"),
            "storage_unavailable",
            "SlowDown",
            id="SlowDown",
            marks=storage_fault("503 SlowDown"),
        ),
        pytest.param(cut, "storage_unavailable", "cut", id="cut", marks=storage_fault("connection cut")),
        pytest.param(flip_a_bit, "object_damaged", "MD5", id="wrong-bytes", marks=storage_fault("wrong bytes")),
        pytest.param(
            send_nothing_of_the_body, "storage_unavailable", "cut", id="truncated", marks=storage_fault("truncated body")
        ),
    ],
)
def test_a_storage_in_trouble_delays_the_job_and_harms_nothing(
    workplace: Workplace, job_id: str, small: Product, store: Gateway, spoil: Spoil, code: str, cause: str
) -> None:
    workplace.place(job_id, small)
    store.spoil = spoil
    waiting = try_once(workplace, job_id)
    assert (waiting.status, waiting.problem and waiting.problem.code) == (Status.PENDING, code)
    assert_told(workplace, waiting, "transient", cause, "attempt 1 of 3", "next try in")
    assert_undelivered(workplace, waiting)
    store.spoil = pass_on
    workplace.let_time_pass()
    assert_delivered_once(workplace, workplace.attempt(waiting), small, spent=2)


@fault(
    "S3: wrong bytes for ever",
    injector="HTTP gateway",
    invariants="LPRH",
    outcome="fails when its attempts are spent, naming the object",
)
def test_an_object_that_always_arrives_damaged_is_never_delivered(
    workplace: Workplace, job_id: str, small: Product, store: Gateway
) -> None:
    workplace.place(job_id, small)
    store.spoil = flip_a_bit
    task = workplace.deliver(job_id)
    assert_failed(workplace, task, "object_damaged", "transient", small.main_model, "attempt 3 of 3", "given up")
    assert store.requests
    assert workplace.studio_rows("model_validation") == []


@pytest.mark.parametrize(
    ("status", "s3_code", "code"),
    [
        pytest.param(
            403,
            "AccessDenied",
            "storage_denied",
            marks=fault("S3: 403", injector="HTTP gateway", invariants="LPRH", outcome="fails at once, naming the object"),
        ),
        pytest.param(
            404,
            "NoSuchKey",
            "object_missing",
            marks=fault("S3: 404", injector="HTTP gateway", invariants="LPRH", outcome="fails at once, naming the object"),
        ),
    ],
)
def test_one_object_that_is_refused_ends_the_job_at_once(
    workplace: Workplace, job_id: str, small: Product, store: Gateway, status: int, s3_code: str, code: str
) -> None:
    """The other objects are fine: none of them is delivered without it."""
    workplace.place(job_id, small)
    refuse = answer_always(status, s3_code)
    store.spoil = lambda request, forward: refuse(request, forward) if is_of_main_model(request) else forward()
    task = workplace.deliver(job_id)
    assert_failed(workplace, task, code, "rejected", small.main_model, "attempt 1 of 3")


@fault(
    "S3: object replaced while it is fetched",
    injector="HTTP gateway cuts the body and replaces the object",
    invariants="LOPRH",
    outcome="never a mixture; the next attempt fetches the new object whole",
)
def test_an_object_that_is_replaced_half_way_is_fetched_anew_never_mixed(
    workplace: Workplace, job_id: str, product: Product, small: Product, store: Gateway
) -> None:
    workplace.place(job_id, small)
    other = next(content for key, content in product.files.items() if key.endswith(".glb") and key != small.main_model)

    def replace_half_way(request: Request, forward: Forward) -> Answer:
        answer = forward()
        if is_of_main_model(request) and request.method == "GET" and len(answer.body) > len(other):
            answer.announced, answer.body = len(answer.body), answer.body[: len(answer.body) // 2]
            workplace.s3.put(small.main_model, other)
        return answer

    store.spoil = replace_half_way
    waiting = try_once(workplace, job_id)
    assert waiting.status is Status.PENDING, waiting.message
    assert_told(workplace, waiting, "transient", small.main_model, "attempt 1 of 3")
    workplace.let_time_pass()
    now = Product(small.sku, small.material_id, small.files | {small.main_model: other}, small.targets)
    assert_delivered_once(workplace, workplace.attempt(waiting), now, spent=2)
    (row,) = [row for row in workplace.studio_rows("ncr_files") if row["target"] == "SKU1/SKU1.glb"]
    assert row["sha256"] == hashlib.sha256(other).hexdigest()


@fault("S3: body cut half-way", injector="HTTP gateway", invariants="LOPR", outcome="resumed by range within the attempt")
def test_a_body_that_is_cut_half_way_is_resumed(workplace: Workplace, job_id: str, small: Product, store: Gateway) -> None:
    cuts: list[str] = []

    def cut_each_once(request: Request, forward: Forward) -> Answer:
        answer = forward()
        if request.method == "GET" and request.path not in cuts:
            cuts.append(request.path)
            answer.announced, answer.body = len(answer.body), answer.body[: len(answer.body) // 2]
        return answer

    workplace.place(job_id, small)
    store.spoil = cut_each_once
    assert_delivered_once(workplace, try_once(workplace, job_id), small, spent=1)
    assert sum("range" in request.headers for request in store.requests) >= len(small.targets)


@fault("S3: slow", injector="HTTP gateway", invariants="LOP", outcome="delivered, later")
def test_a_slow_storage_only_delays_the_job(workplace: Workplace, job_id: str, small: Product, store: Gateway) -> None:
    def answer_late(_request: Request, forward: Forward) -> Answer:
        answer = forward()
        answer.delay_seconds = 1.5
        return answer

    workplace.place(job_id, small)
    store.spoil = answer_late
    assert_delivered_once(workplace, try_once(workplace, job_id), small, spent=1)


@fault(
    "S3: redirects to another host (whole job)",
    injector="HTTP gateway that answers 307, and a host that would serve other bytes",
    invariants="LOPRH",
    outcome="nothing fetched from there or delivered; tried again, then delivered whole",
)
def test_what_another_host_holds_is_never_delivered(workplace: Workplace, job_id: str, small: Product, store: Gateway) -> None:
    workplace.place(job_id, small)
    forged = Answer(200, b"not the studio's", {"ETag": '"0"', "Last-Modified": "Mon, 23 Nov 2026 10:00:00 GMT"})
    with start_http(forged) as elsewhere:
        other_host = elsewhere.url.replace("127.0.0.1", "localhost")

        def redirect(request: Request, forward: Forward) -> Answer:
            is_body = request.method == "GET" and is_of_main_model(request)
            return Answer(307, b"", {"Location": other_host + request.path}) if is_body else forward()

        store.spoil = redirect
        waiting = try_once(workplace, job_id)
        assert (waiting.status, waiting.problem and waiting.problem.code) == (Status.PENDING, "storage_redirected")
        assert_told(workplace, waiting, "transient", "localhost", "attempt 1 of 3", small.main_model)
        assert_undelivered(workplace, waiting)
        assert elsewhere.requests == []
    store.spoil = pass_on
    workplace.let_time_pass()
    assert_delivered_once(workplace, workplace.attempt(waiting), small, spent=2)
