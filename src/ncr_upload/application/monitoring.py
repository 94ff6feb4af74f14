"""What a worker says of its host, so that no more batch jobs are released than the hosts can bear."""

from __future__ import annotations

import logging
from pathlib import Path

from ncr_upload.application.download_cache import DownloadCache
from ncr_upload.application.ports import Host, Statistics, WorkerReport, WorkerReports
from ncr_upload.domain.admission import AdmissionLimits, plan_capacity
from ncr_upload.domain.batches import WorkerRoom

log = logging.getLogger(__name__)
MIB = 1024**2
REPORTS_MISSED = 3
"""A worker that has missed so many of its reports is not counted on any more."""


def observe(
    host: Host,
    worker: str,
    *,
    configured: int,
    child_bytes: int,
    work_dir: Path,
    limits: AdmissionLimits,
    cache: DownloadCache,
) -> WorkerReport:
    """How the worker and its host are now; what the cache would make room for counts as free. Raises `Unavailable` when the
    disk cannot be read."""
    memory, resident = host.memory(), host.process_memory(children=True)
    free_disk = host.free_disk(work_dir) + cache.held_bytes()
    capacity = plan_capacity(
        used_bytes=memory.used,
        total_bytes=memory.total,
        limits=limits,
        child_bytes=child_bytes,
        configured=configured,
        resident_bytes=resident,
        free_disk_bytes=free_disk,
    )
    return WorkerReport(worker, WorkerRoom(capacity, configured), memory, resident, free_disk)


class MemoryWatch:
    """Warns once when the memory passes MAX_MEMORY_USAGE_PERCENT, and tells once when it is below again."""

    def __init__(self, limit_percent: float) -> None:
        self._limit_percent = limit_percent
        self._is_over = False

    def look(self, host: Host) -> None:
        memory = host.memory()
        was_over, self._is_over = self._is_over, memory.used_percent > self._limit_percent
        if was_over == self._is_over:
            return
        facts = (
            f"{memory.used_percent:.1f} % of the {memory.source} memory is in use, the limit is {self._limit_percent:g} %; "
            f"{host.process_memory(children=True) // MIB} MB of it are this program's"
        )
        if self._is_over:
            log.warning("memory: %s. New jobs wait: free memory, or raise MAX_MEMORY_USAGE_PERCENT", facts)
        else:
            log.info("memory: below the limit again: %s", facts)


class BatchWatch:
    """Says once of each batch that it is stalled, and once that it goes on or has ended."""

    def __init__(self, timeout_seconds: float) -> None:
        self._timeout_seconds = timeout_seconds
        self._told: frozenset[str] = frozenset()

    def look(self, statistics: Statistics) -> tuple[list[str], list[str]]:
        """The batches that have stalled since the last look, and those that no longer are. Raises `Unavailable`."""
        stalled, told = frozenset(statistics.stalled(self._timeout_seconds)), self._told
        self._told = stalled
        return sorted(stalled - told), sorted(told - stalled)


def read_rooms(reports: WorkerReports, interval_seconds: float) -> list[WorkerRoom]:
    """What the workers that still report have room for. Raises `Unavailable`."""
    return [report.room for report in reports.recent(REPORTS_MISSED * interval_seconds)]
