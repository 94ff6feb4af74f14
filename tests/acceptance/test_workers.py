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


def counted(stack: RunningStack, series: str) -> float:
    with stack.client() as client:
        lines = client.get("/metrics").text.splitlines()
    (line,) = [line for line in lines if line.startswith(f"{series} ")]
    return float(line.rpartition(" ")[2])


def test_what_a_worker_counted_outlives_its_children_and_itself(stack: RunningStack) -> None:
    completed, uploads = 'ncr_jobs_ended_total{status="completed"}', 'ncr_stage_seconds_count{stage="upload"}'
    before, uploaded, bytes_before = (
        counted(stack, completed),
        counted(stack, uploads),
        counted(stack, "ncr_delivered_bytes_total"),
    )
    deliver(stack, "counted-1")
    until(lambda: counted(stack, completed) == before + 1)
    deliver(stack, "counted-2")
    for pid in children(stack):
        psutil.Process(pid).kill()  # what it had stored stays; what it had not is lost
    worker = psutil.Process(stack.endpoints["pids"]["worker"])
    assert before + 1 <= counted(stack, completed) <= before + 2
    deliver(stack, "counted-3")
    worker.terminate()  # the child has no seconds left: it stores when it ends
    worker.wait(60)
    after = counted(stack, completed)
    assert before + 2 <= after <= before + 3
    assert counted(stack, uploads) - uploaded == after - before
    assert counted(stack, "ncr_delivered_bytes_total") > bytes_before
    until(lambda: stack.endpoints["pids"]["worker"] != worker.pid and bool(children(stack)))
    deliver(stack, "counted-4")
    until(lambda: counted(stack, completed) == after + 1)


def test_a_job_that_is_cancelled_before_a_worker_has_it_is_counted(stack: RunningStack) -> None:
    cancelled = 'ncr_jobs_ended_total{status="cancelled"}'
    before = counted(stack, cancelled)
    worker = psutil.Process(stack.endpoints["pids"]["worker"])
    family = [worker, *worker.children(recursive=True)]
    for process in family:
        process.suspend()
    try:
        with stack.client() as client:
            task_id = client.post("/process-job", json={"job_id": "not-wanted", "username": "ann", "campaign": "tests"}).json()[
                "task_id"
            ]
            assert client.post(f"/jobs/{task_id}/cancel").json()["status"] == "cancelled"
        until(lambda: counted(stack, cancelled) == before + 1)
    finally:
        for process in family:
            process.resume()
