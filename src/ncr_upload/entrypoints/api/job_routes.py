"""Jobs and batches: sending them and following them."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from enum import StrEnum
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import ValidationError

from ncr_upload.application import queries
from ncr_upload.application.lanes import ANSWER_SECONDS
from ncr_upload.application.ports import CancelAnswer, KeyReused, Wanted
from ncr_upload.application.submissions import (
    Accepted,
    AlreadyRunning,
    Answer,
    Busy,
    NothingFailed,
    NotRetried,
    cancel,
    find_repeated,
    identify,
    submit_again,
    submit_batch,
    submit_failed_again,
)
from ncr_upload.application.views import iso_time
from ncr_upload.domain.jobs import NewJob, Status, Task
from ncr_upload.domain.names import ISSUED_ID
from ncr_upload.entrypoints.api import models
from ncr_upload.entrypoints.api.access import documented
from ncr_upload.entrypoints.api.batch_body import REQUEST_BODY, read_batch
from ncr_upload.entrypoints.api.context import In
from ncr_upload.entrypoints.api.problems import ProblemFound, document, shown

router = APIRouter(dependencies=[documented])

TaskId = Annotated[str, Path(description="As answered by `/process-job`.", examples=[models.TASK_ID])]
BatchId = Annotated[str, Path(description="As answered by `/process-batch`.", examples=[models.BATCH_ID])]
Limit = Annotated[int, Query(ge=1, le=1000, description="Tasks on a page.")]
Cursor = Annotated[str | None, Query(pattern="^[0-9]{1,18}$", description="The `cursor` of the page before.")]

IdempotencyKey = Annotated[
    str | None,
    Header(
        pattern="^[\\x21-\\x7e]{1,255}$",
        description="Makes a repeat harmless: the same key with the same body is answered as the first time.",
        examples=["9c7d5c1e-7f5f-4d0e-8e0e-1b2a3c4d5e6f"],
    ),
]


class OnConflict(StrEnum):
    """`skip`: the batch goes on without the job. `reject`: nothing of the batch is accepted."""

    SKIP = "skip"
    REJECT = "reject"


SECONDS_PER_JOB = 0.001
"""What a batch may take beyond the time of a single job, on a slow database. One that is away is noticed before."""


class LeanRoute(APIRoute):
    """Takes a plain `POST /process-job` itself: the framework's way to the function below, and back, takes as long as all
    else. Whatever is not plain (bad input, an Idempotency-Key, another Content-Type) goes that way."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        whole = super().get_route_handler()

        async def handle(request: Request) -> Response:
            headers = request.headers
            if headers.get("content-type") != "application/json" or "idempotency-key" in headers:
                return await whole(request)
            try:
                body = models.JobRequest.model_validate_json(await request.body())
            except ValidationError:
                return await whole(request)
            return JSONResponse(await process_job(body, request, request.app.state.context), 202)

        return handle


lean = APIRouter(dependencies=[documented], route_class=LeanRoute)


@lean.post(
    "/process-job",
    status_code=202,
    response_model=models.Accepted,
    responses=document(
        "already_running",
        "bodies_in_flight",
        "body_timeout",
        "body_too_large",
        "encoding_unsupported",
        "idempotency_key_reused",
        "invalid_request",
        "memory_pressure",
        "unavailable",
    ),
    tags=["Jobs"],
    summary="Send a job",
)
async def process_job(
    body: models.JobRequest, request: Request, api: In, idempotency_key: IdempotencyKey = None
) -> dict[str, Any]:
    """Accept a job for delivery. A 202 means it is in the ledger and will end in exactly one terminal status, whatever
    dies meanwhile. 409 names the task if this `job_id` is already in flight.

    A 503 means nothing was confirmed: send the request again. Should it have been accepted after all (the database took
    the job, but its answer was lost), the repeat is answered 409 with the task.
    """
    job = body.to_job()
    wanted = Wanted(job, idempotency=identify(idempotency_key, "process-job", [job]))
    answer = await api.ports.lanes.jobs.run(wanted, api.submit_each)
    task = _accepted(answer, api).tasks[0]
    request.state.task_id = task.task_id
    return _describe(task)


