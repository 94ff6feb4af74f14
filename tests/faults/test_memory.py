"""Memory is the container's: a real group of the kernel's, filled and emptied by another process in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from cgroups import MB, MemoryGroup, memory_group
from fault_table import fault
from installation import Installation, Outside, Program, install, job
from patience import until
from valkey_server import start_valkey

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

LIMIT = 1000 * MB
OVER = 760 * MB
SETTINGS = {"MAX_MEMORY_USAGE_PERCENT": "70", "MEMORY_CHECK_INTERVAL": "1"}


@pytest.fixture(scope="module")
def group() -> Iterator[MemoryGroup]:
    with memory_group(LIMIT) as made:
        yield made


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, outside: Outside, group: MemoryGroup) -> Iterator[Installation]:
    """The API in the group; beat outside of it."""
    folder = tmp_path_factory.mktemp("site")
    with (
        start_valkey(folder) as valkey,
        install(folder, outside, f"sqlite:///{folder / 'ncr.db'}", valkey.port, SETTINGS) as site,
        site.run("api") as api,
        site.run("beat"),
    ):
        group.add(api.process.pid)
        yield site


@pytest.fixture(scope="module")
def worker(site: Installation) -> Iterator[Program]:
    """Outside of the group until a test puts it in; its children too, since those it has are there already."""
    with site.run("worker", MAX_MEMORY_USAGE_PERCENT="70") as worker:
        yield worker


@fault(
    "API: memory over the limit",
    injector="a process in its memory group",
    invariants="LA",
    outcome="503 with Retry-After and the group's figures; accepted again once it is free",
)
def test_over_the_limit_of_its_group_the_api_answers_503_with_the_figures_and_accepts_again(
    site: Installation, group: MemoryGroup, worker: Program
) -> None:
    site.place("pressed")
    with group.holding(OVER):
        refused = site.ask("POST", "/process-job", json=job("pressed"))
        assert refused.status_code == 503, refused.text
        told = refused.json()
        assert (told["code"], refused.headers["Retry-After"]) == ("memory_pressure", "15")
        figures = told["memory"]
        assert (figures["total_bytes"], figures["source"], figures["limit_percent"]) == (LIMIT, group.source, 70)
        assert OVER < figures["used_bytes"] < LIMIT
        assert f"{figures['used_percent']} % of the memory is in use" in told["detail"]
        assert site.ask("GET", "/memory-stats").json()["accepting_jobs"] is False
        assert site.ask("GET", "/health").status_code == 200
        refused = site.ask("POST", "/process-batch", json=[job("pressed")])
        assert refused.status_code == 503
        assert site.count("SELECT COUNT(*) FROM ncr_jobs WHERE job_id = 'pressed'") == 0
    accepted = site.ask("POST", "/process-job", json=job("pressed"))
    assert accepted.status_code == 202, accepted.text
    site.assert_delivered_once("pressed", accepted.json()["task_id"])


def test_memory_stats_are_the_groups_and_a_file_in_the_page_cache_is_not_used_memory(
    site: Installation, group: MemoryGroup, tmp_path: Path
) -> None:
    before = site.ask("GET", "/memory-stats").json()["system"]
    assert (before["total_bytes"], before["source"]) == (LIMIT, group.source)
    for _ in range(10):  # where other programs want memory, the kernel lets some of it go
        (tmp_path / "large").unlink(missing_ok=True)  # pages that are written twice count as active, which are used memory
        group.write_file(tmp_path / "large", 900 * MB)
        if (usage := _usage(group)) > OVER:
            break
    after = site.ask("GET", "/memory-stats").json()
    (tmp_path / "large").unlink()
    assert usage > OVER, "the kernel did not charge the file to the group"
    # Where the whole machine is short of memory, the kernel takes a part of the file for active.
    assert after["system"]["used_bytes"] < before["used_bytes"] + 450 * MB
    assert after["accepting_jobs"] is True


def _usage(group: MemoryGroup) -> int:
    return int((group.folder / ("memory.current" if group.source == "cgroup2" else "memory.usage_in_bytes")).read_text())


@fault(
    "Worker: memory over the limit",
    injector="a process in its memory group",
    invariants="LOH",
    outcome="jobs wait for memory, no attempt spent, and go on by themselves",
)
def test_a_worker_over_the_limit_lets_jobs_wait_unspent_and_goes_on_by_itself(
    site: Installation, group: MemoryGroup, worker: Program
) -> None:
    for pid in (worker.process.pid, *(child.pid for child in worker.children())):
        group.add(pid)
    with worker.asleep():
        task_ids = {job_id: site.submit(job_id) for job_id in ("waits-1", "waits-2", "waits-3")}
        held = ExitStack()
        held.enter_context(group.holding(OVER))
    with held:
        for task_id in task_ids.values():
            told = _wait_for_problem(site, task_id)
            assert (told["status"], told["attempt"], told["problem"]["code"]) == ("pending", 0, "memory_short")
            assert told["message"].startswith("deferred: waiting for memory on the worker's host")
            assert "% of the memory is in use, more than MAX_MEMORY_USAGE_PERCENT=70 allows" in told["message"]
        until(lambda: _capacity(site) == 0, 30)
    for job_id, task_id in task_ids.items():
        site.assert_delivered_once(job_id, task_id, 90)
        assert site.row(task_id)["attempt"] == 1
    until(lambda: _capacity(site) == 2, 30)


def _wait_for_problem(site: Installation, task_id: str) -> dict[str, Any]:
    """The task's status as soon as one says why it waits."""
    told: dict[str, Any] = {"problem": None}

    def waits() -> bool:
        told.update(site.ask("GET", f"/job-status/{task_id}").json())
        return told["problem"] is not None

    until(waits, 60)
    return told


def _capacity(site: Installation) -> int:
    """How many jobs the worker says that it has room for, by the figures of its group."""
    (told,) = site.ask("GET", "/memory-stats").json()["workers"]
    assert told["total_bytes"] == LIMIT
    return int(told["capacity"])
