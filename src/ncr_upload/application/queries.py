"""What callers may ask. Every answer comes in time, whatever part is down; the ledger is the truth.

The ledger says what is so; of a task that runs, the live view in Redis adds how far the current stage is. When the ledger does
not answer, the view in Redis stands alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

from ncr_upload.application.api_ports import ApiPorts
from ncr_upload.application.metrics import Counts
from ncr_upload.application.monitoring import REPORTS_MISSED
from ncr_upload.application.ports import Figures, Page, WorkerReport
from ncr_upload.application.views import is_whole, iso_time, optional_time, view_of, with_live
from ncr_upload.domain.admission import AdmissionLimits, Admit, decide, recommend_concurrency
from ncr_upload.domain.batches import BatchStatus, count_statuses, estimate_remaining, percentage, roll_up
from ncr_upload.domain.errors import Unavailable
from ncr_upload.domain.jobs import TERMINAL, Status

T = TypeVar("T")

LEDGER_FIRST_SECONDS = 0.3
"""How long the ledger alone is asked: it says of most tasks that they wait or have ended, which Redis knows no better."""

LIVE_VIEW_SECONDS = 0.4
"""How long an answer waits for the live details."""


async def read_task(ports: ApiPorts, task_id: str) -> dict[str, Any] | None:
    """The view of a task; None only for an id never issued. Raises `Unavailable` when neither part answers."""
    live: asyncio.Future[dict[str, Any] | None] | None = None

    def ask_redis_too() -> None:
        nonlocal live
        live = ports.lanes.views.ask(task_id, ports.board.read)

    slow = asyncio.get_running_loop().call_later(LEDGER_FIRST_SECONDS, ask_redis_too)
    try:
        task = await ports.lanes.tasks.run(task_id, ports.ledger.tasks)
    except Unavailable:
        view = await _wait_for_view(ports, task_id, live)
        if view is None:
            raise
        return view
    finally:
        slow.cancel()
    if task is None or task.status in TERMINAL or task.status is Status.PENDING:
        if live is not None:
            live.cancel()
        return None if task is None else view_of(task)
    return with_live(task, await _wait_for_view(ports, task_id, live))


async def _wait_for_view(
    ports: ApiPorts, task_id: str, live: asyncio.Future[dict[str, Any] | None] | None
) -> dict[str, Any] | None:
    if live is None:
        live = ports.lanes.views.ask(task_id, ports.board.read)
    try:
        view = await ports.lanes.views.wait(live, LIVE_VIEW_SECONDS)
    except Unavailable:
        return None
    return view if view is not None and is_whole(view) else None


async def read_history(ports: ApiPorts, task_id: str) -> dict[str, Any] | None:
    """Every event of a task, oldest first; None for an id never issued."""

    events = await ports.lanes.database.run(lambda: ports.ledger.history(task_id))
    if not events:  # acceptance itself is an event
        return None
    return {
        "task_id": task_id,
        "events": [
            {
                "at": iso_time(event.at),
                "attempt": event.attempt,
                "stage": event.stage.value,
                "kind": event.kind,
                "actor": event.actor,
                "message": event.message,
            }
            for event in events
        ],
    }


async def read_active(
    ports: ApiPorts, *, username: str | None, campaign: str | None, status: Status | None, limit: int, cursor: str | None
) -> dict[str, Any]:
    """Live tasks, oldest first, one page."""

    def ask() -> Page:
        return ports.ledger.active(username=username, campaign=campaign, status=status, limit=limit, cursor=cursor)

    page = await ports.lanes.database.run(ask)
    views = [view_of(task) for task in page.tasks]
    return {"active_jobs": views, "count": len(views), "total": page.total, "cursor": page.cursor}


async def read_batch(
    ports: ApiPorts, batch_id: str, *, limit: int, cursor: str | None, timeout_seconds: float
) -> dict[str, Any] | None:
    """A batch's roll-up and one page of its tasks, in the order they were submitted; None for an id never issued.
    It is stalled when none of them has started or ended for `timeout_seconds`."""
    answer = await ports.lanes.database.run(lambda: ports.ledger.batch(batch_id, limit=limit, cursor=cursor))
    if answer is None:
        return None
    batch, page = answer
    counts, percent = count_statuses(batch.shares), percentage(batch.shares)
    idle_seconds = max(0.0, batch.now - batch.moved_at)
    status = roll_up(counts, idle_seconds=idle_seconds, timeout_seconds=timeout_seconds)
    remaining = None if batch.started_at is None else estimate_remaining(percent, batch.now - batch.started_at)
    return {
        "batch_id": batch_id,
        "status": status.value,
        "total_jobs": page.total,
        "counts": {status.value: counts.get(status, 0) for status in Status},
        "percentage": percent,
        "stalled": status is BatchStatus.STALLED,
        "jobs": [view_of(task) for task in page.tasks],
        "cursor": page.cursor,
        "conflicts": [{"job_id": each.job_id, "task_id": each.task_id} for each in batch.conflicts],
        "created_at": iso_time(batch.created_at),
        "started_at": optional_time(batch.started_at),
        "finished_at": optional_time(batch.finished_at),
        "estimated_end": None if batch.finished_at or remaining is None else iso_time(batch.now + remaining),
        "timestamp": iso_time(batch.updated_at),
    }


async def read_reports(ports: ApiPorts, interval_seconds: float) -> list[WorkerReport] | Unavailable:
    """What the workers last said of their hosts, as far as they still report."""
    return await _answer_or_error(ports.lanes.database.run(lambda: ports.reports.recent(REPORTS_MISSED * interval_seconds)))


async def read_memory(
    ports: ApiPorts, limits: AdmissionLimits, *, child_bytes: int, configured_concurrency: int, report_seconds: float
) -> dict[str, Any]:
    """Memory of this process and of the container or host, and what it allows; and what the workers say of theirs.
    `child_bytes`: what one worker child may use."""
    host, memory = ports.host, ports.host.memory()
    reports = await read_reports(ports, report_seconds)
    return {
        "process": {"rss_bytes": host.process_memory()},
        "system": {
            "used_bytes": memory.used,
            "total_bytes": memory.total,
            "available_bytes": memory.total - memory.used,
            "used_percent": round(memory.used_percent, 1),
            "source": memory.source,
        },
        "limit_percent": limits.max_memory_percent,
        "accepting_jobs": isinstance(decide(memory_used_percent=memory.used_percent, limits=limits), Admit),
        "recommended_concurrency": recommend_concurrency(
            used_bytes=memory.used,
            total_bytes=memory.total,
            max_memory_percent=limits.max_memory_percent,
            child_bytes=child_bytes,
            configured=configured_concurrency,
        ),
        "workers": [] if isinstance(reports, Unavailable) else [_report_view(report) for report in reports],
        "problems": [reports.message] if isinstance(reports, Unavailable) else [],
    }


def _report_view(report: WorkerReport) -> dict[str, Any]:
    return {
        "worker": report.worker,
        "seen_at": iso_time(report.seen_at),
        "resident_bytes": report.resident_bytes,
        "used_bytes": report.memory.used,
        "total_bytes": report.memory.total,
        "used_percent": round(report.memory.used_percent, 1),
        "source": report.memory.source,
        "free_disk_bytes": report.free_disk_bytes,
        "capacity": report.room.capacity,
        "configured": report.room.configured,
    }


async def read_workers(ports: ApiPorts) -> dict[str, Any]:
    """What the workers say of themselves and how many messages wait. What does not answer in time is left out and said in
    `problems`."""

    def ask_workers() -> dict[str, Any]:
        ports.board.ping()  # workers are asked through Redis, and asking takes long without it
        return ports.queue.workers()

    workers, depth = await asyncio.gather(_answer_or_error(ports.lanes.worker.run(ask_workers)), read_depths(ports))
    told: dict[str, Any] = {} if isinstance(workers, Unavailable) else workers
    return {
        "active": told.get("active", {}),
        "scheduled": told.get("scheduled", {}),
        "stats": told.get("stats", {}),
        "queues": {ports.queue_name: None} if isinstance(depth, Unavailable) else depth,
        "problems": [error.message for error in (workers, depth) if isinstance(error, Unavailable)],
    }


async def read_depths(ports: ApiPorts) -> dict[str, int] | Unavailable:
    """Messages that wait, by queue; those that are read first are counted with the others."""

    def ask() -> dict[str, int]:
        return {ports.queue_name: ports.queue.depth() + ports.queue.depth(first=True)}

    return await _answer_or_error(ports.lanes.queue.run(ask))


async def read_figures(ports: ApiPorts, batch_timeout_seconds: float) -> Figures | Unavailable:
    """The ledger in figures."""
    return await _answer_or_error(ports.lanes.database.run(lambda: ports.statistics.figures(batch_timeout_seconds)))


async def read_counts(ports: ApiPorts) -> Counts | Unavailable:
    """Return the counts of all processes."""
    return await _answer_or_error(ports.lanes.database.run(ports.metrics.read))


async def _answer_or_error(answer: Awaitable[T]) -> T | Unavailable:
    try:
        return await answer
    except Unavailable as error:
        return error
