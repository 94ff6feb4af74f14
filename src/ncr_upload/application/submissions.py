"""Accepting jobs: room in memory, one transaction in the ledger, then the doorbell. What is accepted is never lost."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

from ncr_upload.application.doorbell import Doorbell
from ncr_upload.application.ports import AlreadyLive, Host, Idempotency, KeyReused, Memory, Submissions
from ncr_upload.domain.admission import AdmissionLimits, Defer, decide
from ncr_upload.domain.jobs import TERMINAL, NewJob, Status, Task


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


def submit(
    job: NewJob,
    *,
    ledger: Submissions,
    host: Host,
    doorbell: Doorbell,
    limits: AdmissionLimits,
    idempotency: Idempotency | None = None,
) -> Answer:
    """Accept one job. Raises `Unavailable` when the database does not answer: then nothing was confirmed."""
    return _accept([job], None, 1, ledger, host, doorbell, limits, idempotency=idempotency)


def submit_again(
    task_id: str, *, ledger: Submissions, host: Host, doorbell: Doorbell, limits: AdmissionLimits
) -> Answer | NotRetried | None:
    """Accept an ended task's job once more, as a new task; None for an id never issued. Raises as `submit`."""
    task = ledger.task(task_id)
    if task is None:
        return None
    if task.status not in TERMINAL:
        return AlreadyRunning((AlreadyLive(task.job_id, task.task_id),))
    if task.status is Status.COMPLETED:
        return NotRetried(task)
    job = NewJob(task.job_id, task.username, task.campaign, task.row_id)
    return _accept([job], None, 1, ledger, host, doorbell, limits, remark=f"accepted as a retry of task {task_id}")


def submit_batch(
    jobs: Sequence[NewJob],
    *,
    batch_size: int,
    skip_live: bool = False,
    ledger: Submissions,
    host: Host,
    doorbell: Doorbell,
    limits: AdmissionLimits,
    remark: str = "accepted",
    idempotency: Idempotency | None = None,
) -> Answer:
    """Accept all the jobs, the first `batch_size` of them ready at once, or none; with `skip_live`, all but those in
    flight already. Raises as `submit`."""
    answer = _accept(
        jobs,
        str(uuid.uuid4()),
        batch_size,
        ledger,
        host,
        doorbell,
        limits,
        remark,
        skip_live=skip_live,
        idempotency=idempotency,
    )
    if isinstance(answer, Accepted) and answer.batch_id is not None and len(answer.tasks) < len(jobs):
        return replace(answer, conflicts=tuple(ledger.conflicts(answer.batch_id)))
    return answer


def submit_failed_again(
    batch_id: str, *, batch_size: int, ledger: Submissions, host: Host, doorbell: Doorbell, limits: AdmissionLimits
) -> Answer | NothingFailed | None:
    """Accept the jobs of a batch that failed or were refused once more, as a new batch; those in flight already are left
    out. None for an id never issued. Raises as `submit`."""
    jobs = ledger.unsuccessful(batch_id)
    if jobs is None:
        return None
    if not jobs:
        return NothingFailed(batch_id)
    return submit_batch(
        jobs,
        batch_size=batch_size,
        skip_live=True,
        ledger=ledger,
        host=host,
        doorbell=doorbell,
        limits=limits,
        remark=f"accepted as a retry from batch {batch_id}",
    )


def _accept(
    jobs: Sequence[NewJob],
    batch_id: str | None,
    release: int,
    ledger: Submissions,
    host: Host,
    doorbell: Doorbell,
    limits: AdmissionLimits,
    remark: str = "accepted",
    *,
    skip_live: bool = False,
    idempotency: Idempotency | None = None,
) -> Answer:
    memory = host.memory()
    decision = decide(memory_used_percent=memory.used_percent, limits=limits)
    if isinstance(decision, Defer):
        return Busy(memory, decision)
    answers = ledger.accept(
        jobs, batch_id=batch_id, release=release, remark=remark, skip_live=skip_live, idempotency=idempotency
    )
    if isinstance(answers, KeyReused):
        return answers
    live = tuple(answer for answer in answers if isinstance(answer, AlreadyLive))
    if live:
        return AlreadyRunning(live)
    tasks = tuple(answer for answer in answers if isinstance(answer, Task))
    doorbell.press(tasks[:release])
    return Accepted(tasks, tasks[0].batch_id)
