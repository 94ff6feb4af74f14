"""From a doorbell to a settled task: claim it, try, and write down what became of it."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, replace

from ncr_upload.application.crash_points import Reach, pass_by
from ncr_upload.application.janitor import JanitorOptions
from ncr_upload.application.lease import Lease
from ncr_upload.application.leaving import Leaving
from ncr_upload.application.live import LiveStatus, post_quietly
from ncr_upload.application.parking import ParkingOptions, park, require_open, tell_parked
from ncr_upload.application.pipeline import Delivery, PipelineOptions, PipelinePorts, make_cache, remove_staging
from ncr_upload.application.ports import Claims, Duties, StatusBoard, Submissions
from ncr_upload.application.workspace import remove_workspaces
from ncr_upload.domain.errors import (
    CancelRequested,
    DeliveryError,
    DestinationParked,
    HandedOver,
    LeaseLost,
    PublishUnsettled,
    Unavailable,
)
from ncr_upload.domain.jobs import Claim, Problem, Status, Task
from ncr_upload.domain.parking import Parked
from ncr_upload.domain.retries import LOOKS, ErrorClass, GiveUp, Retry, RetryLimits, classify, count_attempt, plan_retry

CLEANING_SECONDS = 60.0
"""How long a worker has for removing an ended task's staging before another is sent."""


REFUSED = ("sftp_failure", "sftp_missing", "job_folder_denied", "publish_refused")
"""Codes of a server's "no"."""

UNSURE_SECONDS = 15.0
"""When to look again whether an announced publish has happened."""


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """How this worker holds and retries jobs (see `Settings`)."""

    name: str
    lease_seconds: float
    lease_renew_seconds: float
    retry_limits: RetryLimits
    parking: ParkingOptions
    janitor: JanitorOptions
    pipeline: PipelineOptions


@dataclass(frozen=True, slots=True)
class WorkerPorts:
    """Everything a worker touches."""

    pipeline: PipelinePorts
    duties: Duties
    submissions: Submissions
    board: StatusBoard


@dataclass(frozen=True, slots=True)
class Settled:
    """What became of one attempt. `failure` is None when the pipeline itself ended the task; `unexpected` when the
    failure is none the code foresaw, so that the trace should be logged."""

    task: Task
    failure: Exception | None = None
    unexpected: bool = False


def run_task(
    task_id: str, ports: WorkerPorts, options: WorkerOptions, reach: Reach = pass_by, leaving: Leaving | None = None
) -> Settled | None:
    """Do one attempt at the task, if it is due and free; None if it is not. An ended task that left something at the
    destination is cleaned up after instead. Raises only `Unavailable`, when the ledger cannot be written: then the lease
    runs out and the sweeper takes over."""
    reach("claim:before")
    asked_at = time.monotonic()
    claim = ports.pipeline.claims.claim(task_id, options.name, options.lease_seconds)
    if claim is None:
        _clean_up_after(task_id, ports.pipeline)
        return None
    reach("claim:after")
    lease = Lease(ports.pipeline.claims, claim, renew_seconds=options.lease_renew_seconds, asked_at=asked_at)
    failure, task = _attempt(claim, lease, ports, options, reach, leaving or Leaving())
    task = task or ports.submissions.task(task_id)
    assert task is not None
    if task.finished_at is not None:
        remove_workspaces(options.pipeline.work_dir, task_id, make_cache(ports.pipeline, options.pipeline))
    if not isinstance(failure, LeaseLost):
        post_quietly(ports.board, task, fence=claim.fence, live=task.finished_at is None)
    return Settled(task, failure, unexpected=failure is not None and not isinstance(failure, DeliveryError))


def _clean_up_after(task_id: str, ports: PipelinePorts) -> None:
    if ports.cleaning.take_cleaning(task_id, CLEANING_SECONDS):
        try:
            require_open(ports.parking, ports.dropoff.destination)
            asyncio.run(remove_staging(task_id, ports.dropoff, ports.cleaning))
        except DestinationParked as error:
            raise Unavailable(error.code, error.message, error.next_step) from error


Outcome = tuple[Exception | None, Task | None]
"""The failure, if any, and the task as it was written down; None where that is not known."""


def _attempt(claim: Claim, lease: Lease, ports: WorkerPorts, options: WorkerOptions, reach: Reach, leaving: Leaving) -> Outcome:
    live = LiveStatus(ports.board, claim)
    delivery = Delivery(claim, ports.pipeline, options.pipeline, lease, live, reach)
    with lease, live, leaving.heard_by(lambda: lease.end(HandedOver())):
        try:
            delivery.run()
        except LeaseLost as failure:
            return failure, None
        except Exception as failure:  # noqa: BLE001 - the one place that must settle whatever happened
            return _settled(delivery, failure, options)
    return None, delivery.ended


def _settled(delivery: Delivery, failure: Exception, options: WorkerOptions) -> Outcome:
    try:
        try:
            return failure, _settle(delivery, failure, options)
        except CancelRequested as cancelled:
            return cancelled, _settle(delivery, cancelled, options)
    except LeaseLost as lost:
        # Somebody else owns the task by now, or its end was committed although the answer was lost.
        return lost, None


