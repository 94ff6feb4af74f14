"""Whether this host has room for another job, and for how many."""

from __future__ import annotations

from dataclasses import dataclass

MEMORY_RETRY_SECONDS = 15
DISK_RETRY_SECONDS = 60
DISK_SHORT = "disk_short"
"""Too little room for the job's files before any is fetched."""

DISK_FULL = "disk_full"
"""The disk took no more although there had been room."""

SPARE_DISK_BYTES = 64 * 1024 * 1024
"""Kept free beside a job's own files: logs, the embedded database and other tenants of the disk need some."""


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """`max_memory_percent` (MAX_MEMORY_USAGE_PERCENT) may be fractional; memory exactly at it still admits."""

    max_memory_percent: float
    spare_disk_bytes: int = SPARE_DISK_BYTES


@dataclass(frozen=True, slots=True)
class Admit:
    """There is room."""


@dataclass(frozen=True, slots=True)
class Defer:
    """No room now. `code` is 'memory_short' or 'disk_short'; `reason` says what is short, by how much."""

    code: str
    reason: str
    retry_after_seconds: int


@dataclass(frozen=True, slots=True)
class NeverFits:
    """There is no room however long the job waits."""

    reason: str


def find_misfit(needed_disk_bytes: int, *, total_disk_bytes: int, limits: AdmissionLimits) -> NeverFits | None:
    """Whether the job's files are too large even for the empty disk of the work folder."""
    if needed_disk_bytes + limits.spare_disk_bytes <= total_disk_bytes:
        return None
    return NeverFits(
        f"the job needs {needed_disk_bytes} bytes of disk and {limits.spare_disk_bytes} must stay free, "
        f"but the whole disk has {total_disk_bytes}"
    )


def decide(
    *, memory_used_percent: float, limits: AdmissionLimits, free_disk_bytes: int | None = None, needed_disk_bytes: int = 0
) -> Admit | Defer:
    """Admit a job that will put `needed_disk_bytes` on the disk of the work folder. `free_disk_bytes` None: the disk is not
    asked about (the API, which fetches nothing)."""
    if memory_used_percent > limits.max_memory_percent:
        return Defer(
            "memory_short",
            f"{memory_used_percent:.1f} % of the memory is in use, "
            f"more than MAX_MEMORY_USAGE_PERCENT={limits.max_memory_percent:g} allows",
            MEMORY_RETRY_SECONDS,
        )
    if free_disk_bytes is not None and free_disk_bytes < needed_disk_bytes + limits.spare_disk_bytes:
        return Defer(
            DISK_SHORT,
            f"the job needs {needed_disk_bytes} bytes of disk and {limits.spare_disk_bytes} must stay free, "
            f"but only {free_disk_bytes} are free",
            DISK_RETRY_SECONDS,
        )
    return Admit()


def plan_capacity(
    *,
    used_bytes: int,
    total_bytes: int,
    limits: AdmissionLimits,
    child_bytes: int,
    configured: int,
    resident_bytes: int,
    free_disk_bytes: int,
) -> int:
    """How many jobs at once a worker has room for now: none above the memory limit or on a full disk, else as many children
    of `child_bytes` as fit below the limit beside everybody else, at least 1 and at most `configured`. The worker's own
    `resident_bytes` are taken to be those children's."""
    if free_disk_bytes < limits.spare_disk_bytes:
        return 0
    if total_bytes > 0 and 100 * used_bytes > limits.max_memory_percent * total_bytes:
        return 0
    return recommend_concurrency(
        used_bytes=max(0, used_bytes - resident_bytes),
        total_bytes=total_bytes,
        max_memory_percent=limits.max_memory_percent,
        child_bytes=child_bytes,
        configured=configured,
    )


def recommend_concurrency(
    *, used_bytes: int, total_bytes: int, max_memory_percent: float, child_bytes: int, configured: int
) -> int:
    """How many worker children of `child_bytes` each fit into what is left below the memory limit: at least 1, so that work
    goes on, at most `configured` (CELERY_WORKER_CONCURRENCY). Children that run already are counted in `used_bytes` too, so
    a busy host is told fewer than it could bear, never more. Where the total is unknown (0), `configured` stands."""
    if total_bytes <= 0 or child_bytes <= 0:
        return configured
    room_bytes = total_bytes * max_memory_percent / 100 - used_bytes
    return max(1, min(configured, int(room_bytes // child_bytes)))
