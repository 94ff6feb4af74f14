"""What callers may ask: the ledger decides, Redis adds and stands in, and no answer waits for a part that is away."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from api_server import make_ports
from ledger_twin import MemoryHost, MemoryJobQueue, MemoryLedger, MemoryStatusBoard
from ncr_upload.application import queries
from ncr_upload.application.ports import Figures, Memory, WorkerReport
from ncr_upload.application.views import view_of
from ncr_upload.domain.admission import AdmissionLimits
from ncr_upload.domain.batches import WorkerRoom
from ncr_upload.domain.errors import Unavailable
from ncr_upload.domain.jobs import Claim, NewJob, Problem, Stage, Status, Task
from patience import allowed

pytestmark = pytest.mark.anyio
AWAY = Unavailable("database_unreachable", "the database is away", "Start it.")
NOBODY = "00000000-0000-0000-0000-000000000000"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class CountingBoard(MemoryStatusBoard):
    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def read(self, task_ids: Sequence[str]) -> list[dict[str, Any] | None]:
        self.reads += 1
        return super().read(task_ids)


class Ledger(MemoryLedger):
    """Can be away, or frozen until it is thawed."""

    away = False

    def __init__(self) -> None:
        super().__init__(max_attempts=5)
        self.thawed = threading.Event()
        self.thawed.set()

    def tasks(self, task_ids: Sequence[str]) -> Any:
        self._answer()
        return super().tasks(task_ids)

    def history(self, task_id: str) -> Any:
        self._answer()
        return super().history(task_id)

    def _answer(self) -> None:
        self.thawed.wait()
        if self.away:
            raise AWAY


class Site:
    def __init__(self) -> None:
        self.ledger, self.board, self.host = Ledger(), CountingBoard(), MemoryHost()
        self.queue = MemoryJobQueue(workers=["celery@here"])
        self.ports = make_ports(self.ledger, self.board, self.queue, self.host, "ncr_jobs", lambda: None, {})

    def accept(self, *job_ids: str, batch_id: str | None = None) -> list[Task]:
        accepted = self.ledger.accept([NewJob(each, "ann", "spring") for each in job_ids], batch_id=batch_id, release=100)
        assert all(isinstance(each, Task) for each in accepted)
        return [each for each in accepted if isinstance(each, Task)]

    def run_one(self, job_id: str = "job-1") -> Claim:
        (task,) = self.accept(job_id)
        claim = self.ledger.claim(task.task_id, "w1", 60)
        assert claim is not None
        return claim

    def post(self, claim: Claim, **changes: Any) -> None:
        self.board.post([view_of(replace(claim.task, **changes))], live=True, fence=claim.fence)


@pytest.fixture
def site() -> Iterator[Site]:
    """What a test froze is thawed after it, or its threads would outlive it."""
    made = Site()
    yield made
    made.board.thawed.set()
    made.ledger.thawed.set()


# --- one task


async def test_an_id_never_issued_is_none(site: Site) -> None:
    assert await queries.read_task(site.ports, NOBODY) is None
    assert await queries.read_history(site.ports, NOBODY) is None
    assert await queries.read_batch(site.ports, NOBODY, limit=10, cursor=None, timeout_seconds=60) is None


async def test_of_a_task_that_waits_or_has_ended_redis_is_not_asked(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queries, "LEDGER_FIRST_SECONDS", 60)
    (task,) = site.accept("job-1")
    assert await queries.read_task(site.ports, task.task_id) == view_of(task)
    claim = site.run_one("job-2")
    ended = replace(claim.task, status=Status.FAILED)
    site.ledger.finish(
        claim, status=Status.FAILED, stage=Stage.LOOKUP, message="no", problem=Problem("code", "rejected", "no", "Correct it.")
    )
    view = await queries.read_task(site.ports, ended.task_id)
    assert view is not None
    assert (view["status"], view["problem"]["code"]) == ("failed", "code")
    assert site.board.reads == 0


async def test_a_running_task_is_told_as_far_as_its_live_view_goes(site: Site) -> None:
    claim = site.run_one()
    site.post(claim, stage=Stage.DOWNLOAD, progress=33.3, message="12 of 36 files")
    view = await queries.read_task(site.ports, claim.task.task_id)
    assert view is not None
    assert (view["stage"], view["progress"], view["message"]) == ("download", 33.3, "12 of 36 files")


@pytest.mark.parametrize("how", ["away", "frozen", "knows nothing", "another shape", "another attempt"])
async def test_a_running_task_is_told_by_the_ledger_alone_where_redis_is_of_no_help(
    site: Site, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = site.run_one()
    match how:
        case "away":
            site.board.away = True
        case "frozen":
            site.board.thawed.clear()
        case "another shape":
            site.board.post([{"task_id": claim.task.task_id, "status": "processing"}], live=True)
        case "another attempt":
            site.post(claim, attempt=7, progress=99.0)
    began = time.monotonic()
    view = await queries.read_task(site.ports, claim.task.task_id)
    assert time.monotonic() - began < allowed(queries.LIVE_VIEW_SECONDS + 1)
    assert view == view_of(claim.task)


@pytest.mark.parametrize("how", ["away", "frozen"])
async def test_without_the_ledger_the_view_in_redis_stands_alone(site: Site, how: str) -> None:
    claim = site.run_one()
    site.post(claim, progress=33.3)
    site.ledger.away = how == "away"
    if how == "frozen":
        site.ledger.thawed.clear()
    view = await queries.read_task(site.ports, claim.task.task_id)
    assert view is not None
    assert view["progress"] == 33.3


async def test_without_the_ledger_and_a_view_that_the_reason_is_raised(site: Site) -> None:
    claim = site.run_one()
    site.ledger.away = True
    with pytest.raises(Unavailable, match="the database is away"):
        await queries.read_task(site.ports, claim.task.task_id)
    site.board.away = True
    with pytest.raises(Unavailable, match="the database is away"):
        await queries.read_task(site.ports, claim.task.task_id)
    with pytest.raises(Unavailable, match="the database is away"):
        await queries.read_history(site.ports, claim.task.task_id)


async def test_a_slow_ledger_has_redis_asked_beside_it_and_decides_all_the_same(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queries, "LEDGER_FIRST_SECONDS", 0.01)
    claim = site.run_one()
    site.post(claim, progress=33.3)
    site.ledger.thawed.clear()
    timer = threading.Timer(0.3, site.ledger.thawed.set)
    timer.start()
    view = await queries.read_task(site.ports, claim.task.task_id)
    timer.join()
    assert view is not None
    assert view["progress"] == 33.3
    assert site.board.reads == 1, "it was asked once, while the ledger was slow"


async def test_the_history_has_every_event_in_order(site: Site) -> None:
    claim = site.run_one()
    site.ledger.advance(claim, status=Status.PROCESSING, stage=Stage.DOWNLOAD, message="downloading")
    told = await queries.read_history(site.ports, claim.task.task_id)
    assert told is not None
    assert told["task_id"] == claim.task.task_id
    assert [set(event) for event in told["events"]] == [{"at", "attempt", "stage", "kind", "actor", "message"}] * len(
        told["events"]
    )
    assert [event["at"] for event in told["events"]] == sorted(event["at"] for event in told["events"])
    assert told["events"][0]["attempt"] == 0
    assert told["events"][-1]["attempt"] == 1


# --- many tasks


async def test_active_tasks_come_page_by_page_and_each_once(site: Site) -> None:
    accepted = {task.task_id for task in site.accept(*(f"job-{number}" for number in range(7)))}
    found: list[str] = []
    cursor: str | None = None
    for _ in range(10):
        page = await queries.read_active(site.ports, username=None, campaign=None, status=None, limit=3, cursor=cursor)
        assert (page["total"], page["count"]) == (7, len(page["active_jobs"]))
        found += [view["task_id"] for view in page["active_jobs"]]
        cursor = page["cursor"]
        if cursor is None:
            break
    assert len(found) == len(set(found)) == 7
    assert set(found) == accepted
    none = await queries.read_active(site.ports, username="bob", campaign=None, status=None, limit=3, cursor=None)
    assert (none["total"], none["active_jobs"], none["cursor"]) == (0, [], None)


async def test_a_batch_counts_every_status_and_estimates_its_end_once_it_has_begun(site: Site) -> None:
    tasks = site.accept("job-1", "job-2", batch_id="batch-1")

    async def read() -> dict[str, Any]:
        told = await queries.read_batch(site.ports, "batch-1", limit=1, cursor=None, timeout_seconds=1000)
        assert told is not None
        return told

    before = await read()
    assert set(before["counts"]) == {status.value for status in Status}
    assert (before["counts"]["pending"], before["total_jobs"], len(before["jobs"])) == (2, 2, 1)
    assert (before["percentage"], before["started_at"], before["estimated_end"], before["stalled"]) == (0, None, None, False)
    for task in tasks:
        claim = site.ledger.claim(task.task_id, "w1", 60)
        assert claim is not None
        site.ledger.finish(
            claim, status=Status.FAILED, stage=Stage.LOOKUP, message="no", problem=Problem("c", "rejected", "no", "Correct it.")
        )
    after = await read()
    assert (after["counts"]["failed"], after["percentage"], after["estimated_end"]) == (2, 100, None)
    assert after["finished_at"] is not None


# --- what the service says of itself


REPORT = WorkerReport("celery@w1", WorkerRoom(1, 4), Memory(900, 1000, "cgroup2"), 700, 10**9)
LIMITS = AdmissionLimits(80)


async def read_memory(site: Site) -> dict[str, Any]:
    return await queries.read_memory(site.ports, LIMITS, child_bytes=10, configured_concurrency=4, report_seconds=10)


@pytest.mark.parametrize(("used", "accepts", "recommended"), [(20, True, 4), (80, True, 1), (81, False, 1)])
async def test_memory_tells_what_it_allows(site: Site, used: int, accepts: bool, recommended: int) -> None:
    site.host.figures = Memory(used, 100, "cgroup2")
    told = await read_memory(site)
    assert told["system"] == {
        **{"used_bytes": used, "total_bytes": 100, "available_bytes": 100 - used},
        **{"used_percent": float(used), "source": "cgroup2"},
    }
    assert (told["limit_percent"], told["accepting_jobs"]) == (80, accepts)
    assert told["recommended_concurrency"] == recommended


async def test_memory_without_the_ledger_tells_its_own_part_and_the_reason(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.ports.reports.report(REPORT)
    assert [worker["worker"] for worker in (await read_memory(site))["workers"]] == ["celery@w1"]

    def fail(_: float) -> list[WorkerReport]:
        raise AWAY

    monkeypatch.setattr(site.ports.reports, "recent", fail)
    told = await read_memory(site)
    assert (told["workers"], told["problems"]) == ([], ["the database is away"])
    assert told["process"]["rss_bytes"] == 1


async def test_workers_and_messages_are_told_and_what_is_away_is_left_out_with_its_reason(site: Site) -> None:
    site.queue.ring(["one", "two"])
    site.queue.ring(["three"], first=True)
    told = await queries.read_workers(site.ports)
    assert (told["queues"], told["problems"]) == ({"ncr_jobs": 3}, [])
    assert told["active"] == {"celery@here": []}
    site.board.away = site.queue.away = True
    told = await queries.read_workers(site.ports)
    assert (told["queues"], told["active"], told["scheduled"], told["stats"]) == ({"ncr_jobs": None}, {}, {}, {})
    assert len(told["problems"]) == 2


async def test_figures_are_told_or_the_reason_why_not(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    assert await queries.read_figures(site.ports, 60) == Figures({}, {}, 0.0, 0)

    def fail(_: float) -> Figures:
        raise AWAY

    monkeypatch.setattr(site.ports.statistics, "figures", fail)
    assert await queries.read_figures(site.ports, 60) is AWAY
    site.queue.away = True
    assert isinstance(await queries.read_depths(site.ports), Unavailable)
