"""The bodies of requests and answers (wire format), as the OpenAPI document shows them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema

from ncr_upload import __version__
from ncr_upload.domain.batches import BatchStatus
from ncr_upload.domain.jobs import NewJob, Status
from ncr_upload.domain.names import JOB_ID_PATTERN, MAX_NAME_LENGTH, check_job_id, check_label

TASK_ID = "0b9f4b1e-8c1d-4c52-9c53-0f1b9f1e8a11"
OTHER_TASK_ID = "5f3c0a6e-4f0e-4c1e-9d2b-2b7f5c1c7a90"
BATCH_ID = "9d1c2a52-3a77-4f0e-8a3c-6d0a3f7f5b10"
TIME = "2026-11-23T20:56:01.250Z"
MAX_ROW_ID = 2**63 - 1
MAX_BATCH_JOBS = 10_000

EXAMPLE_JOB: dict[str, Any] = {"job_id": "your-job-id", "username": "your-username", "campaign": "your-campaign", "row_id": 123}
EXAMPLE_VIEW: dict[str, Any] = {
    **EXAMPLE_JOB,
    "task_id": TASK_ID,
    "batch_id": None,
    "status": "uploading",
    "stage": "upload",
    "progress": 72.4,
    "message": "uploading 36 files",
    "attempt": 1,
    "max_attempts": 5,
    "timestamp": TIME,
    "created_at": TIME,
    "started_at": TIME,
    "finished_at": None,
    "next_attempt_at": None,
    "sku": "SKU1",
    "verdict": "Valid",
    "files": 36,
    "bytes": 268435456,
    "problem": None,
}

JobId = Annotated[
    str,
    AfterValidator(check_job_id),
    WithJsonSchema({"type": "string", "pattern": JOB_ID_PATTERN, "minLength": 1, "maxLength": MAX_NAME_LENGTH}),
]
Label = Annotated[
    str, AfterValidator(check_label), WithJsonSchema({"type": "string", "minLength": 1, "maxLength": MAX_NAME_LENGTH})
]


class JobRequest(BaseModel):
    """A job to deliver. A field that is not listed here is refused: a misspelt `row_id` would otherwise be ignored."""

    model_config = ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [EXAMPLE_JOB]})

    job_id: JobId = Field(
        description="As in `job_details.job_id`: 1 to 128 letters, digits, `.`, `_`, `-`, not starting with a dot."
    )
    username: Label = Field(
        description="Who asks: 1 to 128 printable characters, not only spaces. Written to the studio's history."
    )
    campaign: Label = Field(description="The campaign: 1 to 128 printable characters, not only spaces.")
    row_id: int | None = Field(
        None, ge=1, le=MAX_ROW_ID, description="`job_details.id`, where known; refused if it is another job's."
    )

    def to_job(self) -> NewJob:
        return NewJob(self.job_id, self.username, self.campaign, self.row_id)


class Accepted(BaseModel):
    """The job is in the ledger and will end in exactly one terminal status."""

    job_id: str
    task_id: str = Field(description="This submission of the job; ask `/job-status/{task_id}`.")
    status: Status
    message: str
    timestamp: str = Field(description="When it was accepted, UTC.")

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"job_id": "your-job-id", "task_id": TASK_ID, "status": "pending", "message": "accepted", "timestamp": TIME}
            ]
        }
    )


class Retried(Accepted):
    """The job is in the ledger again, as a new task."""

    retry_of: str = Field(description="The task that is tried again; its history stays.")

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "job_id": "your-job-id",
                    "task_id": TASK_ID,
                    "status": "pending",
                    "message": f"accepted as a retry of task {OTHER_TASK_ID}",
                    "timestamp": TIME,
                    "retry_of": OTHER_TASK_ID,
                }
            ]
        }
    )


class Cancelled(BaseModel):
    """What became of the wish to cancel."""

    task_id: str
    status: Literal["cancelled", "cancelling"] = Field(
        description="`cancelled`: ended. `cancelling`: a worker has the job and stops within seconds; follow `/job-status`."
    )
    message: str

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"task_id": TASK_ID, "status": "cancelled", "message": "The job is cancelled; nothing is delivered."}]
        }
    )


class JobRef(BaseModel):
    """A job of a batch and its task."""

    job_id: str
    task_id: str


class BatchAccepted(BaseModel):
    """All jobs of the batch are in the ledger."""

    batch_id: str = Field(description="Ask `/batch-status/{batch_id}`.")
    total_jobs: int
    jobs: list[JobRef] = Field(description="In the order they were sent.")
    conflicts: list[JobRef] = Field(
        description="Jobs left out because they are in flight already, each with the task to follow instead."
    )
    status: BatchStatus
    message: str
    timestamp: str

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "batch_id": BATCH_ID,
                    "total_jobs": 1,
                    "jobs": [{"job_id": "job-1", "task_id": TASK_ID}],
                    "conflicts": [{"job_id": "job-2", "task_id": OTHER_TASK_ID}],
                    "status": "pending",
                    "message": "accepted 1 job",
                    "timestamp": TIME,
                }
            ]
        }
    )


class BatchRetried(BatchAccepted):
    """The unsuccessful jobs of a batch are in the ledger again, as a new batch."""

    retry_of: str = Field(description="The batch they were in before; it stays as it ended.")


class BatchCancelled(BaseModel):
    """What became of the wish to cancel a batch, in numbers of its jobs."""

    batch_id: str
    cancelled: int = Field(description="Ended; nothing of them is delivered.")
    cancelling: int = Field(description="A worker has them and stops within seconds.")
    publishing: int = Field(description="Too late: their package is being published.")
    ended: int = Field(description="Had ended before.")
    message: str

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "batch_id": BATCH_ID,
                    "cancelled": 90,
                    "cancelling": 5,
                    "publishing": 0,
                    "ended": 5,
                    "message": "95 of 100 jobs are cancelled or stop within seconds.",
                }
            ]
        }
    )


class ProblemView(BaseModel):
    """Why a task waits or ended."""

    code: str = Field(description="Stable and machine readable, such as `object_missing`.")
    class_: str = Field(alias="class", description="What may be done about it: rejected, transient, parked, deferred, unknown.")
    message: str
    next_step: str = Field(description="What an operator can do.")


class TaskView(BaseModel):
    """A task as it is now."""

    job_id: str
    task_id: str
    username: str
    campaign: str
    row_id: int | None
    batch_id: str | None
    status: Status = Field(description="`completed` means delivered; a validator's no is `validation_failed`.")
    stage: str = Field(description="Where in the pipeline: queued, lookup, download, validate, upload, publish, record, done.")
    progress: float = Field(description="Percent of the whole job.", ge=0, le=100)
    message: str
    attempt: int
    max_attempts: int
    timestamp: str = Field(description="When this was so, UTC.")
    created_at: str
    started_at: str | None
    finished_at: str | None
    next_attempt_at: str | None = Field(description="When a waiting task may be taken up at the earliest.")
    sku: str | None
    verdict: str | None = Field(description="The validator's word on the package.")
    files: int | None = Field(description="Files in the package.")
    bytes: int | None = Field(description="Their bytes.")
    problem: ProblemView | None

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE_VIEW]})


class BatchView(BaseModel):
    """A batch as it is now, with one page of its tasks."""

    batch_id: str
    status: BatchStatus
    total_jobs: int
    counts: dict[str, int] = Field(description="Tasks by status; every status is named.")
    percentage: float = Field(
        description="How far the batch is, by bytes as far as they are known; 100 once every task has ended.", ge=0, le=100
    )
    stalled: bool = Field(
        description="Whether no task has started or ended for BATCH_TIMEOUT seconds though some have not ended."
    )
    jobs: list[TaskView] = Field(description="In the order they were sent, at most `limit`.")
    cursor: str | None = Field(description="Send it as `cursor` for the next page; null on the last.")
    conflicts: list[JobRef] = Field(description="Jobs that were left out because they were in flight already.")
    created_at: str
    started_at: str | None = Field(description="When its first task was taken up.")
    finished_at: str | None = Field(description="When its last task ended.")
    estimated_end: str | None = Field(description="At the pace so far; null before the start, and after the end.")
    timestamp: str = Field(description="When a task of the batch last changed, UTC.")

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "batch_id": BATCH_ID,
                    "status": "processing",
                    "total_jobs": 1,
                    "counts": {status.value: int(status is Status.UPLOADING) for status in Status},
                    "percentage": 60.0,
                    "stalled": False,
                    "jobs": [EXAMPLE_VIEW | {"batch_id": BATCH_ID}],
                    "cursor": None,
                    "conflicts": [],
                    "created_at": TIME,
                    "started_at": TIME,
                    "finished_at": None,
                    "estimated_end": TIME,
                    "timestamp": TIME,
                }
            ]
        }
    )


class ActiveJobs(BaseModel):
    """Tasks that have not ended, oldest first."""

    active_jobs: list[TaskView]
    count: int = Field(description="Tasks in this answer.")
    total: int = Field(description="Tasks that match, on all pages.")
    cursor: str | None = Field(description="Send it as `cursor` for the next page; null on the last.")

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"active_jobs": [EXAMPLE_VIEW], "count": 1, "total": 1, "cursor": None}]}
    )


class EventView(BaseModel):
    """One line of a task's history."""

    at: str
    attempt: int
    stage: str
    kind: str = Field(description="accepted, claimed, stage, put_back, or the status it ended in.")
    actor: str = Field(description="The user, worker or sweeper that did it.")
    message: str


