"""A job, its statuses and stages, and which status may follow which.

A *job* is what the caller names (`job_id`); a *task* is one accepted submission of it (`task_id`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from ncr_upload.domain.text import CODE, NEXT_STEP, PROBLEM, bound_text


class Status(StrEnum):
    """The public status of a task (wire format)."""

    PENDING = "pending"
    PROCESSING = "processing"
    VALIDATION_PASSED = "validation_passed"
    UPLOADING = "uploading"
    COMPLETED = "completed"
    VALIDATION_FAILED = "validation_failed"
    FAILED = "failed"
    CANCELLED = "cancelled"


TERMINAL = frozenset({Status.COMPLETED, Status.VALIDATION_FAILED, Status.FAILED, Status.CANCELLED})
LIVE = frozenset(Status) - TERMINAL

TRANSITIONS: dict[Status, frozenset[Status]] = {
    Status.PENDING: frozenset({Status.PROCESSING, Status.FAILED, Status.CANCELLED}),
    Status.PROCESSING: frozenset(
        {Status.PENDING, Status.VALIDATION_PASSED, Status.VALIDATION_FAILED, Status.COMPLETED, Status.FAILED, Status.CANCELLED}
    ),
    Status.VALIDATION_PASSED: frozenset({Status.PENDING, Status.PROCESSING, Status.UPLOADING, Status.FAILED, Status.CANCELLED}),
    Status.UPLOADING: frozenset({Status.PENDING, Status.PROCESSING, Status.COMPLETED, Status.FAILED, Status.CANCELLED}),
    Status.COMPLETED: frozenset(),
    Status.VALIDATION_FAILED: frozenset(),
    Status.FAILED: frozenset(),
    Status.CANCELLED: frozenset(),
}
"""Every legal move. A worker that dies leaves its task live; the next claim moves it to `processing` again.
`processing` to `completed` is the attempt that finds the package already published by the one before it."""


class Stage(StrEnum):
    """Where in the pipeline a task is (wire format, finer than `Status`)."""

    QUEUED = "queued"
    LOOKUP = "lookup"
    DOWNLOAD = "download"
    VALIDATE = "validate"
    UPLOAD = "upload"
    PUBLISH = "publish"
    RECORD = "record"
    CLEANUP = "cleanup"
    DONE = "done"


PROGRESS_SPAN: dict[Stage, tuple[float, float]] = {
    Stage.QUEUED: (0, 0),
    Stage.LOOKUP: (0, 5),
    Stage.DOWNLOAD: (5, 45),
    Stage.VALIDATE: (45, 60),
    Stage.UPLOAD: (60, 95),
    Stage.PUBLISH: (95, 97),
    Stage.RECORD: (97, 99),
    Stage.CLEANUP: (99, 100),
    Stage.DONE: (100, 100),
}


def progress_percent(stage: Stage, done_bytes: int = 0, total_bytes: int = 0) -> float:
    """Progress of a task, 0 to 100, from its stage and how much of that stage's bytes are through."""
    low, high = PROGRESS_SPAN[stage]
    share = min(1.0, done_bytes / total_bytes) if total_bytes > 0 else 0.0
    return round(low + (high - low) * share, 1)


def may_follow(now: Status, then: Status) -> bool:
    """Whether a task in status `now` may move to `then`."""
    return then in TRANSITIONS[now]


@dataclass(frozen=True, slots=True)
class NewJob:
    """What a caller asks for. `row_id` is `job_details.id`, when the caller knows it."""

    job_id: str
    username: str
    campaign: str
    row_id: int | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a task waits or ended: `error_class` is one of `retries.ErrorClass`, the rest as in `DeliveryError`. Bounded here."""

    code: str
    error_class: str
    message: str
    next_step: str

    def __post_init__(self) -> None:
        for name, limit in (("code", CODE), ("message", PROBLEM), ("next_step", NEXT_STEP)):
            object.__setattr__(self, name, bound_text(getattr(self, name), limit))


@dataclass(frozen=True, slots=True)
class Task:
    """One row of the ledger. Times are seconds since the epoch by the database's clock."""

    task_id: str
    job_id: str
    username: str
    campaign: str
    row_id: int | None
    batch_id: str | None
    status: Status
    stage: Stage
    progress: float
    message: str
    attempt: int
    max_attempts: int
    created_at: float
    updated_at: float
    started_at: float | None = None
    finished_at: float | None = None
    due_at: float | None = None
    sku: str | None = None
    verdict: str | None = None
    files: int | None = None
    bytes: int | None = None
    problem: Problem | None = None
    publish_announced: bool = False
    """Whether an attempt was about to publish, or has, and nobody has looked since."""


@dataclass(frozen=True, slots=True)
class Claim:
    """The right to work on a task until the lease ends. `fence` grows by one with every claim of the task;
    a write with an older fence changes nothing."""

    task: Task
    fence: int
    worker: str
    lease_seconds: float
    cancel_requested: bool = False
    publish_fence: int | None = None
    """The fence of an earlier attempt that had announced its publish renames, if any (see `DropoffSession.is_published`)."""

    @property
    def looks_only(self) -> bool:
        """Whether the attempts are spent, and this is only to see if an announced publish has happened."""
        return self.task.attempt > self.task.max_attempts


@dataclass(frozen=True, slots=True)
class Event:
    """One line of a task's history."""

    at: float
    attempt: int
    stage: Stage
    kind: str
    actor: str
    message: str
