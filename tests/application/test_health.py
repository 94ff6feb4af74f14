"""Health: each part asked at once and for a bounded time, and what each answer means for callers."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import pytest

from api_server import make_ports
from ledger_twin import MemoryHost, MemoryJobQueue, MemoryLedger, MemoryStatusBoard
from ncr_upload.application import health
from ncr_upload.application.api_ports import ApiPorts
from ncr_upload.application.health import ServiceState, check_health, check_ready
from ncr_upload.domain.errors import DestinationParked, Unavailable
from patience import allowed

pytestmark = pytest.mark.anyio
AWAY = Unavailable("away", "the part is away", "Start it.")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def fail() -> None:
    raise AWAY


def well() -> None: ...


class Site:
    def __init__(self, check: Callable[[], None] = well, **deep: Callable[[], None]) -> None:
        self.board, self.queue = MemoryStatusBoard(), MemoryJobQueue(workers=["celery@here"])
        self.ports: ApiPorts = make_ports(MemoryLedger(), self.board, self.queue, MemoryHost(), "ncr_jobs", check, deep)


async def test_all_parts_well_is_healthy_and_names_the_parts_it_asked() -> None:
    found = await check_health(Site(s3=fail).ports, deep=False)
    assert (found.state, found.parts, found.problems) == (ServiceState.HEALTHY, ("redis", "database", "worker"), {})


async def test_without_the_database_no_job_is_accepted() -> None:
    site = Site(fail)
    found = await check_health(site.ports, deep=False)
    assert (found.state, set(found.problems)) == (ServiceState.UNHEALTHY, {"database"})
    with pytest.raises(Unavailable, match="the part is away"):
        await check_ready(site.ports)


async def test_without_redis_jobs_are_accepted_and_wait() -> None:
    site = Site()
    site.board.away = True
    found = await check_health(site.ports, deep=False)
    assert found.state is ServiceState.DEGRADED
    assert set(found.problems) == {"redis", "worker"}, "workers are asked through Redis"
    await check_ready(site.ports)


async def test_without_a_worker_jobs_are_accepted_and_wait() -> None:
    site = Site()
    site.queue._workers = []
    found = await check_health(site.ports, deep=False)
    assert (found.state, found.problems["worker"].code) == (ServiceState.DEGRADED, "no_worker")
    assert "python start_worker.py worker" in found.problems["worker"].next_step


async def test_deep_asks_the_outside_parts_too_and_any_failure_of_them_degrades() -> None:
    def parked() -> None:
        raise DestinationParked("host_key_mismatch", "the key is another", "Ask the partner.")

    found = await check_health(Site(s3=well, sftp=parked, validator=fail).ports, deep=True)
    assert found.parts == ("redis", "database", "worker", "s3", "sftp", "validator")
    assert {part: error.code for part, error in found.problems.items()} == {"sftp": "host_key_mismatch", "validator": "away"}
    assert found.state is ServiceState.DEGRADED


async def test_parts_are_asked_side_by_side() -> None:
    """Each waits until all of them have been asked."""
    asked = threading.Barrier(3, timeout=20)
    found = await check_health(Site(s3=asked.wait, sftp=asked.wait, validator=asked.wait).ports, deep=True)
    assert found.state is ServiceState.HEALTHY


async def test_a_part_that_does_not_answer_is_given_up_and_the_others_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "HEALTH_SECONDS", 0.5)
    let_go = threading.Event()
    site = Site(s3=lambda: let_go.wait() and None, sftp=well)
    try:
        began = time.monotonic()
        found = await check_health(site.ports, deep=True)
        assert time.monotonic() - began < allowed(5)
        assert {part: error.code for part, error in found.problems.items()} == {"s3": "s3_timeout"}
        again = await asyncio.gather(*(check_health(site.ports, deep=True) for _ in range(5)))
        assert all(set(each.problems) == {"s3"} for each in again), "what hangs keeps threads of its own part only"
    finally:
        let_go.set()


async def test_a_fault_of_our_own_is_not_told_as_a_part_that_is_away() -> None:
    def broken() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await check_health(Site(broken).ports, deep=False)
