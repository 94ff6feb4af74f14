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

from ncr_upload.adapters.sql.engine import open_engine
from ncr_upload.entrypoints.embedded.product import Product, make_product
from ncr_upload.entrypoints.embedded.samples import place_product
from parts import require
from running_stack import RunningStack, follow, free_port, start_stack, stop_stack, until

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]

POINTS = (
    "claim:after",
    "lookup:after",
    "download:after",
    "validate:after",
    "stage:before",
    "stage:after",
    "publish:before",
    "publish:after",
    "record:before",
    "record:after",
    "cleanup:before",
)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningStack]:
    require("rclone")
    folder = tmp_path_factory.mktemp("recovery")
    settings = {
        "NCR_TESTING": "1",
        "NCR_CRASH_AT": f"@{folder / 'crash'}",
        "LEASE_SECONDS": "2",
        "LEASE_RENEW_SECONDS": "0.5",
        "SWEEP_SECONDS": "0.5",
        "RETRY_BASE_SECONDS": "0.5",
    }
    started = start_stack(folder, "--port", str(free_port()), environment=settings)
    yield started
    stop_stack(started)


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


def assert_delivered_once(stack: RunningStack, engine: Engine, job_id: str, task_id: str, product: Product) -> dict[str, Any]:
    with stack.client() as client:
        status = follow(client, task_id)
    assert status["status"] == "completed", status
    root = Path(stack.endpoints["sftp"]["root"])
    arrived = {str(path.relative_to(root / job_id)): path.read_bytes() for path in (root / job_id).rglob("*") if path.is_file()}
    assert arrived == product.delivered
    with engine.connect() as connection:
        count = connection.execute(text("SELECT upload_count FROM job_details WHERE job_id = :j"), {"j": job_id}).scalar_one()
        ends = connection.execute(
            text("SELECT COUNT(*) FROM ncr_events WHERE task_id = :t AND kind = 'completed'"), {"t": task_id}
        ).scalar_one()
    assert (count, ends) == (1, 1)
    return status


def leftovers(stack: RunningStack) -> list[str]:
    staging = Path(stack.endpoints["sftp"]["root"]) / ".ncr-staging"
    work = stack.state_dir / "work"
    return [str(path) for folder in (staging, work) if folder.exists() for path in folder.iterdir()]


@pytest.mark.parametrize("point", POINTS)
def test_a_worker_killed_at_any_point_delivers_once_and_leaves_nothing(
    stack: RunningStack, engine: Engine, product: Product, crash_order: Path, point: str
) -> None:
    crash_order.write_text(point)
    job_id = f"killed-{point.replace(':', '-')}"
    task_id = submit(stack, engine, job_id, product)
    until(lambda: not crash_order.exists())
    status = assert_delivered_once(stack, engine, job_id, task_id, product)
    assert status["attempt"] == (1 if point in ("record:after", "cleanup:before") else 2)
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
