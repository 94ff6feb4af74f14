"""Accepting jobs: room in memory, one transaction in the ledger, then the doorbell. What is accepted is never lost."""

from __future__ import annotations

import hashlib
import json
import logging
import uuid
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from ncr_upload.application.doorbell import Doorbell
from ncr_upload.application.monitoring import read_rooms
from ncr_upload.application.ports import (
    AlreadyLive,
    CancelAnswer,
    Host,
    Idempotency,
    KeyReused,
    Memory,
    Recovery,
    Submissions,
    Wanted,
    WorkerReports,
)
from ncr_upload.application.recovery import ReleaseLimits, release
from ncr_upload.domain.admission import AdmissionLimits, Defer, decide
from ncr_upload.domain.batches import plan_room
from ncr_upload.domain.errors import Unavailable
from ncr_upload.domain.jobs import TERMINAL, NewJob, Status, Task

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SubmitPorts:
    """Everything a submit or a cancel touches."""

    ledger: Submissions
    recovery: Recovery
    reports: WorkerReports
    host: Host
    doorbell: Doorbell


@dataclass(frozen=True, slots=True)
class SubmitLimits:
    """What is accepted now, and how much of a batch may be in flight."""

    admission: AdmissionLimits
    release: ReleaseLimits


@dataclass(frozen=True, slots=True)
class Accepted:
    """In the ledger. `batch_id` is None for a job on its own; the tasks are in the order of the jobs. `conflicts` were left
    out, since they are in flight already."""

    tasks: tuple[Task, ...]
    batch_id: str | None = None
    conflicts: tuple[AlreadyLive, ...] = ()


@dataclass(frozen=True, slots=True)
class AlreadyRunning:
    """Nothing was accepted: these jobs are in flight."""

    live: tuple[AlreadyLive, ...]


@dataclass(frozen=True, slots=True)
class Busy:
    """Nothing was accepted: too little memory now."""

    memory: Memory
    defer: Defer


@dataclass(frozen=True, slots=True)
class NotRetried:
    """The task was delivered: there is nothing to try again."""

    task: Task


@dataclass(frozen=True, slots=True)
class NothingFailed:
    """No job of the batch has failed: there is nothing to try again."""

    batch_id: str


Answer = Accepted | AlreadyRunning | Busy | KeyReused


@dataclass(frozen=True, slots=True)
class Repeated:
    """The jobs at positions `first` and `again` have the same id."""

    job_id: str
    first: int
    again: int


def find_repeated(jobs: Sequence[NewJob]) -> list[Repeated]:
    """Every job that is named again, with where it was named first."""
    first: dict[str, int] = {}
    repeated = []
    for position, job in enumerate(jobs):
        if job.job_id in first:
            repeated.append(Repeated(job.job_id, first[job.job_id], position))
        else:
            first[job.job_id] = position
    return repeated


def identify(key: str | None, request: str, jobs: Sequence[NewJob]) -> Idempotency | None:
    """The caller's key with the fingerprint of what was asked, if there is a key."""
    if key is None:
        return None
    asked = json.dumps([request, *(astuple(job) for job in jobs)], ensure_ascii=False, separators=(",", ":"))
    return Idempotency(key, hashlib.sha256(asked.encode()).hexdigest())


def submit_each(wanted: Sequence[Wanted], ports: SubmitPorts, limits: SubmitLimits) -> list[Answer | Unavailable]:
    """Accept each job on its own, those that came together in one transaction. `Unavailable` is an answer too: the database
    did not answer, and nothing of that job was confirmed."""
    if busy := _find_no_room(ports.host, limits.admission):
        return [busy] * len(wanted)
    found = ports.ledger.accept_each(wanted)
    ports.doorbell.press([task for task in found if isinstance(task, Task)])
    return [_answer_of(each) for each in found]


def _answer_of(found: Task | AlreadyLive | KeyReused | Unavailable) -> Answer | Unavailable:
    match found:
        case Task():
            return Accepted((found,))
        case AlreadyLive():
            return AlreadyRunning((found,))
    return found