@router.post(
    "/process-batch",
    status_code=202,
    response_model=models.BatchAccepted,
    responses=document(
        "already_running",
        "bodies_in_flight",
        "body_timeout",
        "body_too_large",
        "duplicate_jobs",
        "encoding_unsupported",
        "idempotency_key_reused",
        "invalid_request",
        "memory_pressure",
        "unavailable",
    ),
    tags=["Batches"],
    summary="Send a batch of jobs",
    openapi_extra={"requestBody": REQUEST_BODY},
)
async def process_batch(
    jobs: Annotated[list[NewJob], Depends(read_batch)],
    request: Request,
    api: In,
    on_conflict: Annotated[OnConflict, Query(description="What to do when a job is in flight already.")] = OnConflict.SKIP,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Accept 1 to 10,000 jobs. BATCH_SIZE of them are in flight at most; the others wait for their turn.

    A job that is in flight already is left out and named in `conflicts`, here and in the batch's status; with
    `on_conflict=reject`, or when no job would remain, the whole batch is answered 409 instead. A bad job, or one named
    twice, is a 422 and nothing is accepted. A 503 is as for `/process-job`."""
    _refuse_repeated(jobs)
    answer = await api.ports.lanes.submit.run(
        lambda: submit_batch(
            jobs,
            api.submits,
            api.limits,
            skip_live=on_conflict is OnConflict.SKIP,
            idempotency=identify(idempotency_key, f"process-batch {on_conflict}", jobs),
        ),
        ANSWER_SECONDS + len(jobs) * SECONDS_PER_JOB,
    )
    described = _describe_batch(_accepted(answer, api), request)
    return JSONResponse(described, 202)  # not checked against its model: that takes long for 10,000 jobs


@router.get(
    "/job-status/{task_id}",
    response_model=models.TaskView,
    responses=document("task_unknown", "unavailable"),
    tags=["Jobs"],
    summary="Status of a task",
)
async def job_status(task_id: TaskId, request: Request, api: In) -> dict[str, Any]:
    """Where a task is, with live progress. Answers for every job ever accepted, until HISTORY_DAYS after its end."""
    view = await queries.read_task(api.ports, task_id) if _is_issued(task_id, request, "task_id") else None
    if view is None:
        raise _unknown_task(task_id)
    return view


@router.get(
    "/jobs/active",
    response_model=models.ActiveJobs,
    responses=document("invalid_request", "unavailable"),
    tags=["Jobs"],
    summary="Tasks that have not ended",
)
async def active_jobs(
    api: In,
    username: Annotated[models.Label | None, Query(description="Only this user's.")] = None,
    campaign: Annotated[models.Label | None, Query(description="Only this campaign's.")] = None,
    status: Annotated[Status | None, Query(description="Only those in this status.")] = None,
    limit: Limit = 100,
    cursor: Cursor = None,
) -> dict[str, Any]:
    """Tasks that wait or run, oldest first, a page at a time."""
    return await queries.read_active(api.ports, username=username, campaign=campaign, status=status, limit=limit, cursor=cursor)


@router.get(
    "/jobs/{task_id}/history",
    response_model=models.History,
    responses=document("task_unknown", "unavailable"),
    tags=["Jobs"],
    summary="Timeline of a task",
)
async def job_history(task_id: TaskId, request: Request, api: In) -> dict[str, Any]:
    """Every attempt, stage, cause and actor of a task, oldest first."""
    history = await queries.read_history(api.ports, task_id) if _is_issued(task_id, request, "task_id") else None
    if history is None:
        raise _unknown_task(task_id)
    return history


@router.post(
    "/jobs/{task_id}/cancel",
    status_code=202,
    response_model=models.Cancelled,
    responses=document("already_ended", "being_published", "task_unknown", "unavailable"),
    tags=["Jobs"],
    summary="Cancel a task",
)
async def cancel_job(task_id: TaskId, request: Request, api: In) -> dict[str, Any]:
    """Cancel a task that waits, or ask its worker to stop. A task is either cancelled or published, never both: once its
    package is being published it is too late (409). A publish that was refused, and changed nothing, can be cancelled again.
    Asking twice is harmless."""
    known = _is_issued(task_id, request, "task_id")
    answer = await api.ports.lanes.submit.run(lambda: cancel(task_id, api.submits, api.limits)) if known else None
    match answer:
        case CancelAnswer.CANCELLED:
            message = "The job is cancelled; nothing is delivered."
            return {"task_id": task_id, "status": "cancelled", "message": message}
        case CancelAnswer.REQUESTED:
            message = "The worker that has the job stops within seconds; nothing is delivered."
            return {"task_id": task_id, "status": "cancelling", "message": message}
        case CancelAnswer.PUBLISHING:
            view = await queries.read_task(api.ports, task_id)
            detail, next_step = _tell_publishing(waits=view is not None and view["status"] == "pending")
            raise ProblemFound("being_published", detail, task_id=task_id, next_step=next_step)
        case CancelAnswer.ENDED:
            next_step = "Nothing to do: see its history."
            raise ProblemFound("already_ended", "The task has already ended.", task_id=task_id, next_step=next_step)
        case None:
            raise _unknown_task(task_id)


@router.post(
    "/jobs/{task_id}/retry",
    status_code=202,
    response_model=models.Retried,
    responses=document("already_ended", "already_running", "memory_pressure", "task_unknown", "unavailable"),
    tags=["Jobs"],
    summary="Try an ended task's job again",
)
async def retry_job(task_id: TaskId, request: Request, api: In) -> dict[str, Any]:
    """Accept the job of a failed, refused or cancelled task once more, with the same facts, as a new task. 409 if the job is
    in flight, or was delivered."""
    known = _is_issued(task_id, request, "task_id")
    answer = await api.ports.lanes.submit.run(lambda: submit_again(task_id, api.submits, api.limits)) if known else None
    if answer is None:
        raise _unknown_task(task_id)
    if isinstance(answer, NotRetried):
        next_step = "Nothing to do: the package is at the destination."
        raise ProblemFound("already_ended", "The task was delivered.", task_id=task_id, next_step=next_step)
    return _describe(_accepted(answer, api).tasks[0]) | {"retry_of": task_id}


@router.get(
    "/batch-status/{batch_id}",
    response_model=models.BatchView,
    responses=document("batch_unknown", "invalid_request", "unavailable"),
    tags=["Batches"],
    summary="Status of a batch",
)
async def batch_status(
    batch_id: BatchId, request: Request, api: In, limit: Limit = 1000, cursor: Cursor = None
) -> dict[str, Any]:
    """How a batch stands, with a page of its tasks in the order they were sent."""
    known = _is_issued(batch_id, request, "batch_id")
    timeout_seconds = api.settings.batch_timeout
    view = None
    if known:
        view = await queries.read_batch(api.ports, batch_id, limit=limit, cursor=cursor, timeout_seconds=timeout_seconds)
    if view is None:
        raise _unknown_batch(batch_id)
    return view


@router.post(
    "/batches/{batch_id}/cancel",
    status_code=202,
    response_model=models.BatchCancelled,
    responses=document("batch_unknown", "unavailable"),
    tags=["Batches"],
    summary="Cancel a batch",
)
async def cancel_batch(batch_id: BatchId, request: Request, api: In) -> dict[str, Any]:
    """Cancel every task of the batch that has not ended, as `/jobs/{task_id}/cancel` does. Asking twice is harmless."""
    ports = api.ports
    known = _is_issued(batch_id, request, "batch_id")
    answers = await ports.lanes.submit.run(lambda: ports.ledger.cancel_batch(batch_id)) if known else None
    if answers is None:
        raise _unknown_batch(batch_id)
    cancelled, cancelling = answers.get(CancelAnswer.CANCELLED, 0), answers.get(CancelAnswer.REQUESTED, 0)
    total = sum(answers.values())
    return {
        "batch_id": batch_id,
        "cancelled": cancelled,
        "cancelling": cancelling,
        "publishing": answers.get(CancelAnswer.PUBLISHING, 0),
        "ended": answers.get(CancelAnswer.ENDED, 0),
        "message": f"{cancelled + cancelling} of {total} jobs are cancelled or stop within seconds.",
    }


@router.post(
    "/batches/{batch_id}/retry-failed",
    status_code=202,
    response_model=models.BatchRetried,
    responses=document("already_running", "batch_unknown", "memory_pressure", "nothing_failed", "unavailable"),
    tags=["Batches"],
    summary="Try a batch's unsuccessful jobs again",
)
async def retry_failed(batch_id: BatchId, request: Request, api: In) -> dict[str, Any]:
    """Accept the jobs of the batch that failed or that the validator refused once more, as a new batch. Those in flight
    already are named in `conflicts`; 409 if all are, or if none has failed."""
    known = _is_issued(batch_id, request, "batch_id")
    answer = await api.ports.lanes.submit.run(lambda: submit_failed_again(batch_id, api.submits, api.limits)) if known else None
    if answer is None:
        raise _unknown_batch(batch_id)
    if isinstance(answer, NothingFailed):
        next_step = "Nothing to do; see the batch's status."
        raise ProblemFound("nothing_failed", "No job of the batch has failed.", batch_id=batch_id, next_step=next_step)
    return _describe_batch(_accepted(answer, api), request) | {"retry_of": batch_id}


def _describe_batch(accepted: Accepted, request: Request) -> dict[str, Any]:
    request.state.batch_id = accepted.batch_id
    count, left_out = len(accepted.tasks), len(accepted.conflicts)
    message = f"accepted {count} job{'' if count == 1 else 's'}"
    return {
        "batch_id": accepted.batch_id,
        "total_jobs": count,
        "jobs": [{"job_id": task.job_id, "task_id": task.task_id} for task in accepted.tasks],
        "conflicts": [{"job_id": each.job_id, "task_id": each.task_id} for each in accepted.conflicts],
        "status": Status.PENDING,
        "message": f"{message}; {left_out} left out, in flight already" if left_out else message,
        "timestamp": iso_time(accepted.tasks[0].created_at),
    }


def _describe(task: Task) -> dict[str, Any]:
    return {
        "job_id": task.job_id,
        "task_id": task.task_id,
        "status": task.status,
        "message": task.message,
        "timestamp": iso_time(task.created_at),
    }


def _tell_publishing(*, waits: bool) -> tuple[str, str]:
    """Say what is known of an announced publish, and what the caller can do."""
    if waits:
        return (
            "The package may be visible: the attempt that published it could not see how that ended.",
            "Follow the task: the next attempt looks at the destination. If nothing is visible there, cancel again.",
        )
    return (
        "The package is being published.",
        "Follow the task: it ends within seconds. If its publish is refused, cancel again.",
    )


def _unknown_task(task_id: str) -> ProblemFound:
    return ProblemFound("task_unknown", f"There is no task '{shown(task_id)}'.")


def _unknown_batch(batch_id: str) -> ProblemFound:
    return ProblemFound("batch_unknown", f"There is no batch '{shown(batch_id)}'.")


def _is_issued(identity: str, request: Request, name: str) -> bool:
    """Whether the id has the form of those we issue: the database is not asked about any other."""
    if ISSUED_ID.fullmatch(identity) is None:
        return False
    setattr(request.state, name, identity)
    return True


def _accepted(answer: Answer, api: In) -> Accepted:
    match answer:
        case Accepted():
            return answer
        case AlreadyRunning(live):
            raise ProblemFound(
                "already_running",
                f"Already in flight: {', '.join(job.job_id for job in live[:10])}{' and more' if len(live) > 10 else ''}.",
                task_id=live[0].task_id,
                running=[{"job_id": job.job_id, "task_id": job.task_id} for job in live],
                next_step="Follow these tasks, or send the jobs again once they have ended. Nothing was accepted.",
            )
        case KeyReused(key):
            raise ProblemFound(
                "idempotency_key_reused",
                f"The Idempotency-Key '{key}' was used before, for another request.",
                next_step="Use a new key for a new request; repeat a request with the very same body. Nothing was accepted.",
            )
        case Busy(memory, defer):
            raise ProblemFound(
                "memory_pressure",
                defer.reason,
                retry_after_seconds=defer.retry_after_seconds,
                memory={
                    "used_bytes": memory.used,
                    "total_bytes": memory.total,
                    "used_percent": round(memory.used_percent, 1),
                    "limit_percent": api.settings.max_memory_usage_percent,
                    "source": memory.source,
                },
                next_step="Send the request again later; nothing was accepted.",
            )


def _refuse_repeated(jobs: list[NewJob]) -> None:
    repeated = find_repeated(jobs)
    if repeated:
        errors = [
            {
                "field": f"[{job.again}].job_id",
                "message": f"[{job.first}].job_id and [{job.again}].job_id are both '{job.job_id}'.",
            }
            for job in repeated[:100]
        ]
        more = f" And {len(repeated) - 3} more." if len(repeated) > 3 else ""
        raise ProblemFound("duplicate_jobs", " ".join(error["message"] for error in errors[:3]) + more, errors=errors)