class History(BaseModel):
    """Everything that happened to a task, oldest first."""

    task_id: str
    events: list[EventView]

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "task_id": TASK_ID,
                    "events": [
                        {
                            "at": TIME,
                            "attempt": 0,
                            "stage": "queued",
                            "kind": "accepted",
                            "actor": "user your-username",
                            "message": "accepted",
                        }
                    ],
                }
            ]
        }
    )


class HealthView(BaseModel):
    """The state of the service and of its parts: `connected` or `unavailable`."""

    status: str = Field(
        description="`healthy`; `degraded`: jobs are accepted and kept, but not all can be worked on; `unhealthy`: none is."
    )
    redis: str
    database: str
    worker: str = Field(description="Whether any worker answers.")
    tables: str | None = Field(None, description="The service's and the studio's. Only with `deep=true`.")
    s3: str | None = Field(None, description="Only with `deep=true`.")
    sftp: str | None = Field(None, description="Only with `deep=true`.")
    validator: str | None = Field(None, description="Only with `deep=true`.")
    problems: dict[str, str] | None = Field(
        None, description="What is wrong and the next step, by part; only for callers with access."
    )
    timestamp: str

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "status": "healthy",
                    "redis": "connected",
                    "database": "connected",
                    "worker": "connected",
                    "problems": {},
                    "timestamp": TIME,
                }
            ]
        }
    )


