"""What the API says of workers is so with none, one and two of them, and without Redis; each answer in time."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from sqlalchemy import text

from fault_table import fault
from installation import Installation, Outside, install
from ncr_upload.adapters.celery_queue import QUEUE
from patience import until
from valkey_server import ValkeyServer

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, outside: Outside, valkey: ValkeyServer) -> Iterator[Installation]:
    folder = tmp_path_factory.mktemp("site")
    settings = {"MEMORY_CHECK_INTERVAL": "1", "CELERY_WORKER_CONCURRENCY": "1"}
    with (
        install(folder, outside, f"sqlite:///{folder / 'ncr.db'}", valkey.port, settings) as site,
        site.run("api"),
        site.run("beat"),
    ):
        yield site


def read(site: Installation, path: str, status: int = 200) -> dict[str, Any]:
    answer = site.ask("GET", path)
    assert answer.status_code == status, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_no_worker_one_and_two_are_told_as_they_are(site: Installation, outside: Outside) -> None:
    assert_told(site, workers=0, health=("degraded", "unavailable"))
    outside.judge.hold()
    task_ids = {job_id: site.submit(job_id) for job_id in ("seen-1", "seen-2")}
    assert read(site, "/jobs/active")["count"] == 2
    with ExitStack() as workers:
        first = workers.enter_context(site.run("worker"))
        until(lambda: outside.judge.waiting == 1)
        assert_told(site, workers=1, health=("healthy", "connected"))
        workers.enter_context(site.run("worker"))
        until(lambda: outside.judge.waiting == 2)
        assert_told(site, workers=2, health=("healthy", "connected"))
        active = read(site, "/celery-stats")["active"]
        assert {task["args"][0] for tasks in active.values() for task in tasks} == set(task_ids.values())
        outside.judge.open.set()
        for job_id, task_id in task_ids.items():
            site.assert_delivered_once(job_id, task_id)
        assert read(site, "/jobs/active") == {"active_jobs": [], "count": 0, "total": 0, "cursor": None}
        first.signal(signal.SIGTERM)
        assert first.wait(60) == 0
        until(lambda: len(read(site, "/memory-stats")["workers"]) == 1, 10)
        assert_told(site, workers=1, health=("healthy", "connected"))
        ran = sum_of_runs(site)
        assert read(site, "/health")["worker"] == "connected"
        assert sum_of_runs(site) == ran, "asking for health ran a task"
    until(lambda: not read(site, "/memory-stats")["workers"], 30)
    assert_told(site, workers=0, health=("degraded", "unavailable"))


@fault(
    "Redis: down, workers are asked about",
    injector="SIGKILL",
    invariants="LSA",
    outcome="answers in time that say so; jobs and memory are still told",
)
def test_without_redis_the_answers_say_so_and_the_rest_is_still_told(site: Installation, valkey: ValkeyServer) -> None:
    with site.run("worker"):
        until(lambda: len(read(site, "/memory-stats")["workers"]) == 1)
        valkey.kill()
        try:
            task_id = site.submit("unseen")
            told = read(site, "/celery-stats")
            assert (told["workers"], told["active"], told["queues"]) == ([], {}, {QUEUE: None})
            assert "Redis" in " ".join(told["problems"])
            health = read(site, "/health")
            assert (health["status"], health["redis"], health["database"]) == ("degraded", "unavailable", "connected")
            assert [each["task_id"] for each in read(site, "/jobs/active")["active_jobs"]] == [task_id]
            assert read(site, "/memory-stats")["accepting_jobs"] is True
        finally:
            valkey.start_again()
        site.assert_delivered_once("unseen", task_id, 90)
        until(lambda: len(read(site, "/memory-stats")["workers"]) == 1)


def assert_told(site: Installation, *, workers: int, health: tuple[str, str]) -> None:
    def names() -> list[list[str]]:
        told = read(site, "/celery-stats")
        reported = [each["worker"] for each in read(site, "/memory-stats")["workers"]]
        return [told["workers"], sorted(told["stats"]), sorted(told["active"]), sorted(reported)]

    until(lambda: all(len(each) == workers for each in names()), 30)
    assert len({tuple(each) for each in names()}) == 1
    told = read(site, "/health")
    assert (told["status"], told["worker"]) == health


def sum_of_runs(site: Installation) -> int:
    return sum(sum(each["total"].values()) for each in read(site, "/celery-stats")["stats"].values())


def test_a_child_makes_way_after_so_many_jobs_and_between_two(site: Installation) -> None:
    with site.run("worker", CELERY_WORKER_MAX_TASKS_PER_CHILD="2"):
        for number in range(4):
            task_id = site.submit(f"in-turn-{number}")
            site.assert_delivered_once(f"in-turn-{number}", task_id)
    with site.engine.connect() as connection:
        query = text(
            "SELECT actor FROM ncr_events WHERE kind = 'claimed' AND task_id IN (SELECT task_id FROM ncr_jobs "
            "WHERE job_id LIKE 'in-turn-%') ORDER BY id"
        )
        children = Counter(connection.execute(query).scalars())
    assert sum(children.values()) == 4
    assert max(children.values()) <= 2  # a duty counts as a task too
