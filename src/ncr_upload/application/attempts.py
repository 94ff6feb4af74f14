"""From a doorbell to a settled task: claim it, try, and write down what became of it."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass

from ncr_upload.application.crash_points import Reach, pass_by
from ncr_upload.application.lease import Lease
from ncr_upload.application.live import LiveStatus, post_quietly
from ncr_upload.application.pipeline import Delivery, PipelineOptions, PipelinePorts, remove_staging
from ncr_upload.application.ports import StatusBoard, Submissions
from ncr_upload.application.workspace import remove_workspaces
from ncr_upload.domain.errors import CancelRequested, DeliveryError, DestinationParked, LeaseLost, Unavailable
from ncr_upload.domain.jobs import Claim, Problem, Status, Task
from ncr_upload.domain.retries import ErrorClass, GiveUp, Retry, RetryLimits, classify, plan_retry

CLEANING_SECONDS = 60.0
"""How long a worker has for removing an ended task's staging before another is sent."""


UNSURE_SECONDS = 15.0
"""When to look again whether an announced publish has happened."""


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """How this worker holds and retries jobs (see `Settings`)."""

    name: str
    lease_seconds: float
    lease_renew_seconds: float
    retry_limits: RetryLimits
    park_seconds: float
    pipeline: PipelineOptions


@dataclass(frozen=True, slots=True)
class WorkerPorts:
    """Everything a worker touches."""

    pipeline: PipelinePorts
    submissions: Submissions
    board: StatusBoard


@dataclass(frozen=True, slots=True)
class Settled:
    """What became of one attempt. `failure` is None when the pipeline itself ended the task; `unexpected` when the
    failure is none the code foresaw, so that the trace should be logged."""

    task: Task
    failure: Exception | None = None
    unexpected: bool = False


def run_task(task_id: str, ports: WorkerPorts, options: WorkerOptions, reach: Reach = pass_by) -> Settled | None:
    """Do one attempt at the task, if it is due and free; None if it is not. An ended task that left something at the
    destination is cleaned up after instead. Raises only `Unavailable`, when the ledger cannot be written: then the lease
    runs out and the sweeper takes over."""
    reach("claim:before")
    claim = ports.pipeline.claims.claim(task_id, options.name, options.lease_seconds)
    if claim is None:
        _clean_up_after(task_id, ports.pipeline)
        return None
    reach("claim:after")
    failure = _attempt(claim, ports, options, reach)
    task = ports.submissions.task(task_id)
    assert task is not None
    if task.finished_at is not None:
        remove_workspaces(options.pipeline.work_dir, task_id)
    if not isinstance(failure, LeaseLost):
        post_quietly(ports.board, task, fence=claim.fence, live=task.finished_at is None)
    return Settled(task, failure, unexpected=failure is not None and not isinstance(failure, DeliveryError))


def _clean_up_after(task_id: str, ports: PipelinePorts) -> None:
    if ports.cleaning.take_cleaning(task_id, CLEANING_SECONDS):
        try:
            asyncio.run(remove_staging(task_id, ports.dropoff, ports.cleaning))
        except DestinationParked as error:
            raise Unavailable(error.code, error.message, error.next_step) from error


def _attempt(claim: Claim, ports: WorkerPorts, options: WorkerOptions, reach: Reach) -> Exception | None:
    lease = Lease(ports.pipeline.claims, claim, renew_seconds=options.lease_renew_seconds)
    live = LiveStatus(ports.board, claim)
    delivery = Delivery(claim, ports.pipeline, options.pipeline, lease, live, reach)
    with lease, live:
        try:
            asyncio.run(_run_under(lease, delivery))
        except LeaseLost as failure:
            return failure
        except Exception as failure:  # noqa: BLE001 - the one place that must settle whatever happened
            return _settled(delivery, failure, options)
    return None


async def _run_under(lease: Lease, delivery: Delivery) -> None:
    """Run the delivery; stop it when its claim ends."""
    running = asyncio.current_task()
    assert running is not None
    loop = asyncio.get_running_loop()

    def stop() -> None:
        loop.call_soon_threadsafe(running.cancel)

    lease.when_ended(stop)
    try:
        await delivery.run()
    except asyncio.CancelledError:
        if lease.ended is not None:
            raise lease.ended from None
        raise


def _settled(delivery: Delivery, failure: Exception, options: WorkerOptions) -> Exception:
    try:
        try:
            _settle(delivery, failure, options)
        except CancelRequested as cancelled:
            _settle(delivery, cancelled, options)
            return cancelled
    except LeaseLost as lost:
        # Somebody else owns the task by now, or its end was committed although the answer was lost.
        return lost
    return failure


def _settle(delivery: Delivery, failure: Exception, options: WorkerOptions) -> None:
    """Write down how the attempt failed: to be tried again, or for good."""
    claim, claims = delivery.claim, delivery.ports.claims
    stage = delivery.live.stage
    if isinstance(failure, CancelRequested):
        problem = Problem(failure.code, "cancelled", failure.message, failure.next_step)
        claims.finish(claim, status=Status.CANCELLED, stage=stage, message=failure.message, problem=problem)
        return
    error_class = classify(failure)
    problem = describe(failure, error_class, delivery.task)
    plan = plan_retry(
        error_class,
        claim.task.attempt,
        options.retry_limits,
        random.random(),
        retry_after_seconds=getattr(failure, "retry_after_seconds", None),
    )
    if isinstance(plan, GiveUp) and delivery.announced_publish:
        # The package may be visible. Not to be given up before an attempt has looked.
        plan = Retry(UNSURE_SECONDS, spend_attempt=False)
    waited = claim.task.updated_at - claim.task.created_at
    if isinstance(plan, Retry) and not plan.spend_attempt and waited > options.park_seconds:
        plan = GiveUp(f"it has waited {waited / 3600:.1f} hours, longer than PARK_HOURS allows")
    attempt = f"attempt {claim.task.attempt} of {claim.task.max_attempts}"
    if isinstance(plan, Retry):
        spent = attempt if plan.spend_attempt else f"{attempt}, not counted"
        message = (
            f"{error_class.value}: {problem.message}. {problem.next_step} ({spent}; next try in {plan.delay_seconds:.0f} s)"
        )
        claims.put_back(
            claim, problem=problem, message=message, delay_seconds=plan.delay_seconds, spend_attempt=plan.spend_attempt
        )
        return
    message = f"{error_class.value}: {problem.message}. {problem.next_step} ({attempt}; given up: {plan.reason})"
    claims.finish(claim, status=Status.FAILED, stage=stage, message=message, problem=problem)


def describe(failure: Exception, error_class: ErrorClass, task: Task) -> Problem:
    """The failure in words for the job's history. The text of an unforeseen exception stays in the log."""
    if isinstance(failure, DeliveryError):
        return Problem(failure.code, error_class.value, failure.message, failure.next_step)
    return Problem(
        "unexpected",
        error_class.value,
        f"an unexpected {type(failure).__name__} stopped the job",
        f"Look for task_id {task.task_id} in the worker's log, where the trace is.",
    )