def _settle(delivery: Delivery, failure: Exception, options: WorkerOptions) -> Task | None:
    """Write down how the attempt failed: to be tried again, to wait for the destination, or for good."""
    claim, claims = delivery.claim, delivery.ports.claims
    stage = delivery.live.stage
    if isinstance(failure, CancelRequested):
        problem = Problem(failure.code, "cancelled", failure.message, failure.next_step)
        return claims.finish(claim, status=Status.CANCELLED, stage=stage, message=failure.message, problem=problem)
    if isinstance(failure, HandedOver):
        return _hand_over(claim, claims, failure)
    error_class = classify(failure)
    plan = _plan(delivery, failure, error_class, options)
    attempt = count_attempt(claim.task.attempt, claim.task.max_attempts)
    if isinstance(failure, DestinationParked):
        parked = park(delivery.ports.parking, delivery.ports.dropoff.destination, failure, options.parking)
        if parked is not None and isinstance(plan, Retry):
            return _wait_for_probe(delivery, parked, plan, options)
    problem = describe(failure, error_class, delivery.task)
    if isinstance(plan, Retry):
        spent = attempt if plan.spend_attempt else f"{attempt}, not counted"
        message = (
            f"{error_class.value}: {problem.message}. {problem.next_step} ({spent}; next try in {plan.delay_seconds:.0f} s)"
        )
        return claims.put_back(
            claim, problem=problem, message=message, delay_seconds=plan.delay_seconds, spend_attempt=plan.spend_attempt
        )
    if delivery.announced_publish:
        problem = warn_of_delivery(problem, claim.task)
    message = f"{error_class.value}: {problem.message}. {problem.next_step} ({attempt}; given up: {plan.reason})"
    return claims.finish(claim, status=Status.FAILED, stage=stage, message=message, problem=problem)


def _hand_over(claim: Claim, claims: Claims, order: HandedOver) -> Task:
    """Whoever takes the job next begins at once, and with the same attempt number."""
    problem = Problem(order.code, ErrorClass.DEFERRED.value, order.message, order.next_step)
    attempt = f"{count_attempt(claim.task.attempt, claim.task.max_attempts)}, not counted; next try at once"
    message = f"{problem.error_class}: {problem.message}. {problem.next_step} ({attempt})"
    return claims.put_back(claim, problem=problem, message=message, delay_seconds=0, spend_attempt=False)


def _plan(delivery: Delivery, failure: Exception, error_class: ErrorClass, options: WorkerOptions) -> Retry | GiveUp:
    task = delivery.claim.task
    plan = plan_retry(
        error_class,
        task.attempt,
        options.retry_limits,
        random.random(),
        retry_after_seconds=getattr(failure, "retry_after_seconds", None),
    )
    if isinstance(plan, GiveUp) and delivery.announced_publish and not _was_answered(failure):
        # The package may be visible. Not to be given up before an attempt has looked, unless looking itself fails oddly.
        odd = error_class is ErrorClass.UNKNOWN
        if not odd or task.attempt < task.max_attempts + LOOKS:
            plan = Retry(UNSURE_SECONDS, spend_attempt=odd)
    waited = task.updated_at - task.created_at
    if isinstance(plan, Retry) and not plan.spend_attempt and waited > options.parking.park_seconds:
        return GiveUp(f"it has waited {waited / 3600:.1f} hours, longer than PARK_HOURS allows")
    return plan


def _was_answered(failure: Exception) -> bool:
    """Return whether the destination was looked at, or refused to have it done: the next attempt would hear the same."""
    return isinstance(failure, PublishUnsettled) or getattr(failure, "code", None) in REFUSED


def _wait_for_probe(delivery: Delivery, parked: Parked, plan: Retry, options: WorkerOptions) -> Task | None:
    """Put the task back until the destination is healed, but no longer than PARK_HOURS."""
    claim, destination = delivery.claim, parked.destination
    remaining_seconds = options.parking.park_seconds - (claim.task.updated_at - claim.task.created_at)
    attempt = count_attempt(claim.task.attempt, claim.task.max_attempts)
    problem = Problem(parked.code, ErrorClass.PARKED.value, parked.message, parked.next_step)
    waiting = delivery.ports.claims.put_back(
        claim,
        problem=problem,
        message=f"parked: {tell_parked(parked)}. {parked.next_step} ({attempt}, not counted)",
        delay_seconds=max(1.0, min(parked.seconds_to_probe + plan.delay_seconds, remaining_seconds)),
        spend_attempt=False,
        waits_for=destination,
    )
    if delivery.ports.parking.find_parked(destination) is None:  # healed before it knew that this task waits
        delivery.ports.parking.heal(destination, f"the destination {destination} works again")
        return None
    return waiting


def warn_of_delivery(problem: Problem, task: Task) -> Problem:
    """The problem of a task that is given up although its publish had been announced."""
    return replace(
        problem,
        message=f"{problem.message}; its publish had begun, and the package may be visible as '{task.job_id}'",
        next_step=f"{problem.next_step} Look whether '{task.job_id}' is complete at the destination: if so, only the studio's "
        "rows are missing; if not, submit the job again, which replaces it whole.",
    )


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
