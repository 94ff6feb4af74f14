"""The sweep: what makes an accepted job go on after anything was killed. Safe to run twice at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ncr_upload.application.attempts import warn_of_delivery
from ncr_upload.application.duties import due_duties
from ncr_upload.application.live import post_quietly
from ncr_upload.application.monitoring import read_rooms
from ncr_upload.application.ports import (
    Cleaning,
    Duties,
    JobQueue,
    Parking,
    Recovery,
    StatusBoard,
    Submissions,
    WorkerReports,
)
from ncr_upload.domain.jobs import Problem
from ncr_upload.domain.retries import ErrorClass

AT_ONCE = 3000
"""Rings of one sweep: enough for every waiting job to be rung for soon after Redis was wiped, and few enough for no sweep to
take long."""


@dataclass(frozen=True, slots=True)
class SweepPorts:
    """Everything a sweep touches."""

    recovery: Recovery
    cleaning: Cleaning
    parking: Parking
    duties: Duties
    submissions: Submissions
    queue: JobQueue
    board: StatusBoard
    reports: WorkerReports


@dataclass(frozen=True, slots=True)
class Swept:
    """What one sweep did."""

    released: int
    rung: int
    given_up: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ReleaseLimits:
    """BATCH_SIZE, and how often workers report (MEMORY_CHECK_INTERVAL)."""

    batch_size: int
    report_seconds: float


def sweep(ports: SweepPorts, limits: ReleaseLimits) -> Swept:
    """Release batch jobs, end what killed its worker every time, ring for what is due. Raises `Unavailable`."""
    given_up = _give_up_exhausted(ports)
    released = release(ports.recovery, ports.reports, limits)
    _ring_duties(ports)
    return Swept(len(released), _ring_due(ports), tuple(given_up))


def release_and_ring(ports: SweepPorts, limits: ReleaseLimits) -> int:
    """Let the next jobs of the batches begin, as soon as one has ended. Raises `Unavailable`."""
    released = release(ports.recovery, ports.reports, limits)
    if released:
        ports.queue.ring(released)
    return len(released)


def release(recovery: Recovery, reports: WorkerReports, limits: ReleaseLimits) -> list[str]:
    """Let the next jobs of the batches be claimed, as many as may be in flight; their task ids. Raises `Unavailable`."""
    return recovery.release_batch_jobs(limits.batch_size, read_rooms(reports, limits.report_seconds))


def _ring_duties(ports: SweepPorts) -> None:
    """While messages wait that workers read first, no worker is free, or the ring for a duty is among them."""
    due = due_duties(ports.duties, ports.parking)
    if due and ports.queue.depth(first=True) == 0:
        for duty in due:
            ports.queue.ring_duty(duty)


def _ring_due(ports: SweepPorts) -> int:
    """Ring for what a dead worker left before all else, then for what waits and is due. Of each, the oldest: the newest are
    taken to have their message waiting already, as many as there are messages. What lost its ring or its worker grows old,
    and is rung for however busy the queue is."""

    def list_left(limit: int, but_newest: int) -> list[str]:
        left = [*ports.cleaning.unclean(limit + but_newest), *ports.recovery.abandoned(limit + but_newest)]
        return left[: max(0, len(left) - but_newest)][:limit]

    return _ring_oldest(ports.queue, list_left, first=True) + _ring_oldest(ports.queue, ports.recovery.due, first=False)


def _ring_oldest(queue: JobQueue, list_oldest: Callable[[int, int], list[str]], *, first: bool) -> int:
    if not list_oldest(1, 0):
        return 0
    unrung = list_oldest(AT_ONCE, queue.depth(first=first))
    queue.ring(unrung, first=first)
    return len(unrung)


def _give_up_exhausted(ports: SweepPorts) -> list[str]:
    ended = []
    for task in ports.recovery.exhausted(AT_ONCE):
        problem = Problem(
            "worker_died",
            ErrorClass.UNKNOWN.value,
            f"the worker died or lost its lease in stage '{task.stage}' in each of {task.attempt} attempts",
            f"Look for task_id {task.task_id} in the workers' logs and for killed processes (memory?), then submit it again.",
        )
        if task.publish_announced:
            problem = warn_of_delivery(problem, task)
        if ports.recovery.give_up(task, problem):
            ended.append(task.task_id)
            failed = ports.submissions.task(task.task_id)
            if failed is not None:
                # Above every fence of the task, so no late view of a stale worker covers it.
                post_quietly(ports.board, failed, fence=2**31, live=False)
    return ended
