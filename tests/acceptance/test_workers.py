"""Real workers: when their children are replaced, and what they say of themselves."""

from __future__ import annotations

import psutil
import pytest

from ncr_upload.adapters.sql.engine import open_engine
from ncr_upload.entrypoints.embedded.product import make_product
from ncr_upload.entrypoints.embedded.samples import place_product
from patience import until
from running_stack import RunningStack, follow

pytestmark = [pytest.mark.real, pytest.mark.timeout(240)]
STACK_ENVIRONMENT = {
    "CELERY_WORKER_MAX_MEMORY_PER_CHILD": "20000",  # every child is above it from its first job on
    "CELERY_WORKER_CONCURRENCY": "1",
    "MEMORY_CHECK_INTERVAL": "0.5",
}


def deliver(stack: RunningStack, job_id: str) -> None:
    engine = open_engine(stack.endpoints["database"]["url"], pool_size=1)
    try:
        place_product(stack.endpoints["s3"], engine, job_id, make_product(f"artists/{job_id}", "SKU-1"), campaign="tests")
    finally:
        engine.dispose()
    with stack.client() as client:
        answer = client.post("/process-job", json={"job_id": job_id, "username": "ann", "campaign": "tests"})
        assert follow(client, answer.json()["task_id"])["status"] == "completed"


def children(stack: RunningStack) -> set[int]:
    return {child.pid for child in psutil.Process(stack.endpoints["pids"]["worker"]).children(recursive=True)}


def test_a_limit_below_what_a_child_needs_does_not_replace_it_after_every_job(stack: RunningStack) -> None:
    deliver(stack, "first")
    before = children(stack)
    for number in range(3):
        deliver(stack, f"job-{number}")
    assert children(stack) == before
    log = (stack.state_dir / "logs" / "worker.log").read_text()
    assert log.count("memory_per_child_too_low") == 1


def test_a_worker_says_how_it_is_and_that_it_has_gone(stack: RunningStack) -> None:
    with stack.client() as client:
        (worker,) = client.get("/memory-stats").json()["workers"]
        assert worker["worker"].startswith("ncr-")
        assert worker["resident_bytes"] > 20 * 1024**2
        assert (worker["configured"], worker["free_disk_bytes"] > 0) == (1, True)
        psutil.Process(stack.endpoints["pids"]["worker"]).terminate()
        until(lambda: client.get("/memory-stats").json()["workers"] == [])
        until(lambda: len(client.get("/memory-stats").json()["workers"]) == 1)
