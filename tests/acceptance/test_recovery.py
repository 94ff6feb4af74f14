"""Whatever is killed, an accepted job is delivered once (invariants L, O, P, R): real processes, real SIGKILL."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import redis
from sqlalchemy import Engine, text

from fault_table import fault
from ncr_upload.adapters.sql.engine import open_engine
from ncr_upload.application import download_cache
from ncr_upload.application.crash_points import CRASH_POINTS
from ncr_upload.entrypoints.embedded.product import Product, make_product
from ncr_upload.entrypoints.embedded.samples import place_product
from patience import until
from running_stack import RunningStack, follow

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]
STACK_ENVIRONMENT = {
    "NCR_TESTING": "1",
    "NCR_CRASH_AT": "@{folder}/crash",
    "LEASE_SECONDS": "2",
    "LEASE_RENEW_SECONDS": "0.5",
    "SWEEP_SECONDS": "0.5",
    "RETRY_BASE_SECONDS": "0.5",
}

AGAIN = "publish:between"
"""Only reached by a job that was delivered before."""
AT_ONCE = {"claim:before", "record:after", "cleanup:before", "cleanup:after"}
"""Killed there, no second attempt is needed: the first has not begun yet, or has ended."""


def killed_at(point: str) -> Any:
    outcome = "delivered and recorded by the next attempt" if point not in AT_ONCE else "one attempt delivers it"
    return pytest.param(
        point, marks=fault(f"Worker: killed at {point}", injector="SIGKILL of the child", invariants="LOPR", outcome=outcome)
    )


@pytest.fixture
def crash_order(stack: RunningStack) -> Iterator[Path]:
    order = stack.endpoints_file.parent / "crash"
    yield order
    order.unlink(missing_ok=True)


@pytest.fixture
def engine(stack: RunningStack) -> Iterator[Engine]:
    opened = open_engine(stack.endpoints["database"]["url"], pool_size=1)
    yield opened
    opened.dispose()


@pytest.fixture(scope="module")
def product() -> Product:
    return make_product("artists/recovery", "SKU-7", seed=7)


def submit(stack: RunningStack, engine: Engine, job_id: str, product: Product) -> str:
    place_product(stack.endpoints["s3"], engine, job_id, product, campaign="tests")
    with stack.client() as client:
        answer = client.post("/process-job", json={"job_id": job_id, "username": "tester", "campaign": "tests"})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["task_id"])


def read_package(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_delivered_once(
    stack: RunningStack, engine: Engine, job_id: str, task_id: str, product: Product, deliveries: int = 1
) -> dict[str, Any]:
    with stack.client() as client:
        status = follow(client, task_id)
    assert status["status"] == "completed", status
    assert read_package(Path(stack.endpoints["sftp"]["root"]) / job_id) == product.delivered
    with engine.connect() as connection:
        count = connection.execute(text("SELECT upload_count FROM job_details WHERE job_id = :j"), {"j": job_id}).scalar_one()
        ends = connection.execute(
            text("SELECT COUNT(*) FROM ncr_events WHERE task_id = :t AND kind = 'completed'"), {"t": task_id}
        ).scalar_one()
    assert (count, ends) == (deliveries, 1)
    return status


def leftovers(stack: RunningStack) -> list[str]:
    staging = Path(stack.endpoints["sftp"]["root"]) / ".ncr-staging"
    work = stack.state_dir / "work"
    found = [path for folder in (staging, work) if folder.exists() for path in folder.iterdir()]
    return [str(path) for path in found if path != work / download_cache.FOLDER]


@pytest.mark.parametrize("point", [killed_at(point) for point in CRASH_POINTS if point != AGAIN])
def test_a_worker_killed_at_any_point_delivers_once_and_leaves_nothing(
    stack: RunningStack, engine: Engine, product: Product, crash_order: Path, point: str
) -> None:
    crash_order.write_text(point)
    job_id = f"killed-{point.replace(':', '-')}"
    task_id = submit(stack, engine, job_id, product)
    until(lambda: not crash_order.exists())
    status = assert_delivered_once(stack, engine, job_id, task_id, product)
    assert status["attempt"] == (1 if point in AT_ONCE else 2)
    until(lambda: leftovers(stack) == [])


@fault(
    "Worker: killed between the two renames of a publish",
    injector="SIGKILL of the child",
    invariants="LOPR",
    outcome="the previous delivery waits aside, whole, until the next attempt publishes the new one",
)
def test_a_redelivery_killed_between_its_two_renames_loses_neither_package(
    stack: RunningStack, engine: Engine, product: Product, crash_order: Path
) -> None:
    job_id, root = "killed-between", Path(stack.endpoints["sftp"]["root"])
    previous = make_product("artists/before", product.sku, seed=6)
    assert_delivered_once(stack, engine, job_id, submit(stack, engine, job_id, previous), previous)
    beat = psutil.Process(stack.endpoints["pids"]["beat"])
    beat.suspend()  # nobody recovers while the gap is looked at
    try:
        crash_order.write_text(AGAIN)
        task_id = submit(stack, engine, job_id, product)
        until(lambda: not crash_order.exists())
        (aside,) = root.glob(f".ncr-staging/{task_id}-*/previous/{job_id}")
        assert not (root / job_id).exists()
        assert read_package(aside) == previous.delivered
    finally:
        beat.resume()
    status = assert_delivered_once(stack, engine, job_id, task_id, product, deliveries=2)
    assert status["attempt"] == 2
    until(lambda: leftovers(stack) == [])


def test_a_wiped_redis_loses_no_job(stack: RunningStack, engine: Engine, product: Product) -> None:
    worker = psutil.Process(stack.endpoints["pids"]["worker"])
    worker.suspend()
    try:
        task_ids = {f"wiped-{n}": submit(stack, engine, f"wiped-{n}", product) for n in range(3)}
        redis.Redis.from_url(stack.endpoints["redis"]["url"]).flushall()
    finally:
        worker.resume()
    for job_id, task_id in task_ids.items():
        assert_delivered_once(stack, engine, job_id, task_id, product)


def test_a_job_submitted_while_redis_is_gone_is_accepted_and_delivered(
    stack: RunningStack, engine: Engine, product: Product
) -> None:
    psutil.Process(stack.endpoints["pids"]["redis"]).send_signal(signal.SIGKILL)
    task_id = submit(stack, engine, "no-redis", product)
    assert_delivered_once(stack, engine, "no-redis", task_id, product)


def test_the_whole_worker_and_beat_killed_mid_job_deliver_once(stack: RunningStack, engine: Engine, product: Product) -> None:
    task_id = submit(stack, engine, "all-killed", product)
    with stack.client() as client:
        until(lambda: _stage(client, task_id) not in ("queued", "lookup"))
    for part in ("worker", "beat"):
        psutil.Process(stack.endpoints["pids"][part]).send_signal(signal.SIGKILL)
    assert_delivered_once(stack, engine, "all-killed", task_id, product)


def _stage(client: httpx.Client, task_id: str) -> str:
    return str(client.get(f"/job-status/{task_id}").json()["stage"])
