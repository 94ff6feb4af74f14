"""Whatever dies in the middle of a batch, every job of it is delivered once, never more than BATCH_SIZE at a time; and the
next begins because one has ended, not because time has passed."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import pytest
from redis import Redis

from fault_table import fault
from installation import Installation, Outside, Program, install, job
from patience import until
from valkey_server import ValkeyServer, start_valkey

pytestmark = [pytest.mark.real, pytest.mark.timeout(400)]

BATCH_SIZE = 3
SETTINGS = {"BATCH_SIZE": str(BATCH_SIZE), "CELERY_WORKER_CONCURRENCY": "4", "MEMORY_CHECK_INTERVAL": "1"}


@dataclass
class Sent:
    """A batch that was accepted."""

    batch_id: str
    task_ids: dict[str, str]


@dataclass
class BatchSite:
    """An installation with the programs that tests kill and start again."""

    site: Installation
    valkey: ValkeyServer
    programs: dict[str, Program] = field(default_factory=dict)
    running: dict[str, ExitStack] = field(default_factory=dict)

    def start(self, name: str, **changes: str) -> None:
        self.running[name] = ExitStack()
        self.programs[name] = self.running[name].enter_context(self.site.run(name, **changes))

    def stop(self, name: str) -> None:
        """By SIGKILL to its whole group."""
        self.running.pop(name).close()
        del self.programs[name]

    def send(self, name: str, count: int) -> Sent:
        body = [job(f"{name}-{number}") for number in range(count)]
        for each in body:
            self.site.place(each["job_id"])
        answer = self.site.ask("POST", "/process-batch", json=body)
        assert answer.status_code == 202, answer.text
        told = answer.json()
        return Sent(told["batch_id"], {each["job_id"]: each["task_id"] for each in told["jobs"]})

    def count(self, batch: Sent, condition: str) -> int:
        return self.site.count(f"SELECT COUNT(*) FROM ncr_jobs WHERE batch_id = :b AND {condition}", b=batch.batch_id)

    def completed(self, batch: Sent) -> int:
        return self.count(batch, "status = 'completed'")

    @contextmanager
    def watched(self, batch: Sent) -> Iterator[list[int]]:
        """How many of the batch were in flight, looked at often. The database answers what it holds, not what is told."""
        seen: list[int] = []
        done = threading.Event()

        def look() -> None:
            while not done.wait(0.05):
                seen.append(self.count(batch, "claimable_at IS NOT NULL"))

        watcher = threading.Thread(target=look)
        watcher.start()
        try:
            yield seen
        finally:
            done.set()
            watcher.join()

    def assert_all_delivered_once(self, batch: Sent, seconds: float = 150) -> None:
        until(lambda: self.count(batch, "live_job_id IS NOT NULL") == 0, seconds)
        for job_id, task_id in batch.task_ids.items():
            self.site.assert_delivered_once(job_id, task_id)
        told = self.site.ask("GET", f"/batch-status/{batch.batch_id}").json()
        assert (told["status"], told["percentage"], told["stalled"]) == ("completed", 100.0, False)


@pytest.fixture(scope="module")
def batches(tmp_path_factory: pytest.TempPathFactory, outside: Outside) -> Iterator[BatchSite]:
    folder = tmp_path_factory.mktemp("site")
    with (
        start_valkey(folder) as valkey,
        install(folder, outside, f"sqlite:///{folder / 'ncr.db'}", valkey.port, SETTINGS) as site,
    ):
        found = BatchSite(site, valkey)
        try:
            for name in ("api", "beat", "worker"):
                found.start(name)
            yield found
        finally:
            for name in list(found.running):
                found.stop(name)


def kill_and_start(batches: BatchSite, name: str) -> None:
    batches.stop(name)
    batches.start(name)


def kill_redis(batches: BatchSite, _: str) -> None:
    batches.valkey.kill()
    batches.valkey.start_again()  # without a file to read: it is empty


def flush_redis(batches: BatchSite, _: str) -> None:
    with Redis.from_url(batches.valkey.url) as client:
        client.flushall()


@pytest.mark.parametrize(
    ("part", "harm"),
    [
        pytest.param(
            part,
            harm,
            id=f"{part}-{harm.__name__}",
            marks=fault(
                f"{name} mid-batch", injector=injector, invariants="LOSR", outcome="all delivered, BATCH_SIZE at a time"
            ),
        )
        for part, harm, name, injector in (
            ("beat", kill_and_start, "Beat: killed", "SIGKILL, started again"),
            ("worker", kill_and_start, "Worker: killed", "SIGKILL of its process group, started again"),
            ("api", kill_and_start, "API: killed", "SIGKILL, started again"),
            ("redis", kill_redis, "Redis: killed, comes back empty", "SIGKILL, started again"),
            ("redis", flush_redis, "Redis: flushed", "FLUSHALL"),
        )
    ],
)
def test_what_is_killed_mid_batch_loses_and_doubles_nothing(batches: BatchSite, part: str, harm: object) -> None:
    batch = batches.send(f"{part}-{harm.__name__}", 12)  # type: ignore[attr-defined]
    with batches.watched(batch) as in_flight:
        until(lambda: batches.completed(batch) >= 3, 90)
        assert batches.count(batch, "live_job_id IS NOT NULL") > 0, "the fault came too late"
        harm(batches, part)  # type: ignore[operator]
        batches.assert_all_delivered_once(batch)
    assert max(in_flight) == BATCH_SIZE


@fault(
    "Beat: gone for good mid-batch",
    injector="SIGKILL",
    invariants="LO",
    outcome="each job that ends releases the next: no sweep is needed",
)
def test_the_next_job_is_released_when_one_ends_and_not_by_a_timer(batches: BatchSite) -> None:
    batches.stop("beat")
    try:
        batches.assert_all_delivered_once(batches.send("without-beat", 12))
    finally:
        batches.start("beat")


def test_a_small_batch_does_not_wait_for_a_large_one(batches: BatchSite) -> None:
    large = batches.send("large", 24)
    small = batches.send("small", 3)
    until(lambda: batches.completed(small) == 3, 90)
    assert batches.completed(large) < 24 - BATCH_SIZE
    for batch in (large, small):
        batches.assert_all_delivered_once(batch)


def test_jobs_run_side_by_side_and_their_size_is_known_before_they_end(batches: BatchSite) -> None:
    """All at the validator at once: none waits on another."""
    judge = batches.site.outside.judge
    judge.hold()
    batch = batches.send("held", BATCH_SIZE)
    until(lambda: judge.waiting == BATCH_SIZE, 60)
    told = batches.site.ask("GET", f"/batch-status/{batch.batch_id}").json()
    size = sum(len(content) for content in batches.site.outside.product.delivered.values())
    assert {(each["stage"], each["bytes"]) for each in told["jobs"]} == {("validate", size)}
    assert 0 < told["percentage"] < 100
    judge.open.set()
    batches.assert_all_delivered_once(batch)


@fault(
    "Worker: none, a batch waits",
    injector="SIGSTOP of the worker",
    invariants="LAH",
    outcome="reported stalled after BATCH_TIMEOUT, one line by beat; goes on by itself",
)
def test_a_batch_without_a_worker_is_called_stalled_and_goes_on_when_there_is_one(batches: BatchSite) -> None:
    for name in ("api", "beat"):
        batches.stop(name)
        batches.start(name, BATCH_TIMEOUT="2")
    batches.programs["worker"].signal_all(signal.SIGSTOP)
    try:
        batch = batches.send("stalled", 5)
        status = f"/batch-status/{batch.batch_id}"
        assert batches.site.ask("GET", status).json()["stalled"] is False
        until(lambda: _said(batches, batch) == 1, 60)
        told = batches.site.ask("GET", status).json()
        assert (told["status"], told["stalled"]) == ("stalled", True)
        assert "ncr_batches_stalled 1.0" in batches.site.ask("GET", "/metrics").text
        time.sleep(3)  # beat looks every second
        assert _said(batches, batch) == 1
    finally:
        batches.programs["worker"].signal_all(signal.SIGCONT)
    batches.assert_all_delivered_once(batch)
    until(lambda: "batch_not_stalled" in batches.programs["beat"].log(), 30)


def _said(batches: BatchSite, batch: Sent) -> int:
    lines = batches.programs["beat"].log().splitlines()
    return sum("batch_stalled" in line and batch.batch_id in line for line in lines)
