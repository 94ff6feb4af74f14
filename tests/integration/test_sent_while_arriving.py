"""STAGE_BEFORE_VERDICT with a large file: it is sent while it is fetched, and only what was verified is delivered."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from fault_proxy import FaultProxy, fault_proxy
from fault_table import fault
from ncr_upload.adapters.object_store.store import RANGE_BYTES
from ncr_upload.adapters.sftp_dropoff.upload import SPLIT_BYTES
from ncr_upload.domain.jobs import Status
from ncr_upload.entrypoints.embedded.product import Product
from outcomes import assert_delivered_once, assert_told, assert_undelivered
from servers import Answer, Forward, Request, start_gateway
from workplace import Workplace

MEGABYTE = 1024 * 1024
SENT_BYTES = 20 * MEGABYTE
"""Of the first two ranges of three."""


@pytest.fixture(scope="module")
def huge(product: Product, small: Product) -> Product:
    """With a scene of three ranges."""
    scene = next(key for key in product.targets if key.endswith(".blend"))
    content = product.files[scene] + os.urandom(SPLIT_BYTES + 8 * MEGABYTE)
    return replace(small, files=small.files | {scene: content}, targets=small.targets | {scene: product.targets[scene]})


def scene_of(huge: Product) -> str:
    return next(key for key in huge.targets if key.endswith(".blend"))


@pytest.fixture
def partner(workplace: Workplace) -> Iterator[FaultProxy]:
    with fault_proxy((workplace.settings.sftp_host or "", workplace.settings.sftp_port)) as proxy:
        workplace.change(sftp_host="127.0.0.1", sftp_port=proxy.port)
        yield proxy


@dataclass
class Verdicts:
    """What the validator says, once it has everything."""

    result: str = "Valid"


@pytest.fixture(autouse=True)
def verdicts(workplace: Workplace) -> Iterator[Verdicts]:
    said = Verdicts()
    with start_gateway("http://127.0.0.1:9") as gateway:
        gateway.spoil = lambda *_: Answer(200, b'{"data": [{"result": "%s"}]}' % said.result.encode())
        workplace.change(validator_api_url=f"{gateway.url}/validate", stage_before_verdict=True)
        yield said


@dataclass
class Storage:
    """The bucket, which answers ranges as S3 does; `last` is called, once, before the scene's last range is answered."""

    last: Callable[[Forward], Answer] | None = None
    waited: threading.Event = field(default_factory=threading.Event)

    def answer(self, request: Request, forward: Forward) -> Answer:
        if request.headers.get("range", "").startswith(f"bytes={2 * RANGE_BYTES}-") and self.last is not None:
            last, self.last = self.last, None
            answer = last(forward)
            self.waited.set()
        else:
            answer = forward()
        return replace(answer, status=206 if "Content-Range" in answer.headers else answer.status)


@pytest.fixture
def storage(workplace: Workplace) -> Iterator[Storage]:
    storage = Storage()
    with start_gateway(workplace.s3.endpoint) as gateway:
        gateway.spoil = storage.answer
        workplace.change(wasabi_endpoint=gateway.url)
        yield storage


def when_sent(
    partner: FaultProxy, then: Callable[[Forward], Answer] = lambda forward: forward()
) -> Callable[[Forward], Answer]:
    """What storage does `then`, once so much of the scene has gone out to the partner."""

    def wait(forward: Forward) -> Answer:
        deadline = time.monotonic() + 30
        while partner.count()["up"] < SENT_BYTES:
            assert time.monotonic() < deadline, "nothing is sent before the whole file is here"
            time.sleep(0.02)
        return then(forward)

    return wait


def early_parts(workplace: Workplace) -> list[Path]:
    return list((workplace.sftp.folder / ".ncr-staging").glob("*/parts/*.early"))


def test_a_large_file_goes_out_before_its_end_has_come(
    workplace: Workplace, storage: Storage, partner: FaultProxy, job_id: str, huge: Product
) -> None:
    storage.last = when_sent(partner)
    workplace.place(job_id, huge)
    task = workplace.deliver(job_id)
    assert storage.waited.is_set()
    assert_delivered_once(workplace, task, huge, spent=1)
    total = sum(map(len, huge.delivered.values()))
    assert partner.count()["up"] < total + MEGABYTE, "nothing was sent twice"