class ProcessMemory(BaseModel):
    """This API process."""

    rss_bytes: int = Field(description="Resident memory.")


class SystemMemory(BaseModel):
    """The container this runs in, or the host where there is none."""

    used_bytes: int
    total_bytes: int
    available_bytes: int
    used_percent: float
    source: str = Field(description="cgroup2, cgroup1 or host.")


class WorkerMemory(BaseModel):
    """What a worker said of itself and its host, every MEMORY_CHECK_INTERVAL seconds."""

    worker: str
    seen_at: str
    resident_bytes: int = Field(description="The worker with its children.")
    used_bytes: int
    total_bytes: int
    used_percent: float
    source: str
    free_disk_bytes: int = Field(description="Where WORK_DIR is, and what the cache of downloads there would make room for.")
    capacity: int = Field(description="Jobs at once it has room for now.")
    configured: int = Field(description="Jobs at once it is set to.")


class MemoryView(BaseModel):
    """Memory, and what it allows."""

    process: ProcessMemory
    system: SystemMemory
    limit_percent: float = Field(description="MAX_MEMORY_USAGE_PERCENT.")
    accepting_jobs: bool = Field(description="Whether a job sent now would be accepted.")
    recommended_concurrency: int = Field(description="Worker children that fit into what is left below the limit, at least 1.")
    workers: list[WorkerMemory] = Field(description="Every worker that still reports.")
    problems: list[str] = Field(description="Why the workers' reports are missing, if they are.")
    timestamp: str

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "process": {"rss_bytes": 71303168},
                    "system": {
                        "used_bytes": 858993459,
                        "total_bytes": 2147483648,
                        "available_bytes": 1288490189,
                        "used_percent": 40.0,
                        "source": "cgroup2",
                    },
                    "limit_percent": 80.0,
                    "accepting_jobs": True,
                    "recommended_concurrency": 4,
                    "workers": [
                        {
                            "worker": "ncr-17@host",
                            "seen_at": TIME,
                            "resident_bytes": 524288000,
                            "used_bytes": 858993459,
                            "total_bytes": 2147483648,
                            "used_percent": 40.0,
                            "source": "cgroup2",
                            "free_disk_bytes": 42949672960,
                            "capacity": 4,
                            "configured": 4,
                        }
                    ],
                    "problems": [],
                    "timestamp": TIME,
                }
            ]
        }
    )


