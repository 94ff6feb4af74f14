"""A batch: which of its jobs may start, and what has become of it as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from ncr_upload.domain.jobs import LIVE, TERMINAL, Stage, Status, progress_percent


class BatchStatus(StrEnum):
    """The public status of a batch (wire format)."""

    PENDING = "pending"
    PROCESSING = "processing"
    STALLED = "stalled"
    COMPLETED = "completed"
    COMPLETED_WITH_ERRORS = "completed_with_errors"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class BatchLoad:
    """The live jobs of one batch: `in_flight` may be claimed or are, `held` wait for their release."""

    batch_id: str
    in_flight: int
    held: int


@dataclass(frozen=True, slots=True)
class WorkerRoom:
    """What one worker said of itself last: it is set to `configured` jobs at once and has memory and disk for `capacity`."""

    capacity: int
    configured: int


def plan_room(workers: Iterable[WorkerRoom], *, in_flight: int) -> int | None:
    """How many more batch jobs the workers together can bear beside the `in_flight` ones; None: no worker is short, or none
    has said anything."""
    rooms = list(workers)
    if all(room.capacity >= room.configured for room in rooms):
        return None
    return max(0, sum(room.capacity for room in rooms) - in_flight)


def release_next(loads: Iterable[BatchLoad], *, batch_size: int, room: int | None = None) -> dict[str, int]:
    """How many held jobs to release, by batch; a batch that releases none is not in it.

    No batch gets more than `batch_size` in flight, all together release no more than `room` (None: no such limit). One
    job at a time goes to the batch with the fewest in flight, so that a large batch cannot keep a small one waiting; the
    order of `loads` changes nothing.
    """
    in_flight: dict[str, int] = {}
    held: dict[str, int] = {}
    for load in loads:
        in_flight[load.batch_id], held[load.batch_id] = load.in_flight, load.held
    released: dict[str, int] = {}
    while room is None or sum(released.values()) < room:
        ready = [batch_id for batch_id in held if held[batch_id] > 0 and in_flight[batch_id] < batch_size]
        if not ready:
            break
        batch_id = min(ready, key=lambda ready_id: (in_flight[ready_id], ready_id))
        held[batch_id] -= 1
        in_flight[batch_id] += 1
        released[batch_id] = released.get(batch_id, 0) + 1
    return released


def roll_up(counts: Mapping[Status, int], *, idle_seconds: float = 0, timeout_seconds: float = float("inf")) -> BatchStatus:
    """The status of a batch from how many of its jobs have which. `idle_seconds` is how long no job of it has started or
    ended; past `timeout_seconds` (BATCH_TIMEOUT) a batch that still has live jobs is stalled. Raises `ValueError` for a
    batch without jobs.

    Once every job has ended: completed if all are, cancelled if all are, failed if none is completed, else
    completed_with_errors. A validator's "no" is an error here, never a completion.
    """
    total = sum(counts.values())
    if total <= 0:
        raise ValueError("a batch has at least one job")
    if any(counts.get(status, 0) for status in LIVE):
        if idle_seconds > timeout_seconds:
            return BatchStatus.STALLED
        return BatchStatus.PENDING if counts.get(Status.PENDING, 0) == total else BatchStatus.PROCESSING
    completed = counts.get(Status.COMPLETED, 0)
    if completed == total:
        return BatchStatus.COMPLETED
    if counts.get(Status.CANCELLED, 0) == total:
        return BatchStatus.CANCELLED
    return BatchStatus.COMPLETED_WITH_ERRORS if completed else BatchStatus.FAILED


@dataclass(frozen=True, slots=True)
class Share:
    """The `count` jobs of a batch in one status and stage; the sizes of `sized` of them are known, `size` bytes in all."""

    status: Status
    stage: Stage
    count: int
    sized: int = 0
    size: int = 0


def count_statuses(shares: Iterable[Share]) -> dict[Status, int]:
    """How many jobs have which status."""
    counts: dict[Status, int] = {}
    for share in shares:
        counts[share.status] = counts.get(share.status, 0) + share.count
    return counts


def percentage(shares: Iterable[Share]) -> float:
    """How far the batch is, 0 to 100, rounded down to a tenth: 100 means that every job has ended, however it ended.

    A job weighs as many bytes as it has, one whose size is not known yet as many as the others have on average; while no
    size is known all weigh the same. A job that runs counts with the part of it that is through.
    """
    shares = list(shares)
    sized, size = sum(share.sized for share in shares), sum(share.size for share in shares)
    average = size / sized if size else 1.0
    weight = done = 0.0
    for share in shares:
        bytes_ = share.size + (share.count - share.sized) * average if size else float(share.count)
        through = 100.0 if share.status in TERMINAL else progress_percent(share.stage)
        weight += bytes_
        done += bytes_ * through / 100
    if all(share.status in TERMINAL for share in shares):
        return 100.0 if shares else 0.0
    return min(99.9, int(1000 * done / weight) / 10) if weight else 0.0


def estimate_remaining(percent: float, elapsed_seconds: float) -> float | None:
    """Seconds until a batch that came to `percent` in `elapsed_seconds` is through at the same pace; None while that
    cannot be told."""
    if percent <= 0 or elapsed_seconds <= 0:
        return None
    return elapsed_seconds * (100 - percent) / percent