@fault(
    "S3: large object replaced while it is sent on already",
    injector="another object under the key before the last range",
    invariants="LOPRH",
    outcome="tried again; what was sent of the former object is thrown away",
)
def test_an_object_that_is_replaced_half_way_is_delivered_as_it_is_then(
    workplace: Workplace, storage: Storage, partner: FaultProxy, job_id: str, huge: Product
) -> None:
    scene = scene_of(huge)
    other = huge.files[scene][:-MEGABYTE] + os.urandom(MEGABYTE)

    def replace_it(forward: Forward) -> Answer:
        workplace.put_objects({scene: other})
        return forward()

    storage.last = when_sent(partner, replace_it)
    workplace.place(job_id, huge)
    (task,) = workplace.submit(job_id)
    waiting = workplace.attempt(task)
    assert_told(workplace, waiting, "transient", scene, "attempt 1 of 3")
    assert len(early_parts(workplace)) == 1
    workplace.let_time_pass()
    before = partner.count()["up"]
    ended = workplace.attempt(task)
    replaced = replace(huge, files=huge.files | {scene: other})
    assert_delivered_once(workplace, ended, replaced, spent=2)
    assert partner.count()["up"] - before >= len(other), "the whole of it was sent anew"


@fault(
    "S3: wrong bytes in a large object that is sent on already",
    injector="HTTP gateway",
    invariants="LOPRH",
    outcome="tried again; what was sent is thrown away",
)
def test_wrong_bytes_at_the_end_are_not_delivered(
    workplace: Workplace, storage: Storage, partner: FaultProxy, job_id: str, huge: Product
) -> None:
    def damage(forward: Forward) -> Answer:
        answer = forward()
        return replace(answer, body=answer.body[:-1] + bytes([answer.body[-1] ^ 1]))

    storage.last = when_sent(partner, damage)
    workplace.place(job_id, huge)
    (task,) = workplace.submit(job_id)
    assert_told(workplace, workplace.attempt(task), "transient", "arrived damaged", "attempt 1 of 3")
    assert workplace.delivered(job_id) is None
    workplace.let_time_pass()
    assert_delivered_once(workplace, workplace.attempt(task), huge, spent=2)


@fault(
    "Worker: killed while it sends a large file that still arrives",
    injector="SIGKILL",
    invariants="LOPR",
    outcome="the next attempt sends it once its hash is known, and nothing twice",
)
def test_what_a_killed_worker_had_sent_of_an_unknown_file_is_not_taken_for_it(
    workplace: Workplace, storage: Storage, partner: FaultProxy, job_id: str, huge: Product, tmp_path: Path
) -> None:
    workplace.place(job_id, huge)
    (task,) = workplace.submit(job_id)
    doomed = workplace.start_attempt(task, tmp_path)

    def kill(forward: Forward) -> Answer:
        doomed.kill()
        return forward()

    storage.last = when_sent(partner, kill)
    assert doomed.wait(60) == -9
    (part,) = early_parts(workplace)
    part.write_bytes(hashlib.sha256(b"others").digest() * (part.stat().st_size // 32))
    workplace.let_time_pass()
    before = partner.count()["up"]
    assert_delivered_once(workplace, workplace.attempt(task), huge, spent=2)
    total = sum(map(len, huge.delivered.values()))
    assert total <= partner.count()["up"] - before <= total + MEGABYTE


@fault(
    "Validator: a no while a large file is still being sent",
    injector="HTTP gateway",
    invariants="LOPRH",
    outcome="nothing is visible; staging is removed",
)
def test_a_no_removes_what_was_sent_of_a_large_file(
    workplace: Workplace, storage: Storage, partner: FaultProxy, verdicts: Verdicts, job_id: str, huge: Product
) -> None:
    verdicts.result = "Invalid"

    def slow_down(forward: Forward) -> Answer:
        partner.throttle(all_bytes_per_second=MEGABYTE)
        return forward()

    storage.last = when_sent(partner, slow_down)
    workplace.place(job_id, huge)
    task = workplace.deliver(job_id)
    assert task.status is Status.VALIDATION_FAILED
    assert SENT_BYTES < partner.count()["up"] < len(huge.files[scene_of(huge)]), "it was still being sent"
    assert_undelivered(workplace, task)