class CeleryView(BaseModel):
    """What the workers say of themselves; empty where none answers."""

    active: dict[str, Any] = Field(description="Tasks being worked on, by worker.")
    scheduled: dict[str, Any] = Field(description="Tasks a worker holds for later, by worker.")
    stats: dict[str, Any] = Field(description="Statistics, by worker.")
    workers: list[str] = Field(description="The workers that answered.")
    queues: dict[str, int | None] = Field(description="Messages waiting, by queue; null when Redis did not answer.")
    problems: list[str] = Field(description="Which part did not answer in time, if any.")
    timestamp: str

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "active": {"ncr-17@host": []},
                    "scheduled": {"ncr-17@host": []},
                    "stats": {"ncr-17@host": {"total": {"ncr.run_job": 12}}},
                    "workers": ["ncr-17@host"],
                    "queues": {"ncr_jobs": 0},
                    "problems": [],
                    "timestamp": TIME,
                }
            ]
        }
    )


class About(BaseModel):
    """What this is."""

    name: str
    version: str
    status: str
    links: dict[str, str]

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "name": "NCR Upload API",
                    "version": __version__,
                    "status": "running",
                    "links": {"docs": "/docs", "redoc": "/redoc", "openapi": "/openapi.json", "health": "/health"},
                }
            ]
        }
    )


class Alive(BaseModel):
    """A probe's answer."""

    status: str
    timestamp: str

    model_config = ConfigDict(json_schema_extra={"examples": [{"status": "ok", "timestamp": TIME}]})


class FieldError(BaseModel):
    """One field of the request that was refused."""

    field: str = Field(description="`username`, `[2].job_id`, `limit`; `body` for the body as a whole.")
    message: str


class Problem(BaseModel):
    """An error (RFC 9457, `application/problem+json`)."""

    type: str
    title: str
    status: int
    code: str = Field(description="Stable and machine readable.")
    detail: str = Field(description="What is wrong, and with which thing.")
    next_step: str | None = Field(None, description="What to do about it.")
    errors: list[FieldError] | None = Field(None, description="The fields refused; at most 100 are listed.")
    task_id: str | None = Field(None, description="On 409: the task that is in flight.")
    running: list[JobRef] | None = Field(None, description="On 409: every job that is in flight, with its task.")
    retry_after_seconds: int | None = Field(None, description="On 503: as the header Retry-After.")
    reference: str | None = Field(None, description="On 500: where to find it in the log.")

    model_config = ConfigDict(extra="allow")