def submit(wanted: Wanted, ports: SubmitPorts, limits: SubmitLimits) -> Answer:
    """Accept one job. Raises `Unavailable` when the database does not answer: then nothing was confirmed."""
    (answer,) = submit_each([wanted], ports, limits)
    if isinstance(answer, Unavailable):
        raise answer
    return answer


def submit_again(task_id: str, ports: SubmitPorts, limits: SubmitLimits) -> Answer | NotRetried | None:
    """Accept an ended task's job once more, as a new task; None for an id never issued. Raises as `submit`."""
    task = ports.ledger.task(task_id)
    if task is None:
        return None
    if task.status not in TERMINAL:
        return AlreadyRunning((AlreadyLive(task.job_id, task.task_id),))
    if task.status is Status.COMPLETED:
        return NotRetried(task)
    job = NewJob(task.job_id, task.username, task.campaign, task.row_id)
    return submit(Wanted(job, f"accepted as a retry of task {task_id}"), ports, limits)


def submit_batch(
    jobs: Sequence[NewJob],
    ports: SubmitPorts,
    limits: SubmitLimits,
    *,
    skip_live: bool = False,
    remark: str = "accepted",
    idempotency: Idempotency | None = None,
) -> Answer:
    """Accept all the jobs or none; with `skip_live`, all but those in flight already. The first BATCH_SIZE are ready at once;
    when a worker is short of memory or disk, as many as the workers have room for. Raises as `submit`."""
    if busy := _find_no_room(ports.host, limits.admission):
        return busy
    is_roomy = plan_room(read_rooms(ports.reports, limits.release.report_seconds), in_flight=0) is None
    found = ports.ledger.accept(
        jobs,
        batch_id=str(uuid.uuid4()),
        release=limits.release.batch_size if is_roomy else 0,
        remark=remark,
        skip_live=skip_live,
        idempotency=idempotency,
    )
    if isinstance(found, KeyReused):
        return found
    if live := tuple(each for each in found if isinstance(each, AlreadyLive)):
        return AlreadyRunning(live)
    tasks = tuple(each for each in found if isinstance(each, Task))
    ports.doorbell.press([task for task in tasks[: limits.release.batch_size] if task.due_at is not None])
    if not is_roomy:
        _release_next(ports, limits)
    return Accepted(tasks, tasks[0].batch_id, _find_conflicts(tasks, len(jobs), ports.ledger))


def _find_conflicts(tasks: Sequence[Task], wanted: int, ledger: Submissions) -> tuple[AlreadyLive, ...]:
    batch_id = tasks[0].batch_id
    return () if batch_id is None or len(tasks) == wanted else tuple(ledger.conflicts(batch_id))


def submit_failed_again(batch_id: str, ports: SubmitPorts, limits: SubmitLimits) -> Answer | NothingFailed | None:
    """Accept the jobs of a batch that failed or were refused once more, as a new batch; those in flight already are left
    out. None for an id never issued. Raises as `submit`."""
    jobs = ports.ledger.unsuccessful(batch_id)
    if jobs is None:
        return None
    if not jobs:
        return NothingFailed(batch_id)
    return submit_batch(jobs, ports, limits, skip_live=True, remark=f"accepted as a retry from batch {batch_id}")


def cancel(task_id: str, ports: SubmitPorts, limits: SubmitLimits) -> CancelAnswer | None:
    """See `Submissions.cancel`. Of a batch's task that has ended so, the next one begins in its place."""
    answer = ports.ledger.cancel(task_id)
    if answer is CancelAnswer.CANCELLED:
        task = ports.ledger.task(task_id)
        if task is not None and task.batch_id is not None:
            _release_next(ports, limits)
    return answer


def _release_next(ports: SubmitPorts, limits: SubmitLimits) -> None:
    """What the caller asked for is done already: should this fail, the sweeper releases."""
    try:
        ports.doorbell.press(release(ports.recovery, ports.reports, limits.release))
    except Unavailable as error:
        log.info("release left to the sweeper: %s", error.message)


def _find_no_room(host: Host, limits: AdmissionLimits) -> Busy | None:
    memory = host.memory()
    decision = decide(memory_used_percent=memory.used_percent, limits=limits)
    return Busy(memory, decision) if isinstance(decision, Defer) else None
