"""A batch: which of its jobs may start, and what has become of it as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from ncr_upload.domain.jobs import LIVE, TERMINAL, Status


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


def percentage(counts: Mapping[Status, int]) -> float:
    """Percent of the jobs that have ended, however they ended, rounded down to a tenth: 100 means all of them."""
    total = sum(counts.values())
    ended = sum(counts.get(status, 0) for status in TERMINAL)
    return (1000 * ended // total) / 10 if total else 0.0
