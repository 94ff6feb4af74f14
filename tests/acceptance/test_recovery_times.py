"""How long recovery takes with the default settings (docs/state_machine.md): real processes, real SIGKILL, a long queue."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import redis
from sqlalchemy import text

from fault_table import fault
from ncr_upload.adapters.celery_queue import QUEUE, RECOVERED_QUEUE
from ncr_upload.adapters.sql.engine import open_engine
from ncr_upload.entrypoints.embedded.product import make_product
from ncr_upload.entrypoints.embedded.samples import place_product
from ncr_upload.entrypoints.settings import Settings
from patience import until
from running_stack import RunningStack, follow

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]
STACK_ENVIRONMENT = {"NCR_TESTING": "1", "NCR_CRASH_AT": "@{folder}/crash"}

LOADED_SECONDS = 15
"""What a busy machine may add to each bound."""

STALE_MESSAGES = 30_000


@pytest.fixture
def broker(stack: RunningStack) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(stack.endpoints["redis"]["url"], decode_responses=True) as opened:
        yield opened


def submit(stack: RunningStack, job_id: str) -> str:
    with stack.client() as client:
        answer = client.post("/process-job", json={"job_id": job_id, "username": "tester", "campaign": "tests"})
    assert answer.status_code == 202, answer.text
    return str(answer.json()["task_id"])


def worker_of(stack: RunningStack) -> psutil.Process:
    return psutil.Process(stack.endpoints["pids"]["worker"])


def catch_ring(stack: RunningStack, broker: redis.Redis) -> str:
    """The message that rings for some job, as it waits."""
    worker = worker_of(stack)
    worker.suspend()
    try:
        submit(stack, "not-in-the-studio")
        until(lambda: broker.llen(QUEUE) > 0)
        return str(broker.lindex(QUEUE, 0))
    finally:
        worker.resume()


def kill_worker(stack: RunningStack) -> None:
    worker = worker_of(stack)
    for process in [*worker.children(recursive=True), worker]:
        process.kill()


def test_the_defaults_are_those_the_bounds_are_told_for() -> None:
    settings = Settings(_env_file=None)
    assert (settings.lease_seconds, settings.lease_renew_seconds, settings.sweep_seconds) == (20, 5, 3)


@fault(
    "Worker: kill -9 behind a long queue",
    injector="SIGKILL",
    invariants="LO",
    outcome="taken over within 30 s",
)
def test_a_killed_workers_job_runs_again_soon_however_long_the_queue(stack: RunningStack, broker: redis.Redis) -> None:
    engine = open_engine(stack.endpoints["database"]["url"], pool_size=1)
    order = Path(stack.endpoints_file.parent / "crash")
    product = make_product("artists/times", "SKU-8", seed=8)
    place_product(stack.endpoints["s3"], engine, "killed", product, campaign="tests")
    ring = catch_ring(stack, broker)
    order.write_text("stage:before")
    task_id = submit(stack, "killed")
    until(lambda: not order.exists(), 60)
    killed_at = time.time()
    for _ in range(STALE_MESSAGES // 1000):
        broker.lpush(QUEUE, *[ring] * 1000)
    kill_worker(stack)

    claims = text("SELECT at, message FROM ncr_events WHERE task_id = :t AND kind = 'claimed' ORDER BY id")

    def times() -> list[tuple[float, str]]:
        with engine.connect() as connection:
            return [(row.at, row.message) for row in connection.execute(claims, {"t": task_id})]

    until(lambda: len(times()) == 2, 90)
    assert broker.llen(QUEUE) > 0, "it went before the queue"
    (_, (again_at, why)) = times()
    assert again_at - killed_at < 30 + LOADED_SECONDS
    assert "ran out" in why
    broker.delete(QUEUE)
    with stack.client() as client:
        assert follow(client, task_id)["status"] == "completed"
    engine.dispose()


@fault("Redis: FLUSHALL with jobs waiting", injector="FLUSHALL", invariants="LS", outcome="every job is rung within 15 s")
def test_after_a_wiped_redis_every_waiting_job_is_rung_for_soon(stack: RunningStack, broker: redis.Redis) -> None:
    worker = worker_of(stack)
    worker.suspend()
    try:
        task_ids = [submit(stack, f"wiped-{number}") for number in range(20)]
        until(lambda: broker.llen(QUEUE) >= len(task_ids))
        broker.flushall()
        wiped_at = time.monotonic()
        until(lambda: broker.llen(QUEUE) >= len(task_ids), 15 + LOADED_SECONDS)
        rung = [json.loads(message)["headers"]["argsrepr"] for message in broker.lrange(QUEUE, 0, -1)]
        assert [task_id for task_id in task_ids if not any(task_id in arguments for arguments in rung)] == []
        assert time.monotonic() - wiped_at < 15 + LOADED_SECONDS
    finally:
        worker.resume()
    with stack.client() as client:
        assert {follow(client, task_id)["problem"]["code"] for task_id in task_ids} == {"sku_not_found"}


def test_no_key_in_redis_stays_for_ever(stack: RunningStack, broker: redis.Redis) -> None:
    """But for the queues and Celery's own few; also not after a worker was killed and callers asked for statistics."""
    with stack.client() as client:
        for _ in range(3):
            assert client.get("/celery-stats").status_code == 200
    kill_worker(stack)
    with stack.client() as client:
        client.get("/celery-stats")
    lasting = {key for key in broker.scan_iter(count=1000) if broker.ttl(key) == -1}
    celerys = {key for key in lasting if key.startswith(("_kombu.", "unacked"))}
    assert lasting - celerys <= {QUEUE, RECOVERED_QUEUE}
    assert len(celerys) < 20
    assert all(broker.scard(key) < 100 for key in celerys if broker.type(key) == "set")
